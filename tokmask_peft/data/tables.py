"""Tables: CSV, TSV, workbooks, JSON lines and parquet. Every row comes out once: as cells, or as an `Unreadable`."""

import ast
import csv
import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tokmask_peft.console import Decision
from tokmask_peft.data.conll import BLANK, Cells, Columns, Row, blank_row, grouping, is_usual, join_words, words_of_rows
from tokmask_peft.data.opening import DataFile, damaged, unicode_problem
from tokmask_peft.errors import DataError, nearest
from tokmask_peft.examples import MARKS, Example, Pair, Unreadable
from tokmask_peft.tasks import Task, is_missing

SNIFFED = 1000  # rows from which separator, header and grouping are decided
LONGEST = 20_000_000  # characters in a row of several lines: a quote that is not closed within them is a stray one
_QUOTED = r'"(?:[^"]++|"")*+"'


def records(lines: Iterator[str], separator: str, quoted: bool = True) -> Iterator[tuple[list[str], list[str] | None]]:
    """Split lines, with their ends, into the rows of a table: each as its lines, and as its cells by RFC 4180.

    Every line is in one row. A quote that is never closed, or closed in the middle of a cell, spoils its own line only
    (its row has no cells): lines that it would have taken in are rows of their own, also if all of them would be valid.
    """
    line = next(lines, None)
    while line is not None:
        taken, cells = [line], None
        if not quoted or '"' not in line:
            cells = line.removesuffix("\n").removesuffix("\r").split(separator)
        else:
            cells = _quoted_cells(_following(taken, lines), separator)
            inner = [_quoted_cells([one], separator) for one in taken[1:-1]]
            swallowed = len(inner) > 2 and all(cells and len(cells) == len(one or ()) > 1 for one in inner)
            if cells is None or swallowed:
                yield taken[:1], None
                yield from zip(([one] for one in taken[1:-1]), inner, strict=True)
                line = taken[-1] if len(taken) > 1 else next(lines, None)
                continue
        yield taken, cells
        line = next(lines, None)


def _following(taken: list[str], lines: Iterator[str]) -> Iterator[str]:
    """Yield the line of `taken`, and then further lines, which are added to it."""
    yield taken[0]
    size = 0
    while size < LONGEST and (line := next(lines, None)) is not None:
        taken.append(line)
        size += len(line)
        yield line


def _quoted_cells(lines: Iterable[str], separator: str) -> list[str] | None:
    """Return the cells of the first row, or none if it is not valid."""
    limit = csv.field_size_limit(2**31 - 1)  # 131,072 characters for whoever else reads CSV in this process
    try:
        return next(csv.reader(lines, strict=True, delimiter=separator))
    except csv.Error:
        return None
    finally:
        csv.field_size_limit(limit)


def separator_of(file: DataFile) -> str:
    """Return what separates the columns of a CSV file: what gives most rows the columns of the first, or a comma."""
    best, most = ",", 0.0
    for separator in ",;\t|":
        rows = islice(records(file.again().lines(keep_ends=True), separator), SNIFFED)
        widths = [len(cells or ()) for _, cells in rows if cells != [""]]
        share = widths.count(widths[0]) / len(widths) if widths and widths[0] > 1 else 0.0
        if share == 1.0:
            return separator
        best, most = (separator, share) if share > most else (best, most)
    return best


def is_quoted(file: DataFile, separator: str) -> bool:
    """Return whether the quotes of a TSV file are those of pandas or Excel: every one belongs to a quoted cell.

    At least one of these cells must have needed it, or all cells be quoted: a post may be a quotation.
    """
    needed, every, mark = False, True, re.escape(separator)
    cell = rf'(?:{_QUOTED}|[^"{mark}\n]*+)'
    for taken, cells in records(file.again().lines(keep_ends=True), separator):
        row = "".join(taken).removesuffix("\n").removesuffix("\r")
        if '"' in row:
            if cells is None or not re.fullmatch(rf"{cell}(?:{mark}{cell})*", row):
                return False
            needed = needed or any(re.search(rf'["{mark}\n]', cell) for cell in cells)
        every = every and (not row or re.fullmatch(rf"{_QUOTED}(?:{mark}{_QUOTED})*", row) is not None)
    return needed or every


