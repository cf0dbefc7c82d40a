"""Layers of bitsandbytes for fake tensors: what they take and what they keep, without their kernels."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

BLOCK, NESTED_BLOCK = 64, 256
"""Weights for each scale, and scales for each scale of scales (Dettmers et al. 2023, double quantization)."""


def nf4_bytes(weights: int) -> int:
    """Return the bytes of a layer's weights in NF4 with double quantization: codes, scales and their tables."""
    blocks = -(-weights // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4
    return -(-weights // 2) + scales + 4 * (16 + 256)


def int8_bytes(out_features: int, in_features: int) -> int:
    """Return the bytes of a layer's weights in 8 bits with a scale for each row."""
    return out_features * in_features + 4 * out_features


class _Product(torch.autograd.Function):
    """A frozen quantized product: unpacks the weights for each pass; in 8 bits it keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, keeps_input: bool) -> Tensor:
        ctx.shape, ctx.features = x.shape, out_features
        ctx.kept = x if keeps_input else None
        unpacked = x.new_empty(out_features, x.shape[-1])
        out = x.new_empty(*x.shape[:-1], out_features)
        del unpacked
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        unpacked = gradients[0].new_empty(ctx.features, ctx.shape[-1])
        found = gradients[0].new_empty(ctx.shape)
        del unpacked
        ctx.kept = None
        return found, None, None


class Simulated4bit(Linear4bit):
    """Stands for a 4-bit layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        out: Tensor = _Product.apply(x.to(self.compute_dtype), self.out_features, False)
        return out.to(x.dtype)


class Simulated8bit(Linear8bitLt):
    """Stands for an 8-bit layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        out: Tensor = _Product.apply(x, self.out_features, True)
        return out


def simulate_quantized(model: Any, kind: str, dtype: torch.dtype, keep: tuple[str, ...]) -> None:
    """Replace the linear layers of a model on the meta device, as loading it quantized would.

    Args:
        model: of transformers, without an adapter.
        kind: nf4 or int8.
        dtype: that 4-bit layers compute in.
        keep: modules that are left alone, by full name.
    """
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or any(name == other or name.startswith(f"{other}.") for other in keep):
            continue
        bias = module.bias is not None
        made: Any
        if kind == "nf4":
            made = Linear4bit(
                module.in_features,
                module.out_features,
                bias,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            made.__class__ = Simulated4bit
        else:
            made = Linear8bitLt(module.in_features, module.out_features, bias, has_fp16_weights=False, device="meta")
            made.__class__ = Simulated8bit
        made.requires_grad_(False)
        if bias:
            made.bias = nn.Parameter(module.bias.detach().clone(), False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
