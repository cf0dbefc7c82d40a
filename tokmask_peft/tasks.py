"""A labelled text, and what depends on the kind of its labels: one task object each.

Everything outside this file asks the task, `get_task(name)`, instead of comparing its name. A new task is a subclass of
`Task` and an entry of `TASKS`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tokmask_peft.errors import DataError, nearest

Label = str | tuple[str, ...] | None
IGNORED = -100
"""Label id of positions without a label, as torch's cross entropy ignores it."""


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
    """A row or text that cannot be read, in its place among those that can.

    Attributes:
        where: `file:line` or `file[row]`.
        problem: what is wrong with it.
        code: of the error that it becomes if every text is needed.
    """

    where: str
    problem: str
    code: str = "unreadable"


LabelIds = Mapping[str, int]


class Task:
    """What depends on the kind of label; `sequence` and `token` below are the two that come with the package.

    Attributes:
        name: as in `data.task`.
        description: one line for `tokmask recipes fields`.
        item: what carries a label, for sentences: `text` or `word`.
        auto_class: transformers' class that loads backbone and head.
        peft_type: name in `peft.TaskType`, without which the head would stay frozen in silence.
        pipeline_tag: of the Hub and of `transformers.pipeline`.
        text_columns: usual names of the column with the text, the likeliest first.
        label_columns: usual names of the column with the labels.
        words_given: whether a text is a list of words, and is given to the tokenizer as one.
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

    def example(self, text: str | Sequence[str], label: Label, where: str) -> Example:
        """Return an example whose text has the form that the task needs: a string, or words."""
        if self.words_given:
            return Example(tuple(text.split() if isinstance(text, str) else text), label, where)
        return Example(text if isinstance(text, str) else " ".join(text), label, where)

    def from_cells(self, text: Any, label: Any, where: str, columns: tuple[str, str | None]) -> Example:
        """Return the example of a table's row: its cells, its place, and the names of the two columns for messages.

        Raises:
            DataError: a cell does not fit the task.
        """
        raise NotImplementedError

    def encode_label(self, example: Example, starts: Sequence[tuple[int, int]], length: int, ids: LabelIds) -> Any:
        """Return what the model should learn from an example, for the column `labels`.

        Args:
            example: the text and its label.
            starts: if words are given, `(word, position)` of each first sub-token that was kept.
            length: sub-tokens of the encoded text, special tokens included.
            ids: label -> index among the outputs.
        """
        raise NotImplementedError

    def pack_labels(self, labels: Sequence[Any]) -> Any:
        """Return the labels of a batch as the tensor that goes with one packed row of its texts."""
        raise NotImplementedError

    # -- model --

    def auto_model(self) -> Any:
        """Return transformers' class that loads backbone and head."""
        import transformers

        return getattr(transformers, self.auto_class)

    # -- training and scores --

    # -- inference --

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

    def from_cells(self, text: Any, label: Any, where: str, columns: tuple[str, str | None]) -> Example:
        """See `Task`; the text is a string or a list of words, the label any value."""
        words = text if isinstance(text, list) else ["" if text is None else text]
        if not all(isinstance(word, str) for word in words):
            found = f"column '{columns[0]}' has {type(text).__name__}"
            raise DataError(f"{found}, but a text is a string or a list of words", code="cell-type")
        if isinstance(label, list | dict):
            found = f"column '{columns[1]}' has {type(label).__name__}, but task '{self.name}' needs one label per text"
            raise DataError(f"{found}. For one label per word set data.task to token.", code="cell-type")
        return self.example(text or "", None if label is None else str(label).strip(), where)

    def encode_label(self, example: Example, starts: Sequence[tuple[int, int]], length: int, ids: LabelIds) -> int:
        """Return the label's index."""
        return label_id(example.tags[0], ids, example.where)

    def pack_labels(self, labels: Sequence[int]) -> Any:
        """Return int64 [texts]."""
        import torch

        return torch.tensor([int(label) for label in labels], dtype=torch.long)

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

    def from_cells(self, text: Any, label: Any, where: str, columns: tuple[str, str | None]) -> Example:
        """See `Task`; words and tags are lists, or strings separated by white space."""
        words, tags = _listed(text), _listed(label)
        if not isinstance(words, list | None) or not isinstance(tags, list | None):
            problem = f"task '{self.name}' needs a list of words in '{columns[0]}' and a list of tags in '{columns[1]}'"
            raise DataError(problem, code="cell-type")
        words = ["" if word is None else str(word) for word in words or []]
        if tags is None:
            return self.example(words, None, where)
        if len(words) != len(tags):
            problem = f"{len(words)} words in '{columns[0]}' but {len(tags)} tags in '{columns[1]}'"
            raise DataError(problem, code="tag-count")
        return self.example(words, tuple("" if tag is None else str(tag) for tag in tags), where)

    def encode_label(
        self, example: Example, starts: Sequence[tuple[int, int]], length: int, ids: LabelIds
    ) -> list[int]:
        """Return a label index per sub-token, `IGNORED` for all but the first one of each word."""
        row = [IGNORED] * length
        for word, position in starts:
            row[position] = label_id(example.tags[word], ids, example.where)
        return row

    def pack_labels(self, labels: Sequence[Sequence[int]]) -> Any:
        """Return int64 [1, sub-tokens of all texts]."""
        import torch

        return torch.cat([torch.as_tensor(row, dtype=torch.long) for row in labels]).unsqueeze(0)

    # -- training and scores --

    # -- inference --

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


def label_id(label: str, ids: LabelIds, where: str) -> int:
    """Return the index of a label.

    Raises:
        DataError: it is not one of the labels to learn.
    """
    if label not in ids:
        raise DataError(f"{where}: label '{label}' is not one of {', '.join(ids)}", code="unknown-label", label=label)
    return ids[label]


def _listed(cell: Any) -> Any:
    """Return a string cell as a list: one that pandas wrote into CSV (`['a', 'b']`), or split at white space."""
    if not isinstance(cell, str):
        return cell
    try:
        listed = ast.literal_eval(cell) if cell.startswith("[") and cell.endswith("]") else None
    except (ValueError, SyntaxError):
        listed = None
    return listed if isinstance(listed, list) else cell.split()
