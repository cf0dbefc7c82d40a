"""Column files (CoNLL): a word per line, its tags beside it, a blank line between texts.

LinCE, CALCS, SentiMix and Universal Dependencies differ in comments, separators and columns. What looks like a comment
may be a word of a tweet, so the rules are spelled out here:

* a comment stands before the first word of a text, and reads `# key = value` or `# key: value`, or holds no column
  separator in a file whose word lines do;
* everything else that begins with `#` is a word: `#OneDay<TAB>lang1`, and the sign alone, `#<TAB>other`;
* the header of SentiMix, `meta<TAB>7<TAB>positive`, counts as a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from tokmask_peft.errors import DataError, nearest
from tokmask_peft.recipe.schema import Task
from tokmask_peft.tasks import Example

CONLLU_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
SNIFFED_LINES = 5000

_KEY_VALUE = re.compile(r"#[ ]+(?P<key>[A-Za-z_][\w.\-]*(?:\[\w+\]|[ ]id)?)[ ]*=(?P<value>.*)")
_KEY_COLON = re.compile(r"#[ ]+(?P<key>[A-Za-z_][\w.\-]*):[ ](?P<value>[^\t]*)$")
_LABEL_KEYS = {"label", "sentiment", "sa", "sent_label", "class"}
_RANGE_OR_EMPTY_NODE = re.compile(r"\d+[-.]\d+$")


@dataclass(frozen=True, slots=True)
class Layout:
    """What the first lines of a file say about the rest.

    Attributes:
        tabs: columns are separated by tabs; else by any white space.
        width: columns of a word line.
        conllu: ten columns of Universal Dependencies, with range and empty-node lines.
        labels: last columns seen, to recognise a word line with spaces in place of the tab.
    """

    tabs: bool
    width: int
    conllu: bool
    labels: frozenset[str] = field(repr=False)

    @classmethod
    def sniff(cls, lines: Iterable[str]) -> Layout:
        """Guess the layout from the first lines of a file."""
        rows = [line for line in (line.rstrip(" ") for line in lines) if line.strip(" \t")]
        tabbed = [line.split("\t") for line in rows if "\t" in line and not _comment(line)]
        tabs = bool(tabbed)
        fields = tabbed or [_split(line) for line in rows if not _comment(line)]
        widths = [len(row) for row in fields] or [0]
        width = max(set(widths), key=widths.count)
        conllu = tabs and width == len(CONLLU_COLUMNS)
        return cls(tabs, width, conllu, frozenset(row[-1] for row in fields if len(row) == width))


def _split(line: str) -> list[str]:
    """Split at spaces and tabs only: a word may be any other white space, such as a no-break space."""
    return re.split(r"[ \t]+", line.strip(" \t"))


def _comment(line: str) -> re.Match[str] | None:
    """Match a line that reads as a comment whatever the file's columns."""
    return _KEY_VALUE.match(line) or _KEY_COLON.match(line)


def _column(column: str | int | None, default: int, layout: Layout, field_name: str) -> int:
    """Turn a column's number or CoNLL-U name into an index."""
    if column is None:
        return default
    if isinstance(column, int):
        return column
    if re.fullmatch(r"-?\d+", column):
        return int(column)
    if layout.conllu and column.lower() in CONLLU_COLUMNS:
        return CONLLU_COLUMNS.index(column.lower())
    known = (
        f" Columns of CoNLL-U: {', '.join(CONLLU_COLUMNS)}.{nearest(column, CONLLU_COLUMNS)}" if layout.conllu else ""
    )
    raise DataError(
        f"data.{field_name} is '{column}', but the columns of a CoNLL file have numbers: 0 is the first, -1 the last."
        + known
    )


