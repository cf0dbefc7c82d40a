"""Which columns of a table have the texts and the labels, as a sample of its rows shows it."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tokmask_peft.console import Decision
from tokmask_peft.data import tables
from tokmask_peft.data.conll import Columns, Row, grouping
from tokmask_peft.data.split import SPLITS, canonical
from tokmask_peft.errors import DataError
from tokmask_peft.examples import MARKS, Unreadable
from tokmask_peft.tasks import TASKS, get_task

SAMPLED = 2000  # lines or rows from which the form of a file is decided
MOST_LABELS, MOST_NUMBERS = 200, 20  # different values of a column of labels; fewer of numbers, which may be counts
TASK_QUESTION = "What has a label: each text (sequence), or each word (token)?"
SETS_QUESTION = "How many labels has a text: one (sequence), or several (multilabel)?"
TEXT_NAMES = (
    *("text", "sentence", "tweet", "content", "body", "post", "comment", "review", "utterance", "message", "question"),
    *("words", "tokens", "word", "token", "form"),
)
PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("sentence_a", "sentence_b"), ("text1", "text2")),
    *(("text_a", "text_b"), ("question1", "question2"), ("question", "sentence"), ("question", "answer")),
    *(("question", "passage"), ("question", "context"), ("query", "passage"), ("query", "document")),
    *(("claim", "evidence"), ("headline", "body")),
)
"""Names of two columns of texts that are read as a pair."""
LABEL_NAMES = (
    *("label", "labels", "tags", "lid", "sentiment", "sa", "class", "category", "target", "tag", "intent", "emotion"),
    *("topic", "stance", "polarity", "stars", "rating", "score", "hate", "offensive", "irony", "gold", "pos", "ner"),
    *("genre", "classes", "categories", "targets", "intents", "emotions", "topics", "genres"),
)
LANGUAGE_NAMES = ("language", "lang", "dialect")  # names of labels if nothing else in the table is one
TAG_NAMES = ("label", "labels", "tags", "lid", *LANGUAGE_NAMES, *LABEL_NAMES)  # names of the labels of words
_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)?")
Ask = Callable[[str, str, Mapping[str, str]], str]  # key, question, and answers with what is known; returns one


def likeliest(key: str, question: str, answers: Mapping[str, str]) -> str:
    """Answer a question if nobody can be asked."""
    return next(iter(answers))


@dataclass
class Findings:
    """What was found: the keys of `data` that read the files, and each decision under the key that changes it."""

    data: dict[str, Any]
    ask: Ask = likeliest
    decisions: list[Decision] = field(default_factory=list)

    def decide(self, key: str, value: Any, reason: str) -> None:
        """Set a key of `data`, unless it is set already."""
        if key not in self.data:
            self.data[key] = value
            self.decisions.append(Decision(f"data.{key}", written(value), reason))

    def pick(self, key: str, question: str, answers: Mapping[str, str]) -> str:
        """Return the only answer, or the one that the user gives."""
        return (likeliest if len(answers) == 1 else self.ask)(key, question, answers)


def written(value: Any) -> str:
    """Return a value of a recipe for a reader."""
    if isinstance(value, Mapping):
        return ", ".join(f"{old} -> {new}" for old, new in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(str(one) or repr('') for one in value)}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def some(values: Iterable[str] | Counter[str]) -> str:
    """Return a few labels to show."""
    names = [name for name, _ in values.most_common()] if isinstance(values, Counter) else list(values)
    return ", ".join(name[:20] for name in names[:4]) + (", …" if len(names) > 4 else "")


def spread(rows: Iterable[Row]) -> list[Row]:
    """Return some of the rows, at most `SAMPLED`, at equal distances."""
    kept: list[Row] = []
    step = 1
    for at, row in enumerate(rows):
        if at % step == 0:
            kept.append(row)
        if len(kept) > SAMPLED:
            kept, step = kept[::2], 2 * step
    return kept


class _Column:
    """A column of a table, as its sample shows it."""

    def __init__(self, name: str, cells: Sequence[Any]) -> None:
        self.name, self.cells = name, cells
        strings = [str(cell).strip() for cell in cells if cell is not None]
        self.strings = [text for text in strings if text]
        self.values = Counter(self.strings)
        self.filled = len(self.strings) / max(len(cells), 1)
        self.words = sum(len(text.split()) for text in self.strings) / max(len(self.strings), 1)
        self.length = sum(map(len, self.strings)) / max(len(self.strings), 1)
        self.is_number = all(map(_NUMBER.fullmatch, self.strings))
        self.lists = [_items(cell) for cell in cells]
        self.is_list = self.lists.count(None) < 0.1 * len(cells)
        if self.is_list:
            self.values = Counter(str(item) for row in self.lists for item in row or ())

    def may_be_text(self) -> bool:
        """Whether most cells differ, and are neither lists nor numbers."""
        differ = self.filled > 0.5 and len(self.values) > 0.3 * len(self.cells)
        return differ and not self.is_list and not self.is_number

    def may_be_label(self) -> bool:
        """Whether a few short values recur."""
        most = MOST_NUMBERS if self.is_number else MOST_LABELS
        few = 1 < len(self.values) <= min(most, max(2, len(self.strings) // 2))
        return few and not self.is_list and self.words <= 4 and not self.names_splits

    @property
    def names_splits(self) -> bool:
        """Whether the cells say which rows are train, validation and test."""
        return len(self.values) > 1 and {canonical(value) for value in self.values} <= {*SPLITS}

    def rank(self, names: Sequence[str]) -> int:
        """Return the place of the column's name among usual ones; those of which it is a part follow."""
        name, most = self.name.strip().lower(), len(names)
        parts = [most + names.index(part) for part in re.split(r"[^a-z]+", name) if part in names]
        return names.index(name) if name in names else min(parts, default=2 * most)

    def has_name(self, names: Sequence[str]) -> bool:
        """Whether its name, or a part of it, is a usual one."""
        return self.rank(names) < 2 * len(names)


