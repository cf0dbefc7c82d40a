"""The scores of a run: its best checkpoint on validation and test, beside the baseline's."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokmask_peft.data.corpus import Corpus
from tokmask_peft.errors import RunError
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.tasks import Example
from tokmask_peft.training.metrics import Predictions, calibrate, scores, scores_by_mixing
from tokmask_peft.training.trainer import OrderedEvalTrainer, Split

DESCRIPTION = "character 1- to 5-grams within words (tf-idf), logistic regression"


def baseline_scores(train: Sequence[Example], test: Sequence[Example], labels: Sequence[str], task: str) -> dict:
    """Fit the baseline on `train` and score it on `test`.

    In token tasks each word is classified without its context. Equal words with equal labels are one row, with
    their number as weight: the same fit as on repeated rows, in less time. (The idf of an n-gram counts those rows.)

    Returns:
        The scores of `metrics.scores`, with `method` and `seconds`.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    start = time.perf_counter()
    ids = {label: i for i, label in enumerate(labels)}
    counted = Counter(_items(train, task))
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), lowercase=False, sublinear_tf=True)
    features = vectorizer.fit_transform([text for text, _ in counted])
    model = LogisticRegression(C=10.0, max_iter=300)
    model.fit(
        features,
        np.array([ids[label] for _, label in counted]),
        sample_weight=np.array(list(counted.values()), dtype=np.float64),
    )
    items = list(_items(test, task))
    distinct = sorted({text for text, _ in items})
    answer = dict(zip(distinct, model.predict(vectorizer.transform(distinct)), strict=True))
    gold = np.array([ids[label] for _, label in items])
    predicted = np.array([answer[text] for text, _ in items])
    return {
        **scores(gold, predicted, labels),
        "method": DESCRIPTION,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _items(examples: Sequence[Example], task: str) -> Any:
    for example in examples:
        if task == "token":
            yield from zip(example.text, example.label or (), strict=True)
        else:
            yield example.text, example.label


def score_best(
    trainer: OrderedEvalTrainer, recipe: Recipe, corpus: Corpus, parts: Mapping[str, Split]
) -> tuple[dict[str, Any], dict[str, Predictions]]:
    """Score the best checkpoint, which the trainer has loaded.

    Args:
        trainer: after training.
        recipe: of the run.
        corpus: its texts.
        parts: their encoded splits `train`, `validation` and, where there is one, `test`.

    Returns:
        What `result.json` holds of scores, calibration and data; and the predictions per split.
    """
    labels = corpus.labels
    found, *seen = trainer.predict_with_logits(parts["validation"])
    predictions = {"validation": found}
    logits: dict[str, Any] = {"validation": seen}
    result: dict[str, Any] = {
        "name": recipe.name,
        "task": recipe.data.task,
        "labels": list(labels),
        "seed": recipe.seed,
        "masking": recipe.masking.model_dump(mode="json"),
        "validation": scores(*found.flat(), labels),
        "best_step": trainer.state.best_global_step,
        "steps": trainer.state.global_step,
    }
    if "test" in parts:
        found, *logits["test"] = trainer.predict_with_logits(parts["test"])
        predictions["test"] = found
        result["test"] = scores(*found.flat(), labels)
        if recipe.data.task == "token" and recipe.data.language_labels:
            result["test"]["by_mixing"] = scores_by_mixing(found, labels, recipe.data.language_labels)
    result["calibration"] = calibrate(logits)
    if recipe.training.baseline and trainer.is_world_process_zero():
        scored_on = corpus.test or corpus.validation
        result["baseline"] = baseline_scores(corpus.train, scored_on, labels, recipe.data.task)
    result["data"] = {
        **corpus.report.to_dict(),
        "truncation": {name: part.encoded.truncation.to_dict() for name, part in parts.items()},
    }
    return result, predictions


def check_best(result: dict[str, Any], best: float | None) -> None:
    """Fail when the saved adapter is not the one that was best in training.

    Args:
        result: of `score_best`.
        best: macro-F1 on validation of the best checkpoint, as the Trainer has it; none if it has none.

    Raises:
        RunError: it is another one.
    """
    found = result["validation"]["f1_macro"]
    if best is not None and abs(found - best) > 0.005:
        raise RunError(
            f"the best checkpoint scored {best:.4f} macro-F1 on validation, but the saved adapter scores {found:.4f}: "
            "the scores above do not belong to the best checkpoint. Please report this with result.json."
        )
