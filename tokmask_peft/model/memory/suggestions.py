"""What saves memory: the one list of suggestions, for estimates and for every place where memory runs out."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tokmask_peft.errors import RunError, TokmaskError
from tokmask_peft.model.decisions import in_short, out_of_memory
from tokmask_peft.model.memory.estimate import Estimate, Memory, shown
from tokmask_peft.recipe.schema import Recipe, changed

Changes = Mapping[str, Any]
Phase = Literal["run", "loading", "training", "evaluation", "prediction"]

PHASES: dict[Phase, str] = {
    "loading": "while the backbone was loaded",
    "training": "in training",
    "evaluation": "in evaluation",
    "prediction": "in prediction",
}


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A change that saves memory."""

    text: str  # as it is typed on the command line, or as a user does it
    changes: Changes = field(default_factory=dict)  # of keys of the recipe
    note: str = ""  # what to know before making it
    total: int = 0  # bytes of the run with it, if they were counted
    fits: bool = False

    def __str__(self) -> str:
        """Return the change with what it leads to, for a reader."""
        counted = f": {shown(self.total)}{'' if self.fits else ', still too much'}" if self.total else ""
        return f"{self.text}{counted}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True, slots=True)
class Situation:
    """Where memory is short, and what can be changed there."""

    phase: Phase  # what takes the memory; `run` for all of a run
    recipe: Recipe | None = None  # whose keys can be changed; None for a command that takes an adapter
    gpu: bool = field(kw_only=True)  # whether the device is one
    movable: bool = False  # whether the embedding can be somewhere else than on the device as it is
    checkpointable: bool = True
    int8: bool = False  # whether bitsandbytes runs on the device
    texts: int = 1  # in a forward pass of a command that takes `--batch-size`


