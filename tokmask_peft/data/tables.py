"""Row files: CSV, TSV, JSON lines and parquet, a text per row."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokmask_peft.errors import DataError, nearest
from tokmask_peft.recipe.schema import Task
from tokmask_peft.tasks import Example

TEXT_NAMES: dict[Task, tuple[str, ...]] = {
    "sequence": ("text", "sentence", "tweet", "content", "words", "tokens"),
    "token": ("words", "tokens"),
}
LABEL_NAMES: dict[Task, tuple[str, ...]] = {
    "sequence": ("label", "sentiment", "sa"),
    "token": ("labels", "tags", "lid", "ner_tags", "pos_tags", "pos", "ner", "label"),
}

Row = tuple[str, dict[str, Any] | DataError]
"""Where a row stands (`file:line`), and its columns by name, or why it has none."""


def csv_rows(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Read CSV with RFC 4180 quoting; a text may hold line ends inside its quotes."""
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = DataError(
                f"{where}: this is not valid CSV ({error}). If quotes are ordinary characters in this file "
                "and tabs separate its columns, set data.format to tsv."
            )
            if header is None:
                raise problem from error
            yield where, problem
            continue
        if header is None:
            header = fields
        elif fields:
            yield where, _by_name(header, fields, where, "','")


def tsv_rows(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Read TSV without quoting: a lone quote is an ordinary character in real posts."""
    header: list[str] | None = None
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if header is None:
            header = fields
        elif line:
            yield f"{name}:{number}", _by_name(header, fields, f"{name}:{number}", "a tab")


def jsonl_rows(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Read one JSON object per line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)
            yield where, DataError(f"{where}: this line is not JSON ({why}). A JSONL file holds one object per line.")
            continue
        wrong = DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield where, row if isinstance(row, dict) else wrong


def parquet_rows(path: Path, name: str) -> Iterator[Row]:
    """Read parquet in batches.

    Raises:
        DataError: the file is not parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{name}: cannot be read as parquet: {error}") from error
    classes = _stored_classes(file.schema_arrow)
    index = 0
    for batch in file.iter_batches(batch_size=2048):
        for row in batch.to_pylist():
            yield f"{name}[{index}]", name_classes(row, classes)
            index += 1


def _stored_classes(schema: Any) -> dict[str, list[str] | None]:
    """Class names that `datasets` stores in a parquet file's schema."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features

    return {column: class_names(feature) for column, feature in Features.from_arrow_schema(schema).items()}


def class_names(feature: Any) -> list[str] | None:
    """Names of a class-label column of `datasets`, also inside a list; none for other columns."""
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return list(names) if names is not None else None


def name_classes(row: dict[str, Any], classes: dict[str, list[str] | None]) -> dict[str, Any]:
    """Turn class numbers into names; -1, a label that is kept back, becomes an empty one."""
    return {column: _name_class(cell, classes.get(column)) for column, cell in row.items()}


def _name_class(cell: Any, names: list[str] | None) -> Any:
    """Name of a class number, or of each number of a list."""
    if names is None:
        return cell
    if isinstance(cell, list):
        return [_name_class(item, names) for item in cell]
    return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else ""


def _by_name(header: Sequence[str], fields: Sequence[str], where: str, separator: str) -> dict[str, Any] | DataError:
    """Pair the fields of a row with the header's names, or say that their numbers differ."""
    if len(fields) != len(header):
        return DataError(
            f"{where}: {len(fields)} columns separated by {separator}, but the header has {len(header)} "
            f"({', '.join(header)})"
        )
    return dict(zip(header, fields, strict=True))


def choose_column(columns: Sequence[str], asked: str | int | None, known: Sequence[str], field: str, name: str) -> str:
    """Find the column of the text or the label.

    Args:
        columns: names found in the file.
        asked: the recipe's choice, a name or a number; none looks for a well-known name.
        known: well-known names.
        field: `text_column` or `label_column`, for the message.
        name: the file or split, for the message.

    Raises:
        DataError: the column is not there, or several well-known names are.
    """
    found = f"Columns of {name}: {', '.join(columns)}."
    if isinstance(asked, int):
        if -len(columns) <= asked < len(columns):
            return columns[asked]
        raise DataError(f"data.{field} is {asked}, but {name} has {len(columns)} columns. {found}")
    if asked is not None:
        if asked in columns:
            return asked
        raise DataError(f"data.{field}: no column '{asked}'. {found}{nearest(asked, columns)}")
    lower = {column.lower().strip(): column for column in columns}
    matches = [lower[candidate] for candidate in known if candidate in lower]
    if len(matches) == 1:
        return matches[0]
    why = f"several columns fit ({', '.join(matches)})" if matches else "no column has a usual name"
    raise DataError(f"data.{field} is not set, and {why}. {found} Set data.{field} to one of them.")


def examples(
    rows: Iterable[Row],
    name: str,
    task: Task,
    text_column: str | int | None = None,
    label_column: str | int | None = None,
    labelled: bool = True,
) -> Iterator[Example]:
    """Turn rows into examples.

    Raises:
        DataError: a column is missing, or a cell does not fit the task.
    """
    for example in examples_or_problems(rows, name, task, text_column, label_column, labelled):
        if isinstance(example, DataError):
            raise example
        yield example


def examples_or_problems(
    rows: Iterable[Row],
    name: str,
    task: Task,
    text_column: str | int | None = None,
    label_column: str | int | None = None,
    labelled: bool = True,
) -> Iterator[Example | DataError]:
    """Turn rows into examples, with an error in place of each row that cannot be one.

    Raises:
        DataError: the first row that could be read has no fitting columns.
    """
    columns: tuple[str, str | None] | None = None
    for where, row in rows:
        if isinstance(row, DataError):
            yield row
            continue
        if columns is None:
            names = list(row)
            text = choose_column(names, text_column, TEXT_NAMES[task], "text_column", name)
            label = choose_column(names, label_column, LABEL_NAMES[task], "label_column", name) if labelled else None
            columns = text, label
        try:
            yield _example(row, where, task, *columns)
        except DataError as error:
            yield error


def _example(row: dict[str, Any], where: str, task: Task, text: str, label: str | None) -> Example:
    """Turn one row into an example."""
    for column in (text, label):
        if column is not None and column not in row:
            raise DataError(f"{where}: no column '{column}' in this row; it has {', '.join(row) or 'none'}")
    if task == "sequence":
        return Example(_text(row[text], where, text), _label(row[label], where, label) if label else None, where)
    return _tagged(row[text], row[label] if label else None, where, text, label)


def _text(cell: Any, where: str, column: str) -> str:
    """The text of a sequence task: a string, or words to join by a space."""
    if isinstance(cell, list) and all(isinstance(word, str) for word in cell):
        return " ".join(cell)
    if cell is None or isinstance(cell, str):
        return cell or ""
    raise DataError(
        f"{where}: column '{column}' holds {type(cell).__name__}, but a text is a string or a list of words"
    )


def _label(cell: Any, where: str, column: str) -> str | None:
    """The label of a sequence task as a string."""
    if isinstance(cell, list | dict):
        raise DataError(
            f"{where}: column '{column}' holds a {type(cell).__name__}, but task 'sequence' needs one label per text. "
            "For one label per word set data.task to token."
        )
    return None if cell is None else str(cell).strip()


def _listed(cell: Any) -> Any:
    """A cell as a list: as it is, as a list that pandas wrote into CSV (`['a', 'b']`), or split at white space."""
    if not isinstance(cell, str):
        return cell
    if cell.startswith("[") and cell.endswith("]"):
        try:
            listed = ast.literal_eval(cell)
        except (ValueError, SyntaxError):
            return cell.split()
        return listed if isinstance(listed, list) else cell.split()
    return cell.split()


def _tagged(words: Any, tags: Any, where: str, text: str, label: str | None) -> Example:
    """The words and tags of a token task: lists, or strings separated by white space."""
    words, tags = _listed(words), _listed(tags)
    if not isinstance(words, list | None) or not isinstance(tags, list | None):
        raise DataError(f"{where}: task 'token' needs a list of words in '{text}' and a list of tags in '{label}'")
    words = ["" if word is None else str(word) for word in words or []]
    if label is None or tags is None:
        return Example(tuple(words), None, where)
    if len(words) != len(tags):
        raise DataError(f"{where}: {len(words)} words in '{text}' but {len(tags)} tags in '{label}'")
    return Example(tuple(words), tuple("" if tag is None else str(tag) for tag in tags), where)
