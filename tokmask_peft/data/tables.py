"""A local file that is being read, and the tables in it: CSV, TSV, JSON lines and parquet, with a text in each row."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tokmask_peft.errors import DataError, nearest
from tokmask_peft.tasks import Example, Task, Unreadable

Row = tuple[str, dict[str, Any]] | Unreadable
"""The place of a row (`file:line`) and its cells by column, or why it has none."""


@dataclass(frozen=True, slots=True)
class Columns:
    """What to read from a file: names or numbers of columns; for none a usual name is looked for."""

    task: Task  # what an example must look like
    text: str | int | None = None  # column of the text, or of the words
    label: str | int | None = None  # column of the label, or of the tags
    labelled: bool = True  # whether to read labels; prediction does not


class DataFile:
    """A file to read from.

    Args:
        path: the file.
        name: for places such as `name:line`; default: the path.
        tolerant: keep bytes that are not UTF-8 as lone surrogates, for `unicode_problem` to find in the text.

    Attributes:
        total: its size in bytes.
        done: bytes read so far.
    """

    def __init__(self, path: Path, name: str | None = None, tolerant: bool = False) -> None:
        self.path, self.name, self._tolerant = path, name or str(path), tolerant
        self.total, self.done = path.stat().st_size, 0

    def lines(self, keep_ends: bool = False) -> Iterator[str]:
        """Read UTF-8 lines, with or without a byte-order mark, ended by LF or CRLF.

        Only line feeds end a line: a post may contain other characters that Unicode counts as line ends.

        CSV needs them inside quotes (`keep_ends`).

        Raises:
            DataError: a line is not UTF-8 (unless `tolerant`); names it.
        """
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                self.done += len(raw)
                text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                try:
                    line = text.decode("utf-8", errors="surrogateescape" if self._tolerant else "strict")
                except UnicodeDecodeError as error:
                    where = f"{self.name}:{number}"
                    problem = f"{where}: byte {error.start + 1} of the line is not UTF-8 ({error.reason}). "
                    remedy = f"Save the file as UTF-8, for example: iconv -f latin1 -t utf-8 '{self.path.name}'"
                    raise DataError(problem + remedy, code="not-utf8", where=where) from error
                yield line if keep_ends else line.removesuffix("\n").removesuffix("\r")


def readable(found: Iterable[Example | Unreadable]) -> Iterator[Example]:
    """Yield examples.

    Raises:
        DataError: at the first text that cannot be read; names its place.
    """
    for example in found:
        if isinstance(example, Unreadable):
            raise DataError(f"{example.where}: {example.problem}", code=example.code, where=example.where)
        yield example


def unicode_problem(text: str) -> str | None:
    """Return why a text is not valid Unicode, or none: no tokenizer takes it, and JSON lines may contain it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is not valid Unicode, or the file is not UTF-8"
    return None


