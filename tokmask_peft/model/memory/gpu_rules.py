"""What CUDA keeps for the backward pass where a CPU keeps something else, for steps on fake tensors of a CPU.

Fake tensors of a GPU need a torch that was built for one; these few rules let any machine stand in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SavedAttention(torch.autograd.Function):
    """Stands for flash attention: keeps query, key, value, output and a number for each query; no weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Take [..., heads, seq, head] of one kind, give the shape of query with the head size of value."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *(() if mask is None else (mask,)))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Make the gradients' shapes; their sums are in fp32 first."""
        query, key, value = ctx.saved_tensors[:3]
        sums = torch.empty_like(query, dtype=torch.float32)
        found = torch.empty_like(sums, dtype=query.dtype), torch.empty_like(key), torch.empty_like(value)
        return *found, None


class _GpuRules(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.layer_norm and torch.is_autocast_enabled("cuda"):
            return func(args[0].float(), *args[1:], **kwargs)  # in autocast's list of operations in fp32
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
) -> Any:
    if options.get("enable_gqa") and attn_mask is not None:
        times = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(times, -3) for tensor in (key, value))
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    if attn_mask is not None and attn_mask.dtype != query.dtype:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    return SavedAttention.apply(query, key, value, attn_mask)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


@contextlib.contextmanager
def device_rules(device_type: str, autocast: bool) -> Iterator[None]:
    """Let forward and backward on fake tensors of a CPU keep what they would on the device.

    Args:
        device_type: cpu, or any other for the rules of CUDA.
        autocast: whether the forward runs in `autocast_forward`.
    """
    if device_type == "cpu":
        yield
        return
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", autocast)  # PEFT asks for it
    try:
        with _GpuRules():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def checkpointing_options(device_type: str) -> dict[str, Any]:
    """Return gradient checkpointing's options: what it computes again in `backward` is outside of any function mode."""
    again = contextlib.nullcontext if device_type == "cpu" else _GpuRules
    return {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), again())}


def autocast_forward(enabled: bool) -> torch.autocast:
    """Return the context of a forward in bf16; fake tensors are those of a CPU."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)