def _items(cell: Any) -> list[Any] | None:
    """Return the items of a cell that is a list, or a list written as text."""
    try:
        found = tables.listed(cell, "", TASKS["token"], label=True)
    except DataError:
        return None
    return found if isinstance(found, list) else None


class Table:
    """Finds the columns of a table with a text, or a word, in each row."""

    def __init__(self, rows: Iterator[Row], path: Path, found: Findings) -> None:
        self.path, self.found = path, found
        self.rows = list(islice(rows, SAMPLED))
        self.further = spread(rows)
        self.columns = self._look(self.rows)
        self.headless = [column.name for column in self.columns] == [f"column {at}" for at in range(len(self.columns))]
        if self.headless:
            found.decide("header", False, "the first row is data: it does not name the columns")

    def _look(self, rows: Sequence[Row]) -> list[_Column]:
        """Return the columns that rows have."""
        read = [row[1] for row in rows if isinstance(row, tuple)]
        if not read:
            problem = next((row.problem for row in rows if isinstance(row, Unreadable)), "it has no rows")
            raise DataError(f"{self.path}: {problem}", code="no-texts", source=str(self.path))
        names = list(dict.fromkeys(name for row in read for name in row))
        return [_Column(name, [row.get(name) for row in read]) for name in names]

    def find(self) -> None:
        """Set task and columns, or raise a DataError that lists the columns and what is in them."""
        sample = self._look([*self.rows, *self.further])  # the first rows may all have one label
        for column in sample:
            if column.names_splits:
                reason = f"column '{column.name}' says which are {some(column.values)}, "
                reason += "but each split must be a file of its own: save them separately"
                self.found.decisions.append(Decision("data.train", "all rows", reason))
        if several := isinstance(listed := self.found.data.get("label_column"), list | tuple):
            names = ", ".join(self._column(name, "label_column").name for name in listed)
            self.found.decide("task", "multilabel", f"data.label_column names several columns: {names}")
        task = self.found.data.get("task")
        one = not isinstance(self.found.data.get("text_column"), list | tuple)
        if one and (task is None or get_task(task).words_given) and (self._find_lists() or self._find_words()):
            return
        self.columns = sample
        chosen = self._pair()
        if not chosen:
            texts = self._texts()
            if not texts:
                self._refuse("text_column", "no column has texts: most cells must differ, and not be numbers")
            chosen = [self._pick("text_column", "Which column has the texts?", texts, TEXT_NAMES)]
        if several or self._find_sets(chosen):
            return
        named = [column for column in self.columns if column.has_name(LABEL_NAMES) and len(column.values) == 1]
        labels = self._labels(chosen) or named  # the rest of the file may have other labels
        if not labels:
            names = "' and '".join(column.name for column in chosen)
            why = f"'{names}' has texts, but no other column has labels: two or more values that recur"
            self._refuse("label_column", why)
        self._pick("label_column", "Which column has the labels?", labels, LABEL_NAMES)
        self.found.decide("task", "sequence", f"{'two texts' if chosen[1:] else 'a text'} and a label in each row")

    def _refuse(self, key: str, problem: str) -> None:
        shown = "; ".join(f"{one.name} ({len(one.values):,} values: {some(one.values)})" for one in self.columns)
        remedy = f"If it is one of these, name it: data.{key}=NAME"
        names = tuple(column.name for column in self.columns)
        code = "no-labels" if key == "label_column" else "column"
        raise DataError(f"{self.path}: {problem}. Columns: {shown}. {remedy}.", code=code, field=key, columns=names)

    def _pair(self) -> list[_Column]:
        """Return the two columns of pairs, next to one of labels; unlike texts, those of a pair may recur."""
        if isinstance(asked := self.found.data.get("text_column"), list | tuple):
            return [self._column(one, "text_column") for one in asked]
        by_name = {column.name.strip().lower(): column for column in self.columns}
        for names in PAIRS if asked is None else ():
            pair = [by_name[name] for name in names if name in by_name]
            running = len(pair) == 2 and all(not one.is_list and one.words >= 2 for one in pair)
            labels = [named] if (named := self._named("label_column")) else self._labels(pair)
            if running and labels and named not in pair and not any(_gives_away(one, labels[0]) for one in pair):
                alone = {one.name: "its texts alone" for one in pair if one.name.strip().lower() in TEXT_NAMES}
                both, why = " and ".join(one.name for one in pair), "two texts in each row, which are read as a pair"
                if self.found.pick("data.text_column", "Which texts get the label?", {both: why, **alone}) != both:
                    return []
                self.found.decide("text_column", [one.name for one in pair], why)
                return pair
        return []

    def _named(self, key: str) -> _Column | None:
        """Return the column that the user names; none if no name is given, or several."""
        asked = self.found.data.get(key)
        return self._column(asked, key) if isinstance(asked, str | int) else None

    def _column(self, asked: Any, key: str) -> _Column:
        names = [column.name for column in self.columns]
        name = tables.choose(names, asked, (), key.removesuffix("_column"), self.path.name)
        return self.columns[names.index(name)]

    def _pick(self, key: str, question: str, likely: Sequence[_Column], names: Sequence[str] = ()) -> _Column:
        """Return the column that the user names; or of the likely ones the only one with a usual name; or ask."""
        if (named := self._named(key)) is not None:
            return named
        shown = {column.name: f"{len(column.values):,} values: {some(column.values)}" for column in likely}
        if key == "text_column":
            shown = {column.name: f"such as “{' '.join(column.strings[0].split())[:60]}”" for column in likely}
        usual = [column.name for column in likely if column.has_name(names)]
        name = usual[0] if len(usual) == 1 else self.found.pick(f"data.{key}", question, shown)
        chosen = next(column for column in likely if column.name == name)
        others = [other for other in shown if other != name][:4]
        more = f"; or is it {' or '.join(others)}?" if others else ""
        if key == "label_column" and chosen.is_number:
            more = '; data.label_map={"' + next(iter(chosen.values)) + '": "NAME"} names them' + more
        self.found.decide(key, self.columns.index(chosen) if self.headless else name, shown[name] + more)
        return chosen

    def _texts(self) -> list[_Column]:
        """Return the columns that may hold texts, the likeliest first."""
        found = [column for column in self.columns if column.may_be_text()]
        found = [column for column in found if column.words >= 2] or found
        found = found or [column for column in self.columns if column.is_list and column.has_name(TEXT_NAMES)]
        found.sort(key=lambda column: (column.rank(TEXT_NAMES), -column.length))
        longest = max((column.length for column in found), default=0)
        return [column for column in found if column.has_name(TEXT_NAMES) or column.length > longest / 2]

    def _labels(self, texts: Sequence[_Column]) -> list[_Column]:
        """Return the columns that may hold labels, the likeliest first."""
        found = [column for column in self.columns if column not in texts and column.may_be_label()]
        found.sort(key=lambda column: (-round(column.filled, 1), len(column.values)))
        found.sort(key=lambda column: (column.rank(LABEL_NAMES), column.rank(LANGUAGE_NAMES)))
        best: list[_Column] = []
        for column in found:  # of a name and its number, the name is enough
            twin = next((one for one in best if _same(one, column)), None)
            if twin is None:
                best.append(column)
            elif twin.is_number and not column.is_number:
                best[best.index(twin)] = column
        return best

    def _find_lists(self) -> bool:
        """Look for a cell with the words of a text, and one with as many labels."""
        pairs: dict[_Column, list[_Column]] = {}
        named = self._named("text_column"), self._named("label_column")
        for text in self.columns if named[0] is None else [named[0]]:
            for label in self.columns if named[1] is None else [named[1]]:
                if text is not label and _go_together(text, label):
                    pairs.setdefault(text, []).append(label)
        if not pairs:
            return False
        texts = sorted(pairs, key=lambda column: (column.rank(TEXT_NAMES), -len(column.values)))
        labels = sorted(pairs[texts[0]], key=lambda column: column.rank(TAG_NAMES))
        single = [one for one in self._labels(texts[:1]) if one.has_name((*LABEL_NAMES, *LANGUAGE_NAMES))]
        why = f"'{texts[0].name}' and '{labels[0].name}' have the same number of items in each row"
        answers = {"token": why}
        if single and single[0] not in labels:
            answers = {"sequence": f"'{single[0].name}' has one label in each row", **answers}
        if "task" not in self.found.data:
            if self.found.pick("data.task", TASK_QUESTION, answers) != "token":
                return False
            self.found.decide("task", "token", why)
        self._pick("text_column", "Which column has the words?", texts[:1])
        self._pick("label_column", "Which column has the labels of the words?", labels)
        return True

    def _find_sets(self, texts: Sequence[_Column]) -> bool:
        """Look for several labels for each text: in a list, between marks in a cell, or in columns of 0 and 1."""
        task = self.found.data.get("task")
        asked = task is not None and get_task(task).several
        if not (asked or task is None):
            return False
        others, named = [column for column in self.columns if column not in texts], self._named("label_column")
        marks = {column: mark for column in others if (mark := _mark_of_sets(column)) is not None}
        likely = [named] if named else [column for column in others if column.has_name(LABEL_NAMES)]
        sets = {one: mark for one, mark in marks.items() if one in likely or (mark == "|" and not likely)}
        flags = [column for column in others if column.is_number and {*column.values} <= {"0", "1", "0.0", "1.0"}]
        usual = LABEL_NAMES if likely else (*LABEL_NAMES, *LANGUAGE_NAMES)
        single = [one for one in self._labels(texts) if one.has_name(usual) or not (sets or one.is_number)]
        single = [one for one in single if one not in marks and not (asked or named)]
        if asked and self.headless and len(flags) > 1 and not (sets or named):
            self._refuse("label_column", "columns have 0 or 1: give the file a header, or name data.label_column")
        if sets:
            label, mark = min(sets.items(), key=lambda pair: pair[0].rank(LABEL_NAMES))
            why = f"'{label.name}' has lists of labels" + (f" between {mark!r}" if mark else "")
        elif not named and not self.headless and len(flags) >= (2 if asked else 3):
            mark, why = "", f"{some(column.name for column in flags)} have 0 or 1"
        else:
            return False
        answers = {"sequence": f"'{single[0].name}' has one label in each row"} if single else {}
        if self.found.pick("data.task", SETS_QUESTION, answers | {"multilabel": why}) != "multilabel":
            self._pick("label_column", "Which column has the labels?", single, usual)
            self.found.decide("task", "sequence", f"{answers['sequence']}; or multilabel: {why}")
            return False
        self.found.decide("task", "multilabel", f"{why}; a text may have several, or none")
        if sets:
            if mark:
                label.values = Counter(filter(None, map(str.strip, mark.join(label.strings).split(mark))))
            self._pick("label_column", "Which column has the labels?", [label])
        else:
            self.found.decide("label_column", [one.name for one in flags], "each has 0 or 1: whether a text has it")
        if mark:
            self.found.decide("label_separator", mark, f"it is in cells of '{label.name}'")
        return True

    def _find_words(self) -> bool:
        """Look for a word in each row, and what says which words make a text."""
        single = [column for column in self.columns if 0 < column.words < 1.05 and column.filled > 0.5]
        running = any(column.words >= 2 and column.may_be_text() for column in self.columns)
        words = [column for column in single if not column.is_number]
        words.sort(key=lambda column: (column.rank(TEXT_NAMES), -len(column.values)))
        word = self._named("text_column") or (words[0] if words else None)
        if word is None or running or word is self._named("label_column"):
            return False
        labels = [column for column in single if column is not word and column.may_be_label()]
        labels.sort(key=lambda column: (column.rank(TAG_NAMES), len(column.values)))
        label = self._named("label_column") or (labels[0] if labels else None)
        if label is None:
            return False
        asked, wanted = self._named("group_column"), Columns(TASKS["token"])
        joined, group = True, asked.name if asked else None
        try:
            if asked is None:
                joined, group = grouping(self.rows, word.name, label.name, wanted, self.path.name)
        except DataError:
            if len(word.values) > 0.8 * len(word.strings) and "task" not in self.found.data:
                return False  # names or the like: each a text
            raise
        if not joined:
            return False
        labels = [column for column in labels if column.name != group and not column.is_number]
        self.found.decide("task", "token", "a word and its label in each row")
        self._pick("text_column", "Which column has the words?", [word])
        self._pick("label_column", "Which column has the labels of the words?", labels or [label])
        if group is not None:
            at = next(at for at, column in enumerate(self.columns) if column.name == group)
            self.found.decide("group_column", at if self.headless else group, "its values say which words make a text")
        return True


