"""Texts with a word in each row: the rows of a table that make a text, and column files (CoNLL).

In a column file there is a word per line, its tags in further columns, a blank line between texts. What looks like a
comment may be a word of a tweet; these rules read LinCE, CALCS, SentiMix and Universal Dependencies:

* a comment comes before the first word of a text, and reads `# key = value`, `# key: value` or `# key value<TAB>label`,
  or has no column separator in a file whose word lines have one; SentiMix has `meta<TAB>7<TAB>positive`;
* everything else that begins with `#` is a word: `#OneDay<TAB>lang1`, and the sign alone, `#<TAB>other`.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Literal

from tokmask_peft.console import Decision
from tokmask_peft.errors import DataError, nearest
from tokmask_peft.examples import Example, Unreadable
from tokmask_peft.tasks import TASKS, Task, is_missing

Row = tuple[str, dict[str, Any]] | Unreadable  # place of a row (`file:line`) and cells by column, or why it has none
Cells = tuple[str, list[str]] | Unreadable  # the same before columns have names
Word = tuple[str, str, str | None]  # a word with its place and its tag or its text's label
BLANK = "blank-row"  # the code of a blank line in a table: it has no text, but may end one
_TEXT_ENDS = {"<eos>", "</s>"}
_USUAL = {"id", "word", "token", "tag", "sent", "sent_id", "sentence_id", "sentence #", "tweet_id", "category", "class"}
_USUAL |= {"language", "lang"} | {name for task in TASKS.values() for name in (*task.text_columns, *task.label_columns)}
CONLLU_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
SNIFFED_LINES = 5000
WITHHELD = (
    "If this is the test set of a shared task, whose labels are withheld, set data.test to validation (or dev) and "
    "data.validation to a share of train such as 0.1, so that the texts that select the checkpoint do not score it."
)
_EMPTY_WORD = "the word is empty. Fill it in or remove the line", ', or leave out such texts with data.missing=[""]'
_KEY_VALUE = re.compile(r"#[ ]+(?P<key>[A-Za-z_][\w.\-]*(?:\[\w+\]|[ ]id)?)[ ]*=(?P<value>.*)")
_KEY_COLON = re.compile(r"#[ ]+(?P<key>[A-Za-z_][\w.\-]*):[ ](?P<value>[^\t]*)$")
_KEY_TAB = re.compile(
    r"#[ ]+(?P<key>(?:[\w.\-]+[ ])?[\w.\-]*(?i:id|enum|tweet|text)|[A-Za-z_][\w.\-]*(?=:?[ ]+\d+[ ]*\t))"
    r":?[ ]+(?P<value>\S+)[ ]*\t(?P<label>[^\t]*)$"
)
_LABEL_KEYS = {"label", "sentiment", "sa", "sent_label", "class"}
_PAIR = re.compile(r"(?:^|(?<=\|))([^|=]+)=([^|]*)")
_SPACING = {"SpaceAfter", "SpacesAfter", "SpacesBefore"}
_RANGE_OR_EMPTY_NODE = re.compile(r"\d+[-.]\d+$")


def split_columns(line: str, most: int = 0) -> list[str]:
    """Split at spaces and tabs only, `most` times: a word may be any other white space, such as a no-break space."""
    return re.split(r"[ \t]+", line.strip(" \t"), maxsplit=most)


def _is_meta(line: str) -> bool:
    """Return whether a line is the header of a text in SentiMix: `meta`, a number, the label of the text."""
    return line.startswith("meta") and len(line.split()) == 3


def _comment(line: str) -> re.Match[str] | None:
    """Match a line that reads as a comment whatever the file's columns."""
    return _KEY_VALUE.match(line) or _KEY_COLON.match(line) or _KEY_TAB.match(line)


