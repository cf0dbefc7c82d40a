"""Stream the texts of a file for prediction: nothing is kept, nothing is dropped, and no bad row ends the reading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tokmask_peft.data import tabular
from tokmask_peft.data.conll import ConllReader
from tokmask_peft.data.example import Example, Unreadable
from tokmask_peft.data.files import file_format, read_lines, unicode_problem
from tokmask_peft.errors import DataError
from tokmask_peft.recipe import Task


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