def csv_rows(file: DataFile) -> Iterator[Row]:
    """Read CSV with RFC 4180 quoting; a text may contain line ends inside its quotes."""
    reader = csv.reader(file.lines(keep_ends=True), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{file.name}:{reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"this is not valid CSV ({error}). If tabs separate the columns, set data.format=tsv."
            if header is None:
                raise DataError(f"{where}: {problem}", code="not-csv", where=where) from error
            yield Unreadable(where, problem, "not-csv")
            continue
        if header is None:
            header = _unique(fields, f"{where}: ")
        elif fields:
            yield _by_name(header, fields, where, "','")


def tsv_rows(file: DataFile) -> Iterator[Row]:
    """Read TSV without quoting: a lone quote is an ordinary character in real posts."""
    header: list[str] | None = None
    for number, line in enumerate(file.lines(), start=1):
        fields = line.split("\t")
        if header is None:
            header = _unique(fields, f"{file.name}:{number}: ")
        elif line:
            yield _by_name(header, fields, f"{file.name}:{number}", "a tab")


def _unique(names: Sequence[str], place: str = "") -> list[str]:
    """Return the names of columns, with a number for each that is empty.

    Raises:
        DataError: two are the same, so that one would hide the other.
    """
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        problem = f"{place}several columns are named '{twice[0]}'. Rename or remove all but one."
        raise DataError(problem, code="duplicate-column", columns=tuple(twice))
    return [name or f"column {number}" for number, name in enumerate(names)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object whose names all differ."""
    if len(row := dict(pairs)) < len(pairs):
        _unique([name or '""' for name, _ in pairs])
    return row


def _by_name(header: Sequence[str], fields: Sequence[str], where: str, separator: str) -> Row:
    if len(fields) == len(header):
        return where, dict(zip(header, fields, strict=True))
    names = ", ".join(header)
    problem = f"{len(fields)} columns separated by {separator}, but the header has {len(header)} ({names})"
    return Unreadable(where, problem, "column-count")


_JSON_FORM = (
    "Needed: one object per line, or one array of objects. For objects over several lines: jq -c . FILE > NEW.jsonl"
)


def jsonl_rows(file: DataFile) -> Iterator[Row]:
    """Read one JSON object per line, or one array of objects, which is read whole.

    Raises:
        DataError: the file begins like an array, but is not one.
    """
    lines = enumerate(file.lines(), start=1)
    start, first = next((found for found in lines if found[1].strip()), (1, ""))
    if first.lstrip().startswith("["):
        rest = [line for _, line in lines]
        whole = _json("\n".join([first, *rest]), file.name, start)
        if not isinstance(whole, Unreadable):
            yield from (_json_row(item, f"{file.name}[{index}]") for index, item in enumerate(whole))
            return
        if isinstance(_json(first, file.name, start), Unreadable):
            raise DataError(f"{whole.where}: {whole.problem}", code=whole.code, where=whole.where)
        lines = enumerate(rest, start=start + 1)
    for number, line in chain([(start, first)], lines):
        if line.strip():
            yield _json_row(_json(line, file.name, number), f"{file.name}:{number}")


def _json(text: str, name: str, number: int) -> Any:
    """Return the value of a JSON text that begins in the line of a number, or why there is none."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except DataError as error:
        return Unreadable(f"{name}:{number}", str(error), error.code)
    except (ValueError, RecursionError) as error:
        problem = f"this line is not JSON ({getattr(error, 'msg', error)}). {_JSON_FORM}"
        return Unreadable(f"{name}:{number + getattr(error, 'lineno', 1) - 1}", problem, "not-json")


def _json_row(value: Any, where: str) -> Row:
    if isinstance(value, Unreadable):
        return value
    problem = f"this is JSON, but a {type(value).__name__}. {_JSON_FORM}"
    return (where, value) if isinstance(value, dict) else Unreadable(where, problem, "not-json")


def parquet_rows(file: DataFile) -> Iterator[Row]:
    """Read parquet in batches; class numbers become the names that `datasets` stored in the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.name}: cannot be read as parquet: {error}", code="not-parquet") from error
    _unique(table.schema_arrow.names, f"{file.name}: ")
    classes: dict[str, list[str]] = {}
    if b"huggingface" in (table.schema_arrow.metadata or {}):
        from datasets import Features

        classes = class_names(Features.from_arrow_schema(table.schema_arrow))
    rows = (row for batch in table.iter_batches(batch_size=2048) for row in batch.to_pylist())
    for index, row in enumerate(rows):
        file.done = file.total * (index + 1) // table.metadata.num_rows
        yield f"{file.name}[{index}]", name_classes(row, classes)


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

    Raises:
        DataError: the first row that can be read has no fitting columns.
    """
    text = label = None
    for found in rows:
        if isinstance(found, Unreadable):
            yield found
            continue
        where, row = found
        if text is None:
            text = _choose(list(row), columns.text, columns.task.text_columns, "text_column", name)
            if columns.labelled:
                label = _choose(list(row), columns.label, columns.task.label_columns, "label_column", name)
        if missing := {text, label} - {None, *row}:
            problem = f"no column '{missing.pop()}' in this row; it has {', '.join(row) or 'none'}"
            yield Unreadable(where, problem, "missing-column")
            continue
        try:
            words = listed(row[text], text, columns.task)
            tags = None if label is None else listed(row[label], label, columns.task, label=True)
            yield columns.task.from_cells(words, tags, where, (text, label))
        except DataError as error:
            yield Unreadable(where, str(error), error.code)


_ITEM = r"""(?:[uU]?'(?:[^'\\]|\\.)*'|[uU]?"(?:[^"\\]|\\.)*"|[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)"""
_LIST = re.compile(rf"\[\s*(?:{_ITEM}(?:\s*,\s*{_ITEM})*\s*,?|{_ITEM}(?:\s+{_ITEM})*)?\s*\]", re.DOTALL)


def listed(cell: Any, column: str, task: Task, label: bool = False) -> Any:
    """Return the list that a cell holds as text, in the form of JSON, Python or numpy (no commas), or the cell itself.

    A post may begin with a bracket (`[user] hola`), so that a text is read as a list only if a quote follows.

    Raises:
        DataError: a cell that begins with a bracket is not a list of strings or numbers, or may be a word (`[1]`).
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
    shown = text if len(text) <= 40 else text[:39] + "…"
    problem = f"column '{column}' has {shown}, which is not clearly a list of strings or numbers"
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


def _choose(columns: Sequence[str], asked: str | int | None, known: Sequence[str], field: str, name: str) -> str:
    """Find the column of the text or the label: as the recipe asks, or by a usual name."""
    found = f"Columns of {name}: {', '.join(columns)}."
    if isinstance(asked, int):
        if -len(columns) <= asked < len(columns):
            return columns[asked]
        problem = f"data.{field} is {asked}, but {name} has {len(columns)} columns. {found}"
    elif asked is not None:
        if asked in columns:
            return asked
        problem = f"data.{field}: no column '{asked}'. {found}{nearest(asked, columns)}"
    else:
        matches = [column for candidate in known for column in columns if column.lower().strip() == candidate]
        if len(matches) == 1:
            return matches[0]
        why = f"several columns fit ({', '.join(matches)})" if matches else "no column has a usual name"
        problem = f"data.{field} is not set, and {why}. {found} Set data.{field} to one of them."
    raise DataError(problem, code="column", field=field, columns=tuple(columns))
