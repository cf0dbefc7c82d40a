"""A split as the Trainer sees it, and the way back from its padded arrays to texts and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokmask_peft.data import Encoded, Example, encode
from tokmask_peft.training.losses import IGNORED
from tokmask_peft.training.metrics import NO_PREDICTION, Predictions


@dataclass(frozen=True)
class Split:
    """Encoded texts in order of length, so that evaluation wastes little on padding.

    Attributes:
        dataset: rows for the Trainer, shortest first.
        order: `[texts]`, for each row of `dataset` the index of its text.
    """

    examples: Sequence[Example]
    labels: tuple[str, ...]
    encoded: Encoded
    dataset: Any
    order: NDArray[np.int64]

    @classmethod
    def make(
        cls, examples: Sequence[Example], tokenizer: Any, task: Any, labels: tuple[str, ...], max_length: int
    ) -> Split:
        """Encode `examples` and sort them by length (ties in the order of the texts)."""
        encoded = encode(examples, tokenizer, task, labels, max_length)
        order = np.argsort(np.asarray(encoded.dataset["length"]), kind="stable").astype(np.int64)
        return cls(examples, labels, encoded, encoded.dataset.select(order), order)

    def predictions(self, predicted: NDArray[np.int64], gold: NDArray[np.int64]) -> Predictions:
        """Return predictions per text, in the order of the texts.

        Args:
            predicted: `[texts]` or `[texts, seq]` label ids in the order of `dataset`.
            gold: the label ids that the model saw, of the same shape; -100 where there is none.
        """
        ids = {label: i for i, label in enumerate(self.labels)}
        gold_rows: list[Any] = [None] * len(self.examples)
        found_rows: list[Any] = [None] * len(self.examples)
        for row, text in enumerate(self.order):
            label = self.examples[text].label
            if self.encoded.kept is None:
                gold_rows[text] = np.array([ids[str(label)]])
                found_rows[text] = np.array([predicted[row]])
                continue
            gold_rows[text] = np.array([ids[tag] for tag in label or ()], dtype=np.int64)
            found_rows[text] = np.full(len(gold_rows[text]), NO_PREDICTION)
            found_rows[text][self.encoded.kept[text]] = predicted[row][gold[row] != IGNORED]
        return Predictions(gold_rows, found_rows)
