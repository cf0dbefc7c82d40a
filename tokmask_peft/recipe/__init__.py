"""The whole run as data: a recipe is a frozen pydantic model, read from YAML by `recipe.io`.

Field descriptions are the documentation: `tokmask recipes fields` prints them.
"""

from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.recipe.schema import (
    AdapterConfig,
    Batching,
    DataConfig,
    ModelConfig,
    Recipe,
    SourceConfig,
    Task,
    TrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "Batching",
    "DataConfig",
    "ModelConfig",
    "Recipe",
    "SourceConfig",
    "Task",
    "TokenMaskConfig",
    "TrainingConfig",
]
