"""Token-masked LoRA and QLoRA fine-tuning for text classification: the public names, imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokmask_peft.errors import TokmaskError
    from tokmask_peft.examples import LabelPredictions, Prediction, WordPredictions
    from tokmask_peft.inference.classifier import Classifier, load
    from tokmask_peft.inference.explain import Explanation, explain
    from tokmask_peft.inference.export import push
    from tokmask_peft.masking.callback import TokenMaskCallback
    from tokmask_peft.masking.config import TokenMaskConfig
    from tokmask_peft.masking.masker import TokenMasker
    from tokmask_peft.recipe.schema import Recipe
    from tokmask_peft.training.evaluate import evaluate
    from tokmask_peft.training.train import train

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "Explanation",
    "LabelPredictions",
    "Prediction",
    "Recipe",
    "TokenMaskCallback",
    "TokenMaskConfig",
    "TokenMasker",
    "TokmaskError",
    "WordPredictions",
    "__version__",
    "evaluate",
    "explain",
    "load",
    "push",
    "train",
]

_HOMES = {
    **dict.fromkeys(("LabelPredictions", "Prediction", "WordPredictions"), "examples"),
    **dict.fromkeys(("Classifier", "load"), "inference.classifier"),
    **dict.fromkeys(("Explanation", "explain"), "inference.explain"),
    "Recipe": "recipe.schema",
    "TokenMaskCallback": "masking.callback",
    "TokenMaskConfig": "masking.config",
    "TokenMasker": "masking.masker",
    "TokmaskError": "errors",
    "push": "inference.export",
    "evaluate": "training.evaluate",
    "train": "training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
