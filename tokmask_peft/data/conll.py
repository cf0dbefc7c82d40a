"""Column files (CoNLL): a word per line, its tags in further columns, a blank line between texts.

LinCE, CALCS, SentiMix and Universal Dependencies differ in comments, separators and columns. What looks like a comment
may be a word of a tweet, so these are the rules:

* a comment comes before the first word of a text, and reads `# key = value` or `# key: value`, or has no column
  separator in a file whose word lines have one;
* everything else that begins with `#` is a word: `#OneDay<TAB>lang1`, and the sign alone, `#<TAB>other`;
* the header of SentiMix, `meta<TAB>7<TAB>positive`, counts as a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from tokmask_peft.data.tables import Columns
from tokmask_peft.errors import DataError, nearest
from tokmask_peft.tasks import Example, Unreadable

CONLLU_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
SNIFFED_LINES = 5000

_KEY_VALUE = re.compile(r"#[ ]+(?P<key>[A-Za-z_][\w.\-]*(?:\[\w+\]|[ ]id)?)[ ]*=(?P<value>.*)")
_KEY_COLON = re.compile(r"#[ ]+(?P<key>[A-Za-z_][\w.\-]*):[ ](?P<value>[^\t]*)$")
_LABEL_KEYS = {"label", "sentiment", "sa", "sent_label", "class"}
_PAIR = re.compile(r"(?:^|(?<=\|))([^|=]+)=")
_PAIR_VALUE = re.compile(r"(?:^|(?<=\|))([^|=]+)=([^|]*)")
_SPACING = {"SpaceAfter", "SpacesAfter", "SpacesBefore"}
_RANGE_OR_EMPTY_NODE = re.compile(r"\d+[-.]\d+$")


def _split(line: str) -> list[str]:
    """Split at spaces and tabs only: a word may be any other white space, such as a no-break space."""
    return re.split(r"[ \t]+", line.strip(" \t"))


def _comment(line: str) -> re.Match[str] | None:
    """Match a line that reads as a comment whatever the file's columns."""
    return _KEY_VALUE.match(line) or _KEY_COLON.match(line)


