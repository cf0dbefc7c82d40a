"""The whole run as data: a recipe is a frozen pydantic model, read from YAML by `recipe.io`.

Field descriptions are the documentation: `tokmask recipes fields` prints them.
"""

from tokmask_peft.recipe.data import DataConfig, SourceConfig, Task
from tokmask_peft.recipe.masking import TokenMaskConfig
from tokmask_peft.recipe.model import AdapterConfig, ModelConfig
from tokmask_peft.recipe.training import Batching, TrainingConfig
from tokmask_peft.recipe.whole import Recipe

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
