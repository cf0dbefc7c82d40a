"""Token masking for fine-tuning (arXiv 2505.11746): attach a `TokenMasker`, or give a Trainer a `TokenMaskCallback`.

Stands alone: the masker needs torch and pydantic, the callback transformers too. Names are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokmask_peft.masking.callback import TokenMaskCallback
    from tokmask_peft.masking.config import TokenMaskConfig
    from tokmask_peft.masking.masker import TokenMasker
    from tokmask_peft.masking.replacement import MaskToken, choose_mask_token

__all__ = ["MaskToken", "TokenMaskCallback", "TokenMaskConfig", "TokenMasker", "choose_mask_token"]
_HOMES = dict(zip(__all__, ("replacement", "callback", "config", "masker", "replacement"), strict=True))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
