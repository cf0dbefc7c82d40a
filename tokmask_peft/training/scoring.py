"""The scores of a run: its best checkpoint on validation and test, compared with a baseline's."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokmask_peft.artifacts import Result
from tokmask_peft.data.corpus import Corpus
from tokmask_peft.errors import RunError
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.tasks import Example, get_task
from tokmask_peft.training.metrics import Predictions, calibrate, scores, scores_by_mixing
from tokmask_peft.training.trainer import OrderedEvalTrainer, Split


def baseline_scores(
    train: Sequence[Example], test: Sequence[Example], labels: Sequence[str], task: str
) -> dict[str, Any]:
    """Fit logistic regression over character n-grams on `train`, and score it on `test`.

    In token tasks each word is classified without its context. Equal items with equal labels are one row, weighted by
    their number: the same fit as on repeated rows, in less time. (The idf of an n-gram counts those rows.) Returns the
    scores of `metrics.scores`, with `method` and `seconds`.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    start = time.perf_counter()
    ids = {label: i for i, label in enumerate(labels)}
    counted = Counter(item for example in train for item in get_task(task).items(example))
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), lowercase=False, sublinear_tf=True)
    features = vectorizer.fit_transform([text for text, _ in counted])
    weights = np.array(list(counted.values()), dtype=np.float64)
    model = LogisticRegression(C=10.0, max_iter=300)
    model.fit(features, np.array([ids[label] for _, label in counted]), sample_weight=weights)
    items = [item for example in test for item in get_task(task).items(example)]
    distinct = sorted({text for text, _ in items})
    answer = dict(zip(distinct, model.predict(vectorizer.transform(distinct)), strict=True))
    gold, predicted = np.array([(ids[label], answer[text]) for text, label in items]).T
    return {
        **scores(gold, predicted, labels),
        "method": "character 1- to 5-grams within words (tf-idf), logistic regression",
        "seconds": round(time.perf_counter() - start, 1),
    }


def scores_of(recipe: Recipe, found: Predictions, labels: Sequence[str], by_mixing: bool = True) -> dict[str, Any]:
    """Return the scores of a split, with those of its task, and `by_mixing` if the recipe names language labels."""
    task, languages = get_task(recipe.data.task), recipe.data.language_labels
    result = scores(*found.flat(), labels) | task.more_scores(*found.flat(), labels)
    if by_mixing and languages and task.words_given:
        result["by_mixing"] = scores_by_mixing(found, labels, languages)
    return result


def score_best(
    trainer: OrderedEvalTrainer, recipe: Recipe, corpus: Corpus, splits: Mapping[str, Split]
) -> tuple[Result, dict[str, Predictions]]:
    """Score the best checkpoint, which the trainer has loaded.

    Returns what `result.json` will hold, except for decisions and speed, and the predictions for each split.
    """
    labels, predictions, logits = corpus.labels, dict[str, Predictions](), dict[str, Any]()
    for name in ("validation", "test"):
        if name in splits:
            predictions[name], *logits[name] = trainer.predict_windows(splits[name])
    baseline = None
    if recipe.training.baseline and trainer.is_world_process_zero():
        baseline = baseline_scores(corpus.train, corpus.test or corpus.validation, labels, recipe.data.task)
    truncation = {name: splits[name].encoded.truncation.to_dict() for name in ("train", "validation")}
    result = Result(
        name=recipe.name,
        task=recipe.data.task,
        labels=list(labels),
        seed=recipe.seed,
        masking=recipe.masking.model_dump(mode="json"),
        validation=scores_of(recipe, predictions["validation"], labels, by_mixing=False),
        best_step=trainer.state.best_global_step,
        steps=trainer.state.global_step,
        test=scores_of(recipe, predictions["test"], labels) if "test" in predictions else None,
        calibration=calibrate(logits),
        baseline=baseline,
        data=corpus.report.to_dict() | {"truncation": truncation},
    )
    return result, predictions


def check_best(trainer: OrderedEvalTrainer, result: Result, validation: Split) -> None:
    """Fail if the loaded adapter is not the one that was best in training, where validation texts are cut.

    Raises:
        RunError: it is another one.
    """
    found, best = result.validation["f1_macro"], trainer.state.best_metric
    if validation.encoded.truncation.texts_cut:
        found = trainer.predict(validation.dataset).metrics["test_f1_macro"]
    if best is not None and abs(found - best) > 0.005:
        raise RunError(
            f"the best checkpoint scored {best:.4f} macro-F1 on validation, but loaded again it scores {found:.4f}: "
            "no adapter is saved. Please report this with log.jsonl.",
            code="not-the-best",
        )
