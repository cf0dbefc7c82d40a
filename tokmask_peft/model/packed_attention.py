"""Attention over a packed row, text by text, as an attention function of transformers.

A packed row holds the texts of a batch one after the other, `[1, total]`, without padding. transformers knows such rows
only for flash attention; its masks for other kernels mix the texts of a BERT row, and hold `total * total` values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokmask_peft.model.dropout import dropout as dropped
from tokmask_peft.model.packing import Packing

NAME = "tokmask_packed"


class _Pad(torch.autograd.Function):
    """Copy sub-tokens to their slots; the gradient comes back from them alone, without adding anything up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradients[0].index_select(0, back), None, None


class _Unpad(torch.autograd.Function):
    """Take sub-tokens out of their slots; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.slots = padded.shape[0]
        return padded.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (back,) = ctx.saved_tensors
        empty = gradients[0].new_zeros(ctx.slots, *gradients[0].shape[1:])
        return empty.index_copy_(0, back, gradients[0]), None


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each text; without `packing` this is the `sdpa` of transformers.

    Args:
        module: the attention layer.
        query: [1, heads, total, head].
        key: [1, key heads, total, head].
        value: like `key`.
        attention_mask: not looked at where there is a packing.
        dropout: on the attention weights.
        scaling: of the scores.
        is_causal: default: what the layer says.
        sliding_window: sub-tokens that a causal layer sees, itself included.
        packing: where the texts lie.
        kwargs: for `sdpa`.

    Returns:
        [1, total, heads, head], and no weights.
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    causal, sliding_window = seen(module, is_causal, sliding_window, packing.max_length)
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    device = query.device.type
    if device == "cuda" and query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        rows = [tensor.to(torch.get_autocast_dtype("cuda")) for tensor in rows]
    if device == "cuda" and rows[0].dtype != torch.float32 and dropout == 0.0 and (kernel := _varlen_kernel()):
        found = _varlen_attention(kernel, rows, packing, causal, sliding_window, scaling)
    else:
        found = _padded_attention(rows, packing, causal, sliding_window, dropout, scaling)
    return found.to(value.dtype).unsqueeze(0), None


def seen(module: torch.nn.Module, is_causal: bool | None, window: int | None, longest: int) -> tuple[bool, int | None]:
    """Return whether a layer is causal, and its window, if it is narrower than the longest text."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return causal, None if window is not None and window >= longest else window


def _varlen_attention(
    kernel: Callable[..., Tensor],
    rows: list[Tensor],
    packing: Packing,
    causal: bool,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """Attend with a kernel for packed rows; query, key and value as [total, heads, head], and so the result."""
    rows = [rows[0], *(_repeat_heads(tensor, rows[0]) for tensor in rows[1:])]
    # the kernel counts the sub-tokens before the present one, transformers counts that one too
    sides = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
    bounds = (packing.cu_seqlens, packing.cu_seqlens, packing.max_length, packing.max_length)
    return kernel(*(tensor.contiguous() for tensor in rows), *bounds, scale=scaling, window_size=sides)


def _padded_attention(
    rows: list[Tensor], packing: Packing, causal: bool, window: int | None, dropout: float, scaling: float | None
) -> Tensor:
    """Attend in padded buckets; query, key and value as [total, heads, head], and so the result."""
    device = rows[0].device.type
    # The kernels of CPUs are slow in bf16: 26.6 ms in four buckets where fp32 takes 6.8 (see `packing.WORTH`).
    with torch.autocast(device, enabled=False if device == "cpu" else torch.is_autocast_enabled(device)):
        if device == "cpu":
            rows = [tensor.float() for tensor in rows]
        kernel = _dropped_attention if device == "cpu" and dropout > 0 else F.scaled_dot_product_attention
        return attend_in_buckets(rows, packing, causal, window, dropout, scaling, kernel)


def attend_in_buckets(
    rows: list[Tensor],
    packing: Packing,
    causal: bool,
    window: int | None,
    dropout: float,
    scaling: float | None,
    kernel: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """Attend in padded buckets, in the precision that query, key and value come in."""
    rows = [rows[0], *(_repeat_heads(tensor, rows[0]) for tensor in rows[1:])]
    sizes = [bucket.texts * bucket.length for bucket in packing.buckets]
    padded = [_Pad.apply(tensor, packing.slots, packing.back).split(sizes) for tensor in rows]
    outputs = []
    for bucket, *parts in zip(packing.buckets, *padded, strict=True):
        query, key, value = (part.unflatten(0, (bucket.texts, bucket.length)).transpose(1, 2) for part in parts)
        # The padding is on the right, so that no real sub-token of a causal layer sees it.
        mask = None if causal else bucket.mask
        if causal and window is not None:
            mask = torch.ones(bucket.length, bucket.length, dtype=torch.bool, device=query.device)
            mask = mask.tril().triu(1 - window)
        found = kernel(query, key, value, mask, dropout, is_causal=causal and mask is None, scale=scaling)
        outputs.append(found.transpose(1, 2).flatten(0, 1))
    unpadded: Tensor = _Unpad.apply(torch.cat(outputs), packing.back)
    return unpadded


def _dropped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, *, is_causal: bool, scale: float | None
) -> Tensor:
    """Attend with dropout on a CPU, where torch's kernel takes its slow path; every row sees something."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf"))
    return dropped(scores.softmax(-1), p) @ value


def _repeat_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """Give each query head its key or value head; [total, heads, head]."""
    times = query.shape[1] // tensor.shape[1]
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=1)


@functools.cache
def _varlen_kernel() -> Callable[..., Tensor] | None:
    """Return torch's flash attention over packed rows, or None where this torch or this GPU has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)
    kernel: Any = varlen_attn
    return kernel if known and torch.cuda.get_device_capability() >= (8, 0) else None


@functools.cache
def register() -> None:
    """Make the attention function known to transformers under `NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    # for padded batches, which go on through `sdpa`; without a mask function transformers would drop their mask
    AttentionMaskInterface.register(NAME, sdpa_mask)
