"""Running out of memory ends in one message that says what to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tokmask_peft.errors import RunError
from tokmask_peft.model.memory.exhausted import instead_of_memory_errors, message
from tokmask_peft.model.memory.remedies import smaller_batch
from tokmask_peft.recipe import Recipe

LOADING = "while the backbone was loaded"


@contextlib.contextmanager
def explained_memory_errors(
    recipe: Recipe, movable: bool, checkpointable: bool = True, evaluating: bool = False, loading: bool = False
) -> Iterator[None]:
    """Turn running out of memory into an error that names the keys to change.

    Args:
        recipe: of the run, with gradient checkpointing decided.
        movable: whether the backbone's embedding can lie on the host.
        checkpointable: whether the backbone can do gradient checkpointing.
        evaluating: whether it is an evaluation that runs.
        loading: whether the backbone is being loaded, or moved to the device.

    Raises:
        RunError: out of memory.
    """

    def explained(said: str) -> RunError:
        if loading:
            return _while_loading(recipe, said, movable)
        if evaluating:
            return _takes_less("in evaluation", said, [*_evaluation_batch(recipe), *_weights(recipe, movable)])
        ways = [*_batch(recipe), *_training(recipe, movable, checkpointable)]
        return _takes_less("in training", said, ways)

    with instead_of_memory_errors(explained):
        yield


@contextlib.contextmanager
def evaluation_memory_errors(device: torch.device, texts: int | None = None) -> Iterator[None]:
    """Turn running out of memory in `tokmask evaluate`, which takes no keys, into an error that says what helps there.

    Args:
        device: that computes.
        texts: per forward pass; none while the backbone is loaded.

    Raises:
        RunError: out of memory.
    """

    def explained(said: str) -> RunError:
        fewer = max((texts or 1) // 4, 1)
        ways = [f"--batch-size {fewer} (batch_size={fewer})"] if texts is not None and texts > 1 else []
        ways.append("other programs closed")
        if device.type == "cuda":
            ways.append("CUDA_VISIBLE_DEVICES= before the command, which then computes on the CPU")
        return RunError(message(LOADING if texts is None else "in evaluation", said, ways))

    with instead_of_memory_errors(explained):
        yield


def single_text_error(recipe: Recipe, movable: bool, checkpointable: bool, said: str) -> RunError:
    """Return the error for a training that runs out of memory with micro-batches of one text.

    Args:
        recipe: as for `explained_memory_errors`.
        movable: as there.
        checkpointable: as there.
        said: the allocator's words.
    """
    what = f"with a single text of up to {recipe.data.max_length} sub-tokens"
    return _takes_less(what, said, _training(recipe, movable, checkpointable))


def _takes_less(what: str, said: str, ways: list[str]) -> RunError:
    return RunError(
        f"out of memory {what} ({said}). Any of these takes less: {'; '.join([*ways, 'a smaller data.max_length'])}. "
        "`tokmask estimate` with the same recipe says how much."
    )


def _while_loading(recipe: Recipe, said: str, movable: bool) -> RunError:
    """Say what takes less before the first batch: fewer texts at a time do not."""
    ways = [*_quantization(recipe), *_placement(recipe, movable), "a smaller model.backbone", "other programs closed"]
    said = message(LOADING, said, ways)
    return RunError(f"{said} `tokmask estimate` with the same recipe says how much it takes.")


def _batch(recipe: Recipe) -> list[str]:
    """Offer smaller micro-batches that make the same optimizer step."""
    training = recipe.training
    if training.tokens_per_batch is not None:
        half = max(training.tokens_per_batch // 2, 16)
        if half >= training.tokens_per_batch:
            return []
        caveat = ", if no text takes more" if half < recipe.data.max_length else ""
        twice = 2 * training.gradient_accumulation
        return [f"training.tokens_per_batch={half} training.gradient_accumulation={twice}{caveat}"]
    smaller = smaller_batch(training.batch_size, training.gradient_accumulation)
    ways = [f"training.batch_size={smaller[0]} training.gradient_accumulation={smaller[1]}"] if smaller else []
    if not training.auto_batch:
        ways.append("training.auto_batch=true, which does that by itself")
    return ways


def _evaluation_batch(recipe: Recipe) -> list[str]:
    texts = recipe.training.eval_batch_size
    return [f"training.eval_batch_size={max(texts // 4, 1)}"] if texts > 1 else []


def _training(recipe: Recipe, movable: bool, checkpointable: bool) -> list[str]:
    """Offer what makes a step of training smaller, whatever its batch."""
    ways = []
    if checkpointable and recipe.model.gradient_checkpointing is not True:
        ways.append("model.gradient_checkpointing=true")
    ways += _weights(recipe, movable)
    if recipe.adapter.layers == "all" and not recipe.masking.trainable_mask:
        ways.append("adapter.layers=0.5 (may cost score)")
    return ways


def _weights(recipe: Recipe, movable: bool) -> list[str]:
    """Offer what makes every forward pass smaller; the copy of the embedding that a trained mask row takes first."""
    row = ["masking.trainable_mask=false"] if recipe.masking.trainable_mask else []
    return [*row, *_quantization(recipe), *_placement(recipe, movable)]


def _quantization(recipe: Recipe) -> list[str]:
    return ["model.quantization=nf4 (on a GPU)"] if recipe.model.quantization in ("none", "int8") else []


def _placement(recipe: Recipe, movable: bool) -> list[str]:
    free = movable and recipe.model.embedding == "resident" and not recipe.masking.trainable_mask
    return ["model.embedding=offload (on a GPU)"] if free else []
