"""How the texts of a packed row lie, and in which buckets they are padded where a kernel needs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORTH = 400
"""Squares of sub-tokens for which one more call of the kernel is worth while on a CPU.

Measured forward and backward on one core of an EPYC with avx512_bf16 (12 heads of 32, 32 texts of 3 to 35 sub-tokens,
fp32): all texts padded to the longest 12.2 ms; in buckets, for 100, 400 and 1600 squares, 6.4, 5.7 and 6.3 ms; text by
text 7.6 ms; the row as a whole under a mask 28 ms. Longer texts, 14 heads of 64 and causal layers differ by less than a
tenth between 100 and 1600. With dropout, on a busier machine: 14.9; 10.6, 9.3 and 8.5; 12.7 ms (with torch's own kernel
10.1 and 9.5 ms for 400 and 1600).
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