def cells_of(file: DataFile, separator: str, quoted: bool = True) -> Iterator[Cells]:
    """Yield the rows of a CSV or TSV file."""
    number = 1
    for taken, cells in records(file.lines(keep_ends=True), separator, quoted):
        where = f"{file.name}:{number}"
        number += len(taken)
        if cells is None:
            problem = "not valid CSV: a quote opens a cell, but none closes it before a separator or the end of a row"
            remedy = "Double the quotes inside a quoted cell. If tabs separate the columns, set data.format=tsv."
            yield Unreadable(where, f"{problem}. {remedy}", "not-csv", ("".join(taken).rstrip("\r\n"),))
        elif cells == [""] and '"' not in taken[0]:
            yield blank_row(where)
        else:
            yield where, cells


def named(rows: Iterator[Cells], file: DataFile, columns: Columns, separator: str | None = None) -> Iterator[Row]:
    """Name the columns by the header, a valid first row (or DataError); without one they are `column 0` and so on."""
    head = list(islice(rows, SNIFFED))
    start, first = next(((at, row) for at, row in enumerate(head) if getattr(row, "code", "") != BLANK), (0, None))
    if isinstance(first, Unreadable):
        raise DataError(f"{first.where}: {first.problem}", code=first.code, where=first.where)
    valid = [row for row in head if isinstance(row, tuple)]
    if len(valid) > 1 and (why := _title([cells for _, cells in valid], columns)):
        columns.decisions.append(Decision(f"title of {file.path.name}", "left out", f"{valid[0][0]} {why}"))
        valid, head, start = valid[1:], head[head.index(valid[1]) :], 0
    names: list[str] = []
    if valid:
        is_header, why = _is_header([cells for _, cells in valid], columns)
        if why:
            choice = "the first row" if is_header else "none"
            columns.decisions.append(Decision(f"header of {file.path.name}", choice, f"{why}; data.header changes it"))
        if is_header:
            names, head = unique_names(valid[0][1], f"{valid[0][0]}: "), head[start + 1 :]
        else:
            widths = Counter(len(cells) for _, cells in valid)
            names = [f"column {number}" for number in range(widths.most_common(1)[0][0])]
    if columns.labelled and len(names) == 1 and separator:
        problem = f"{file.name} has one column, '{_short(names[0])}', but a text and its label need two"
        remedy = f"Set data.separator to what separates them (now {separator!r}), or data.format to labelled or tagged"
        raise DataError(f"{problem}. {remedy}.", code="column", field="separator", columns=tuple(names))
    by = f" separated by {separator!r}" if separator else ""
    last = len(names) - 1  # takes what is left over
    for row in chain(head, rows):
        if isinstance(row, Unreadable):
            yield row
        elif len(row[1]) == len(names):
            yield row[0], dict(zip(names, row[1], strict=True))
        else:
            problem = f"{len(row[1])} columns{by}, but the header has {len(names)} ({', '.join(names)})"
            cells = (*row[1][:last], (separator or " ").join(row[1][last:]))
            yield Unreadable(row[0], problem, "column-count", cells)


def _is_header(cells: Sequence[list[str]], columns: Columns) -> tuple[bool, str]:
    """Return whether the first row is a header, and the reason if that was decided from the cells."""
    if columns.header != "auto":
        return columns.header, ""
    if columns.named or _has_usual_names(cells):
        return True, ""
    filled = [cell.strip() for cell in cells[0] if cell.strip()]
    if len(filled) > 1 and filled == [str(number) for number in range(len(filled))]:
        return True, "its cells count the columns, as pandas writes columns without names"
    for at, cell in enumerate(cells[0]):
        recurs = _recurs(cells, at)
        if cell.strip() and (recurs or re.fullmatch(r"[-+]?\d+(?:[.,]\d+)?", cell.strip())):
            return False, f"'{_short(cell)}' in the first row is " + ("also in a later one" if recurs else "a number")
    return True, "no cell of the first row is a number or in a later row"