def smaller_batch(batch_size: int, gradient_accumulation: int) -> tuple[int, int] | None:
    """Return the next smaller micro-batch that makes the same optimizer step, and its number; None below one text."""
    texts = batch_size * gradient_accumulation
    sizes = [size for size in range(1, batch_size // 2 + 1) if texts % size == 0]
    return (sizes[-1], texts // sizes[-1]) if sizes else None


def suggestions(
    situation: Situation, count: Callable[[Recipe], Estimate] | None = None, memory: Memory | None = None
) -> list[Suggestion]:
    """Return what saves memory: single changes, and several of them that fit together if no single one does.

    Those that fit together are taken in turn, the one that saves the most first: they need not be the fewest. `count`
    estimates a recipe, and changes that save nothing of `memory`, or for which it raises, are left out. Without it
    every change is suggested, with no total.
    """
    recipe, before = situation.recipe, 0
    if recipe is None:
        return _actions(situation)
    made: dict[str, Suggestion] = {}  # each is counted once, which takes seconds

    def make(changes: Changes) -> Suggestion:
        text = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
        if text in made:
            return made[text]
        notes = ["may cost score"] if "adapter.layers" in changes else []
        budget = changes.get("training.tokens_per_batch")
        if situation.phase == "training" and budget and budget < recipe.data.max_length:
            notes.append("if no text takes more")
        made[text] = Suggestion(text, dict(changes), ", ".join(notes))
        if count is not None and memory is not None:
            try:
                total = count(changed(recipe, changes)).total
            except (TokmaskError, ValueError):  # a budget below the longest text; ALBERT has no layers PEFT could find
                total = before
            made[text] = replace(made[text], total=total, fits=memory.fits(total))
        return made[text]

    if count is None or memory is None:
        found = [make(changes) for changes in _candidates(recipe, situation, lambda changes: True)]
        return found + (_actions(situation) if situation.phase == "loading" else [])
    before = count(recipe).total
    found = [make(changes) for changes in _candidates(recipe, situation, lambda changes: make(changes).fits)]
    found = [one for one in found if one.total < before]
    together: dict[str, Any] = {}
    for one in [] if any(one.fits for one in found) else sorted(found, key=lambda one: one.total):
        for key, value in one.changes.items():  # of a number that both set the smaller, of anything else the first
            both = together.get(key, value)
            together[key] = both if isinstance(both, str) else min(both, value)
        if (several := make(together)).fits:
            return [*found, several]
    return found


def _candidates(recipe: Recipe, situation: Situation, fits: Callable[[Changes], bool]) -> Iterator[Changes]:
    """Give the changes that help in a phase; `fits`, whether changes suffice, is asked only if more depends on it."""
    phase, training, model = situation.phase, recipe.training, recipe.model
    step, on_gpu = phase in ("run", "training"), situation.gpu
    if step:
        yield from _smaller_batches(recipe, phase, fits)
        if phase == "training" and training.tokens_per_batch is None and not training.auto_batch:
            yield {"training.auto_batch": True}
        if situation.checkpointable and model.gradient_checkpointing is not True:
            yield {"model.gradient_checkpointing": True}
    if phase == "evaluation" and training.eval_batch_size > 1:
        yield {"training.eval_batch_size": max(training.eval_batch_size // 4, 1)}
    # whether bitsandbytes runs is known for all of a run only
    if on_gpu and model.quantization in ("none", "int8") and (situation.int8 or phase != "run"):
        yield {"model.quantization": "nf4"}
    frozen = {"masking.trainable_mask": False} if recipe.masking.trainable_mask else {}
    if frozen and phase != "loading":
        yield frozen
    if not frozen or (phase == "run" and not fits(frozen)):  # a trained row forbids these
        if on_gpu and situation.movable and model.embedding == "resident":
            yield {**frozen, "model.embedding": "offload"}
        placed = model.embedding == "resident" or (model.embedding == "offload" and not on_gpu)
        if situation.int8 and situation.movable and placed:
            yield {**frozen, "model.embedding": "8bit"}
        if step and recipe.adapter.layers == "all":
            yield {**frozen, "adapter.layers": 0.5}
    if phase != "loading" and recipe.data.max_length > 16:
        yield {"data.max_length": recipe.data.max_length // 2}
    if phase == "run" and training.eval_batch_size > training.micro_batch:
        yield {"training.eval_batch_size": training.micro_batch}


def _smaller_batches(recipe: Recipe, phase: Phase, fits: Callable[[Changes], bool]) -> Iterator[Changes]:
    """Give the largest micro-batch that fits, or that of a single text; the optimizer step stays as large."""
    training, changes = recipe.training, dict[str, Any]()
    texts, times = training.micro_batch, training.gradient_accumulation
    if (budget := training.tokens_per_batch) is not None:
        if budget > 16:
            yield {"training.tokens_per_batch": max(budget // 2, 16), "training.gradient_accumulation": 2 * times}
        return
    while (size := smaller_batch(texts, times)) and not (changes and fits(changes)):
        texts, times = size
        changes = {"training.batch_size": texts, "training.gradient_accumulation": times}
        if phase == "run" and training.eval_batch_size > texts:
            changes["training.eval_batch_size"] = max(texts, min(training.eval_batch_size, 4 * texts))
    if changes:
        yield changes


def _actions(situation: Situation) -> list[Suggestion]:
    """Return what helps without a key of a recipe."""
    found = [Suggestion("other programs closed")]
    if situation.recipe is not None:
        return [Suggestion("a smaller model.backbone"), *found]
    if situation.texts > 1:
        fewer = situation.texts // 4 or 1
        # the demo and `report` compute with the usual batches, and have no option for them
        found.insert(0, Suggestion(f"--batch-size {fewer} (batch_size={fewer})", note="if the command has it"))
    if situation.gpu:
        text = "--device cpu (device='cpu'), or CUDA_VISIBLE_DEVICES= before a command without --device"
        found.append(Suggestion(text))
    return found


def memory_error(situation: Situation, what: str, reason: str, kind: type[TokmaskError]) -> TokmaskError:
    """Return the error for memory that ran out in `what`, with `phase`, `suggestions` and the allocator's `reason`."""
    found = [str(one) for one in suggestions(situation)]
    message = f"out of memory {what} ({reason}). Any of these may help: {'; '.join(found)}."
    if situation.recipe is not None:
        message += " `tokmask estimate` with the same recipe reports how much it takes."
    return kind(message, code="out-of-memory", phase=situation.phase, suggestions=found)


@contextlib.contextmanager
def memory_errors(situation: Situation, kind: type[TokmaskError] = RunError, what: str | None = None) -> Iterator[None]:
    """Turn a lack of memory into an error of a `kind`, code `out-of-memory`, with `what` was done, and remedies."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise memory_error(situation, what or PHASES[situation.phase], in_short(error), kind) from error
