"""The shapes of the batches that a run will see: the largest, and a usual one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokmask_peft.model.memory.step import Shape
from tokmask_peft.recipe import Recipe

SHUFFLES = 20
MULTIPLE = 8
"""Padding goes up to a multiple of it (`trainer.collator`)."""


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
        largest: in training; of the longest texts there are, or of max_length where the texts are not known.
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
    """
    texts, evaluation = recipe.training.batch_size, _evaluation(recipe, lengths)
    if (budget := recipe.training.tokens_per_batch) is not None:
        longest = min(max(lengths.train) if lengths else recipe.data.max_length, recipe.data.max_length)
        largest = Shape.padded(max(budget // _rounded(longest), 1), _rounded(longest))
        if batching == "padding_free":
            rest = (budget % longest,) if budget % longest else ()
            largest = Shape((longest,) * (budget // longest) + rest, packed=True)
        return Workload(largest, None, evaluation, lengths is not None)
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
