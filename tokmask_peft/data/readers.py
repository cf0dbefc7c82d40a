"""Stream the texts of a file for prediction: nothing is kept, nothing is dropped, and no bad row ends the reading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tokmask_peft.data import tables as tabular
from tokmask_peft.data.conll import ConllReader
from tokmask_peft.data.files import file_format, find_files, read_lines, unicode_problem
from tokmask_peft.errors import DataError
from tokmask_peft.recipe.schema import SourceConfig, Task
from tokmask_peft.tasks import Example, Unreadable

SHOWN = 5
_PLACEHOLDERS = {"", "-", "_", "?", "-1", "none", "null"}


def read_split(source: SourceConfig, split: str, task: Task) -> list[Example]:
    """Read a labelled split.

    Args:
        source: local path, Hub dataset or built-in corpus; the first that is set wins, in this order.
        split: name of the split, or of a file.
        task: `sequence` or `token`.

    Raises:
        DataError: the split is missing, empty, unlabelled or malformed.
    """
    if source.path is not None:
        found = find_files(source.path, split, source.format)
        name = ", ".join(str(file) for file in found)
        examples = [example for file in found for example in iter_rows(file, source, task)]
    elif source.hub is not None:
        from tokmask_peft.data.hub import read_hub

        name = f"{source.hub} [{split}]"
        examples = read_hub(source, split, task)
    else:
        from tokmask_peft.data.builtin import builtin_examples

        name = f"built-in corpus [{split}]"
        examples = builtin_examples(task, split)
    check_complete(examples, name, task)
    return examples


def iter_rows(path: str | Path, source: SourceConfig, task: Task, labelled: bool = True) -> Iterator[Example]:
    """Stream the texts of one local file, in order and without keeping them.

    Args:
        path: the file.
        source: gives format and columns.
        task: `sequence` or `token`.
        labelled: without, labels are neither needed nor read, as for prediction.

    Raises:
        DataError: a line is malformed, or a column is missing.
    """
    path = Path(path)
    kind = file_format(path, source.format)
    if kind == "conll":
        lines = read_lines(path)
        yield from ConllReader(lines, str(path), task, source.text_column, source.label_column, labelled)
        return
    if kind == "csv":
        rows = tabular.csv_rows(read_lines(path, keep_ends=True), str(path))
    elif kind == "tsv":
        rows = tabular.tsv_rows(read_lines(path), str(path))
    elif kind == "jsonl":
        rows = tabular.jsonl_rows(read_lines(path), str(path))
    else:
        rows = tabular.parquet_rows(path, str(path))
    yield from tabular.examples(rows, str(path), task, source.text_column, source.label_column, labelled)


def check_complete(examples: list[Example], name: str, task: Task) -> None:
    """Refuse a split in which a text or a label is missing.

    Raises:
        DataError: with the first places and the count; or the split has no labels at all.
    """
    if not examples:
        raise DataError(f"{name}: no texts in it")
    if all(_unlabelled(example) for example in examples):
        hint = ""
        if task == "sequence" and ".conll" in name:
            hint = (
                " A CoNLL file carries the label of a text in a comment, '# sent_enum = 7 positive'; for one label per "
                "word set data.task to token."
            )
        raise DataError(
            f"{name}: no text has a label.{hint} If this is the test set of a shared task, whose labels are kept back, "
            "set data.test to validation (or dev) and data.validation to a share of train such as 0.1, so that what "
            "selects the checkpoint is not what scores it."
        )
    _refuse("an empty text", [e.where for e in examples if not e.words or "" in e.words], name)
    _refuse("an empty label", [e.where for e in examples if not e.tags or "" in e.tags], name)


def _unlabelled(example: Example) -> bool:
    """Whether an example has no label, or only placeholders."""
    return all(tag.strip().lower() in _PLACEHOLDERS for tag in example.tags)


def _refuse(what: str, places: list[str], name: str) -> None:
    """Raise for the places found, if any."""
    if places:
        more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        raise DataError(
            f"{name}: {what} at {', '.join(places[:SHOWN])}{more} ({len(places)} in all). Nothing is dropped in "
            "silence: remove these lines or fill them in."
        )


class TextFile:
    """The texts of one file, in order, one at a time; what cannot be read is an `Unreadable` at its place.

    Args:
        path: the file.
        task: `sequence` or `token`.
        format: txt (a text per line), csv, tsv, jsonl, parquet or conll; auto goes by the ending.
        text_column: column of the text or the words; none looks for a usual name.

    Attributes:
        total: size of the file: bytes, or rows of a parquet file.
        done: how much of `total` has been read.

    Raises:
        DataError: the file is missing, or its format is not known.
    """

    def __init__(
        self, path: str | Path, task: Task, format: str = "auto", text_column: str | int | None = None
    ) -> None:
        self.path, self._task, self._column = Path(path), task, text_column
        if not self.path.is_file():
            raise DataError(f"{path}: there is no such file")
        ending = self.path.suffix.lower()
        self.format = "txt" if format == "auto" and ending == ".txt" else file_format(self.path, format)
        self.total = self._rows() if self.format == "parquet" else self.path.stat().st_size
        self.done = 0

    def __iter__(self) -> Iterator[Example | Unreadable]:
        """Read from the beginning.

        Raises:
            DataError: no column fits, or the file as a whole is not what its format says.
        """
        self.done = 0
        for found in self._read():
            if isinstance(found, Example):
                problem = _problem(found)
                yield found if problem is None else Unreadable(found.where, problem)
            else:
                yield self._unreadable(found)

    def _read(self) -> Iterator[Example | DataError]:
        name = str(self.path)
        if self.format == "parquet":
            rows = self._counted(tabular.parquet_rows(self.path, name))
        else:
            lines = read_lines(self.path, keep_ends=self.format == "csv", tolerant=True, advance=self._advance)
            if self.format == "txt":
                yield from self._plain(lines)
                return
            if self.format == "conll":
                yield from ConllReader(lines, name, self._task, self._column, None, False).examples_or_problems()
                return
            reader = {"csv": tabular.csv_rows, "tsv": tabular.tsv_rows, "jsonl": tabular.jsonl_rows}[self.format]
            rows = reader(lines, name)
        yield from tabular.examples_or_problems(rows, name, self._task, self._column, labelled=False)

    def _plain(self, lines: Iterator[str]) -> Iterator[Example]:
        for number, line in enumerate(lines, start=1):
            yield Example(tuple(line.split()) if self._task == "token" else line, None, f"{self.path}:{number}")

    def _unreadable(self, error: DataError) -> Unreadable:
        """Take an error apart: the messages of the readers begin with the place."""
        match = re.match(
            rf"(?P<where>{re.escape(str(self.path))}(:\d+|\[\d+\])): (?P<problem>.*)", str(error), re.DOTALL
        )
        return Unreadable(match["where"], match["problem"]) if match else Unreadable(str(self.path), str(error))

    def _advance(self, size: int) -> None:
        self.done += size

    def _counted(self, rows: Iterator[tabular.Row]) -> Iterator[tabular.Row]:
        for row in rows:
            self.done += 1
            yield row

    def _rows(self) -> int:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return int(pq.ParquetFile(self.path).metadata.num_rows)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.path}: cannot be read as parquet: {error}") from error


def _problem(example: Example) -> str | None:
    """Say why a text cannot be predicted, if so."""
    if not any(example.words):
        return "the text is empty"
    if "" in example.words:
        return "a word is empty"
    return unicode_problem(example.string)


def line_number(where: str) -> int | None:
    """Return n of `file:n`, or n + 1 of row n in `file[n]`: numbers count from 1."""
    match = re.search(r":(?P<line>\d+)$|\[(?P<row>\d+)\]$", where)
    if match is None:
        return None
    return int(match["line"]) if match["line"] else int(match["row"]) + 1