@dataclass(frozen=True, slots=True)
class Columns:
    """What to read from a file: names or numbers of columns; for none a usual name is looked for."""

    task: Task  # what an example must look like
    text: str | int | None = None  # column of the text, or of the words
    label: Any = None  # column of the label, or of the tags; or a tuple of columns, one for each of several labels
    labelled: bool = True  # whether to read labels; prediction does not
    header: bool | Literal["auto"] = "auto"  # whether the first row of a table names its columns
    group: str | int | None = None  # in a table with a word in each row, the column that names its text
    separator: str = "auto"  # what separates columns, or a word from its tag, or a label from its text
    decisions: list[Decision] = field(default_factory=list)  # takes what was decided from what is in the file
    labels: str = "auto"  # what separates the labels in a cell, if a text may have several
    rows: deque[Row] | None = None  # takes the rows of a table as they are read, for who wants all their cells
    second: str | None = None  # column of the second text of a pair, if texts are pairs

    @property
    def asked(self) -> set[str | int]:
        """The names and numbers of columns that were asked for."""
        labels = self.label if isinstance(self.label, tuple) else (self.label,)
        return {self.text, self.second, *labels, self.group} - {None}

    @property
    def named(self) -> bool:
        """Whether a column was asked for by a name, so that the file has a header."""
        return not all(re.fullmatch(r"(?:column )?-?\d+", str(one)) for one in self.asked)

    @property
    def mark(self) -> str | None:
        """The separator that was asked for, if any."""
        return {"auto": None, "tab": "\t"}.get(self.separator, self.separator)


def is_usual(cell: str) -> bool:
    """Return whether a cell is the usual name of a column."""
    return cell.strip().lower() in _USUAL


def blank_row(where: str) -> Unreadable:
    """Return what stands for a blank line."""
    return Unreadable(where, "the row is blank", BLANK)


def _ends_text(found: Row, text: str) -> bool:
    """Return whether a row stands between texts: blank, without anything in its cells, or `<EOS>`."""
    if isinstance(found, Unreadable):
        return found.code == BLANK
    cells = found[1]
    return str(cells.get(text)).strip().lower() in _TEXT_ENDS or all(map(_is_empty, cells.values()))


def _is_empty(cell: Any) -> bool:
    return cell == "" or is_missing(cell)


def grouping(head: Sequence[Row], text: str, label: str | None, columns: Columns, name: str) -> tuple[bool, str | None]:
    """Return whether a row has one word of a text, and the column that names the text; none if rows end the texts.

    Without `group_column` that is so if words have labels and nearly all cells are one word. Then blank or `<EOS>` rows
    end the texts, or the only other column whose values come in runs, from the first row on and each value in one run,
    names them. DataError if rows have words, but nothing says which of them make a text.
    """
    rows = [row[1] for row in head if isinstance(row, tuple) and not _ends_text(row, text)]
    single = sum(re.fullmatch(r"\s*(?!\[)\S*\s*", str(row.get(text, " . "))) is not None for row in rows)
    if not columns.task.words_given or len(rows) < 2 or single < 0.95 * len(rows):
        return False, None
    unique, recurring = list[str](), list[str]()
    for column in rows[0]:
        if column in (text, label) or column.lower() in columns.task.label_columns or _is_empty(rows[0][column]):
            continue
        values = [str(row[column]) for row in rows if not _is_empty(row.get(column))]
        runs = [value for value, _ in groupby(values)]
        if 1 < len(runs) < len(rows) and len(set(runs)) == len(runs):
            unique.append(column)
        elif len(runs) < len(values) and all(value.isdecimal() for value in values):
            recurring.append(column)  # such as sentence numbers that begin again in each document
    last = max(at for at, row in enumerate(head) if not _ends_text(row, text))
    if any(_ends_text(row, text) for row in head[:last]):
        found, group, choice, why = True, None, "one word a row", "a blank or <EOS> row ends a text"
    elif len(unique) == 1 and not recurring:
        found, group, choice = True, unique[0], "one word a row"
        why = f"column '{group}' says which text; data.group_column changes it"
    elif not columns.labelled:
        found, group, choice, why = False, None, "one word each", "neither a column nor blank rows say where texts end"
    else:
        likely = f" (is it {' or '.join([*unique, *recurring])}?)" if unique or recurring else ""
        problem = f"{name}: each row has one word, but not which words make a text"
        remedy = f"Set data.group_column to the column that says it{likely}, or put a blank row between texts"
        alone = 'If each row is a text of one word, write it as a JSON list, such as ["word"]'
        raise DataError(f"{problem}. {remedy}. {alone}.", code="word-per-row", columns=(*unique, *recurring))
    columns.decisions.append(Decision(f"texts of {Path(name).name}", choice, why))
    return found, group


