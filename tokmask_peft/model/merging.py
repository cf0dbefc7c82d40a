"""Merge an adapter for prediction where that loses nothing."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer

from tokmask_peft.model.decisions import Decision

MOST_ROUNDED = 0.3
"""Share of an adapter's change to a bf16 weight matrix that rounding may take before it is kept apart.

Measured with MiniLM on question types (sequence) and parts of speech (token), adapters scaled by 1, .3, .1, .03 and
.01, against fp32: up to a share of .31 merged and unmerged logits deviate alike (rms .0054 and .0055, .0016 and .0016;
.0068 and .0069, .0041 and .0041), from .53 on the merged ones deviate more (.0012 and .0005; .0055 and .0029).
"""


SAMPLED = 256
"""Rows of each matrix that are looked at: all of a large one would take five times as long as merging it."""


def merge_if_harmless(model: Any) -> tuple[Any, Decision]:
    """Merge an adapter into its unquantized backbone, which saves its extra products, unless rounding would spoil it.

    bf16 weights hold three digits. A change that is small beside them gets lost in them, so there the adapter stays.

    Args:
        model: the PEFT model; taken apart where it is merged.

    Returns:
        The merged model, or `model`; and which, with the reason.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    low = [layer for layer in layers if layer.get_base_layer().weight.dtype != torch.float32]
    if not all(map(_is_plain, low)):
        return model, Decision("adapter", "kept apart", "what rounding to bf16 does is known of plain LoRA alone")
    rounded = max(map(_rounded_share, low), default=0.0)
    if not rounded <= MOST_ROUNDED:
        reason = f"rounding to bf16 would take up to {rounded:.0%} of its change to a matrix"
        return model, Decision("adapter", "kept apart", reason)
    reason = "the same function with fewer products"
    if low:
        reason += f"; rounding to bf16 takes up to {rounded:.1%} of its change to a matrix"
    return model.merge_and_unload(), Decision("adapter", "merged", reason)


def _is_plain(layer: Any) -> bool:
    return type(layer) is Linear and not layer.fan_in_fan_out and not layer.lora_variant


@torch.no_grad()
def _rounded_share(layer: Any) -> float:
    """Return what rounding takes of a layer's change, as a share of the change's norm, from some of its rows."""
    weight = layer.get_base_layer().weight
    some = slice(None, None, -(-weight.shape[0] // SAMPLED))
    change = torch.zeros_like(weight[some], dtype=torch.float32)
    for name in layer.active_adapters:
        upper, lower = layer.lora_B[name].weight[some].float(), layer.lora_A[name].weight.float()
        change.addmm_(upper, lower, alpha=layer.scaling[name])
    exact = weight[some].float() + change
    taken = (exact.to(weight.dtype).float() - exact).norm()
    return float(taken / change.norm().clamp_min(torch.finfo(torch.float32).tiny))
