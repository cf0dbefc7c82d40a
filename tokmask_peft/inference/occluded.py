"""What a classifier says of a text with some of its words masked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokmask_peft.inference.forward import Hidden
from tokmask_peft.inference.windows import Window

if TYPE_CHECKING:
    from tokmask_peft.inference.classifier import Classifier


@dataclass(frozen=True, slots=True)
class Question:
    """A text with some words masked.

    Attributes:
        text: index of the text.
        masked: indices of the words to mask; may be none.
        word: token tasks: the word whose label is asked for.
    """

    text: int
    masked: frozenset[int]
    word: int | None = None


class Occluded:
    """Texts of which words can be masked.

    Args:
        classifier: what answers; its occlusion says how words are masked.
        texts: as `Classifier.checked` gives them.
    """

    def __init__(self, classifier: Classifier, texts: Sequence[Any]) -> None:
        self.classifier = classifier
        self._windows = classifier.windower.cut(texts, owners=True)
        self._of_text: list[list[int]] = [[] for _ in texts]
        for number, window in enumerate(self._windows):
            self._of_text[window.text].append(number)
        self._maskable = [
            classifier.occlusion.maskable[window.ids] & (_owners(window) >= 0) for window in self._windows
        ]

    def maskable_words(self, text: int) -> set[int]:
        """Return the words of a text of which at least a sub-token can be masked."""
        return {
            int(word)
            for number in self._of_text[text]
            for word in np.unique(_owners(self._windows[number])[self._maskable[number]])
        }

    def logits(self, questions: Sequence[Question], batch_size: int) -> NDArray[np.float64]:
        """Answer in few forward passes; a window in which nothing changes is computed once.

        Returns:
            `[questions, classes]`: of the text (the mean over its windows, weighted by their sub-tokens), or in token
            tasks of the word that is asked for.
        """
        wanted: dict[tuple[int, bytes], int] = {}
        jobs: list[tuple[Window, Hidden]] = []
        needs = []
        for question in questions:
            need = []
            for number in self._seen_by(question):
                hidden = self._hidden(number, question.masked)
                key = number, hidden.tobytes()
                if key not in wanted:
                    wanted[key] = len(jobs)
                    jobs.append((self._windows[number], hidden))
                need.append(wanted[key])
            needs.append(need)
        forward, occlusion = self.classifier.forward, self.classifier.occlusion
        found = forward.logits([window for window, _ in jobs], batch_size, occlusion, [hidden for _, hidden in jobs])
        rows = [self._row(question, need, jobs, found) for question, need in zip(questions, needs, strict=True)]
        return np.stack(rows) if rows else np.zeros((0, len(self.classifier.labels)))

    def _seen_by(self, question: Question) -> list[int]:
        """Return the windows that a question depends on."""
        numbers = self._of_text[question.text]
        if question.word is None:
            return numbers
        return [number for number in numbers if question.word in self._windows[number].words]

    def _hidden(self, number: int, masked: Collection[int]) -> Hidden:
        return self._maskable[number] & np.isin(_owners(self._windows[number]), list(masked))

    def _row(
        self,
        question: Question,
        need: list[int],
        jobs: Sequence[tuple[Window, Hidden]],
        found: Sequence[NDArray[np.float32]],
    ) -> NDArray[np.float64]:
        if question.word is not None:
            (job,) = need
            row = int(np.flatnonzero(jobs[job][0].words == question.word)[0])
            return found[job][row].astype(np.float64)
        sizes = np.array([jobs[job][0].size for job in need], dtype=np.float64)
        mean: NDArray[np.float64] = (np.concatenate([found[job] for job in need]) * sizes[:, None]).sum(0) / sizes.sum()
        return mean


def _owners(window: Window) -> NDArray[np.int64]:
    assert window.owners is not None  # noqa: S101 - cut with owners above
    return window.owners
