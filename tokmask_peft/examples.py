"""A text as it was read, with its labels, and the answer to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from tokmask_peft.html import InNotebooks
from tokmask_peft.spans import NO_SPANS, Entity, mark_of, read

if TYPE_CHECKING:
    from numpy.typing import NDArray

Label = str | tuple[str, ...] | None
IGNORED = -100  # the label id of positions that carry none: later sub-tokens, special tokens, padding
MOST_SHOWN = 8  # words in the short form of an answer
NO_PREDICTION = -1  # the predicted id of an item that was cut away: never right
BETWEEN = "‖"  # shown between the two texts of a pair
MARK = "|"  # separates the labels of a text in one cell, if nothing else is known
MARKS = "|;,"  # what may separate them
WrongLabel = tuple[str, str, float, float, int | None]  # of data, of classifier, the chance of each, word's index


class LabelSet(tuple[str, ...]):
    """The labels of a text that may have several, or none: each once, in the order of the alphabet."""

    __slots__ = ()

    def __new__(cls, labels: Iterable[str] = ()) -> Self:
        """Make a set of labels; empty strings are none."""
        return super().__new__(cls, sorted({*labels} - {""}))


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that are read together and have one label, such as premise and hypothesis."""

    first: str
    second: str

    def split(self) -> list[str]:
        """Return the words of both as they are shown, with `BETWEEN` after those of the first."""
        return [*self.first.split(), BETWEEN, *self.second.split()]

    def __iter__(self) -> Iterator[str]:
        yield from (self.first, self.second)

    def __str__(self) -> str:
        return f"{self.first} {BETWEEN} {self.second}"


