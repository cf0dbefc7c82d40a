"""A labelled text, and what depends on the kind of its labels: one task object each.

Everything outside this file asks the task, `get_task(name)`, instead of comparing its name. A new task is a subclass of
`Task` and an entry of `TASKS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tokmask_peft.errors import DataError, nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

Label = str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Example:
    """A text as read, before tokenization.

    Attributes:
        text: the text (sequence tasks), or its words (token tasks).
        label: the label, or one tag per word; none when the source gives no label.
        where: `file:line` or `split[row]`, for error messages.
    """

    text: str | tuple[str, ...]
    label: Label
    where: str

    @property
    def words(self) -> tuple[str, ...]:
        """The words: as given, or the text split at white space."""
        return tuple(self.text.split()) if isinstance(self.text, str) else self.text

    @property
    def string(self) -> str:
        """The text as one string, words joined by a space."""
        return self.text if isinstance(self.text, str) else " ".join(self.text)

    @property
    def tags(self) -> tuple[str, ...]:
        """The labels as a tuple: one per word, or the only one; empty without a label."""
        if self.label is None:
            return ()
        return (self.label,) if isinstance(self.label, str) else self.label


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row or text that could not be read, kept at its place where a reader is asked to go on.

    Attributes:
        where: `file:line` or `file[row]`.
        problem: what is wrong with it.
    """

    where: str
    problem: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for a text with one label.

    Attributes:
        label: the most probable label.
        probabilities: label -> calibrated probability, in the order of the classifier's labels.
        windows: windows that the text was read in; more than 1 for a text longer than those of training.
    """

    label: str
    probabilities: dict[str, float]
    windows: int = 1


@dataclass(frozen=True, slots=True)
class WordPredictions:
    """The answer for a text with a label per word; see `Prediction`.

    Attributes:
        words: the words, as they were given or split at white space.
        labels: the most probable label of each word.
        probabilities: per word, label -> calibrated probability.
        windows: windows that the text was read in.
    """

    words: tuple[str, ...]
    labels: tuple[str, ...]
    probabilities: tuple[dict[str, float], ...]
    windows: int = 1


class Task:
    """What depends on the kind of label; `sequence` and `token` below are the two that come with the package.

    Attributes:
        name: as in `data.task`.
        description: one line for `tokmask recipes fields`.
        item: what carries a label, for sentences: `text` or `word`.
        auto_class: transformers' class that loads backbone and head.
        peft_type: name in `peft.TaskType`, without which the head would stay frozen in silence.
        pipeline_tag: of the Hub and of `transformers.pipeline`.
        text_columns: names under which tables hold the text, the likeliest first.
        label_columns: names under which tables hold the labels.
        words_given: whether a text is a list of words, and the tokenizer is told so.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    item: ClassVar[str]
    auto_class: ClassVar[str]
    peft_type: ClassVar[str]
    pipeline_tag: ClassVar[str]
    text_columns: ClassVar[tuple[str, ...]]
    label_columns: ClassVar[tuple[str, ...]]
    words_given: ClassVar[bool]

    # -- data --

    # -- model --

    def auto_model(self) -> Any:
        """Return transformers' class that loads backbone and head."""
        import transformers

        return getattr(transformers, self.auto_class)

    # -- training and scores --

    # -- inference --

    def join(self, windows: Sequence[Any], logits: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the logits of a text's answers, [answers, classes], from those of its windows.

        Here the text has one answer: the mean weighted by sub-tokens, of which the temperature changes no label.
        """
        import numpy as np

        sizes = np.array([window.size for window in windows], dtype=np.float64)
        return np.asarray((np.concatenate(logits) * sizes[:, None]).sum(0, keepdims=True) / sizes.sum())

    def answer(self, text: Any, logits: NDArray[Any], probabilities: list[dict[str, float]], windows: int) -> Any:
        """Return the answer for a text: from `join`'s logits, and label -> probability for each of their rows."""
        return Prediction(list(probabilities[0])[int(logits[0].argmax())], probabilities[0], windows)

    # -- report, card and study --


class SequenceTask(Task):
    """One label for each text."""

    name = "sequence"
    description = "one label per text"
    item = "text"
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    pipeline_tag = "text-classification"
    text_columns = ("text", "sentence", "tweet", "content", "words", "tokens")
    label_columns = ("label", "sentiment", "sa")
    words_given = False

    # -- data --

    # -- training and scores --

    # -- inference --

    # -- report, card and study --


class TokenTask(Task):
    """One label for each word; its first sub-token carries it."""

    name = "token"
    description = "one label per word"
    item = "word"
    auto_class = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"
    pipeline_tag = "token-classification"
    text_columns = ("words", "tokens")
    label_columns = ("labels", "tags", "lid", "ner_tags", "pos_tags", "pos", "ner", "label")
    words_given = True

    # -- data --

    # -- training and scores --

    # -- inference --

    def join(self, windows: Sequence[Any], logits: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Take the logits of each word from the window that it belongs to."""
        import numpy as np

        order = np.argsort(np.concatenate([window.words for window in windows]))
        return np.asarray(np.concatenate(logits)[order], dtype=np.float64)

    def answer(self, text: Any, logits: NDArray[Any], probabilities: list[dict[str, float]], windows: int) -> Any:
        """Return the labels of the words."""
        labels = tuple(list(row)[best] for row, best in zip(probabilities, logits.argmax(-1).tolist(), strict=True))
        return WordPredictions(tuple(text), labels, tuple(probabilities), windows)

    # -- report, card and study --


TASKS: dict[str, Task] = {task.name: task for task in (SequenceTask(), TokenTask())}
"""By name. A task of somebody else's is added here: `TASKS["mine"] = MyTask()`."""


def get_task(name: str) -> Task:
    """Return the task of a name.

    Raises:
        DataError: there is none.
    """
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise DataError(
            f"there is no task '{name}'.{nearest(name, TASKS)} Known: {known}", code="unknown-task", task=name
        )
    return TASKS[name]
