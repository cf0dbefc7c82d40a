"""Token masking for fine-tuning (arXiv 2505.11746): attach a `TokenMasker`, or give a Trainer a `TokenMaskCallback`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.replacement import MaskToken, choose_mask_token

if TYPE_CHECKING:
    from tokmask_peft.masking.callback import TokenMaskCallback

__all__ = ["MaskToken", "TokenMaskCallback", "TokenMaskConfig", "TokenMasker", "choose_mask_token"]


def __getattr__(name: str) -> Any:
    """Import the callback when it is asked for: it alone needs transformers."""
    if name == "TokenMaskCallback":
        from tokmask_peft.masking.callback import TokenMaskCallback

        return TokenMaskCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