@dataclass(frozen=True, slots=True)
class Example:
    """A text as read, before tokenization."""

    text: str | Pair | tuple[str, ...]  # the text, two of them, or its words if they have labels
    label: Label  # the label, one tag per word, or a `LabelSet`; none if the source gives no label
    where: str  # `file:line` or `split[row]`, for error messages
    places: tuple[str, ...] = ()  # the same of each word, if words have rows of their own; for prediction only

    @property
    def words(self) -> tuple[str, ...]:
        """The words: as given, or the text split at white space."""
        return self.text if isinstance(self.text, tuple) else tuple(" ".join(self.parts).split())

    @property
    def string(self) -> str:
        """The text as one string, words joined by a space, and a pair by `BETWEEN`."""
        return " ".join(self.text) if isinstance(self.text, tuple) else str(self.text)

    @property
    def parts(self) -> tuple[str, ...]:
        """The text, or the two of a pair, as strings."""
        return tuple(self.text) if isinstance(self.text, Pair) else (self.string,)

    @property
    def is_empty(self) -> bool:
        """Whether the text, or one of a pair, has no words."""
        return not (all(map(str.split, self.parts)) if isinstance(self.text, Pair) else any(self.words))

    @property
    def tags(self) -> tuple[str, ...]:
        """The labels as a tuple: one per word, or those of the text; empty without a label."""
        if self.label is None:
            return ()
        return (self.label,) if isinstance(self.label, str) else self.label

    @property
    def given(self) -> tuple[str, ...]:
        """The tags, with an empty one for a label that is missing; a set of labels may be empty."""
        return self.tags if self.tags or isinstance(self.label, LabelSet) else ("",)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row or text that cannot be read, in its place among those that can."""

    where: str  # `file:line` or `file[row]`
    problem: str
    code: str = "unreadable"  # of the error that it becomes if every text is needed
    cells: tuple[str, ...] = ()  # what stands there, as far as it was split into cells


LabelIds = Mapping[str, int]


class Probabilities(Sequence[dict[str, float]]):
    """A tuple of dicts, label -> probability, kept as an array [words, labels]: dicts take ten times the memory."""

    __slots__ = ("_labels", "_rows")

    def __init__(self, labels: Sequence[str], rows: NDArray[Any]) -> None:
        self._labels, self._rows = labels, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        rows = self._rows[at]
        return tuple(map(self._row, rows)) if isinstance(at, slice) else self._row(rows)

    def _row(self, row: NDArray[Any]) -> dict[str, float]:
        return dict(zip(self._labels, row.tolist(), strict=True))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Probabilities | tuple) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as for a tuple of dicts

    def __repr__(self) -> str:
        return repr(tuple(self))


@dataclass(frozen=True, slots=True, repr=False)
class Prediction(InNotebooks):
    """The answer for a text with one label."""

    label: str  # the most probable one
    probabilities: dict[str, float]  # label -> calibrated probability, in the order of the classifier's labels
    windows: int = 1  # windows that the text was read in; more than 1 if it is longer than those of training

    @property
    def confidence(self) -> float:
        """The calibrated probability of the label."""
        return self.probabilities[self.label]

    def __repr__(self) -> str:
        return f"Prediction({self.label!r}, {self.confidence:.3f})"


@dataclass(frozen=True, slots=True, repr=False)
class WordPredictions(InNotebooks):
    """The answer for a text with a label per word; see `Prediction`."""

    words: tuple[str, ...]  # as they were given or split at white space
    labels: tuple[str, ...]  # the most probable label of each word
    probabilities: Sequence[dict[str, float]]  # one for each word: a tuple, or `Probabilities`
    windows: int = 1
    spans: str = NO_SPANS  # how the labels mark entities, as in `spans.SCHEMES`

    @property
    def confidence(self) -> tuple[float, ...]:
        """The calibrated probability of each word's label."""
        return tuple(row[label] for row, label in zip(self.probabilities, self.labels, strict=True))

    @property
    def entities(self) -> tuple[Entity, ...]:
        """The entities, from left to right; none if the labels mark none."""

        def confidence(kind: str, row: dict[str, float]) -> float:
            return min(sum(chance for label, chance in row.items() if mark_of(label) == (kind or "entity")), 1.0)

        return tuple(
            Entity(kind, first, last, " ".join(self.words[first : last + 1]),
                   min(confidence(kind, row) for row in self.probabilities[first : last + 1]))
            for kind, first, last in (read(self.labels) if self.spans != NO_SPANS else ())
        )  # fmt: skip

    @property
    def marks(self) -> tuple[str, ...]:
        """What the colour of each word shows: its label or, if labels mark entities, the type of its entity."""
        return tuple(mark_of(label) for label in self.labels) if self.spans != NO_SPANS else self.labels

    @property
    def all_marks(self) -> tuple[str, ...]:
        """The same of all labels of the classifier, each once."""
        labels = next(iter(self.probabilities), {})
        return tuple(dict.fromkeys(map(mark_of, labels) if self.spans != NO_SPANS else labels))

    def __repr__(self) -> str:
        pairs = [f"{word}/{label}" for word, label in zip(self.words, self.labels, strict=True)]
        return f"WordPredictions({' '.join(pairs[:MOST_SHOWN])}{' …' if len(pairs) > MOST_SHOWN else ''})"


@dataclass(frozen=True, slots=True, repr=False)
class LabelPredictions(InNotebooks):
    """The answer for a text that may have several labels, or none; see `Prediction`."""

    labels: tuple[str, ...]  # those whose probability is above their threshold
    probabilities: dict[str, float]  # label -> calibrated probability; each is a yes or no of its own
    windows: int = 1

    @property
    def label(self) -> str:
        """The labels in one string, for a cell of a table; empty for none."""
        return MARK.join(self.labels)

    @property
    def confidence(self) -> float:
        """The probability that all labels are right, those left out too, if labels were independent."""
        return math.prod(p if label in self.labels else 1 - p for label, p in self.probabilities.items())

    def __repr__(self) -> str:
        return f"LabelPredictions({self.label!r}, {self.confidence:.3f})"
