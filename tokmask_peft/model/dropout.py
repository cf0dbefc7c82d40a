"""Dropout on CPUs, with 16 random bits an element.

torch's own draws a random number and a `double` for each element, one at a time (`bernoulli_`, torch 2.13). On one core
of an EPYC, for 985 sub-tokens of 384 dimensions, it takes 2.35 ms where this takes .59: in a packed step of MiniLM a
tenth of the time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEPS = 1 << 16


def dropout(x: Tensor, p: float) -> Tensor:
    """Return `x` with each element zero with probability `p`, else divided by 1 - p; the gradient likewise.

    On a CPU `p` is rounded to the nearest 65,536th, and what stays is divided by the rounded 1 - p, so that the mean is
    that of `x`. The draws come from torch's default generator, in an order of their own: another mask than torch's for
    the same seed. Elsewhere this is torch's dropout.

    Args:
        x: of any shape.
        p: from 0 to 1.
    """
    kept = round((1 - p) * _STEPS)
    if x.device.type != "cpu" or kept == 0:
        return F.dropout(x, p)
    return x if kept == _STEPS else x * _noise(x, kept)


def _noise(x: Tensor, kept: int) -> Tensor:
    """Return a tensor like `x` that holds `_STEPS / kept` with probability `kept / _STEPS`, else 0."""
    count = x.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
    noise = torch.empty(count, dtype=x.dtype, device=x.device)
    torch.lt(
        draws.view(torch.int16)[:count], kept - _STEPS // 2, out=noise
    )  # as numbers at once: turning booleans into them costs more
    return noise.mul_(_STEPS / kept).view(x.shape)


@contextlib.contextmanager
def quick_dropout(model: nn.Module) -> Iterator[None]:
    """Let the `nn.Dropout` modules of a model that stands on a CPU draw as `dropout` does, for the time being.

    Args:
        model: with an adapter or without.
    """
    modules = [
        module
        for module in model.modules()
        if type(module) is nn.Dropout and not module.inplace and "forward" not in vars(module)
    ]
    for module in modules:
        module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _forward(module: nn.Dropout, x: Tensor) -> Tensor:
    return dropout(x, module.p) if module.training else x
