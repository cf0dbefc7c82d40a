"""Attention over a packed row, text by text, as an attention function of transformers.

A packed row holds the texts of a batch one after the other, `[1, total]`, without padding. transformers knows such rows
only for flash attention; its masks for other kernels mix the texts of a BERT row, and hold `total * total` values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "tokmask_packed"

WORTH = 400
"""Squares of sub-tokens for which one more call of the kernel is worth while on a CPU.

Measured forward and backward on one core of an EPYC with avx512_bf16 (12 heads of 32, 32 texts of 3 to 35 sub-tokens,
fp32): all texts padded to the longest 12.2 ms; in buckets, for 100, 400 and 1600 squares, 6.4, 5.7 and 6.3 ms; text by
text 7.6 ms; the row as a whole under a mask 28 ms. With dropout 16.3; 9.3, 7.8 and 7.9; 11.7 and 101 ms. Longer texts,
14 heads of 64 and causal layers differ by less than a tenth between 100 and 1600.
"""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Texts of similar length, padded to the longest of them.

    Attributes:
        texts: how many.
        length: of the longest.
        mask: which sub-tokens are none, bool [texts, 1, 1, length]; None where there is no padding.
    """

    texts: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the texts of a packed row lie; made once for each batch, used by every layer.

    Attributes:
        cu_seqlens: where each text begins, and the end of the last, int32 [texts + 1].
        max_length: of the longest text.
        rows: index of the text of each sub-token, int64 [1, total].
        positions: position in its text, int64 [1, total].
        buckets: how the row is padded for kernels that need it.
        slots: for each slot of the padded buckets the sub-token that fills it, int64 [slots].
        back: for each sub-token its slot, int64 [total].
    """

    cu_seqlens: Tensor
    max_length: int
    rows: Tensor
    positions: Tensor
    buckets: tuple[Bucket, ...]
    slots: Tensor
    back: Tensor

    @classmethod
    def make(cls, cu_seqlens: Tensor, total: int, max_length: int, one_bucket: bool = False) -> Packing:
        """Lay out a row of `total` sub-tokens; waits for no GPU.

        Args:
            cu_seqlens: where each text begins, and the end of the last.
            total: sub-tokens of the row.
            max_length: of the longest text.
            one_bucket: pad all texts to the longest, as always on a GPU.
        """
        device = cu_seqlens.device
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        texts = torch.arange(len(starts), device=device)
        rows = torch.repeat_interleave(texts, lengths, output_size=total)
        positions = torch.arange(total, device=device) - starts[rows]
        # On a GPU the lengths are not known here without waiting, and calls cost more than padding.
        together = one_bucket or device.type != "cpu"
        groups = [(None, max_length, True)] if together else _buckets(lengths.tolist())
        buckets, slots, first = [], [], torch.empty_like(starts)
        used = 0
        for members, length, padded in groups:
            chosen = texts if members is None else torch.tensor(members)
            columns = torch.arange(length, device=device)
            ends = lengths[chosen].unsqueeze(1)
            slots.append((starts[chosen].unsqueeze(1) + columns.minimum(ends - 1)).reshape(-1))
            buckets.append(Bucket(len(chosen), length, (columns < ends)[:, None, None] if padded else None))
            first[chosen] = used + torch.arange(len(chosen), device=device) * length
            used += len(chosen) * length
        return cls(
            cu_seqlens=cu_seqlens,
            max_length=max_length,
            rows=rows.unsqueeze(0),
            positions=positions.unsqueeze(0),
            buckets=tuple(buckets),
            slots=torch.cat(slots),
            back=first[rows] + positions,
        )


def _buckets(lengths: list[int]) -> list[tuple[list[int] | None, int, bool]]:
    """Put texts of similar length together: members, longest, and whether any is shorter than that."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    found: list[list[int]] = []
    for text in order:
        if found:
            waste = sum(lengths[text] ** 2 - lengths[other] ** 2 for other in found[-1])
            if waste <= WORTH:
                found[-1].append(text)
                continue
        found.append([text])
    return [(group, lengths[group[-1]], lengths[group[0]] < lengths[group[-1]]) for group in found]


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
    # The kernels of CPUs are slow in bf16: 26.6 ms in four buckets where fp32 takes 6.8 (see WORTH).
    with torch.autocast(device, enabled=False if device == "cpu" else torch.is_autocast_enabled(device)):
        if device == "cpu":
            rows = [tensor.float() for tensor in rows]
        return attend_in_buckets(rows, packing, causal, window, dropout, scaling)


def attend_in_buckets(
    rows: list[Tensor], packing: Packing, causal: bool, window: int | None, dropout: float, scaling: float | None
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
        found = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=causal and mask is None, scale=scaling
        )
        outputs.append(found.transpose(1, 2).flatten(0, 1))
    unpadded: Tensor = _Unpad.apply(torch.cat(outputs), packing.back)
    return unpadded


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
