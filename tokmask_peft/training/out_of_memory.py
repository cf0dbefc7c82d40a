"""Running out of memory ends in one message that says what to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tokmask_peft.errors import RunError
from tokmask_peft.model.memory.exhausted import instead_of_memory_errors
from tokmask_peft.model.memory.remedies import smaller_batch
from tokmask_peft.recipe import Recipe


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

    def explained(said: str) -> RunError:
        return RunError(_while_loading(recipe, said) if loading else _message(recipe, said, movable, evaluating))

    with instead_of_memory_errors(explained):
        yield


def _while_loading(recipe: Recipe, said: str) -> str:
    """Say what takes less before the first batch: fewer texts at a time do not."""
    ways = ["a smaller model.backbone", "other programs closed"]
    if recipe.model.quantization == "none":
        ways.insert(0, "model.quantization=nf4 (on a GPU)")
    return (
        f"out of memory while the backbone was loaded ({said}). Any of these may help: "
        f"{'; '.join(ways)}. `tokmask estimate` with the same recipe says how much it takes."
    )


def _message(recipe: Recipe, said: str, movable: bool, evaluating: bool) -> str:
    training = recipe.training
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
        f"out of memory {what} ({said}). Any of these takes less: {'; '.join(ways)}. "
        "`tokmask estimate` with the same recipe says how much."
    )


def _smaller_budget(budget: int, max_length: int) -> list[str]:
    half = max(budget // 2, 16)
    caveat = ", if no text takes more" if half < max_length else ""
    return [f"training.tokens_per_batch={half}{caveat}"] if half < budget else []
