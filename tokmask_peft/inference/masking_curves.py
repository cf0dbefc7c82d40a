"""How a label's probability falls as words are masked: the most influential first, the least, or in random order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokmask_peft.inference.explain import Explanation, explain
from tokmask_peft.inference.occluded import Occluded, Question
from tokmask_peft.training.calibration import probabilities

if TYPE_CHECKING:
    from tokmask_peft.inference.classifier import Classifier

SHARES: NDArray[np.float64] = np.linspace(0.0, 1.0, 11)
"""Shares of a text's words at which curves are read, by linear interpolation between whole words."""

RANDOM_ORDERS = 4
_TEXTS = 64  # at a time, which bounds the memory


def masking_curves(
    classifier: Classifier, texts: Sequence[Any], *, seed: int = 0, batch_size: int = 32
) -> dict[int, NDArray[np.float64]]:
    """Return the probability of the predicted label against the share of words masked.

    Influences are measured once, on the whole text, and masked words stay masked. In token tasks a word of each text is
    drawn, and the label is that word's.

    Args:
        classifier: from `load`.
        texts: as for `Classifier.predict`.
        seed: of the random orders and the drawn words, the same for every classifier.
        batch_size: windows per forward pass.

    Returns:
        By index of the text `[3, shares]`: most influential first, least influential first, and the mean of
        `RANDOM_ORDERS` random orders. Texts with fewer than two words that can be masked are left out.
    """
    given = classifier.checked(texts)
    found: dict[int, NDArray[np.float64]] = {}
    for start in range(0, len(given), _TEXTS):
        part = given[start : start + _TEXTS]
        draws = [np.random.default_rng([seed, start + number]) for number in range(len(part))]
        explained = _explained(classifier, part, draws, batch_size)
        for number, curve in _curves(classifier, part, explained, draws, batch_size).items():
            found[start + number] = curve
    return found


def _explained(
    classifier: Classifier, texts: Sequence[Any], draws: Sequence[np.random.Generator], batch_size: int
) -> list[Explanation]:
    if classifier.task == "sequence":
        return explain(classifier, texts, batch_size=batch_size)
    words = [int(draw.integers(len(text))) for text, draw in zip(texts, draws, strict=True)]
    return [
        explanation
        for text, word in zip(texts, words, strict=True)
        for explanation in explain(classifier, [text], word=word, batch_size=batch_size)
    ]


def _curves(
    classifier: Classifier,
    texts: Sequence[Any],
    explained: Sequence[Explanation],
    draws: Sequence[np.random.Generator],
    batch_size: int,
) -> dict[int, NDArray[np.float64]]:
    occluded = Occluded(classifier, texts)
    steps: dict[int, NDArray[np.int64]] = {}
    questions: list[Question] = []
    for text, explanation in enumerate(explained):
        words = np.array([n for n in range(len(explanation.words)) if n not in explanation.unmasked], dtype=np.int64)
        if len(words) < 2:
            continue
        most = words[np.argsort(-np.array(explanation.influences)[words], kind="stable")]
        orders = [most, most[::-1], *(draws[text].permutation(words) for _ in range(RANDOM_ORDERS))]
        steps[text] = np.unique((SHARES * len(words)).round().astype(np.int64))
        questions += [
            Question(text, frozenset(order[:step].tolist()), explanation.word)
            for order in orders
            for step in steps[text]
        ]
    logits = occluded.logits(questions, batch_size)
    found: dict[int, NDArray[np.float64]] = {}
    start = 0
    for text, counts in steps.items():
        stop = start + len(counts) * (2 + RANDOM_ORDERS)
        label = classifier.labels.index(explained[text].label)
        values = probabilities(logits[start:stop], classifier.temperature)[:, label].reshape(-1, len(counts))
        curves = np.stack([np.interp(SHARES, counts / counts[-1], row) for row in values])
        found[text] = np.concatenate([curves[:2], curves[2:].mean(0, keepdims=True)])
        start = stop
    return found
