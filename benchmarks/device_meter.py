"""Time, memory and matrix rate of a device; on a CPU what comes closest, so that the code can be tried there."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokmask_peft.model.memory.step import LiveBytes


def clock(device: torch.device) -> float:
    """Return seconds, when everything before is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def allocated(device: torch.device) -> int:
    """Return the bytes on the device; on a CPU nobody counts them."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def peak_of(work: Callable[[], None], model: Any, optimizer: Any, device: torch.device) -> int:
    """Return the most bytes on the device while `work` runs; on a CPU those of tensors."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    held = [*model.parameters(), *model.buffers(), *states]
    with LiveBytes() as live:
        live.exclude(*held)
        work()
    return live.peak + sum(tensor.untyped_storage().nbytes() for tensor in held)


def matrix_rate(device: torch.device) -> float:
    """Return the FLOPs a second of a large bf16 product, the median of 5 rounds."""
    size, products = (8192, 20) if device.type == "cuda" else (256, 2)
    left = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    rates = []
    for _ in range(6):
        start = clock(device)
        for _ in range(products):
            left @ left
        rates.append(products * 2 * size**3 / (clock(device) - start))
    return statistics.median(rates[1:])