class ConllReader:
    """Read a column file, one text at a time.

    Args:
        lines: the file's lines, without line ends.
        name: the file's name, for error messages.
        task: `sequence` takes the label from the comment above the words, `token` the tags from a column.
        text_column: column of the words; none is the first (CoNLL-U: the second).
        label_column: column of the tags; none is the last.
        labelled: whether labels are needed; without, words are read and labels are none.
    """

    def __init__(
        self,
        lines: Iterable[str],
        name: str,
        task: Task,
        text_column: str | int | None = None,
        label_column: str | int | None = None,
        labelled: bool = True,
    ) -> None:
        stream = iter(lines)
        first = list(islice(stream, SNIFFED_LINES))
        self._lines = chain(first, stream)
        self._name, self._task, self._labelled = name, task, labelled
        self._tagged = labelled and task == "token"
        self._layout = Layout.sniff(first)
        self._text = _column(text_column, 1 if self._layout.conllu else 0, self._layout, "text_column")
        self._tag = _column(label_column, -1, self._layout, "label_column")

    def __iter__(self) -> Iterator[Example]:
        """Yield the texts in order.

        Raises:
            DataError: a line has too few columns, or a text has no label; names the line.
        """
        for example in self.examples_or_problems():
            if isinstance(example, DataError):
                raise example
            yield example

    def examples_or_problems(self) -> Iterator[Example | DataError]:
        """Yield the texts in order, with the first error of a text in its place."""
        words: list[str] = []
        tags: list[str] = []
        label: str | None = None
        start = 0
        problem: DataError | None = None
        for number, line in enumerate(self._lines, start=1):
            if not line.strip(" \t"):
                if problem is None and words:
                    yield self._example(words, tags, label, start)
                words, tags, label, problem = [], [], None, None
                continue
            if problem is not None:
                continue  # the rest of a text that is already given up
            try:
                if self._is_comment(line, number, inside=bool(words)):
                    label = self._label_of(line) or label
                    continue
                word_and_tag = self._word(line, number)
            except DataError as error:
                problem = error
                yield problem
                continue
            if word_and_tag is None:
                continue
            if not words:
                start = number
            words.append(word_and_tag[0])
            tags.append(word_and_tag[1])
        if problem is None and words:
            yield self._example(words, tags, label, start)

    def _is_comment(self, line: str, number: int, inside: bool) -> bool:
        """Tell a comment from a word that begins with '#'."""
        if line.startswith("meta") and self._layout.width == 2 and not inside:
            return len(line.split()) == 3
        if not line.startswith("#"):
            return False
        keyed = _comment(line) is not None
        if keyed and inside:
            raise DataError(
                f"{self._name}:{number}: the comment '{line.strip()}' stands inside a text. "
                "Put a blank line before it: blank lines separate texts."
            )
        if keyed or inside:
            return keyed
        return self._layout.tabs and "\t" not in line and self._repaired(line) is None

    def _repaired(self, line: str) -> list[str] | None:
        """Columns of a word line that has spaces in place of its tabs, or none if it is not one."""
        columns = _split(line)
        fits = self._layout.tabs and len(columns) == self._layout.width and columns[-1] in self._layout.labels
        return columns if fits else None

    def _label_of(self, line: str) -> str | None:
        """The label that a comment carries: the last field after the text's number, or the value of a label key."""
        if line.startswith("meta"):
            return line.split()[-1]
        match = _comment(line)
        if match is None:
            return None
        fields = match["value"].split()
        if match["key"].lower() in _LABEL_KEYS:
            return " ".join(fields) or None
        if match["key"].startswith("sent_enum") and len(fields) > 1:
            return fields[-1]
        return None

    def _word(self, line: str, number: int) -> tuple[str, str] | None:
        """The word and the tag of a line; none for a CoNLL-U range or empty node."""
        if self._layout.tabs:
            columns = [column.strip(" ") for column in line.split("\t")]
            if len(columns) == 1:
                columns = self._repaired(line) or columns
        else:
            columns = _split(line)
        if self._layout.conllu and _RANGE_OR_EMPTY_NODE.fullmatch(columns[0]):
            return None
        self._check_width(columns, line, number)
        return columns[self._text], columns[self._tag] if self._tagged else ""

    def _check_width(self, columns: list[str], line: str, number: int) -> None:
        """Refuse a line in which a column would be missing, or be taken for another."""
        needed = [self._text, self._tag] if self._tagged else [self._text]
        least = max([index + 1 if index >= 0 else -index for index in needed] + [2 if self._tagged else 1])
        exact = not self._layout.tabs or min(needed) < 0
        if len(columns) >= least and (not exact or len(columns) == self._layout.width):
            return
        separator = "tabs" if self._layout.tabs else "spaces"
        found = f"{len(columns)} column{'s' if len(columns) != 1 else ''} separated by {separator}"
        wanted = f"its lines have {self._layout.width}" if exact else f"the word and its label need {least}"
        if self._tagged and self._layout.width < least:
            wanted = f"a word and its label need {least}"
        raise DataError(f"{self._name}:{number}: {found}, but {wanted}: {line!r}")

    def _example(self, words: list[str], tags: list[str], label: str | None, start: int) -> Example:
        """Build the example of one block of lines."""
        where = f"{self._name}:{start}"
        if self._task == "token":
            return Example(tuple(words), tuple(tags) if self._labelled else None, where)
        return Example(" ".join(words), label if self._labelled else None, where)
