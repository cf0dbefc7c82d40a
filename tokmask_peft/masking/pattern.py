"""Which positions are masked: a pure function of counters, so that no random state is read or written.

The numbers come from SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), read
at random access as counter-based generators are (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
Everything is int64 arithmetic that wraps around: the same on CPU and GPU, without synchronisation, and traceable.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Unit = Literal["token", "word", "span"]

_UINT64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment: the golden ratio's odd 64-bit fraction
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # Stafford's mix 13, as in SplitMix64


def _signed(value: int) -> int:
    """Return the int64 that has the bits of `value`."""
    value &= _UINT64
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift without dragging the sign along (torch's shift of int64 is arithmetic)."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 values: SplitMix64's finaliser, a bijection."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift_right(x, 31)


def _mix_int(x: int) -> int:
    """Do the same to a Python integer."""
    x &= _UINT64
    x = ((x ^ (x >> 30)) * _MULTIPLIERS[0]) & _UINT64
    x = ((x ^ (x >> 27)) * _MULTIPLIERS[1]) & _UINT64
    return x ^ (x >> 31)


def _draw(stream: Tensor, index: Tensor | int) -> Tensor:
    """Return 24 random bits: element `index` of each SplitMix64 `stream`."""
    return _shift_right(_mix(stream + index * _signed(_GOLDEN)), 40)


def text_positions(input_ids: Tensor, pad_id: int | None) -> Tensor:
    """Count positions from the first token of each text, so that left and right padding give the same pattern.

    Args:
        input_ids: [batch, seq].
        pad_id: the padding token, if there is one.

    Returns:
        int64 [1, seq] or [batch, seq]; negative on left padding.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    if pad_id is None:
        return positions
    leading = (input_ids == pad_id).to(torch.int64).cumprod(dim=1).sum(dim=1, keepdim=True)
    return positions - leading


def _word_indices(maskable: Tensor, word_starts: Tensor, positions: Tensor) -> Tensor:
    """Number the words of each text; [batch, seq], meaningless where nothing may be masked.

    A token that may not be masked ends a word, and so a word is either maskable as a whole or one such token.
    """
    after_fixed = torch.ones_like(maskable)
    after_fixed[:, 1:] = ~maskable[:, :-1]
    text_start = (positions == 0).expand_as(maskable)
    counted = ((word_starts | after_fixed | text_start) & maskable).to(torch.int64)
    count = counted.cumsum(dim=1)
    # In a packed row the count goes on over the border of two texts: take off what came before this text.
    columns = torch.arange(maskable.shape[1], device=maskable.device).expand_as(count)
    first_column = torch.where(text_start, columns, 0).cummax(dim=1).values
    return count - (count - counted).gather(1, first_column) - 1


def masked_positions(
    input_ids: Tensor,
    rate: Tensor | float,
    seed: int,
    step: Tensor | int,
    rank: int,
    maskable: Tensor,
    word_starts: Tensor | None = None,
    unit: Unit = "token",
    span_length: int = 1,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Say which tokens are masked.

    Each unit draws u in [0, 1), uniform with 24 bits, and is masked where u < rate: raising the rate only adds.

    Args:
        input_ids: [batch, seq]; only the shape and the device matter.
        rate: masking rate in [0, 1), a number or a 0-dim tensor.
        seed: seed of the run.
        step: counter of training forwards, a number or a 0-dim int64 tensor.
        rank: process number in distributed training.
        maskable: bool [batch, seq], false on special tokens, padding and what else is protected.
        word_starts: bool [batch, seq], true where a word begins; needed for `word` and `span`.
        unit: what is masked as a whole.
        span_length: words per span; a random shift per text moves the borders of the spans from step to step.
        rows: index of each token's text in the batch, broadcastable to [batch, seq]; default: the row.
        positions: position of each token in its text, likewise; default: the column.

    Returns:
        bool [batch, seq].
    """
    device = input_ids.device
    if rows is None:
        rows = torch.arange(input_ids.shape[0], device=device).unsqueeze(1)
    if positions is None:
        positions = torch.arange(input_ids.shape[1], device=device).unsqueeze(0)
    if not isinstance(step, Tensor):
        step = torch.tensor(step, dtype=torch.int64, device=device)

    run_key = _mix_int(_mix_int(seed) + _GOLDEN * (rank + 1))
    step_key = _mix(step * _signed(_GOLDEN) + _signed(run_key))
    stream = _mix((rows.to(torch.int64) + 1) * _signed(_GOLDEN) + step_key)

    index = positions.to(torch.int64)
    if unit != "token":
        if word_starts is None:
            raise ValueError(f"unit {unit!r} needs word_starts")
        index = _word_indices(maskable, word_starts, index)
        if unit == "span":
            index = (index + _draw(stream, 0) % span_length).div(span_length, rounding_mode="floor")
    u = _draw(stream, index + 1).to(torch.float32) * 2.0**-24
    return (u < rate) & maskable