def _recurs(cells: Sequence[list[str]], at: int) -> bool:
    """Return whether a cell of the first row is in the same column of a later one, as no name would be."""
    return any(row[at : at + 1] == [cells[0][at]] for row in cells[1:])


def _has_usual_names(cells: Sequence[list[str]]) -> bool:
    return any(is_usual(cell) and not _recurs(cells, at) for at, cell in enumerate(cells[0]))


def _title(cells: Sequence[list[str]], columns: Columns) -> str:
    """Return why the first row, with one cell, is not part of the table, or nothing: Excel begins some with `sep=;`."""
    first = [cell.strip() for cell in cells[0] if cell.strip()]
    if len(first) != 1 or len(cells[1]) < 2:
        return ""
    if first[0].lower() == "sep=":
        return "names the separator"
    names = not columns.asked.isdisjoint(cells[1]) or _has_usual_names(cells[1:])
    is_title = columns.header == "auto" and names and not is_usual(first[0])
    return "has one cell, the next row usual names; data.header changes it" if is_title else ""


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def unique_names(names: Sequence[str], place: str = "") -> list[str]:
    """Return the names of columns, numbers for empty ones; DataError if two are the same, or one is not Unicode."""
    if found := unicode_problem(", ".join(names)):
        raise DataError(f"{place}in the names of the columns, {found}", code="not-utf8", where=place.rstrip(": "))
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        problem = f"{place}several columns are named '{twice[0]}'. Rename or remove all but one."
        raise DataError(problem, code="duplicate-column", columns=tuple(twice))
    return [name or f"column {number}" for number, name in enumerate(names)]


def parquet_rows(file: DataFile) -> Iterator[Row]:
    """Read parquet in batches; class numbers become the names that `datasets` stored in the file."""
    import pyarrow.parquet as pq

    with damaged(file, "parquet", "not-parquet"):
        table = pq.ParquetFile(file.whole())  # closes the stream
        unique_names(table.schema_arrow.names, f"{file.name}: ")
        classes = classes_of(table.schema_arrow)
        rows = (row for batch in table.iter_batches(batch_size=2048) for row in batch.to_pylist())
        index, count = -1, table.metadata.num_rows
        for index, row in enumerate(rows):
            file.done = file.total * (index + 1) // max(count, 1)
            yield f"{file.name}[{index}]", name_classes(row, classes)
        if index + 1 != count:
            problem = f"{file.name}: has {index + 1} rows, but says that there are {count}"
            raise DataError(problem, code="row-count", rows=index + 1, expected=count)


def classes_of(schema: Any) -> dict[str, list[str]]:
    """Return the names of each class-label column that `datasets` stored in the schema of a parquet file."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features

    return class_names(Features.from_arrow_schema(schema))


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of each class-label column of `datasets`, also of one inside a list."""
    found = {name: getattr(getattr(feature, "feature", feature), "names", None) for name, feature in features.items()}
    return {name: names for name, names in found.items() if names is not None}


def name_classes(row: dict[str, Any], classes: Mapping[str, list[str]]) -> dict[str, Any]:
    """Turn class numbers into names; -1, a label that is withheld, becomes an empty one."""
    return row | {column: _name_class(row[column], names) for column, names in classes.items() if column in row}


def _name_class(cell: Any, names: list[str]) -> Any:
    if isinstance(cell, list):
        return [_name_class(item, names) for item in cell]
    return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else ""


