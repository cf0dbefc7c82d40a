"""The classification head: never quantized, computed in fp32, trained, and saved with the adapter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokmask_peft.errors import ModelError
from tokmask_peft.model.quantized import is_quantized

HEAD_NAMES = ("score", "classifier", "head", "pre_classifier", "classification_head")
"""Top-level names of the classification heads in transformers, for which 4-bit loading needs to be told."""


class Float32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever comes in, autocast or not."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` of any dtype to fp32 `[..., out_features]`."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the classification head's modules by name: the model's children that are not its backbone.

    Args:
        model: a sequence or token classification model of transformers, without an adapter.
    """
    backbone = model.base_model
    return {
        name: module
        for name, module in model.named_children()
        if module is not backbone and any(True for _ in module.parameters())
    }


def hold_in_fp32(model: nn.Module, new_modules: tuple[str, ...]) -> None:
    """Bring the head, and whatever else is new, to fp32, in place, and make its linear layers compute in fp32.

    Raises:
        ModelError: a part is quantized; training it would fail or silently not happen.
    """
    for name in new_modules:
        module = model.get_submodule(name)
        quantized = [type(part).__name__ for part in module.modules() if is_quantized(part)]
        if quantized:
            raise ModelError(
                f"the new module '{name}' is quantized ({quantized[0]}); what is trained must be held in full "
                "precision. The checkpoint comes already quantized: use the unquantized backbone with "
                "model.quantization=nf4."
            )
        module.float()
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = Float32Linear
