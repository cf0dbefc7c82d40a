"""`tokmask faithfulness`: areas between masking curves, with intervals, compared with a run without masking.

If influences are right, masking the most influential words first lowers the label's probability faster than random
order does, and the least influential first more slowly. A model that was never masked also reacts to the masks as such;
training with masking should therefore make this measurement, and the influences, more trustworthy (Madsen, Reddy and
Chandar 2023, Faithfulness Measurable Masked Language Models, arXiv:2310.07819). Here that is measured, not assumed.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from scipy.stats import bootstrap

from tokmask_peft.artifacts import find_saved, open_finished
from tokmask_peft.errors import DataError, RunError
from tokmask_peft.inference.classifier import BATCH_SIZE, Classifier, load
from tokmask_peft.inference.explain import MOST_WORDS, Occluded, Question, explain
from tokmask_peft.recipe.loading import differences, load_recipe
from tokmask_peft.study.report import render
from tokmask_peft.study.statistics import MEANINGS
from tokmask_peft.tasks import get_task
from tokmask_peft.training.evaluate import split_examples
from tokmask_peft.training.metrics import probabilities

SHARES: NDArray[np.float64] = np.linspace(0.0, 1.0, 11)  # of a text's words, where curves are interpolated
RANDOM_ORDERS = 4
_TEXTS = 64  # at a time, which bounds the memory


def masking_curves(
    classifier: Classifier, texts: Sequence[Any], *, seed: int = 0, batch_size: int = 32
) -> dict[int, NDArray[np.float64]]:
    """Return the probability of the predicted label against the share of words masked.

    Influences are measured once, on the whole text, and masked words stay masked. In token tasks a word of each text is
    drawn, and the label is that word's. The seed, of these words and the random orders, is the same for every
    classifier. By index of the text `[3, shares]`: most influential first, least influential first, and the mean of
    `RANDOM_ORDERS` random orders; without texts of fewer than two words that can be masked, or of more than
    `MOST_WORDS`.
    """
    given = classifier.checked(texts)
    kept = [number for number, text in enumerate(given) if not too_long(text)]
    found: dict[int, NDArray[np.float64]] = {}
    for start in range(0, len(kept), _TEXTS):
        numbers = kept[start : start + _TEXTS]
        part, draws = [given[at] for at in numbers], [np.random.default_rng([seed, at]) for at in numbers]
        explained = [] if get_task(classifier.task).words_given else explain(classifier, part, batch_size=batch_size)
        for text, draw in zip(part, draws, strict=True) if not explained else ():
            explained += explain(classifier, [text], word=int(draw.integers(len(text))), batch_size=batch_size)
        steps, questions = dict[int, NDArray[np.int64]](), list[Question]()
        for text, explanation in enumerate(explained):
            words = np.delete(np.arange(len(explanation.words)), list(explanation.unmasked))
            if len(words) < 2:
                continue
            most = words[np.argsort(-np.array(explanation.influences)[words], kind="stable")]
            orders = [most, most[::-1], *(draws[text].permutation(words) for _ in range(RANDOM_ORDERS))]
            steps[text] = np.unique((SHARES * len(words)).round().astype(np.int64))
            masked = [frozenset(order[:step].tolist()) for order in orders for step in steps[text]]
            questions += [Question(text, words_masked, explanation.word) for words_masked in masked]
        logits = Occluded(classifier, part).logits(questions, batch_size)
        for text, counts in steps.items():
            own, logits = np.split(logits, [len(counts) * (2 + RANDOM_ORDERS)])
            label = classifier.labels.index(explained[text].label)
            shares, at = get_task(classifier.task).competing(own, label)
            values = probabilities(shares, classifier.temperature)[:, at].reshape(-1, len(counts))
            curves = np.stack([np.interp(SHARES, counts / counts[-1], row) for row in values])
            found[numbers[text]] = np.concatenate([curves[:2], curves[2:].mean(0, keepdims=True)])
    return found


def too_long(text: Any) -> bool:
    """Return whether a text has too many words to be explained."""
    return len(text if isinstance(text, list | tuple) else text.split()) > MOST_WORDS


MEASURES: dict[str, str] = MEANINGS["faithfulness"]
Ratio = tuple[NDArray[np.float64], NDArray[np.float64]]
_RESAMPLES = 9999


def faithfulness(
    run: str | Path,
    against: str | Path | None = None,
    *,
    split: str | None = None,
    data: str | None = None,
    limit: int = 200,
    seed: int = 0,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure how faithful occlusion is for a run, and how much more so than for one of its recipe without masking.

    `split` and `data` are as for `evaluate`; `limit` texts are drawn with `seed`, as are the random orders and the
    bootstrap; `batch_size` is masked texts per forward pass. Returned, JSON-able: `run` (and `against`), curves and
    areas with 95% bootstrap intervals over texts; `difference`, of the areas, paired by text. RunError if a folder is
    not a finished run, or the two differ in labels or task; DataError, ModelError and MaskTokenError say what to do.
    """
    if limit < 2:
        raise DataError(f"limit is {limit}; an interval needs 2 texts or more", code="too-few-texts")
    folders = {name: open_finished(path) for name, path in (("run", run), ("against", against)) if path is not None}
    recipes = {name: load_recipe(folder.recipe) for name, folder in folders.items()}
    saved = {}
    for name, folder in folders.items():
        saved[name] = find_saved(folder.root, trust_remote_code=trust_remote_code)
    if len({(found.info.task, found.info.labels) for found in saved.values()}) > 1:
        problem = f"{against} was trained for another task or other labels than {run}"
        raise RunError(f"{problem}; compare runs of one recipe", code="not-comparable")
    examples, _ = split_examples(recipes["run"], split, data, folders["run"].adapter)
    chosen = sorted(random.Random(seed).sample(range(len(examples)), min(limit, len(examples))))  # noqa: S311
    texts = [examples[number].text for number in chosen]
    result: dict[str, Any] = {"split": split or Path(data or "test").name, "seed": seed}
    result |= {"shares": SHARES.tolist(), "random_orders": RANDOM_ORDERS}
    curves, parts = {}, {}
    for name, folder in folders.items():
        classifier = load(saved[name])
        curves[name] = masking_curves(classifier, texts, seed=seed, batch_size=batch_size or BATCH_SIZE)
        result[name] = {"path": str(folder.root), "p": recipes[name].masking.p, "mask": classifier.occlusion.note}
    kept = sorted(set.intersection(*map(set, curves.values())))
    if len(kept) < 2:
        problem = f"fewer than 2 of the texts have 2 to {MOST_WORDS:,} words, two of which can be masked"
        raise DataError(problem, code="too-few-texts")
    long = sum(map(too_long, texts))
    result |= {"texts": len(kept), "left_out": len(texts) - len(kept), **({"too_long": long} if long else {})}
    for name, found in curves.items():
        stacked = np.stack([found[number] for number in kept])
        result[name]["curves"] = dict(zip(("most", "least", "random"), stacked.mean(0).tolist(), strict=True))
        parts[name] = areas(stacked)
        result[name]["measures"] = {key: interval(pair, None, seed) for key, pair in parts[name].items()}
    if against is not None:
        result["difference"] = {key: interval(parts["run"][key], parts["against"][key], seed) for key in MEASURES}
        changed = differences(recipes["against"], recipes["run"])
        result["other_differences"] = [line for line in changed if not line.startswith("masking.")]
    return result