def _mark_of_sets(column: _Column) -> str | None:
    """Return what separates the labels in cells of a column, nothing in lists; none if no cell has several labels."""
    few = 1 < len(column.values) <= MOST_LABELS
    marks = [mark for mark in MARKS if any(mark in text for text in column.strings)]
    rows = [[*map(str, row or ())] for row in column.lists] if column.is_list else []
    if not column.is_list and len(marks) == 1:
        rows = [[part.strip() for part in text.split(marks[0])] for text in column.strings]
    if any(one and times > 1 for row in rows for one, times in Counter(row).items()):
        return None  # such as [0, 1, 0]: each place stands for a label, whose name is not there
    if column.is_list:
        return "" if few and any(len(row) > 1 for row in rows) else None
    parts = Counter(part for row in rows for part in row)
    few = 1 < len(parts) <= min(MOST_LABELS, len(column.strings) // 2) and len(parts) < len(column.values)
    few = few and not column.is_number  # numbers may have a decimal comma
    return marks[0] if few and all(len(part.split()) <= 4 for part in parts) else None


def _gives_away(text: _Column, label: _Column) -> bool:
    """Return whether many texts of a column recur, each nearly always with the same label."""
    cells = {(str(one).strip(), str(other).strip()) for one, other in zip(text.cells, label.cells, strict=True)}
    labels, recur = Counter(one for one, _ in cells), [one for one, count in text.values.items() if count > 1]
    rows = sum(text.values[one] for one in recur)
    return rows > 0.2 * len(text.strings) and sum(labels[one] == 1 for one in recur) > 0.9 * len(recur)


def _same(one: _Column, other: _Column) -> bool:
    """Return whether each value of a column goes with one value of another."""
    pairs = {(str(first), str(second)) for first, second in zip(one.cells, other.cells, strict=True)}
    return len(pairs) == len(one.values) == len(other.values)


def _go_together(text: _Column, label: _Column) -> bool:
    """Return whether two columns have the same number of items in each row, those of the second being few labels."""
    if text.is_list != label.is_list:
        return False
    words, tags = (
        [row or [] for row in column.lists] if text.is_list else [str(cell or "").split() for cell in column.cells]
        for column in (text, label)
    )
    alike = [(row, other) for row, other in zip(words, tags, strict=True) if row and len(row) == len(other)]
    labels = Counter(str(tag) for _, row in alike for tag in row)
    vocabulary = {str(word) for row, _ in alike for word in row}
    few = 1 < len(labels) <= MOST_LABELS and len(labels) < min(labels.total() / 2, len(vocabulary))
    return len(alike) > 0.95 * len(words) and labels.total() > 1.2 * len(words) and few
