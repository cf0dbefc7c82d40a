"""A bootstrap over seeds and examples together, for F1 differences of arms that share both.

Every seed scores the same test texts, so seeds and texts are crossed: each replicate draws seeds and, for all of them,
texts, both with replacement (the pigeonhole bootstrap, Owen 2007, arXiv:0712.1111). In word-level tasks a whole text is
drawn with its words, which depend on each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WEIGHTS_AT_ONCE = 2_000_000
METRICS = ("f1_macro", "f1_weighted")


@dataclass(frozen=True, slots=True)
class TextCounts:
    """What a run did on each text, enough to score any choice of texts.

    Attributes:
        right: `[texts, classes]` items of the class that were found.
        gold: `[texts, classes]` items of the class.
        given: `[texts, classes]` items that were given the class.
    """

    right: NDArray[np.int64]
    gold: NDArray[np.int64]
    given: NDArray[np.int64]

    @classmethod
    def of(cls, gold: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]], classes: int) -> TextCounts:
        """Count label ids per text; a prediction of -1 (a word that was cut away) is given to no class."""
        lengths = [len(row) for row in gold]
        text = np.repeat(np.arange(len(gold)), lengths)
        one = np.concatenate([np.asarray(row, dtype=np.int64) for row in gold])
        two = np.concatenate([np.asarray(row, dtype=np.int64) for row in predicted])

        def count(chosen: NDArray[np.bool_], label: NDArray[np.int64]) -> NDArray[np.int64]:
            cells = text[chosen] * classes + label[chosen]
            return np.bincount(cells, minlength=len(gold) * classes).reshape(len(gold), classes)

        return cls(count(one == two, one), count(one >= 0, one), count(two >= 0, two))


def f1_of(right: NDArray[Any], gold: NDArray[Any], given: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Return macro and weighted F1 of counts `[..., classes]`, as `training.metrics.scores` defines them."""
    f1 = 2 * right / np.maximum(gold + given, 1)
    occurring = (gold + given) > 0
    macro = f1.sum(-1, where=occurring) / np.maximum(occurring.sum(-1), 1)
    weighted = (f1 * gold).sum(-1) / np.maximum(gold.sum(-1), 1)
    return {"f1_macro": macro, "f1_weighted": weighted}


def bootstrap_differences(
    arms: Mapping[Any, Sequence[TextCounts]], reference: Any, replicates: int = 2000, seed: int = 0
) -> dict[Any, dict[str, NDArray[np.float64]]]:
    """Draw seeds and texts, and return how far each arm's mean F1 lies from the reference's in each replicate.

    All arms see the same draws.

    Args:
        arms: for each arm its runs, in the same order of seeds, on the same texts.
        reference: the arm to compare with.
        replicates: number of draws.
        seed: of the draws.

    Returns:
        For each other arm and metric `[replicates]` differences.
    """
    random = np.random.default_rng(seed)
    runs = len(arms[reference])
    texts = len(arms[reference][0].gold)
    chosen_runs = random.integers(0, runs, (replicates, runs))
    scored = {arm: {metric: np.empty((replicates, runs)) for metric in METRICS} for arm in arms}
    step = max(1, _WEIGHTS_AT_ONCE // texts)
    for start in range(0, replicates, step):
        rows = slice(start, min(start + step, replicates))
        draws = random.multinomial(texts, np.full(texts, 1 / texts), rows.stop - rows.start).astype(np.float64)
        for arm, counts in arms.items():
            for run, part in enumerate(counts):
                found = f1_of(draws @ part.right, draws @ part.gold, draws @ part.given)
                for metric in METRICS:
                    scored[arm][metric][rows, run] = found[metric]
    means = {
        arm: {metric: np.take_along_axis(values, chosen_runs, axis=1).mean(1) for metric, values in by_metric.items()}
        for arm, by_metric in scored.items()
    }
    return {
        arm: {metric: found[metric] - means[reference][metric] for metric in METRICS}
        for arm, found in means.items()
        if arm != reference
    }


def percentile_interval(values: NDArray[np.float64], level: float = 0.95) -> list[float]:
    """Return the percentile interval of bootstrap replicates."""
    return [float(bound) for bound in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]
