"""The shapes of the batches that a run will see: the largest, and a usual one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from tokmask_peft.data.token_budget import COUNTED_EPOCHS, TokenBudgetSampler, check_budget
from tokmask_peft.errors import RecipeError
from tokmask_peft.model.memory.step import Shape
from tokmask_peft.recipe import Batching, Recipe, TrainingConfig

SHUFFLES = 20
MULTIPLE = 8
"""Padding goes up to a multiple of it (`trainer.collator`)."""
NEARLY = 0.9
"""Share of the most sub-tokens in a batch that passes for as many."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sub-tokens of each text.

    Attributes:
        train: of the texts to train on.
        evaluated: of each split that the run evaluates, validation and test, whose texts may be longer and more.
    """

    train: Sequence[int]
    evaluated: tuple[Sequence[int], ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Shapes of micro-batches.

    Attributes:
        largest: in training; of the longest texts there are, or of max_length where the texts are not known, or what
            fills a budget of sub-tokens.
        usual: in training; none where the texts are not known.
        evaluation: the largest in evaluation.
        known: whether the shapes come from the texts.
    """

    largest: Shape
    usual: Shape | None
    evaluation: Shape
    known: bool


def workload(recipe: Recipe, batching: str, lengths: Lengths | None) -> Workload:
    """Return the shapes of a run's batches.

    Args:
        recipe: of the run.
        batching: as decided: padded, grouped or padding_free.
        lengths: of the texts, if they are known.

    Raises:
        RecipeError: a text alone exceeds the budget of sub-tokens.
    """
    texts, evaluation = recipe.training.batch_size, _evaluation(recipe, lengths)
    if recipe.training.tokens_per_batch is not None:
        return Workload(_largest_of_budget(recipe, batching, lengths), None, evaluation, lengths is not None)
    if lengths is None:
        largest = Shape((recipe.data.max_length,) * texts, packed=batching == "padding_free")
        return Workload(largest, None, evaluation, False)
    cut = [min(length, recipe.data.max_length) for length in lengths.train]
    texts = min(texts, len(cut))
    batches = _batches(cut, texts, batching == "grouped", recipe.seed)
    if batching == "padding_free":
        by_size = sorted(batches, key=sum)
        return Workload(Shape(by_size[-1], True), Shape(by_size[len(by_size) // 2], True), evaluation, True)
    by_size = sorted(batches, key=max)
    usual = Shape.padded(texts, _rounded(max(by_size[len(by_size) // 2])))
    return Workload(Shape.padded(texts, _rounded(max(cut))), usual, evaluation, True)


def _largest_of_budget(recipe: Recipe, batching: str, lengths: Lengths | None) -> Shape:
    budget, cut = recipe.training.tokens_per_batch or 0, recipe.data.max_length
    if lengths is None:
        if batching == "padding_free":
            return _filled((), budget, cut)
        return _fullest(budget, dict.fromkeys(range(MULTIPLE, _rounded(cut) + 1, MULTIPLE), budget))
    texts, kind = [min(length, cut) for length in lengths.train], cast("Batching", batching)
    try:
        check_budget(max(texts), budget, kind)
    except ValueError as error:
        problem = f"training.tokens_per_batch: {error}; set it higher, or data.max_length lower"
        raise RecipeError([problem], source=recipe.name) from error
    if batching != "padding_free":
        return _fullest(budget, {_rounded(length): number for number, length in enumerate(sorted(texts), 1)})
    sampler = TokenBudgetSampler(texts, budget, kind, recipe.seed)
    drawn = [[texts[at] for at in batch] for epoch in range(COUNTED_EPOCHS) for batch in sampler.all_batches(epoch)]
    # In attention with dropout a GPU pads them to the longest: most for a long text among many short ones.
    widest = max(drawn, key=lambda batch: (len(batch) * max(batch), sum(batch)))
    return _filled(widest, min(budget, sum(texts)), max(texts))


def _fullest(budget: int, up_to: dict[int, int]) -> Shape:
    """Return the padded batch of the most sub-tokens, or one of nearly as many and longer texts: attention takes more.

    Args:
        budget: sub-tokens, padding included.
        up_to: how many texts there are of a padded length or less.
    """
    fitting = ((length, min(budget // length, number)) for length, number in up_to.items() if length <= budget)
    shapes = [Shape.padded(number, length) for length, number in fitting]
    most = max(shape.tokens for shape in shapes)
    return max((shape for shape in shapes if shape.tokens >= NEARLY * most), key=lambda shape: shape.lengths[0])


def _filled(texts: Sequence[int], budget: int, longest: int) -> Shape:
    """Return a packed batch with texts added until it takes the whole budget."""
    missing = budget - sum(texts)
    more = (min(longest, missing - start) for start in range(0, missing, longest))
    return Shape((*texts, *more), packed=True)


def _evaluation(recipe: Recipe, lengths: Lengths | None) -> Shape:
    """Return a shape that no batch of an evaluation exceeds: its texts come by length, the longest together."""
    texts, longest = recipe.training.eval_batch_size, recipe.data.max_length
    if lengths is not None:
        texts = min(texts, max(map(len, lengths.evaluated)))
        longest = min(longest, max(max(split) for split in lengths.evaluated if split))
    return Shape.padded(texts, _rounded(longest))


def _batches(lengths: list[int], texts: int, grouped: bool, seed: int) -> list[tuple[int, ...]]:
    """Draw the batches of some epochs; full ones only."""
    draw, found = np.random.default_rng(seed), list[tuple[int, ...]]()
    for _ in range(SHUFFLES):
        order = sorted(lengths) if grouped else draw.permutation(lengths).tolist()
        found += [tuple(order[at : at + texts]) for at in range(0, len(order) - texts + 1, texts)]
        if grouped or len(found) > 5000:
            break
    return found


def _rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def tokens_per_step(training: TrainingConfig, lengths: Sequence[int], batches: int | None, processes: int) -> float:
    """Return the sub-tokens that an optimizer step takes on average, in all processes together; padding is none.

    Args:
        training: the size of a micro-batch and how many make a step.
        lengths: sub-tokens of each text to train on.
        batches: of one process in an epoch, where a budget of sub-tokens makes them, each with as many as there are
            processes at the same time; None where `batch_size` does.
        processes: how many train.
    """
    texts = training.batch_size * processes if batches is None else len(lengths) / max(batches, 1)
    return texts * training.gradient_accumulation * sum(lengths) / max(len(lengths), 1)
