"""Score a trained model on texts that are masked, misspelt, or hold words that training did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokmask_peft.data import Example
from tokmask_peft.inference.classifier import Classifier
from tokmask_peft.inference.windows import Window
from tokmask_peft.masking.mask_token import maskable_table
from tokmask_peft.masking.pattern import masked_positions
from tokmask_peft.masking.words import word_start_table
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.study.diagnostics.noise import alphabet, disturb, disturb_text
from tokmask_peft.study.diagnostics.unseen import unseen_words
from tokmask_peft.training.metrics import Predictions, scores

METRICS = ("f1_macro", "f1_weighted", "accuracy")


@dataclass(frozen=True, slots=True)
class Disturbances:
    """What is done to the texts.

    Attributes:
        rates: masking rates above 0.
        noise: shares of misspelt words above 0.
        draws: random draws of each; scores are their means.
        seed: of the draws, the same for all runs.
        limit: score at most so many texts, drawn at random; none for all.
    """

    rates: tuple[float, ...]
    noise: tuple[float, ...]
    draws: int
    seed: int = 0
    limit: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def score_disturbed(
    classifier: Classifier, texts: Sequence[Example], known: set[str], what: Disturbances, batch_size: int = 64
) -> dict[str, Any]:
    """Return scores on the texts as they are, disturbed, and split by unseen words; JSON-able.

    Args:
        classifier: from `load`. As in `predict`, a text longer than those of training is read in windows, not cut.
        texts: labelled.
        known: the words of the training texts, from `unseen.vocabulary`.
        what: rates, shares and draws.
        batch_size: windows per forward pass.
    """
    if what.limit is not None and what.limit < len(texts):
        chosen = np.random.default_rng([what.seed, 0]).permutation(len(texts))[: what.limit]
        texts = [texts[index] for index in sorted(chosen)]
    ids = {label: number for number, label in enumerate(classifier.labels)}
    gold = [np.array([ids[tag] for tag in example.tags], dtype=np.int64) for example in texts]
    given = [example.string if classifier.task == "sequence" else list(example.words) for example in texts]
    plain = _predicted(classifier, given, batch_size)

    def mean(rounds: Sequence[list[NDArray[np.int64]]]) -> dict[str, Any]:
        found = [scores(*Predictions(gold, one).flat(), classifier.labels) for one in rounds]
        means = {metric: float(np.mean([one[metric] for one in found])) for metric in METRICS}
        return {**means, "f1_macro_by_draw": [one["f1_macro"] for one in found]}

    masks = _Masks(classifier, given, what.seed) if what.rates else None
    letters = alphabet(word for example in texts for word in example.words)

    def misspelt(share: float, draw: int) -> list[Any]:
        change: Any = disturb_text if classifier.task == "sequence" else disturb
        return [change(text, share, (what.seed, draw, number), letters) for number, text in enumerate(given)]

    draws = range(what.draws)
    return {
        "texts": len(texts),
        "clean": mean([plain]),
        "mask": [
            {"at": rate, **mean([masks.predicted(rate, draw, batch_size) for draw in draws])}
            for rate in what.rates
            if masks is not None
        ],
        "noise": [
            {"at": share, **mean([_predicted(classifier, misspelt(share, draw), batch_size) for draw in draws])}
            for share in what.noise
        ],
        "words": by_unseen(texts, gold, plain, known, classifier.labels),
    }


def by_unseen(
    texts: Sequence[Example],
    gold: Sequence[NDArray[np.int64]],
    predicted: Sequence[NDArray[np.int64]],
    known: set[str],
    labels: Sequence[str],
) -> dict[str, Any]:
    """Score texts with and without unseen words apart; in token tasks seen and unseen words."""
    parts: dict[str, Any] = {}
    unseen = [unseen_words(example.words, known) for example in texts]
    for name, wanted in (("seen", False), ("unseen", True)):
        pairs = []
        for flags, one, other in zip(unseen, gold, predicted, strict=True):
            chosen = np.array(flags if len(one) == len(flags) else [any(flags)]) == wanted
            pairs.append((one[chosen], other[chosen]))
        found = scores(*Predictions([a for a, _ in pairs], [b for _, b in pairs]).flat(), labels)
        parts[name] = {**{metric: found[metric] for metric in METRICS}, "items": found["items"]}
    return parts


class _Masks:
    """Texts under the masks that training would draw for them: same rule, unit, token and protection."""

    def __init__(self, classifier: Classifier, texts: Sequence[Any], seed: int) -> None:
        self._classifier, self._count, self._seed = classifier, len(texts), seed
        self._config = classifier.masking or TokenMaskConfig()
        self._windows = classifier.windower.cut(texts)
        tokenizer = classifier.tokenizer
        rows = len(classifier.occlusion.maskable)
        table = maskable_table(tokenizer, rows, {*self._config.protect, tokenizer.pad_token_id})
        longest = max(len(window.ids) for window in self._windows)
        self._ids = torch.full((len(self._windows), longest), int(tokenizer.pad_token_id))
        self._maskable = torch.zeros(self._ids.shape, dtype=torch.bool)
        for number, window in enumerate(self._windows):
            self._ids[number, : len(window.ids)] = torch.tensor(window.ids)
            self._maskable[number, : len(window.ids)] = table[window.ids]
        self._starts = None
        if self._config.unit != "token":
            self._starts = word_start_table(tokenizer, rows)[self._ids]

    def predicted(self, rate: float, draw: int, batch_size: int) -> list[NDArray[np.int64]]:
        unit, length = self._config.unit, self._config.span_length
        masked = masked_positions(
            self._ids, rate, self._seed, draw, 0, self._maskable, self._starts, unit, length
        ).numpy()
        hidden = [masked[number, : len(window.ids)] for number, window in enumerate(self._windows)]
        logits = self._classifier.forward.logits(self._windows, batch_size, self._classifier.occlusion, hidden)
        return _labels(self._classifier, self._windows, logits, self._count)


def _predicted(classifier: Classifier, texts: Sequence[Any], batch_size: int) -> list[NDArray[np.int64]]:
    windows = classifier.windower.cut(texts)
    return _labels(classifier, windows, classifier.forward.logits(windows, batch_size), len(texts))


def _labels(
    classifier: Classifier, windows: Sequence[Window], logits: Sequence[NDArray[np.float32]], texts: int
) -> list[NDArray[np.int64]]:
    """Return label ids per text, `[1]` or `[words]`, as `Classifier.predict` chooses them."""
    if classifier.task == "sequence":
        total = np.zeros((texts, len(classifier.labels)))
        for window, values in zip(windows, logits, strict=True):
            total[window.text] += values[0].astype(np.float64) * window.size
        return list(total.argmax(-1)[:, None])
    words = np.zeros(texts, dtype=np.int64)
    for window in windows:
        words[window.text] += len(window.words)
    found = [np.zeros(count, dtype=np.int64) for count in words]
    for window, values in zip(windows, logits, strict=True):
        found[window.text][window.words] = values.argmax(-1)
    return found
