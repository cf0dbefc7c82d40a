"""Which words a prediction rests on: mask each in turn, and compare the answers.

A model trained with masking has seen masked inputs, so that a text with a word masked is nothing unusual to it
(Madsen, Reddy and Chandar 2023, arXiv:2310.07819). Nothing is estimated: an influence is a difference of two answers.

The influence of a word is the drop of the label's log-odds, log p / (1 - p), in nats: the weight of evidence
(Robnik-Šikonja and Kononenko 2008, IEEE TKDE 20:5). A probability near 1 hardly moves when a decisive word goes (.9999
to .999), nor does its logarithm; the log-odds do (by 2.3), and they treat evidence for and against alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from tokmask_peft.errors import DataError, nearest
from tokmask_peft.html import InNotebooks, influence_words, strongest_words
from tokmask_peft.tasks import get_task

if TYPE_CHECKING:
    from tokmask_peft.data.encoding import Window
    from tokmask_peft.inference.classifier import Classifier
    from tokmask_peft.inference.forward import Hidden

_QUESTIONS = 4096  # asked at a time: limits the memory, and fills the batches
MOST_WORDS = 10_000  # words of a text: each takes a forward pass, minutes in all, and memory for what it masks


def find_word(words: Sequence[str], wanted: int | str, where: str) -> int:
    """Return the index of a word, given as itself, if it is there once, or as its index, from the end if negative."""
    if isinstance(wanted, int):
        if not -len(words) <= wanted < len(words):
            message = f"{where} has no word {wanted}: its words are 0 to {len(words) - 1}"
            raise DataError(message, code="no-such-word", word=wanted)
        return wanted % len(words)
    places = [index for index, word in enumerate(words) if word == wanted]
    if not places:
        raise DataError(f"{where} has no word '{wanted}'.{nearest(wanted, words)}", code="no-such-word", word=wanted)
    if len(places) > 1:
        listed = f"{', '.join(map(str, places[:-1]))} and {places[-1]}"
        message = f"'{wanted}' is word {listed} of {where}: give one of these numbers"
        raise DataError(message, code="ambiguous-word", word=wanted, places=places)
    return places[0]


@dataclass(frozen=True, slots=True)
class Question:
    """A text with some words masked, each given by its index."""

    text: int
    masked: frozenset[int]
    word: int | None = None  # token tasks: whose label is asked for


class Occluded:
    """Texts, from `Classifier.checked`, whose words can be masked as the classifier's occlusion does."""

    def __init__(self, classifier: Classifier, texts: Sequence[Any]) -> None:
        self.classifier = classifier
        self._windows: list[Window] = list(classifier.encoder.windows(texts, owners=True))
        self._owners = [np.asarray(window.owners) for window in self._windows]
        self._of_text: list[list[int]] = [[] for _ in texts]
        for number, window in enumerate(self._windows):
            self._of_text[window.text].append(number)
        maskable = classifier.occlusion.maskable
        pairs = zip(self._windows, self._owners, strict=True)
        self._maskable = [maskable[window.ids] & (owners >= 0) for window, owners in pairs]

    def maskable_words(self, text: int) -> set[int]:
        """Return the words of a text of which at least one sub-token can be masked."""
        return {word for n in self._of_text[text] for word in self._owners[n][self._maskable[n]].tolist()}

    def logits(self, questions: Sequence[Question], batch_size: int) -> NDArray[np.float64]:
        """Answer in few forward passes, `[questions, classes]`; a window in which nothing changes is computed once."""
        task = get_task(self.classifier.task)
        jobs: dict[tuple[int, bytes], tuple[Window, Hidden]] = {}
        needs: list[list[tuple[int, bytes]]] = []
        for question in questions:
            needs.append([])
            for number in self._of_text[question.text]:
                if question.word is None or question.word in self._windows[number].words:
                    hidden = self._maskable[number] & np.isin(self._owners[number], list(question.masked))
                    key = number, hidden.tobytes()
                    jobs.setdefault(key, (self._windows[number], hidden))
                    needs[-1].append(key)
        windows, masked = [window for window, _ in jobs.values()], [hidden for _, hidden in jobs.values()]
        logits = self.classifier.forward.logits(windows, batch_size, self.classifier.occlusion, masked)
        found = dict(zip(jobs, logits, strict=True))
        rows = np.zeros((len(questions), len(self.classifier.labels)))
        for row, question, need in zip(rows, questions, needs, strict=True):
            if question.word is None:
                row[:] = task.join([jobs[key][0] for key in need], [found[key] for key in need])[0]
            else:
                (key,) = need
                row[:] = found[key][np.flatnonzero(jobs[key][0].words == question.word)[0]]
        return rows


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(InNotebooks):
    """The influence of each word on a label.

    In token tasks each word's own label is explained by masking the word itself: how much the label rests on the word
    rather than on its context. Given a word, the label of that word is explained by every word.
    """

    words: tuple[str, ...]  # split at white space or as given; those of a pair have `examples.BETWEEN` between them
    influences: tuple[float, ...]  # by how many nats the label's log-odds drop when each is masked; 0 if `unmasked`
    # of the text or the chosen word, otherwise empty; of several the likeliest given, or of all if none is, or as asked
    label: str
    probability: float  # of that label, calibrated; without a chosen word the mean over the words' labels
    without: tuple[float, ...]  # per word, the probability of the label with the word masked
    word: int | None = None  # token tasks: index of the word whose label is explained
    labels: tuple[str, ...] = ()  # token tasks: the label of each word
    probabilities: tuple[float, ...] = ()  # token tasks: of each word's label
    unmasked: tuple[int, ...] = ()  # words whose sub-tokens are special or protected, or that have none of their own

    @property
    def headline(self) -> str:
        """What is explained, in a line."""
        if not self.label:
            return "how far each word supports its own label"
        answer = f"{self.label} ({self.probability:.3f})"
        return answer if self.word is None else f"'{self.words[self.word]}': {answer}"

    @property
    def html(self) -> Markup:
        """The words, coloured by their influence."""
        tags = self.labels if self.word is None else ()
        return influence_words(self.words, self.influences, self.word, unmasked=self.unmasked, tags=tags)

    def __repr__(self) -> str:
        strongest = ", ".join(f"{word} {value:+z.2f}" for word, value in strongest_words(self.words, self.influences))
        return f"Explanation({self.headline}; strongest: {strongest or 'none'})"