def examples(rows: Iterable[Row], name: str, columns: Columns) -> Iterator[Example | Unreadable]:
    """Turn the rows of one file or split into examples, or into the reason why a row cannot be one.

    If words have labels, a table may have a word in each row: then rows are joined, see `conll.grouping`. DataError if
    no columns fit, or nothing says which words are one text.
    """
    stream, task = iter(rows) if columns.rows is None else _noted(rows, columns.rows), columns.task
    head, names = list[Row](), list[str]()  # names are those of the first row that has any
    while not names and (more := list(islice(stream, SNIFFED))):
        head += more
        names = next((list(row[1]) for row in more if isinstance(row, tuple) and row[1]), [])
    if not names:
        bad = (_complete(row, task.text_columns[0]) for row in head)
        yield from (row for row in bad if isinstance(row, Unreadable))
        return
    plain = names[0] == "column 0" and len(names) == 1 + task.words_given
    second, label, mark, flags = None, None, None, list[str]()
    is_usual_name = any(column.lower().strip() in task.text_columns for column in names)
    usual = task.text_columns if is_usual_name or columns.labelled else ("text", "sentence", "tweet")
    text = choose(names, 0 if plain and columns.text is None else columns.text, usual, "text", name)
    if columns.second is not None and (second := choose(names, columns.second, (), "text", name)) == text:
        problem = f"data.text_column: the two texts of a pair are both of column '{text}' of {name}"
        raise DataError(f"{problem}: name two columns", code="column", field="text_column", columns=tuple(names))
    if isinstance(columns.label, tuple) and columns.labelled:
        flags = [choose(names, one, (), "label", name) for one in columns.label]
        if not task.several or not {*columns.label} <= {*names}:
            why = f"this task has {task.description}: name one column"
            why = "a number gives a label no name: name columns of the first row" if task.several else why
            raise DataError(f"data.label_column is a list, but {why}", code="column", field="label_column")
    elif columns.labelled:
        asked = 1 if plain and columns.label is None else columns.label
        label = choose(names, asked, task.label_columns, "label", name)
        if task.several and columns.labels == "auto":
            mark = _mark_of_labels(head, label, columns, name)
    if columns.group is None:
        joined, group = grouping(head, text, label, columns, name)
    elif task.words_given:
        joined, group = True, choose(names, columns.group, (), "group", name)
    else:
        problem = f"data.group_column joins words that have labels, but this task has {task.description}"
        raise DataError(problem, code="column", field="group_column")
    complete = (_complete(row, text, second, label, group, *flags) for row in chain(head, stream))
    if joined:
        yield from join_words(words_of_rows(complete, text, label, group, name, columns), name, columns)
        return
    for found in complete:
        if isinstance(found, Unreadable):
            yield found
            continue
        where, row = found
        try:
            words = listed(row[text], text, task)
            tags = None if label is None else listed(row[label], label, task, label=True)
            tags = task.parted(tags, columns.labels, mark)
            tags = _flagged(row, flags) if flags else tags
            example = task.from_cells(words, tags, where, (text, label))
            if second is not None:
                other = task.from_cells(listed(row[second], second, task), tags, where, (second, label))
                example = replace(example, text=Pair(example.string, other.string))
            yield example
        except DataError as error:
            yield Unreadable(where, str(error), error.code)


def _mark_of_labels(head: Sequence[Row], label: str, columns: Columns, name: str) -> str | None:
    """Return what separates the labels in the cells of a column; DataError if the first rows show several."""
    cells = [row[1].get(label) for row in head if isinstance(row, tuple)]
    texts = [cell for cell in cells if isinstance(cell, str) and not cell.lstrip().startswith("[")]
    marks = [mark for mark in MARKS if any(mark in text for text in texts)]
    if len(marks) > 1:
        shown = next(text for text in texts if marks[0] in text)
        problem = f"{name}: {' and '.join(map(repr, marks))} are both in column '{label}', such as “{_short(shown)}”"
        raise DataError(f"{problem}. Set data.label_separator to what separates labels.", code="label-separator")
    if marks:
        why = f"it is in cells of '{label}'; data.label_separator changes it"
        where = Path(name).name if Path(name).is_absolute() else name
        columns.decisions.append(Decision(f"separator of the labels in {where}", repr(marks[0]), why))
    return marks[0] if marks else None


_FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def _flagged(row: Mapping[str, Any], names: Sequence[str]) -> list[str] | None:
    """Return the columns of a row that have a 1; none if all are empty. DataError for what is neither 0 nor 1."""
    cells = {name: "" if is_missing(row[name]) else str(row[name]).strip() for name in names}
    if not any(cells.values()):
        return None
    for name, cell in cells.items():
        if cell.lower() not in _FLAGS:
            raise DataError(f"column '{name}' has {_short(cell)!r}, expected 0 or 1", code="label-flag")
    return [name for name, cell in cells.items() if _FLAGS[cell.lower()]]


