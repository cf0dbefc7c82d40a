"""Count the bytes of the tensors that are alive, and the most there were."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside it make, real or fake, until each is freed.

    What a kernel takes and gives back within one operation is not seen.

    Attributes:
        now: bytes alive.
        peak: the most bytes that were alive at once since the beginning or `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def exclude(self, *tensors: Tensor) -> None:
        """Do not count tensors that were there before, should an operation hand them on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = storage

    def reset_peak(self) -> None:
        """Begin to look for the peak anew."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if self._known.get(id(storage)) is storage:
            return
        self._known[id(storage)] = storage
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size).atexit = False

    def _forget(self, size: int) -> None:
        self.now -= size