def explain(
    classifier: Classifier,
    texts: Sequence[str] | Sequence[Sequence[str]],
    *,
    word: int | str | None = None,
    label: str | Sequence[str] | None = None,
    batch_size: int = 32,
) -> list[Explanation]:
    """Return the influence of each word of each text on what the classifier predicts.

    Words are masked by the token that training used (see `Classifier.occlusion`, whose `note` names it), one at a time,
    all their sub-tokens together. In token tasks, `word` is the one whose label is to be explained by all words: its
    index from 0, from the end if negative, or itself; by default each word is explained on its own: how far it supports
    its own label. In other tasks, `label` is the one to explain in place of the predicted one: for all texts, or one
    for each.

    Raises:
        DataError: a text is empty, invalid or longer than `MOST_WORDS`, or has no such word; there is no such label;
            `word` is given in a sequence task, or `label` in a token task.
        MaskTokenError: there is no token to mask with.
    """
    given = classifier.checked(texts)
    if word is not None and not get_task(classifier.task).words_given:
        message = "word is for models with a label per word; this one gives one per text, which every word explains"
        raise DataError(message, code="word-not-applicable")
    if label is not None and get_task(classifier.task).words_given:
        message = "label is for models with labels per text; with a label per word, give the word"
        raise DataError(message, code="label-not-applicable")
    about = [label] * len(given) if label is None or isinstance(label, str) else [*label]
    if len(about) != len(given):
        message = f"label has {len(about)} labels for {len(given)} texts: give one for each text, or one for all"
        raise DataError(message, code="label-count", texts=len(given), labels=len(about))
    for name in {*about} - {None, *classifier.labels}:
        known = f"It has {', '.join(classifier.labels)}."
        raise DataError(f"the model has no label '{name}'. {known}", code="unknown-label", label=name)
    words = [tuple(text if isinstance(text, list) else text.split()) for text in given]
    for number, row in enumerate(words):
        if len(row) > MOST_WORDS:
            problem = f"texts[{number}] has {len(row):,} words. Each is masked in turn, in a forward pass of its own: "
            problem += f"give at most {MOST_WORDS:,}, such as the paragraph that matters"
            raise DataError(problem, code="text-too-long", words=len(row))
    targets = [None if word is None else find_word(row, word, f"texts[{n}]") for n, row in enumerate(words)]
    starts, asked = [], _QUESTIONS  # of texts that together ask a limited number of questions
    for number, row in enumerate(words):
        if asked + len(row) > _QUESTIONS:
            starts.append(number)
            asked = 0
        asked += len(row)
    found: list[Explanation] = []
    for start, stop in itertools.pairwise([*starts, len(words)]):
        part = slice(start, stop)
        found.extend(_explain(classifier, given[part], words[part], targets[part], about[part], batch_size))
    return found


