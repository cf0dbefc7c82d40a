"""Weights of which every process holds a shard: FSDP's `fully_shard` makes DTensors of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(weight: Tensor) -> bool:
    """Return whether a weight is spread over processes."""
    return hasattr(weight, "full_tensor")  # of DTensor alone; asking so spares the import of torch.distributed.tensor


def whole(weight: Tensor) -> Tensor:
    """Return a weight as a plain tensor; every process has to call this where it is sharded."""
    if not is_sharded(weight):
        return weight
    sharded: Any = weight
    gathered: Tensor = sharded.full_tensor()
    return gathered


def local_rows(weight: Tensor, row: int) -> tuple[Tensor, int]:
    """Return the rows of a matrix that this process holds, and where `row` lies among them: outside, if elsewhere.

    Args:
        weight: [rows, columns], plain, or sharded by rows as `fully_shard` does.
        row: index in the whole matrix.
    """
    if not is_sharded(weight):
        return weight, row
    sharded: Any = weight
    first, rows = 0, weight.shape[0]
    for dimension, placement in enumerate(sharded.placements):  # one, or two with copies of the shards
        if placement.is_shard(0):
            share = -(-rows // sharded.device_mesh.size(dimension))  # as torch.chunk
            first = sharded.device_mesh.get_local_rank(dimension) * share
    return sharded.to_local(), row - first
