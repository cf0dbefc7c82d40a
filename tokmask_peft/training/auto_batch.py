"""Train on where memory runs out: a smaller micro-batch, and the same optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from tokmask_peft.errors import RunError
from tokmask_peft.model.memory.exhausted import in_short, out_of_memory
from tokmask_peft.model.memory.remedies import smaller_batch
from tokmask_peft.recipe import Recipe

T = TypeVar("T")


def with_smaller_batches(
    model: nn.Module,
    recipe: Recipe,
    attempt: Callable[[], T],
    retry: Callable[[int, int], T],
    alone: Callable[[str], RunError],
) -> T:
    """Train; where memory runs out, go on with a smaller micro-batch and the same optimizer step.

    The Trainer's own `auto_find_batch_size` makes the optimizer step smaller, too, and keeps half-trained weights.

    Args:
        model: its trained weights are set back before every retry.
        recipe: says what is tried first.
        attempt: trains as the recipe says.
        retry: trains with other texts per forward pass and forward passes per optimizer step.
        alone: makes the error for a single text that takes too much, from the allocator's words.

    Returns:
        What the attempt returned that had enough memory.

    Raises:
        RunError: memory runs out with a single text.
    """
    start = {name: value.detach().cpu().clone() for name, value in _trained(model)}
    training = recipe.training
    sizes = [(training.batch_size, training.gradient_accumulation)]
    while smaller := smaller_batch(*sizes[-1]):
        sizes.append(smaller)
    left, said = iter(sizes[1:]), ""

    def run(batch_size: int) -> T:
        nonlocal said
        try:
            return begin(batch_size)
        except (RuntimeError, MemoryError) as error:
            said = in_short(error)  # not the error itself, which would hold the tensors of the step
            if out_of_memory(error) and not should_reduce_batch_size(error):
                raise torch.OutOfMemoryError("CUDA out of memory.") from error  # in words that accelerate knows
            raise

    def begin(batch_size: int) -> T:
        if batch_size == training.batch_size:
            return attempt()
        with torch.no_grad():
            for name, value in _trained(model):
                value.grad = None
                value.copy_(start[name])
        return retry(batch_size, dict(sizes)[batch_size])

    def smaller_size() -> int:
        size = next(left, None)
        if size is None:
            raise alone(said)
        return size[0]

    found: T = find_executable_batch_size(run, sizes[0][0], reduce_batch_size_fn=smaller_size)()
    return found


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)
