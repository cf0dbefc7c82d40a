"""The scores of predictions, and probabilities that mean what they say: one temperature, fitted on validation.

Calibration (Guo et al. 2017, arXiv:1706.04599) covers the items that the model saw, not words that were cut away.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax

from tokmask_peft.errors import RunError, read_json
from tokmask_peft.examples import NO_PREDICTION
from tokmask_peft.spans import Span, read
from tokmask_peft.tasks import Task

METRICS = ("f1_macro", "f1_weighted")
LEVEL = 0.95
_WEIGHTS_AT_ONCE = 2_000_000


@dataclass(frozen=True, slots=True)
class Predictions:
    """Gold and predicted label ids, a pair of arrays per text (one id for each of its items)."""

    gold: list[NDArray[np.int64]]
    predicted: list[NDArray[np.int64]]

    def flat(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return all gold and all predicted ids, `[items]` each."""
        none = np.zeros(0, dtype=np.int64)
        return np.concatenate([none, *self.gold]), np.concatenate([none, *self.predicted])

    def to_dict(self) -> dict[str, list[list[int]]]:
        """Return a JSON-able form: a list of label ids per text, `NO_PREDICTION` for what was cut away."""
        return {"gold": [row.tolist() for row in self.gold], "predicted": [row.tolist() for row in self.predicted]}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `to_dict` returned from a file; a RunError if it cannot be read."""
        return cls.from_dict(read_json(path, RunError, "bad-predictions"))

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned."""
        return cls(*([np.array(row, dtype=np.int64) for row in found[part]] for part in ("gold", "predicted")))


def scores(gold: NDArray[np.int64], predicted: NDArray[np.int64], labels: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, macro and weighted F1, per-class figures and the confusion matrix, JSON-able.

    Macro-F1 is the mean over the classes that occur among the gold or the predicted labels, as in scikit-learn. Ids are
    `[items]`, `NO_PREDICTION` for none, which gold ones are only if a text has an item per label. `confusion` has a row
    for each gold label, a column for each predicted one, and a last column for items without a prediction.
    """
    from sklearn.metrics import precision_recall_fscore_support

    classes, counts, labelled = len(labels), np.zeros((len(labels), len(labels) + 1), dtype=np.int64), gold >= 0
    column = np.where(predicted == NO_PREDICTION, classes, predicted)
    np.add.at(counts, (gold[labelled], column[labelled]), 1)
    found = np.zeros((4, classes))
    if len(gold):  # scikit-learn refuses to count nothing
        found = precision_recall_fscore_support(gold, predicted, labels=range(classes), zero_division=0.0)
    f1, support, missing = found[2], found[3], int(counts[:, classes].sum())
    occurring = np.bincount(column, minlength=classes + 1)[:classes] + support > 0
    return {
        "f1_macro": float(f1[occurring].mean()) if occurring.any() else 0.0,
        "f1_weighted": float(np.dot(f1, support) / max(labelled.sum(), 1)),
        "accuracy": float(counts.trace() / max(len(gold), 1)),
        "items": len(gold),
        "without_prediction": missing,
        "per_class": {
            label: {"precision": float(row[0]), "recall": float(row[1]), "f1": float(row[2]), "support": int(row[3])}
            for label, row in zip(labels, np.transpose(found), strict=True)
        },
        "confusion": {
            "labels": [*labels, *(["(none)"] if missing else [])],
            "matrix": counts[:, : classes + bool(missing)].tolist(),
        },
    }


def task_scores(task: Task, found: Predictions, labels: Sequence[str]) -> dict[str, Any]:
    """Return the scores of predictions, with those of the task."""
    return scores(*found.flat(), labels) | task.more_scores(*found.flat(), labels)


def code_mixing_index(tags: Sequence[str], languages: Sequence[str]) -> float:
    """Return a post's code-mixing index (Das and Gambäck 2014), 100 (1 - max_l w_l / (n - u)): 0 to below 100."""
    counts = Counter(tag for tag in tags if tag in languages)
    spoken = sum(counts.values())
    return 100.0 * (spoken - max(counts.values())) / spoken if counts else 0.0  # exact at the bounds of the bins


MIXING_BINS = ((0.0, 0.0), (0.0, 15.0), (15.0, 30.0), (30.0, 45.0), (45.0, 100.0))
"""Bounds of the code-mixing bins: above the first (the first bin is exactly 0), up to and with the second."""


def scores_by_mixing(found: Predictions, labels: Sequence[str], languages: Sequence[str]) -> list[dict[str, Any]]:
    """Return macro and weighted F1 over the posts of each code-mixing bin; empty bins are left out."""
    index = np.array([code_mixing_index([labels[i] for i in gold], languages) for gold in found.gold])
    rows = []
    for low, high in MIXING_BINS:
        chosen = np.flatnonzero(index == 0.0 if high == 0.0 else (index > low) & (index <= high))
        if len(chosen):
            part = Predictions([found.gold[i] for i in chosen], [found.predicted[i] for i in chosen])
            result, name = scores(*part.flat(), labels), "0" if high == 0.0 else f"{low:g} to {high:g}"
            row = {"cmi": name, "posts": len(chosen), "words": result["items"]}
            rows.append(row | {metric: result[metric] for metric in METRICS})
    return rows


def text_counts(gold: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]], classes: int) -> NDArray[np.float64]:
    """Count each text's items by class, `[3, texts, classes]`: found correctly, of the class, given the class."""
    text = np.repeat(np.arange(len(gold)), [len(row) for row in gold])
    true, found = (np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) for rows in (gold, predicted))
    counts, right = np.zeros((3, len(gold), classes)), (true == found) & (true >= 0)
    for part, label, chosen in zip(counts, (true, true, found), (right, true >= 0, found >= 0), strict=True):
        np.add.at(part, (text[chosen], label[chosen]), 1)
    return counts


