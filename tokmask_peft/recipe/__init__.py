"""The whole run as data: a recipe is a frozen pydantic model, read from YAML; its fields describe themselves."""

from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.recipe.data import DataConfig, SourceConfig
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig, Recipe, TrainingConfig

__all__ = ["AdapterConfig", "DataConfig", "ModelConfig", "Recipe", "SourceConfig", "TokenMaskConfig", "TrainingConfig"]