def _noted(rows: Iterable[Row], into: deque[Row]) -> Iterator[Row]:
    for row in rows:
        into.append(row)
        yield row


def _complete(found: Row, *wanted: str | None) -> Row:
    """Return a row that has the columns, or why it cannot be used."""
    if isinstance(found, tuple) and (missing := {*wanted} - {None, *found[1]}):
        problem = f"no column '{missing.pop()}' in this row; it has {', '.join(found[1]) or 'none'}"
        return Unreadable(found[0], problem.encode("utf-8", "backslashreplace").decode(), "missing-column")
    return found


_ITEM = r"""(?:[uU]?'(?:[^'\\]|\\.)*'|[uU]?"(?:[^"\\]|\\.)*"|[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)"""
_LIST = re.compile(rf"\[\s*(?:{_ITEM}(?:\s*,\s*{_ITEM})*\s*,?|{_ITEM}(?:\s+{_ITEM})*)?\s*\]", re.DOTALL)


def listed(cell: Any, column: str, task: Task, label: bool = False) -> Any:
    """Return the list that a cell holds as text, in the form of JSON, Python or numpy (no commas), or the cell itself.

    A post may begin with a bracket (`[user] hola`), so that a text is read as a list only if a quote follows. DataError
    for a bracket without a list of strings or numbers, or that may be a word (`[1]`).
    """
    text = cell.strip() if isinstance(cell, str) else ""
    quoted = re.match(r"\[[\[\s]*[uU]?['\"].*\]$", text, re.DOTALL)
    if not text.startswith("[") or not (quoted or label or task.words_given):
        return cell
    found = _parse_list(text)
    if found is not None and (label or quoted or "," in text):
        return found
    if label and not quoted and not task.words_given and "," not in text:
        return cell
    problem = f"column '{column}' has {_short(text)}, which is not clearly a list of strings or numbers"
    raise DataError(f'{problem}. Write it as a JSON list of strings, such as ["a", "b"].', code="list-cell")


def _parse_list(text: str) -> list[str | float] | None:
    """Return the strings and numbers of a list, or none if the text is anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if not _LIST.fullmatch(text):
            return None
        try:
            found = [ast.literal_eval(item) for item in re.findall(_ITEM, text, re.DOTALL)]
        except (ValueError, SyntaxError):
            return None
    return found if all(type(item) in (str, int, float) and item == item for item in found) else None


def choose(columns: Sequence[str], asked: str | int | None, known: Sequence[str], what: str, name: str) -> str:
    """Find the column of text or label, as asked, or by a usual name; DataError if there is none, or several fit."""
    field, found = f"data.{what}_column", f"Columns of {name}: {', '.join(columns)}."
    how = f"Set {field} to one of them, or to its number (from 0)."
    if columns[:1] == ["column 0"]:
        found += " They have no names, as the file has no header; if it has one, set data.header=true."
        how = "Otherwise set data.text_column, and for training data.label_column, to their numbers (from 0)."
    if len(columns) == 1 and re.search(r"[,;|\t]", columns[0]):
        found += " If that is more than one, set data.separator to what separates them."
    if isinstance(asked, str) and asked not in columns and re.fullmatch(r"-?\d{1,9}", asked):
        asked = int(asked)
    if isinstance(asked, int):
        if -len(columns) <= asked < len(columns):
            return columns[asked]
        problem = f"{field} is {asked}, but {name} has {len(columns)} columns. {found}"
    elif asked is not None:
        if asked in columns:
            return asked
        problem = f"{field}: no column '{asked}'. {found}{nearest(asked, columns)}"
    else:
        matches = [column for candidate in known for column in columns if column.lower().strip() == candidate]
        if len(matches) == 1:
            return matches[0]
        why = f"several columns fit ({', '.join(matches)})" if matches else "no column has a usual name"
        problem = f"{field} is not set, and {why}. {found} {how}"
    raise DataError(problem, code="column", field=f"{what}_column", columns=tuple(columns))
