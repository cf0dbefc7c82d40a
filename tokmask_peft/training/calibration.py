"""Probabilities that mean what they say: one temperature, fitted on validation (Guo et al. 2017, arXiv:1706.04599).

All figures are of the items that the model saw: a word that was cut away has no probability.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokmask_peft.errors import RunError

BINS = 15
LOWEST, HIGHEST = 0.05, 20.0
_HALVINGS = 60  # of the interval of 1 / T: below the spacing of doubles


def fit_temperature(logits: NDArray[Any], gold: NDArray[Any]) -> float:
    """Return the temperature T > 0 that minimises the negative log likelihood of softmax(logits / T).

    The likelihood is convex in 1 / T, so the root of its derivative is halved in, in double precision. Where no item
    is wrong the best T would be 0, which says nothing about new texts: then T is 1.

    Args:
        logits: `[items, classes]`.
        gold: `[items]` label ids.

    Returns:
        T between 0.05 and 20, never with a higher negative log likelihood than T = 1.
    """
    if len(gold) == 0 or bool((logits.argmax(-1) == gold).all()):
        return 1.0
    scores = logits.astype(np.float64)
    right = scores[np.arange(len(gold)), gold]
    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        slope = float(((probabilities(scores, 1 / middle) * scores).sum(-1) - right).mean())
        low, high = (middle, high) if slope < 0 else (low, middle)
    temperature = 2 / (low + high)
    better = negative_log_likelihood(scores, gold, temperature) <= negative_log_likelihood(scores, gold)
    return temperature if better else 1.0


def calibrate(parts: dict[str, tuple[NDArray[Any], NDArray[Any]]]) -> dict[str, Any]:
    """Fit the temperature on validation; return it with what it changes on each part, JSON-able.

    Args:
        parts: `validation` and whatever else is to be reported: logits `[items, classes]` and gold ids `[items]`.

    Raises:
        RunError: a logit is not finite.
    """
    for name, (logits, _) in parts.items():
        if not np.isfinite(logits).all():
            raise RunError(
                f"the trained model's logits on {name} are not finite, so its scores mean nothing. "
                "Lower training.learning_rate, or set model.precision=fp32."
            )
    temperature = fit_temperature(*parts["validation"])
    report: dict[str, Any] = {
        "temperature": temperature,
        "method": "one temperature, fitted on validation (Guo et al. 2017)",
        "bins": BINS,
    }
    for name, (logits, gold) in parts.items():
        report[name] = {
            "items": len(gold),
            "before": _figures(logits, gold, 1.0),
            "after": _figures(logits, gold, temperature),
        }
    return report


def probabilities(logits: NDArray[Any], temperature: float = 1.0) -> NDArray[np.float64]:
    """Return softmax(logits / temperature) along the last axis, in double precision."""
    scaled = logits.astype(np.float64) / temperature
    grown = np.exp(scaled - scaled.max(-1, keepdims=True))
    return np.asarray(grown / grown.sum(-1, keepdims=True))


def negative_log_likelihood(logits: NDArray[Any], gold: NDArray[Any], temperature: float = 1.0) -> float:
    """Return the mean of -log p(gold), in nats; 0 for no items."""
    if len(gold) == 0:
        return 0.0
    scaled = logits.astype(np.float64) / temperature
    peak = scaled.max(-1)
    total = peak + np.log(np.exp(scaled - peak[:, None]).sum(-1))
    return float((total - scaled[np.arange(len(gold)), gold]).mean())


def expected_calibration_error(probability: NDArray[Any], gold: NDArray[Any], bins: int = BINS) -> float:
    """Return the mean distance between confidence and accuracy over equal-width bins, weighted by their items.

    Args:
        probability: `[items, classes]`.
        gold: `[items]` label ids.
        bins: number of bins over (0, 1]; a confidence on a border belongs to the bin below it.
    """
    rows = reliability_bins(probability, gold, bins)
    return sum(row["items"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / max(len(gold), 1)


def reliability_bins(probability: NDArray[Any], gold: NDArray[Any], bins: int = BINS) -> list[dict[str, Any]]:
    """Return the points of a reliability diagram: per bin with items, their number, mean confidence and accuracy.

    Args:
        probability: `[items, classes]`.
        gold: `[items]` label ids.
        bins: number of bins over (0, 1]; a confidence on a border belongs to the bin below it.
    """
    confidence = probability.max(-1)
    right = probability.argmax(-1) == gold
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    sure, correct = (np.bincount(place, weights=values, minlength=bins) for values in (confidence, right))
    return [
        {"items": int(count), "confidence": float(sure[i] / count), "accuracy": float(correct[i] / count)}
        for i, count in enumerate(counts)
        if count
    ]


def _figures(logits: NDArray[Any], gold: NDArray[Any], temperature: float) -> dict[str, Any]:
    probability = probabilities(logits, temperature)
    return {
        "nll": negative_log_likelihood(logits, gold, temperature),
        "ece": expected_calibration_error(probability, gold),
        "reliability": reliability_bins(probability, gold),
    }