def _explain(
    classifier: Classifier,
    texts: Sequence[Any],
    words: Sequence[tuple[str, ...]],
    targets: Sequence[int | None],
    about: Sequence[str | None],
    batch_size: int,
) -> Iterator[Explanation]:
    task, occluded = get_task(classifier.task), Occluded(classifier, texts)
    per_word, names = task.words_given, classifier.labels

    def odds_of(rows: NDArray[np.float64], labels: Sequence[int]) -> NDArray[np.float64]:
        """Return the log-odds of a label in each row."""
        pairs = zip(rows, labels, strict=True)
        return np.array([log_odds(*task.competing(row, label), classifier.temperature) for row, label in pairs])

    questions, counts = list[Question](), list[int]()  # of each text as it is, and with each word masked
    for text, (row, target) in enumerate(zip(words, targets, strict=True)):
        places = range(len(row))
        whose = [(at if target is None else target) if per_word else None for at in places]
        plain = [Question(text, frozenset(), at) for at in (places if per_word else [None])]
        questions += [*plain, *(Question(text, frozenset([at]), of) for at, of in zip(places, whose, strict=True))]
        counts += [len(plain), len(row)]
    parts = iter(np.split(occluded.logits(questions, batch_size), np.cumsum(counts)))
    for text, (row, target) in enumerate(zip(words, targets, strict=True)):
        before, after = next(parts), next(parts)
        best = [names.index(name)] if (name := about[text]) else task.likeliest(before, classifier.cuts)
        best = classifier.legal.repaired_ids(best) if per_word and classifier.legal else best
        odds = odds_of(before, best)
        probabilities = _probability(odds)
        own, at = per_word and target is None, target or 0
        labels = best if own else [best[at]] * len(row)
        left = odds_of(after, labels)
        maskable = occluded.maskable_words(text)
        yield Explanation(
            words=row,
            influences=tuple(((odds if own else odds[at]) - left).tolist()),
            label="" if own else names[best[at]],
            probability=sum(probabilities) / len(probabilities) if own else probabilities[at],
            without=_probability(left),
            word=target,
            labels=tuple(names[number] for number in best) if per_word else (),
            probabilities=probabilities if per_word else (),
            unmasked=tuple(number for number in range(len(row)) if number not in maskable),
        )


def log_odds(logits: NDArray[np.float64], label: int, temperature: float) -> NDArray[np.float64]:
    """Return log p / (1 - p) of a label under softmax(logits / temperature), [...], without rounding to 0 or 1."""
    scaled = logits / temperature
    others = np.delete(scaled, label, axis=-1)
    peak = others.max(-1)
    return np.asarray(scaled[..., label] - peak - np.log(np.exp(others - peak[..., None]).sum(-1)))


def _probability(odds: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(np.exp(-np.logaddexp(0.0, -odds)).tolist())