def words_of_rows(
    rows: Iterable[Row], text: str, label: str | None, group: str | None, name: str, columns: Columns
) -> Iterator[Word | Unreadable | None]:
    """Yield the words of a table with a word in each row, none where a text ends; an empty `group` cell is as above."""
    key, seen, returned = "", set[str](), set[str]()
    for found in rows:
        if isinstance(found, Unreadable) or _ends_text(found, text):
            yield found if isinstance(found, Unreadable) and found.code != BLANK else None
            continue
        where, row = found
        now = key if group is None or _is_empty(row[group]) else str(row[group])
        if now != key:
            yield None
            returned |= {now} & seen
            seen.add(now)
        key = now
        word, tag = ("" if column is None or is_missing(row[column]) else str(row[column]) for column in (text, label))
        yield where, word.strip(), None if label is None else tag.strip()
    if returned:
        why = f"values that return later: {len(returned):,}; if these are parts of one text, sort the file by '{group}'"
        columns.decisions.append(Decision(f"'{group}' in {Path(name).name}", "each change begins a text", why))


def join_words(
    found: Iterable[Word | Unreadable | None], name: str, columns: Columns
) -> Iterator[Example | Unreadable]:
    """Make examples of words, each with its place and tag; none ends a text. A text's first problem is in its place."""
    task, words, tags, empty = columns.task, list[str](), list[str | None](), 0
    places, bad = list[str](), None
    for one in chain(found, [None]):
        if one is None:
            if words or bad:
                rows = () if columns.labelled else tuple(places)
                try:
                    label: Any = None if None in tags or not tags else tuple(tags) if task.words_given else tags[0]
                    label = task.parted(label, columns.labels)
                    yield bad or replace(task.example(words, label, places[0]), places=rows)
                except DataError as error:
                    yield Unreadable(places[0], str(error), error.code)
            words, tags, places, bad = [], [], [], None
        elif isinstance(one, Unreadable):
            bad = bad or one
        elif one[1]:
            places.append(one[0])
            words.append(one[1])
            tags.append(one[2])
        elif task.words_given:
            bad = bad or Unreadable(one[0], "".join(_EMPTY_WORD[: 1 + columns.labelled]), "empty-word")
        else:
            empty += 1
    if empty:
        decision = Decision(f"empty words of {Path(name).name}", "left out", f"{empty:,} lines have none")
        columns.decisions.append(decision)


def readable(found: Iterable[Example | Unreadable]) -> list[Example]:
    """Return the examples, without blank rows; DataError with the first that cannot be read, and places of others."""
    examples: list[Example] = []
    bad: list[Unreadable] = []
    for one in found:
        if isinstance(one, Example):
            examples.append(one)
        elif one.code != BLANK:
            bad.append(one)
    if bad:
        first, places = bad[0], ", ".join(one.where for one in bad[1:5])
        more = f" There are {len(bad):,} such rows, the next at {places}." if places else ""
        raise DataError(f"{first.where}: {first.problem}{more}", code=first.code, where=first.where, rows=len(bad))
    return examples


