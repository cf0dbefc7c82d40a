"""The input embedding in 8 bits, through bitsandbytes; imported where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from bitsandbytes.nn import Embedding8bit, Int8Params
from torch import Tensor, nn


class Int8Embedding(Embedding8bit):
    """bitsandbytes' 8-bit lookup, with what a masker and a Trainer need of it besides.

    bitsandbytes quantizes a matrix when it leaves the host, loses its scales when a module that holds it is moved, and
    refuses to be part of a state dict (seen with 0.50.2).
    """

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        """Quantize a matrix, [rows, hidden], and put it on `device`."""
        super().__init__(*weight.shape, device="meta", dtype=weight.dtype)
        on_host = Int8Params(weight.detach().to("cpu"), requires_grad=False, has_fp16_weights=False)
        self.weight: Any = on_host.to(device)

    def read_rows(self, first: int, last: int) -> Tensor:
        """Return the rows from `first` to before `last` as they are looked up, [rows, hidden]."""
        ids = torch.arange(first, last, device=self.weight.device)
        rows: Tensor = self.forward(ids)
        return rows

    def write_row(self, index: int, row: Tensor) -> None:
        """Quantize a row, [hidden], in place of another."""
        row = row.to(self.weight.device, torch.float32)
        scale = row.abs().max()
        self.weight.SCB[index] = scale
        self.weight.data[index] = (row * (127.0 / scale.clamp(min=1e-12))).round().to(torch.int8)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.weight
        super()._apply(fn, recurse)
        self.weight.SCB = before.SCB.to(self.weight.device)
        self.weight.CB = self.weight.data
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
