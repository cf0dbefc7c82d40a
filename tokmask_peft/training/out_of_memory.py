"""Running out of memory ends in one message that says what to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.utils.memory import should_reduce_batch_size

from tokmask_peft.errors import RunError, first_line
from tokmask_peft.model.memory.remedies import smaller_batch
from tokmask_peft.recipe import Recipe


def out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the host refused memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # accelerate knows the allocators' words, not those of CUDA's own calls
    said = str(error).lower()
    raw = isinstance(error, RuntimeError) and ("out of memory" in said or "status_alloc_failed" in said)
    return raw or (isinstance(error, Exception) and should_reduce_batch_size(error))


@contextlib.contextmanager
def explained_memory_errors(
    recipe: Recipe, movable: bool, evaluating: bool = False, loading: bool = False
) -> Iterator[None]:
    """Turn running out of memory into an error that names the keys to change.

    Args:
        recipe: of the run, with gradient checkpointing decided.
        movable: whether the backbone's embedding can lie on the host.
        evaluating: whether it is an evaluation that runs.
        loading: whether the backbone is being loaded.

    Raises:
        RunError: out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if loading:
            raise RunError(_while_loading(recipe, error)) from error
        raise RunError(_message(recipe, error, movable, evaluating)) from error


def _while_loading(recipe: Recipe, error: BaseException) -> str:
    """Say what takes less before the first batch: fewer texts at a time do not."""
    ways = ["a smaller model.backbone", "other programs closed"]
    if recipe.model.quantization == "none":
        ways.insert(0, "model.quantization=nf4 (on a GPU)")
    return (
        f"out of memory while the backbone was loaded ({first_line(error).split('. ')[0]}). Any of these may help: "
        f"{'; '.join(ways)}. `tokmask estimate` with the same recipe says how much it takes."
    )


def _message(recipe: Recipe, error: BaseException, movable: bool, evaluating: bool) -> str:
    training = recipe.training
    first = first_line(error).split(". ")[0]
    if evaluating:
        texts = training.eval_batch_size
        ways = [f"training.eval_batch_size={max(texts // 4, 1)}"] if texts > 1 else []
    else:
        smaller = smaller_batch(training.batch_size, training.gradient_accumulation)
        ways = [f"training.batch_size={smaller[0]} training.gradient_accumulation={smaller[1]}"] if smaller else []
        if training.tokens_per_batch is not None:
            ways = _smaller_budget(training.tokens_per_batch, recipe.data.max_length)
        elif not training.auto_batch:
            ways.append("training.auto_batch=true, which does that by itself")
        if recipe.model.gradient_checkpointing is not True:
            ways.append("model.gradient_checkpointing=true")
        if recipe.adapter.layers == "all" and not recipe.masking.trainable_mask:
            ways.append("adapter.layers=0.5")
    if recipe.model.quantization == "none":
        ways.append("model.quantization=nf4 (on a GPU)")
    if movable and recipe.model.embedding == "resident" and not recipe.masking.trainable_mask:
        ways.append("model.embedding=offload (on a GPU)")
    ways.append("a smaller data.max_length")
    what = "in evaluation" if evaluating else "in training"
    return (
        f"out of memory {what} ({first}). Any of these takes less: {'; '.join(ways)}. "
        "`tokmask estimate` with the same recipe says how much."
    )


def _smaller_budget(budget: int, max_length: int) -> list[str]:
    half = max(budget // 2, 16)
    caveat = ", if no text takes more" if half < max_length else ""
    return [f"training.tokens_per_batch={half}{caveat}"] if half < budget else []
