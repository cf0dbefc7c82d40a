"""The section `data`: where texts come from, and how they are split, cleaned and labelled."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, field_validator, model_validator

from tokmask_peft.errors import RecipeError
from tokmask_peft.recipe.section import Section

Task = Literal["sequence", "token"]

# Titles say in errors what is expected where a field takes more than one kind of value.
SplitName = Annotated[str, Field(min_length=1, title="a split or file name")]
ShareOfTrain = Annotated[float, Field(gt=0.0, lt=1.0, title="a share of train between 0 and 1, for example 0.1")]
LanguageCode = Annotated[str, Field(pattern=r"^([a-z]{2,3}|multilingual)$", title="an ISO 639 code such as es or swa")]


class SourceConfig(Section):
    """Where texts come from: local files, a dataset on the Hugging Face Hub, or the built-in corpus."""

    path: str | None = Field(None, description="a local folder or file; wins over `hub` and `builtin`")
    hub: str | None = Field(None, description="dataset id on the Hugging Face Hub")
    hub_config: str | None = Field(None, description="configuration of the Hub dataset")
    hub_revision: str | None = Field(None, description="revision of the Hub dataset, for example refs/convert/parquet")
    builtin: StrictBool = Field(
        False, description="the built-in Spanish-English corpus (made up, for trying things out)"
    )
    format: Literal["auto", "conll", "csv", "tsv", "jsonl", "parquet"] = Field(
        "auto", description="file format; auto goes by the file's ending"
    )
    text_column: str | int | None = Field(
        None, description="column of the text, or of the words in token tasks; a number counts from 0 in CoNLL files"
    )
    label_column: str | int | None = Field(
        None, description="column of the label, or of the tags in token tasks; a number counts from 0 in CoNLL files"
    )
    name: str | None = Field(None, description="what the corpus is called (for the model card)")
    language: tuple[LanguageCode, ...] = Field(
        (), description="languages of the texts as ISO 639 codes, for example [es, en] (for the model card)"
    )
    license: str | None = Field(
        None, description="licence of the texts, as their source states it (for the model card)"
    )
    citation: str | None = Field(None, description="what to cite for the corpus (for the model card)")

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.path is None and self.hub is None and not self.builtin:
            raise ValueError(
                "no data: set path to a local folder or file, hub to a dataset id, or builtin to true in this section"
            )
        return self

    def expanded(self) -> Self:
        """Return a copy in which `${NAME}` and `~` in paths are replaced.

        Raises:
            RecipeError: an environment variable is not set.
        """
        problems: list[str] = []
        copy = self._expand("data", problems)
        if problems:
            raise RecipeError(problems)
        return copy

    def _expand(self, at: str, problems: list[str]) -> Self:
        if self.path is None:
            return self
        for name in re.findall(r"\$\{(\w+)\}", self.path):
            if not os.environ.get(name):
                problems.append(
                    f"{at}.path: is {self.path}, but the environment variable {name} is not set or empty; "
                    f"set it to the folder of your data, or give {at}.path=FOLDER"
                )
        return self.model_copy(update={"path": str(Path(os.path.expandvars(self.path)).expanduser())})


class DataConfig(SourceConfig):
    """Which texts a run learns from, and how they are split, cleaned and labelled."""

    task: Task = Field(description="sequence: one label per text; token: one label per word")
    train: str = Field("train", description="split or file name of the training texts")
    validation: SplitName | ShareOfTrain = Field(
        "validation", description="split or file name, or the share of train to set aside"
    )
    test: str | None = Field(
        "test", description="split or file name of the test texts; null if there is no labelled test"
    )
    test_source: SourceConfig | None = Field(None, description="other source of the test texts (zero-shot transfer)")
    label_map: dict[str, str] | None = Field(
        None, description="label in the file -> label to learn; the key '*' stands for every other label"
    )
    language_labels: tuple[str, ...] = Field(
        (), description="labels (after label_map) that are languages; scores are then also given by code-mixing index"
    )
    max_length: int = Field(128, ge=4, description="sub-tokens per text; what is longer is cut and reported")
    hygiene: Literal["remove", "report"] = Field(
        "remove",
        description="duplicates, conflicting labels and leaked evaluation texts: remove from train, or only report",
    )
    max_train: int | None = Field(None, ge=1, description="use at most so many training texts (seeded, stratified)")

    def _expand(self, at: str, problems: list[str]) -> Self:
        copy = super()._expand(at, problems)
        if self.test_source is None:
            return copy
        return copy.model_copy(update={"test_source": self.test_source._expand(f"{at}.test_source", problems)})

    @field_validator("validation", mode="before")
    @classmethod
    def _number_is_a_share(cls, value: Any) -> Any:
        # YAML 1.1 reads 5e-2 as text, and no split is called like a number
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", value.strip(), re.IGNORECASE):
            return float(value)
        return value
