"""The whole recipe: its sections, and what must fit between them."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from tokmask_peft.recipe.data import DataConfig
from tokmask_peft.recipe.masking import TokenMaskConfig
from tokmask_peft.recipe.model import AdapterConfig, ModelConfig
from tokmask_peft.recipe.section import Section
from tokmask_peft.recipe.training import TrainingConfig


class Recipe(Section):
    """A whole run. `Recipe.load` reads one from YAML, `tokmask_peft.train` runs it."""

    name: str = Field(description="name of the run: its folder below output_dir")
    output_dir: str = Field("runs", description="folder that holds the runs")
    seed: int = Field(
        42, ge=0, le=2**32 - 1, description="seed of the head, the batches, dropout and the masked positions"
    )
    model: ModelConfig
    adapter: AdapterConfig = Field(default_factory=lambda: AdapterConfig())
    masking: TokenMaskConfig = Field(default_factory=lambda: TokenMaskConfig())
    data: DataConfig
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig())

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if not value or value in {".", ".."} or any(sign in value for sign in "/\\\0"):
            raise ValueError("the name becomes a folder: letters, digits, '.', '_' and '-' are safe, a slash is not")
        return value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.masking.trainable_mask and self.adapter.layers != "all":
            raise ValueError(
                "masking.trainable_mask trains a row of the embedding, so the backward pass would run through all "
                "layers and adapter.layers would save nothing: set adapter.layers=all, or masking.trainable_mask=false"
            )
        if self.masking.trainable_mask and self.model.embedding != "resident":
            raise ValueError(
                f"masking.trainable_mask trains a row of the embedding, which model.embedding={self.model.embedding} "
                "cannot: set model.embedding=resident, or masking.trainable_mask=false"
            )
        if self.training.auto_batch and self.training.tokens_per_batch is not None:
            raise ValueError(
                "training.auto_batch changes batch_size, which training.tokens_per_batch takes the place of: "
                "set training.auto_batch=false, or training.tokens_per_batch=null"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir) / self.name

    @classmethod
    def load(cls, recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
        """Read a recipe file, or a shipped recipe by name, with its bases and `dotted.key=value` overrides.

        Raises:
            RecipeError: with every problem found.
        """
        from tokmask_peft.recipe.io import load_recipe

        return load_recipe(recipe, overrides)