class ConllReader:
    """Reads a column file, one text at a time.

    If words carry the labels, the tags are read from a column (default: the last); otherwise the label of a text is
    read from the comment above its words. These are in the first column by default (CoNLL-U: the second). In CoNLL-U
    `misc.Lang` and `feats.Case` are values of a key, `_` for words without it; the default is the only key of MISC.

    Args:
        lines: the file's lines, without line ends.
        name: the file's name, for places.
        columns: what to read.
    """

    def __init__(self, lines: Iterable[str], name: str, columns: Columns) -> None:
        stream = iter(lines)
        first = list(islice(stream, SNIFFED_LINES))
        self._lines = chain(first, stream)
        self._name, self._task, self._labelled = name, columns.task, columns.labelled
        self._tagged = columns.labelled and columns.task.words_given
        self._sniff(first)
        self._text = self._index(columns.text, 1 if self._conllu else 0, "text_column")
        column, _, self._key = str(columns.label).partition(".") if self._conllu else (columns.label, "", "")
        self._tag = self._index(column if self._key else columns.label, -1, "label_column")
        if self._conllu and self._tagged:
            self._choose_key(asked=columns.label is not None)
        if self._tagged and self._tag == -1 and self._width > 2 and self._labels == {""}:
            problem = f"{name}: the last column of every line is empty. If that is a stray tab, set data.label_column="
            problem += f"{self._width - 2} or the number of another column (from 0); withheld labels cannot be scored."
            raise DataError(problem, code="empty-column", columns=self._width)

    def _sniff(self, lines: Iterable[str]) -> None:
        """Guess from the first lines what separates columns, how many there are, and which labels occur."""
        rows = [line for line in (line.rstrip(" ") for line in lines) if line.strip(" \t") and not _comment(line)]
        tabbed = [line.split("\t") for line in rows if "\t" in line]
        fields = tabbed or [_split(line) for line in rows]
        widths = [len(row) for row in fields] or [0]
        self._tabs, self._width = bool(tabbed), max(set(widths), key=widths.count)
        self._conllu = self._tabs and self._width == len(CONLLU_COLUMNS)
        self._labels = {row[-1] for row in fields if len(row) == self._width}
        # of CoNLL-U's FEATS and MISC
        cells = {at: {row[at] for row in fields if len(row) == self._width} if self._conllu else () for at in (5, 9)}
        self._keys = {at: sorted(set(_PAIR.findall("|".join(cells[at]))) - _SPACING) for at in cells}

    def _choose_key(self, asked: bool) -> None:
        """Check the key that labels are read from, or choose the only one of MISC."""
        keys = self._keys.get(self._tag % self._width, [])
        if not asked and len(keys) == 1:
            self._key = keys[0]
        plain = asked or (not keys and self._labels - {"_", ""})
        if self._key in keys if self._key else plain:
            return
        usable = [f"{CONLLU_COLUMNS[at]}.{key}" for at, found in self._keys.items() for key in found]
        wanted = f"{CONLLU_COLUMNS[self._tag]}.{self._key}"
        problem = f"no word has {wanted}.{nearest(wanted, usable)}" if asked else "MISC does not hold one label."
        remedy = f"Set data.label_column to {', '.join(['upos', *usable])}."
        raise DataError(f"{self._name}: {problem} {remedy}", code="column", field="label_column")

    def _index(self, asked: str | int | None, default: int, field: str) -> int:
        """Return the index of a column, given by its number or its CoNLL-U name."""
        if asked is None:
            return default
        if isinstance(asked, int) or re.fullmatch(r"-?\d+", asked):
            return int(asked)
        if self._conllu and asked.lower() in CONLLU_COLUMNS:
            return CONLLU_COLUMNS.index(asked.lower())
        problem = f"data.{field} is '{asked}', but columns of a CoNLL file have numbers: 0 is the first, -1 the last."
        if self._conllu:
            problem += f" Columns of CoNLL-U: {', '.join(CONLLU_COLUMNS)}.{nearest(asked, CONLLU_COLUMNS)}"
        raise DataError(problem, code="column", field=field)

    def __iter__(self) -> Iterator[Example | Unreadable]:
        """Yield the texts in order, with the first problem of a text in its place."""
        words: list[str] = []
        tags: list[str] = []
        label: str | None = None
        where, broken = "", False
        for number, line in enumerate(chain(self._lines, [""]), start=1):
            if not line.strip(" \t"):
                if words and not broken:
                    found = tuple(tags) if self._task.words_given else label
                    yield self._task.example(words, found if self._labelled else None, where)
                words, tags, label, broken = [], [], None, False
                continue
            if broken:
                continue
            try:
                if self._is_comment(line, inside=bool(words)):
                    label = _label_of(line) or label
                    continue
                columns = self._columns(line)
            except DataError as error:
                yield Unreadable(f"{self._name}:{number}", str(error), error.code)
                broken = True
                continue
            if columns is None:
                continue
            if not words:
                where = f"{self._name}:{number}"
            words.append(columns[self._text])
            tag = columns[self._tag] if self._tagged else ""
            tags.append(dict(re.findall(_PAIR_VALUE, tag)).get(self._key, "_") if self._key else tag)

    def _is_comment(self, line: str, inside: bool) -> bool:
        """Distinguish a comment from a word that begins with '#'."""
        if line.startswith("meta") and self._width == 2 and not inside:
            return len(line.split()) == 3
        if not line.startswith("#"):
            return False
        keyed = _comment(line) is not None
        if keyed and inside:
            problem = f"the comment '{line.strip()}' is inside a text. Put a blank line before it to end the text."
            raise DataError(problem, code="comment-inside")
        if keyed or inside:
            return keyed
        return self._tabs and "\t" not in line and self._repaired(line) is None

    def _repaired(self, line: str) -> list[str] | None:
        """Return the columns of a word line that has spaces in place of its tabs, or none if it is not one."""
        columns = _split(line)
        fits = self._tabs and len(columns) == self._width and columns[-1] in self._labels
        return columns if fits else None

    def _columns(self, line: str) -> list[str] | None:
        """Return the columns of a word line; none for a CoNLL-U range or empty node."""
        tabs, width = self._tabs, self._width
        columns = [column.strip(" ") for column in line.split("\t")] if tabs else _split(line)
        if len(columns) == 1:
            columns = self._repaired(line) or columns
        if self._conllu and _RANGE_OR_EMPTY_NODE.fullmatch(columns[0]):
            return None
        needed = [self._text, self._tag] if self._tagged else [self._text]
        least = max([index + 1 if index >= 0 else -index for index in needed] + [2 if self._tagged else 1])
        exact = not tabs or min(needed) < 0
        if len(columns) >= least and (not exact or len(columns) == width):
            return columns
        found = f"{len(columns)} column{'s' if len(columns) != 1 else ''} separated by {'tabs' if tabs else 'spaces'}"
        wanted = f"the other lines have {width}" if exact else f"the word and its label need {least}"
        if self._tagged and width < least:
            wanted = f"a word and its label need {least}"
        raise DataError(f"{found}, but {wanted}: {line!r}", code="column-count")


def _label_of(line: str) -> str | None:
    """Return the label in a comment: the last field after the text's number, or the value of a label key."""
    if line.startswith("meta"):
        return line.split()[-1]
    match = _comment(line)
    if match is None:
        return None
    fields = match["value"].split()
    if match["key"].lower() in _LABEL_KEYS:
        return " ".join(fields) or None
    return fields[-1] if match["key"].startswith("sent_enum") and len(fields) > 1 else None