def f1_of(counts: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Return macro and weighted F1 of counts `[3, ..., classes]`, as `scores` defines them."""
    right, gold, given = counts
    f1 = 2 * right / np.maximum(gold + given, 1)
    occurring = (gold + given) > 0
    macro = f1.sum(-1, where=occurring) / np.maximum(occurring.sum(-1), 1)
    weighted = (f1 * gold).sum(-1) / np.maximum(gold.sum(-1), 1)
    return {"f1_macro": macro, "f1_weighted": weighted}


def bootstrap_differences(
    arms: Mapping[Any, Sequence[NDArray[np.float64]]], reference: Any, replicates: int = 2000, seed: int = 0
) -> dict[Any, dict[str, NDArray[np.float64]]]:
    """Draw seeds and texts, the same for all arms, and return each other arm's mean F1 minus the `reference`'s.

    Every seed scores the same test texts, so seeds and texts are crossed: each replicate draws seeds and, for all of
    them, texts, both with replacement (the pigeonhole bootstrap, Owen 2007, arXiv:0712.1111). A text is drawn with its
    words, which depend on each other. `arms` have the `text_counts` of their runs, in the same order of seeds, on the
    same texts; the result, for each arm and metric, is `[replicates]`.
    """
    random = np.random.default_rng(seed)
    runs, texts = len(arms[reference]), arms[reference][0].shape[1]
    chosen_runs = random.integers(0, runs, (1, replicates, runs))
    scored = {arm: np.empty((len(METRICS), replicates, runs)) for arm in arms}
    step = max(1, _WEIGHTS_AT_ONCE // texts)
    for start in range(0, replicates, step):
        rows = slice(start, min(start + step, replicates))
        draws = random.multinomial(texts, np.full(texts, 1 / texts), rows.stop - start).astype(np.float64)
        for arm, counts in arms.items():
            for run, part in enumerate(counts):
                found = f1_of(draws @ part)
                scored[arm][:, rows, run] = [found[metric] for metric in METRICS]
    means = {arm: np.take_along_axis(values, chosen_runs, axis=2).mean(2) for arm, values in scored.items()}
    others = {arm: found - means[reference] for arm, found in means.items() if arm != reference}
    return {arm: dict(zip(METRICS, found, strict=True)) for arm, found in others.items()}


def entity_counts(found: Predictions, labels: Sequence[str]) -> NDArray[np.float64]:
    """Count each text's entities, `[3, texts, 1]`: found correctly, in the data, predicted; see `text_counts`."""
    rows = [(len(gold & given), len(gold), len(given)) for gold, given in _entities(found, labels)]
    return np.array(rows, dtype=np.float64).reshape(-1, 3).T[:, :, None]


def _entities(found: Predictions, labels: Sequence[str]) -> Iterator[tuple[set[Span], set[Span]]]:
    """Yield the entities of each text in the data and in the predictions; a word without a prediction is outside."""
    for pair in zip(found.gold, found.predicted, strict=True):
        gold, given = ({*read(labels[i] if i >= 0 else "O" for i in ids.tolist())} for ids in pair)
        yield gold, given


def entity_scores(found: Predictions, labels: Sequence[str]) -> dict[str, Any]:
    """Return `f1_entities` and, in `entities`, precision, recall and counts, over all types and for each, JSON-able.

    An entity is right if type, first and last word are: micro scores in seqeval's default mode (see `spans`).
    """
    counts = Counter[str](), Counter[str](), Counter[str]()  # by type: found correctly, in the data, predicted
    for gold, given in _entities(found, labels):
        for counter, entities in zip(counts, (gold & given, gold, given), strict=True):
            counter.update(kind for kind, _, _ in entities)

    def figures(right: int, gold: int, given: int) -> dict[str, Any]:
        shares = {"precision": right / max(given, 1), "recall": right / max(gold, 1)}
        return {**shares, "f1": 2 * right / max(gold + given, 1), "support": gold, "predicted": given}

    total = figures(*(counter.total() for counter in counts))
    part = entity_counts(found, labels)
    drawn = bootstrap_differences({"none": [np.zeros_like(part)], "all": [part]}, "none")["all"]["f1_macro"]
    by_type = {kind: figures(*(counter[kind] for counter in counts)) for kind in sorted(counts[1] | counts[2])}
    return {
        "f1_entities": total["f1"],
        "entities": {**total, "interval": percentile_interval(drawn), "per_type": by_type},
    }


def percentile_interval(values: NDArray[np.float64]) -> list[float]:
    """Return the 95% percentile interval of bootstrap replicates."""
    return [float(bound) for bound in np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def entity_gain(ours: Predictions, theirs: Predictions, labels: Sequence[str]) -> list[float]:
    """Return the 95% interval of a gain in F1 of entities on the same texts (paired bootstrap)."""
    arms = {name: [entity_counts(arm, labels)] for name, arm in enumerate((theirs, ours))}
    return percentile_interval(bootstrap_differences(arms, 0)[1]["f1_macro"])


def compared(ours: Predictions, theirs: Predictions, classes: int) -> dict[str, Any]:
    """Return the 95% interval of a gain in macro-F1 on the same texts (paired bootstrap), and the verdict it allows."""
    arms = [[text_counts(**arm.to_dict(), classes=classes)] for arm in (theirs, ours)]
    low, high = percentile_interval(bootstrap_differences(dict(enumerate(arms)), 0)[1]["f1_macro"])
    verdict = "beats" if low > 0 else "does not beat" if high < 0 else "cannot tell"
    return {"interval": [low, high], "verdict": verdict}


BINS = 15  # of a reliability diagram, of equal width over (0, 1]
LOWEST, HIGHEST = 0.2, 5.0  # bounds of the temperature


def fit_temperature(logits: NDArray[Any], gold: NDArray[Any]) -> float:
    """Return the temperature T, 0.2 to 5, that minimises the negative log likelihood of softmax(logits / T).

    It is 1 if that is no worse, or if no item is wrong: the best T would be 0, which says nothing about new texts.
    """
    if len(gold) == 0 or bool((logits.argmax(-1) == gold).all()):
        return 1.0

    def loss(power: float) -> float:
        return negative_log_likelihood(logits, gold, np.exp(power))

    best = minimize_scalar(loss, bounds=np.log([LOWEST, HIGHEST]), options={"xatol": 1e-9})
    return float(np.exp(best.x)) if best.fun <= loss(0.0) else 1.0


def calibrate(parts: dict[str, tuple[NDArray[Any], NDArray[Any]]]) -> dict[str, Any]:
    """Fit the temperature on validation; return it with what it changes on each part, JSON-able.

    `parts` have logits `[items, classes]` and gold ids `[items]`; ids that the model cannot give are left out. A
    temperature at its bounds, or with which negative log likelihood or calibration error on validation do not fall, is
    not used: then `temperature` is 1, `fitted` the one that `after` reports on, and `left_out` the reason. RunError if
    a logit is not finite.
    """
    known = {}
    for name, (logits, gold) in parts.items():
        if not np.isfinite(logits).all():
            problem = f"the trained model's logits on {name} are not finite, so its scores mean nothing"
            remedy = "Lower training.learning_rate, or set model.precision=fp32."
            raise RunError(f"{problem}. {remedy}", code="not-finite", split=name)
        known[name] = logits[gold < logits.shape[-1]], gold[gold < logits.shape[-1]]
    fitted = fit_temperature(*known["validation"])
    method = "one temperature, fitted on validation (Guo et al. 2017)"
    report: dict[str, Any] = {"temperature": fitted, "method": method, "bins": BINS}
    for name, (logits, gold) in known.items():
        report[name] = {"items": len(gold)}
        for when, divisor in (("before", 1.0), ("after", fitted)):
            rows = reliability_bins(probabilities(logits, divisor), gold)
            nll = negative_log_likelihood(logits, gold, divisor)
            report[name][when] = {"nll": nll, "ece": expected_calibration_error(rows), "reliability": rows}
    before, after = report["validation"]["before"], report["validation"]["after"]
    worse = after["nll"] >= before["nll"] or after["ece"] >= before["ece"]
    reason = f"the one fitted on validation, {fitted:.3f}, does not help on validation" if worse else None
    if fitted == 1.0:
        reason = "validation gives no reason for one"
    elif not LOWEST * 1.001 < fitted < HIGHEST / 1.001:
        reason = f"the best one on validation is not between {LOWEST:g} and {HIGHEST:g}, a sign of too few texts"
    return report if reason is None else report | {"temperature": 1.0, "fitted": fitted, "left_out": reason}


def probabilities(logits: NDArray[Any], temperature: float = 1.0) -> NDArray[np.float64]:
    """Return softmax(logits / temperature) along the last axis, in double precision."""
    return np.asarray(softmax(logits.astype(np.float64) / temperature, axis=-1))


def thresholds_of(cuts: Sequence[float], labels: Sequence[str], temperature: float) -> dict[str, float]:
    """Return each label's threshold from the cuts of `Task.fit_cuts`, as calibrated probabilities, never 0 or 1."""
    chances = expit(np.asarray(cuts) / temperature).clip(1e-12, 1 - 1e-12)
    return dict(zip(labels, chances.tolist(), strict=True))


def negative_log_likelihood(logits: NDArray[Any], gold: NDArray[Any], temperature: float = 1.0) -> float:
    """Return the mean of -log p(gold), in nats; 0 for no items."""
    chosen = log_softmax(logits.astype(np.float64) / temperature, axis=-1)[np.arange(len(gold)), gold]
    return float(-chosen.mean()) if len(gold) else 0.0


def expected_calibration_error(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean distance between confidence and accuracy over `reliability_bins`, weighted by their items."""
    distances = sum(row["items"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    return float(distances / max(sum(row["items"] for row in rows), 1))


def reliability_bins(probability: NDArray[Any], gold: NDArray[Any], bins: int = BINS) -> list[dict[str, Any]]:
    """Return a reliability diagram's points: number, mean confidence and accuracy of items in equal bins of (0, 1].

    A confidence on a border belongs to the bin below. Empty bins are left out.
    """
    confidence, right = probability.max(-1), probability.argmax(-1) == gold
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts, *sums = (np.bincount(place, weights=values, minlength=bins) for values in (None, confidence, right))
    rows = zip(counts, *sums, strict=True)
    return [
        {"items": int(count), "confidence": float(sure / count), "accuracy": float(correct / count)}
        for count, sure, correct in rows
        if count
    ]
