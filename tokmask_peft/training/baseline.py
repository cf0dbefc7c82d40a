"""The floor to respect: character n-grams with logistic regression, from scikit-learn, on the same split."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokmask_peft.data import Example
from tokmask_peft.training.metrics import scores

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
