"""Which words a prediction rests on: mask each in turn, and see what becomes of the label.

A model trained with masking has seen masked inputs, so that a text with a word masked is nothing strange to it
(Madsen, Reddy and Chandar 2023, arXiv:2310.07819). Nothing is estimated: an influence is a difference of two answers.

The influence of a word is the drop of the label's log-odds, log p / (1 - p), in nats: the weight of evidence
(Robnik-Šikonja and Kononenko 2008, IEEE TKDE 20:5). A probability near 1 hardly moves when a decisive word goes (.9999
to .999), nor does its logarithm; the log-odds do (by 2.3), and they treat evidence for and against alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokmask_peft.data.encoding import Window
from tokmask_peft.errors import DataError, nearest
from tokmask_peft.inference.forward import Hidden

if TYPE_CHECKING:
    from tokmask_peft.inference.classifier import Classifier


def find_word(words: Sequence[str], wanted: int | str, where: str) -> int:
    """Return the index of a word.

    Args:
        words: of the text.
        wanted: an index from 0, from the end if negative; or the word itself, if it is there once.
        where: what to call the text in messages.

    Raises:
        DataError: there is no such word, or there are several.
    """
    if isinstance(wanted, int):
        if not -len(words) <= wanted < len(words):
            raise DataError(f"{where} has no word {wanted}: its words are 0 to {len(words) - 1}")
        return wanted % len(words)
    places = [index for index, word in enumerate(words) if word == wanted]
    if not places:
        raise DataError(f"{where} has no word '{wanted}'.{nearest(wanted, words)}")
    if len(places) > 1:
        listed = f"{', '.join(map(str, places[:-1]))} and {places[-1]}"
        raise DataError(f"'{wanted}' is word {listed} of {where}: give one of these numbers")
    return places[0]


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
        self._windows = classifier.encoder.windows(texts, owners=True)
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


_QUESTIONS = 4096  # asked at a time: bounds the memory, and fills the batches


@dataclass(frozen=True, slots=True)
class Explanation:
    """The influence of each word on a label.

    In token tasks each word's own label is explained by masking the word itself: how much the label rests on the word
    rather than on its context. Given a word, the label of that word is explained by every word.

    Attributes:
        words: the words, split at white space or as given.
        influences: per word, by how many nats the log-odds of the label drop when it is masked; negative for a word
            that speaks against the label; 0 where nothing can be masked (`unmasked`).
        label: of the text, or of the chosen word; empty in token tasks without a chosen word.
        probability: of that label, calibrated; without a chosen word the mean over the words' labels.
        without: per word, the probability of the label with the word masked.
        word: token tasks: index of the word whose label is explained; else none.
        labels: token tasks: the label of each word; else empty.
        probabilities: token tasks: of each word's label; else empty.
        unmasked: indices of the words that cannot be masked: their sub-tokens are special or protected, or they have
            none of their own.
    """

    words: tuple[str, ...]
    influences: tuple[float, ...]
    label: str
    probability: float
    without: tuple[float, ...]
    word: int | None = None
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    unmasked: tuple[int, ...] = ()


def explain(
    classifier: Classifier,
    texts: Sequence[str] | Sequence[Sequence[str]],
    *,
    word: int | str | None = None,
    batch_size: int = 32,
) -> list[Explanation]:
    """Return the influence of each word of each text on what the classifier says.

    Words are masked by the token that training used (see `Classifier.occlusion`, whose `note` says which), one at a
    time, all their sub-tokens together.

    Args:
        classifier: from `load`.
        texts: as for `Classifier.predict`.
        word: token tasks: the word whose label is to be explained by all words: its index from 0, from the end if
            negative, or itself; none explains each word's label by the word itself.
        batch_size: windows per forward pass.

    Raises:
        DataError: a text is empty or invalid, or has no such word; `word` is given in a sequence task.
        MaskTokenError: there is no token to mask with.
    """
    given = classifier.checked(texts)
    if word is not None and classifier.task == "sequence":
        raise DataError("word is for token tasks; this model gives one label per text, which every word explains")
    found: list[Explanation] = []
    for part in _parts(given):
        found.extend(_Explainer(classifier, part).explain(word, batch_size, len(found)))
    return found


def log_odds(logits: NDArray[np.float64], label: int, temperature: float) -> NDArray[np.float64]:
    """Return log p / (1 - p) of a label under softmax(logits / temperature), [...], without rounding to 0 or 1."""
    scaled = logits / temperature
    others = np.delete(scaled, label, axis=-1)
    peak = others.max(-1)
    return np.asarray(scaled[..., label] - peak - np.log(np.exp(others - peak[..., None]).sum(-1)))


class _Explainer:
    """Explains some texts together."""

    def __init__(self, classifier: Classifier, texts: Sequence[Any]) -> None:
        self._classifier, self._token = classifier, classifier.task == "token"
        self._words = [tuple(text.split() if isinstance(text, str) else text) for text in texts]
        self._occluded = Occluded(classifier, texts)

    def explain(self, word: int | str | None, batch_size: int, first: int) -> Iterator[Explanation]:
        targets: list[int | None] = [None] * len(self._words)
        if word is not None:
            targets = [find_word(words, word, f"texts[{first + text}]") for text, words in enumerate(self._words)]
        plain = [self._plain(text, len(words)) for text, words in enumerate(self._words)]
        masked = [self._masked(text, target) for text, target in enumerate(targets)]
        questions = [question for parts in zip(plain, masked, strict=True) for part in parts for question in part]
        logits = self._occluded.logits(questions, batch_size)
        start = 0
        for text, target in enumerate(targets):
            middle, stop = start + len(plain[text]), start + len(plain[text]) + len(masked[text])
            yield self._explanation(text, target, logits[start:middle], logits[middle:stop])
            start = stop

    def _plain(self, text: int, words: int) -> list[Question]:
        """Ask for the text as it is, in token tasks for each word."""
        asked: list[int | None] = list(range(words)) if self._token else [None]
        return [Question(text, frozenset(), word) for word in asked]

    def _masked(self, text: int, target: int | None) -> list[Question]:
        """Ask for the label with each word masked: the text's, the target's, or the masked word's own."""
        words = range(len(self._words[text]))
        return [
            Question(text, frozenset([word]), (word if target is None else target) if self._token else None)
            for word in words
        ]

    def _explanation(
        self, text: int, target: int | None, plain: NDArray[np.float64], masked: NDArray[np.float64]
    ) -> Explanation:
        names, temperature = self._classifier.labels, self._classifier.temperature
        best = plain.argmax(-1).tolist()
        odds = np.array([log_odds(row, label, temperature) for row, label in zip(plain, best, strict=True)])
        own = self._token and target is None
        at = target or 0
        label = best if own else [best[at]] * len(masked)
        left = np.array([log_odds(row, number, temperature) for row, number in zip(masked, label, strict=True)])
        maskable = self._occluded.maskable_words(text)
        probabilities = _probability(odds)
        return Explanation(
            words=self._words[text],
            influences=tuple(((odds if own else odds[at]) - left).tolist()),
            label="" if own else names[best[at]],
            probability=sum(probabilities) / len(probabilities) if own else probabilities[at],
            without=_probability(left),
            word=target,
            labels=tuple(names[number] for number in best) if self._token else (),
            probabilities=probabilities if self._token else (),
            unmasked=tuple(number for number in range(len(masked)) if number not in maskable),
        )


def _probability(odds: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(np.exp(-np.logaddexp(0.0, -odds)).tolist())


def _parts(texts: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield texts that ask a bounded number of questions together."""
    start = asked = 0
    for number, text in enumerate(texts):
        words = len(text.split() if isinstance(text, str) else text)
        if asked and asked + words > _QUESTIONS:
            yield texts[start:number]
            start, asked = number, 0
        asked += words
    if asked:
        yield texts[start:]
