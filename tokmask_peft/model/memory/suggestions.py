"""Changes of a recipe that save memory, with what each would save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokmask_peft.errors import TokmaskError
from tokmask_peft.model.memory.estimate import Estimate, Room, shown
from tokmask_peft.recipe.schema import Recipe

Changes = Mapping[str, Any]
Count = Callable[[Recipe], Estimate]

COSTS = {"adapter.layers": "may cost score"}
"""What a reader should know of a change before making it."""


@dataclass(frozen=True, slots=True)
class Able:
    """What a device and a backbone can do.

    Attributes:
        gpu: whether the device is a GPU.
        movable: whether the backbone's embedding can lie elsewhere than on the device as it is.
        checkpoints: whether the backbone can compute activations again.
        int8: whether bitsandbytes runs on the device.
    """

    gpu: bool
    movable: bool
    checkpoints: bool = True
    int8: bool = False


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of one or more keys, and the total that it leads to."""

    changes: Changes
    total: int
    fits: bool

    @property
    def text(self) -> str:
        """The change as it would be typed on the command line."""
        return " ".join(f"{key}={_typed(value)}" for key, value in self.changes.items())

    @property
    def told(self) -> str:
        """The change with what it leads to, for a reader."""
        costs = "".join(f" ({cost})" for key, cost in COSTS.items() if key in self.changes)
        return f"{self.text}: {shown(self.total)}{'' if self.fits else ', still too much'}{costs}"


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """Return a copy of a recipe with other values at dotted keys of its sections."""
    for key, value in changes.items():
        name, _, field = key.partition(".")
        section = getattr(recipe, name).model_copy(update={field: value})
        recipe = recipe.model_copy(update={name: section})
    return recipe


def smaller_batch(batch_size: int, gradient_accumulation: int) -> tuple[int, int] | None:
    """Return the next smaller micro-batch that makes the same optimizer step, and its number; None below one text."""
    texts = batch_size * gradient_accumulation
    sizes = [size for size in range(1, batch_size // 2 + 1) if texts % size == 0]
    return (sizes[-1], texts // sizes[-1]) if sizes else None


def remedies(recipe: Recipe, count: Count, room: Room, able: Able) -> list[Remedy]:
    """Return the single changes that save memory, and several of them that fit together, if none does alone.

    These are taken in turn, the one that saves the most first, until they fit: they need not be the fewest.

    Args:
        recipe: that does not fit.
        count: estimates a recipe; what it raises a TokmaskError or ValueError for is not suggested.
        room: what there is.
        able: what is suggested only where it works.
    """
    before = count(recipe).total
    found: list[Remedy] = []
    for changes in _candidates(recipe, count, room, able):
        try:
            total = count(changed(recipe, changes)).total
        except (TokmaskError, ValueError):  # a budget below the longest text; ALBERT has no layers that PEFT could find
            continue
        if total < before:
            found.append(Remedy(changes, total, room.fits(total)))
    if any(remedy.fits for remedy in found):
        return found
    together: dict[str, Any] = {}
    for remedy in sorted(found, key=lambda remedy: remedy.total):
        together = _both(together, remedy.changes)
        total = count(changed(recipe, together)).total
        if room.fits(total):
            return [*found, Remedy(dict(together), total, True)]
    return found


def _both(changes: Changes, more: Changes) -> dict[str, Any]:
    """Return two changes in one; of a number that both set the smaller is taken, of anything else the first."""
    shared = changes.keys() & more.keys()
    kept = {k: changes[k] if isinstance(changes[k], str) else min(changes[k], more[k]) for k in shared}
    return {**changes, **more, **kept}


def _candidates(recipe: Recipe, count: Count, room: Room, able: Able) -> Iterator[Changes]:
    yield from _batch(recipe, count, room)
    if able.checkpoints and recipe.model.gradient_checkpointing is not True:
        yield {"model.gradient_checkpointing": True}
    if able.gpu and recipe.model.quantization in ("none", "int8"):
        yield {"model.quantization": "nf4"}
    if recipe.masking.trainable_mask:
        frozen = {"masking.trainable_mask": False}
        yield frozen
        if not room.fits(count(changed(recipe, frozen)).total):  # a trained row forbids the others
            yield from ({**frozen, **changes} for changes in _with_frozen_row(recipe, able))
    else:
        yield from _with_frozen_row(recipe, able)
    if recipe.data.max_length > 16:
        yield {"data.max_length": recipe.data.max_length // 2}
    if recipe.training.eval_batch_size > recipe.training.batch_size:
        yield {"training.eval_batch_size": recipe.training.batch_size}


def _with_frozen_row(recipe: Recipe, able: Able) -> Iterator[Changes]:
    """Give what cannot be done where a row of the embedding is trained."""
    placed = recipe.model.embedding
    if able.gpu and able.movable and placed == "resident":
        yield {"model.embedding": "offload"}
    if able.int8 and able.movable and (placed == "resident" or (placed == "offload" and not able.gpu)):
        yield {"model.embedding": "8bit"}
    if recipe.adapter.layers == "all":
        yield {"adapter.layers": 0.5}


def _batch(recipe: Recipe, count: Count, room: Room) -> Iterator[Changes]:
    """Give the largest micro-batch that fits, or that of a single text; the optimizer step stays as large."""
    training = recipe.training
    if training.tokens_per_batch is not None:
        yield {
            "training.tokens_per_batch": max(training.tokens_per_batch // 2, 16),
            "training.gradient_accumulation": 2 * training.gradient_accumulation,
        }
        return
    size: tuple[int, int] | None = (training.batch_size, training.gradient_accumulation)
    changes: Changes = {}
    while size and (size := smaller_batch(*size)):
        changes = {"training.batch_size": size[0], "training.gradient_accumulation": size[1]}
        if training.eval_batch_size > size[0]:
            changes = {**changes, "training.eval_batch_size": max(size[0], min(training.eval_batch_size, 4 * size[0]))}
        if room.fits(count(changed(recipe, changes)).total):
            break
    if changes:
        yield changes


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