def is_conll(lines: Iterable[str], columns: Columns) -> bool:
    """Return whether a file is a column file, whatever its ending, from its first lines.

    It is if blocks of lines, between blank lines or below comments, have the same columns without white space in them,
    and its first line is not the header of a table. Without labels tabs must separate them: prose has spaces.
    """
    found, heads, blocks, begins = list[str](), list[str](), 0, True
    for line in islice(lines, SNIFFED_LINES // 4):  # of most files, which are no column files, they are kept in vain
        if not line.strip(" \t"):
            begins = True
        elif begins and (_is_meta(line) or _comment(line) or re.match(r"-DOCSTART-|#[^\t]*$", line)):
            heads.append(line)
        else:
            blocks, begins = blocks + begins, False
            found.append(line.rstrip(" "))
    tabs = any("\t" in line for line in found)
    rows = [line.split("\t") if tabs else split_columns(line) for line in found]
    widths = [len(row) for row in rows] or [0]
    width = max(set(widths), key=widths.count)
    conllu = tabs and width == len(CONLLU_COLUMNS)
    same = [row for row in rows if len(row) == width and (conllu or not any(" " in cell.strip() for cell in row))]
    words = columns.task.words_given and columns.labelled
    least = 1 if heads or (words and begins) else 2
    if width < 2 or not (tabs or columns.labelled) or not least <= blocks < len(rows) or len(same) < 0.8 * len(rows):
        return False
    if columns.labelled and not words and not any(map(_label_of, heads)):
        return False
    if columns.header is True or columns.group is not None or columns.mark not in (None, "\t", " "):
        return False
    recurring = any(row[at : at + 1] == [cell] for row in rows[1:] for at, cell in enumerate(rows[0]))
    return conllu or (not columns.named and (recurring or not any(map(is_usual, rows[0]))))


class ConllReader:
    """Reads a column file, given as lines without their ends, one text at a time; `name` is for places.

    If words carry the labels, the tags are read from a column (default: the last); otherwise the label of a text is
    read from the comment above its words. These are in the first column by default (CoNLL-U: the second). In CoNLL-U
    `misc.Lang` and `feats.Case` are values of a key, `_` for words without it; the default is the only key of MISC.
    `sample` are the columns of the first word lines, of those that have as many as most.
    """

    def __init__(self, lines: Iterable[str], name: str, columns: Columns) -> None:
        stream = iter(lines)
        first = list(islice(stream, SNIFFED_LINES))
        self._lines = chain(first, stream)
        self._name, self._wanted = name, columns
        self._mark = "\t" if columns.mark in (None, " ") else columns.mark
        self._tagged = columns.labelled and columns.task.words_given
        self._sniff(first)
        self._text = self._index(columns.text, 1 if self._conllu else 0, "text_column")
        column, _, self._key = str(columns.label).partition(".") if self._conllu else (columns.label, "", "")
        self._tag = self._index(column if self._key else columns.label, -1, "label_column")
        if self._conllu and self._tagged:
            self._choose_key(asked=columns.label is not None)
        if self._tagged and self._width == 1:
            raise DataError(f"{name}: words have no labels: each line has one column. {WITHHELD}", code="no-labels")
        if self._tagged and self._tag == -1 and self._width > 2 and self._labels == {""}:
            problem = f"{name}: the last column of every line is empty. If that is a stray tab, set data.label_column="
            problem += f"{self._width - 2} or the number of another column (from 0); withheld labels cannot be scored."
            raise DataError(problem, code="empty-column", columns=self._width)

    def _sniff(self, lines: Iterable[str]) -> None:
        """Guess from the first lines what separates columns, how many there are, and which labels occur."""
        lines = (line.rstrip(" ") for line in lines if line.strip(" \t") and not line.startswith("-DOCSTART-"))
        rows = [line for line in lines if not (_comment(line) or _is_meta(line))]
        tabbed = [line.split(self._mark) for line in rows if self._mark in line]
        fields = tabbed or [split_columns(line) for line in rows]
        widths = [len(row) for row in fields] or [0]
        self._tabs, self._width = bool(tabbed), max(set(widths), key=widths.count)
        self._conllu = self._tabs and self._width == len(CONLLU_COLUMNS)
        self.sample = [row for row in fields if len(row) == self._width]
        self._head: list[str] | None = None
        if self._wanted.header is not False and _is_head(fields, self.sample):
            self._head, *self.sample = self.sample
            self._head = [cell.strip(" ") for cell in self._head]
            why = "all its cells are usual names of columns, and the last is in no other row; data.header changes it"
            self._wanted.decisions.append(Decision(f"header of {Path(self._name).name}", "the first row", why))
        self._labels = {row[-1] for row in self.sample}
        # of CoNLL-U's FEATS and MISC
        cells = {at: {row[at] for row in self.sample} if self._conllu else () for at in (5, 9)}
        self._keys = {at: sorted({*dict(_PAIR.findall("|".join(cells[at])))} - _SPACING) for at in cells}

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
        return join_words(self._words(), self._name, self._wanted)

    def _words(self) -> Iterator[Word | Unreadable | None]:
        label, inside, head = None, False, self._head
        for number, line in enumerate(self._lines, start=1):
            where = f"{self._name}:{number}"
            if not line.strip(" \t"):
                yield None
                label, inside = None, False
                continue
            try:
                if self._is_comment(line, inside):
                    label = _label_of(line) or label
                    continue
                columns = self._columns(line)
            except DataError as error:
                yield Unreadable(where, str(error), error.code)
                inside = True
                continue
            if columns is not None and columns != head:
                inside, head = True, None
                tag = columns[self._tag] if self._tagged else label
                tag = dict(_PAIR.findall(tag)).get(self._key, "_") if self._key and tag is not None else tag
                yield where, columns[self._text], tag if self._wanted.labelled else None

    def _is_comment(self, line: str, inside: bool) -> bool:
        """Distinguish a comment from a word that begins with '#'."""
        if line.startswith("-DOCSTART-") and not inside:  # CoNLL 2003: a document begins
            return True
        if _is_meta(line) and not inside:  # a word of that name has as many columns as others
            return self._width != 3 or line.split()[1].isdecimal()
        if not line.startswith("#"):
            return False
        keyed = _comment(line) is not None
        if keyed and inside:
            problem = f"the comment '{line.strip()}' is inside a text. Put a blank line before it to end the text."
            raise DataError(problem, code="comment-inside")
        if keyed or inside:
            return keyed
        return self._tabs and self._mark not in line and self._repaired(line) is None

    def _repaired(self, line: str) -> list[str] | None:
        """Return the columns of a word line that has spaces in place of its tabs, or none if it is not one."""
        columns = split_columns(line)
        fits = self._tabs and len(columns) == self._width and columns[-1] in self._labels
        return columns if fits else None

    def _columns(self, line: str) -> list[str] | None:
        """Return the columns of a word line; none for a CoNLL-U range or empty node."""
        tabs, width = self._tabs, self._width
        columns = [column.strip(" ") for column in line.split(self._mark)] if tabs else split_columns(line)
        if len(columns) == 1:
            columns = self._repaired(line) or columns
        if self._conllu and _RANGE_OR_EMPTY_NODE.fullmatch(columns[0]):
            return None
        needed = [self._text, self._tag] if self._tagged else [self._text]
        least = max([index + 1 if index >= 0 else -index for index in needed] + [2 if self._tagged else 1])
        exact = not tabs or min(needed) < 0
        if len(columns) >= least and (not exact or len(columns) == width):
            return columns
        by = "tabs" if self._mark == "\t" else repr(self._mark)
        found = f"{len(columns)} column{'s' if len(columns) != 1 else ''} separated by {by if tabs else 'spaces'}"
        wanted = f"the other lines have {width}" if exact else f"the word and its label need {least}"
        if exact and self._tagged and width > 2 and tabs:
            wanted += " (data.label_column=1 counts from the left, and needs no further column)"
        if self._tagged and width < least:
            wanted = f"a word and its label need {least}"
        raise DataError(f"{found}, but {wanted}: {line!r}", code="column-count")


def _is_head(rows: Sequence[Sequence[str]], whole: Sequence[Sequence[str]]) -> bool:
    """Return whether the first row of a column file names the columns."""
    first, *others = whole or [()]
    names = rows[:1] == [first] and len(first) > 1 and all(map(is_usual, first))
    return names and bool(others) and all(row[-1] != first[-1] for row in others)


def _label_of(line: str) -> str | None:
    """Return the label in a comment: the last field after the text's number, or the value of a label key."""
    if line.startswith("meta"):
        return line.split()[-1]
    if (match := _comment(line)) is None or match.re is _KEY_TAB:
        return (match and match["label"].strip()) or None
    fields = match["value"].split()
    if match["key"].lower() in _LABEL_KEYS:
        return " ".join(fields) or None
    return fields[-1] if match["key"].startswith("sent_enum") and len(fields) > 1 else None