def areas(curves: NDArray[np.float64]) -> dict[str, Ratio]:
    """Return each measure as numerator and denominator by text; `curves` is [texts, 3, shares].

    The relative area is RACU (Madsen et al. 2021, arXiv:2110.08412), of probabilities and without retraining: the
    largest possible area is that above the probability that is left when all words are masked.
    """
    (most, least, other), one = trapezoid(curves, SHARES, axis=-1).T, np.ones(len(curves))
    return {
        "least_minus_most": (least - most, one),
        "random_minus_most": (other - most, one),
        "least_minus_random": (least - other, one),
        "relative": (other - most, other - curves[:, 0, -1]),
        "random_fall": (curves[:, 0, 0] - other, one),
    }


def interval(values: Ratio, others: Ratio | None, seed: int) -> dict[str, float]:
    """Return a ratio of means over texts, or its difference from `others`, with its 95% bootstrap interval."""

    def statistic(*columns: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        means = [column.mean(axis=axis) for column in columns]
        return np.asarray(means[0] / means[1] - (means[2] / means[3] if len(means) > 2 else 0.0))

    columns = (*values, *(others or ()))
    mean = float(statistic(*columns))
    if all(np.ptp(column) == 0.0 for column in columns):
        return {"mean": mean, "low": mean, "high": mean}
    options: Any = {"n_resamples": _RESAMPLES, "method": "percentile", "paired": True, "batch": 1000}
    found = bootstrap(columns, statistic, rng=np.random.default_rng(seed), **options).confidence_interval
    return {"mean": mean, "low": float(found.low), "high": float(found.high)}


def report_text(result: dict[str, Any]) -> str:
    """Return the report in plain words."""
    parts = [result[name] for name in ("run", "against") if name in result]
    return render(
        "faithfulness", **{"difference": None, "too_long": 0, **result}, parts=parts, measures=MEASURES
    ).rstrip("\n")
