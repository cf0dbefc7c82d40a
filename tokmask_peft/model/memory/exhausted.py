"""Know an error that says that memory has run out, and say instead what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate.utils.memory import should_reduce_batch_size

from tokmask_peft.errors import TokmaskError, first_line


def out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the host refused memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # accelerate knows the allocators' words, not those of CUDA's own calls
    said = str(error).lower()
    raw = isinstance(error, RuntimeError) and ("out of memory" in said or "status_alloc_failed" in said)
    return raw or (isinstance(error, Exception) and should_reduce_batch_size(error))


@contextlib.contextmanager
def instead_of_memory_errors(explained: Callable[[str], TokmaskError]) -> Iterator[None]:
    """Raise another error where memory runs out.

    Args:
        explained: makes it from the allocator's words.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise explained(in_short(error)) from error


def message(what: str, said: str, ways: Iterable[str]) -> str:
    """Say that memory ran out, and what may help.

    Args:
        what: was being done.
        said: the allocator's words.
        ways: what a user can do.
    """
    return f"out of memory {what} ({said}). Any of these may help: {'; '.join(ways)}."


def in_short(error: BaseException) -> str:
    """Return the first sentence of the allocator's words."""
    return first_line(error).split(". ")[0]
