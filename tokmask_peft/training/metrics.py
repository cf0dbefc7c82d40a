"""Scores of predictions against gold labels, with words that were cut away counted as errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_PREDICTION = -1
"""The prediction for a word that was cut away: never right."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Gold and predicted label ids, a pair of arrays per text (of length 1 in sequence tasks, else one per word)."""

    gold: list[NDArray[np.int64]]
    predicted: list[NDArray[np.int64]]

    def flat(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return all gold and all predicted ids, `[items]` each."""
        if not self.gold:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate(self.gold), np.concatenate(self.predicted)

    def to_dict(self) -> dict[str, list[list[int]]]:
        """Return a JSON-able form: a list of label ids per text, `NO_PREDICTION` for what was cut away."""
        return {"gold": [row.tolist() for row in self.gold], "predicted": [row.tolist() for row in self.predicted]}


def scores(gold: NDArray[np.int64], predicted: NDArray[np.int64], labels: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, macro and weighted F1, per-class figures and the confusion matrix.

    Macro-F1 is the mean over the classes that occur among the gold or the predicted labels, as in scikit-learn.

    Args:
        gold: `[items]` label ids.
        predicted: `[items]` label ids, `NO_PREDICTION` where there is none.
        labels: label names by id.

    Returns:
        JSON-able; `confusion` has a row per gold label and a column per predicted one, with a last column for
        items without a prediction if there are any.
    """
    classes = len(labels)
    # the last column counts what has no prediction
    column = np.where(predicted == NO_PREDICTION, classes, predicted)
    counts = np.bincount(gold * (classes + 1) + column, minlength=classes * (classes + 1)).reshape(classes, classes + 1)
    right, support, given = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)[:classes]
    precision, recall, f1 = _ratio(right, given), _ratio(right, support), _ratio(2 * right, given + support)
    occurring = given + support > 0
    missing = int(counts[:, classes].sum())
    return {
        "f1_macro": float(f1[occurring].mean()) if occurring.any() else 0.0,
        "f1_weighted": float(_ratio(np.dot(f1, support), support.sum())),
        "accuracy": float(_ratio(right.sum(), support.sum())),
        "items": len(gold),
        "without_prediction": missing,
        "per_class": {
            label: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, label in enumerate(labels)
        },
        "confusion": {
            "labels": [*labels, *(["(none)"] if missing else [])],
            "matrix": counts[:, : classes + bool(missing)].tolist(),
        },
    }


def _ratio(part: Any, whole: Any) -> NDArray[np.float64]:
    """Divide, with 0 for nothing of nothing."""
    return np.asarray(part, dtype=np.float64) / np.maximum(whole, 1)


def code_mixing_index(tags: Sequence[str], languages: Sequence[str]) -> float:
    """Return the code-mixing index of a post, 0 (one language) to below 100 (Das and Gambäck 2014).

    CMI = 100 (1 - max_l w_l / (n - u)): w_l words of language l, n words, u of them in no language.
    """
    counts = Counter(tag for tag in tags if tag in languages)
    spoken = sum(counts.values())
    return 100.0 * (spoken - max(counts.values())) / spoken if counts else 0.0  # exact at the bounds of the bins


MIXING_BINS = ((0.0, 0.0), (0.0, 15.0), (15.0, 30.0), (30.0, 45.0), (45.0, 100.0))
"""Bounds of the code-mixing bins: above the first (the first bin is exactly 0), up to and with the second."""


def scores_by_mixing(found: Predictions, labels: Sequence[str], languages: Sequence[str]) -> list[dict[str, Any]]:
    """Return macro and weighted F1 over the posts of each code-mixing bin; bins without posts are left out."""
    index = np.array([code_mixing_index([labels[i] for i in gold], languages) for gold in found.gold])
    rows = []
    for low, high in MIXING_BINS:
        chosen = np.flatnonzero(index == 0.0 if high == 0.0 else (index > low) & (index <= high))
        if len(chosen) == 0:
            continue
        part = Predictions([found.gold[i] for i in chosen], [found.predicted[i] for i in chosen])
        result = scores(*part.flat(), labels)
        rows.append(
            {
                "cmi": "0" if high == 0.0 else f"{low:g} to {high:g}",
                "posts": len(chosen),
                "words": result["items"],
                "f1_macro": result["f1_macro"],
                "f1_weighted": result["f1_weighted"],
            }
        )
    return rows
