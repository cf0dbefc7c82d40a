"""Predict a file of any length: read, classify and write a limited number of texts at a time.

What is written goes by the ending of the output. A table (.csv, .tsv, .parquet, .xlsx) has a row for each row of the
input, whatever is in it: its columns in their order, then `label` and `confidence`, and `error` if any row has no
answer. JSON lines have one for each text, with all probabilities. A column of the input keeps its name: if it has a
`label`, the added one is `predicted_label`.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokmask_peft.data.conll import Row
from tokmask_peft.data.opening import line_number
from tokmask_peft.data.readers import TextFile
from tokmask_peft.data.tables import classes_of
from tokmask_peft.errors import DataError, first_line, require, whole
from tokmask_peft.examples import Example, LabelPredictions, Pair, Unreadable, WordPredictions
from tokmask_peft.inference.classifier import BATCH_SIZE, Answer, Classifier
from tokmask_peft.inference.export import check_output
from tokmask_peft.spans import NO_SPANS

CHUNK_BATCHES, CHUNK_CHARACTERS = 32, 2_000_000
SHOWN_PROBLEMS = 5
BATCH_ROWS = 10_000  # of parquet, or words of an answer in JSON
SHEET_ROWS, SHEET_CHARACTERS = 1_048_576, 32_767  # what a sheet of a workbook holds, and a cell of it
SHEET_NUMBERS = 10**15  # a number in a sheet has 15 digits; one of more is written as a text
Found = Example | Unreadable
Cells = Sequence[Any]


@dataclass(slots=True)
class FileReport:
    """What became of a file."""

    rows: int = 0  # written, unreadable ones included
    unreadable: int = 0  # rows without an answer
    problems: list[Unreadable] = field(default_factory=list)  # the first few of them

    def count(self, found: Found) -> None:
        """Count a text, or a row that is none."""
        self.rows += 1
        if isinstance(found, Unreadable):
            self.unreadable += 1
            self.problems += [found] if len(self.problems) < SHOWN_PROBLEMS else []


def predict_file(
    classifier: Classifier,
    source: TextFile,
    out: str | Path,
    *,
    force: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[FileReport], None] | None = None,
) -> FileReport:
    """Classify the texts of a file, in its order, into a table or JSON lines; see the module.

    A JSON line per text: `line`, the columns of the input, the text or its words, and the answer; for a row that cannot
    be read `line` and `error`. In a table, words that stand in one cell have their labels in one cell, too, between
    spaces. `out` appears when all is done, in place of an old one if `force` says so; until then, a temporary file in
    the same folder is written. At most 32 batches of texts are in memory at a time. `progress` is called after each.
    DataError if `out` cannot be written, or the file as a whole cannot be read.
    """
    path, form = check_output(out, source.path, force), form_of(out)
    report, columns = FileReport(), Columns(source)
    with whole(path) as temporary, (form or _json_lines)(temporary, columns) as write:
        for chunk in answered(classifier, source, batch_size):
            for found, answer in chunk:
                report.count(found)
                for row in columns.rows(found, answer) if form else [columns.record(found, answer)]:
                    write(row)
            if progress is not None:
                progress(report)
        for rest in source.rows if form else ():  # blank rows at the end
            write(columns.cells(rest))
    return report


def answered(
    classifier: Classifier, source: TextFile, batch_size: int = BATCH_SIZE
) -> Iterator[list[tuple[Found, Answer | None]]]:
    """Yield the texts of a file with their answers, a limited number at a time; an `Unreadable` has none."""
    for chunk in _chunks(source, batch_size * CHUNK_BATCHES):
        texts: list[Any] = [found.text for found in chunk if isinstance(found, Example)]
        answers = classifier.predict(texts, batch_size) if texts else []
        if len(answers) != len(texts):
            problem = f"{len(texts)} texts got {len(answers)} answers, first of them {chunk[0].where}"
            raise DataError(problem, code="row-count", texts=len(texts), answers=len(answers))
        following = iter(answers)
        yield [(found, next(following) if isinstance(found, Example) else None) for found in chunk]


def _chunks(source: TextFile, count: int) -> Iterator[list[Found]]:
    """Yield lists of at most `count` texts, and of about 2 million characters."""
    chunk: list[Found] = []
    characters = 0
    for found in source:
        chunk.append(found)
        characters += len(found.string) if isinstance(found, Example) else 0
        if len(chunk) >= count or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class Columns:
    """The columns of what is written: those of a file, which is read to its end for them, and what is added.

    Attributes:
        kinds: the types of the cells in each column of the file; if it has no columns, its texts get one.
        inexact: the columns with a whole number that a float may round.
        errors: whether a row has no answer.
    """

    def __init__(self, source: TextFile) -> None:
        self.source, self.kinds, self.errors = source, dict[str, set[type]](), False
        self.confidence: type = float  # of its cells
        self.inexact = set[str]()
        self._texts, in_rows = 0, False
        for found in source:
            if isinstance(found, Unreadable):
                self.errors = True
            elif isinstance(found.text, tuple) and found.places:
                in_rows = True
            elif isinstance(found.text, tuple):
                self.confidence = str  # of all words together
            for row in source.rows:
                for name, cell in row[1].items() if isinstance(row, tuple) else ():
                    is_long = isinstance(cell, int) and not -(2**63) <= cell < 2**63
                    self.kinds.setdefault(name, set()).add(str if is_long else type(cell))
                    self.inexact |= {name} if isinstance(cell, int) and abs(cell) > 2**53 else set()
            source.rows.clear()
        self._given = set(self.kinds)
        if not self.kinds:
            self.kinds = {"text": {int}, "word": {str}} if in_rows else {"text": {str}}

    def added(self, name: str) -> str:
        """Return the name of something that is added, which no column of the file has."""
        more = (f"predicted_{name}" + (f"_{number}" if number > 1 else "") for number in itertools.count(1))
        return next(one for one in itertools.chain([name], more) if one not in self._given)

    @property
    def names(self) -> list[str]:
        """The names of a table's columns."""
        return [*self.kinds, *map(self.added, ("label", "confidence", "error")[: 2 + self.errors])]

    def rows(self, found: Found, answer: Answer | None) -> Iterator[Cells]:
        """Yield the rows of a text with their answers, after the rows before them that have none."""
        self._texts += 1
        places: tuple[str, ...] = (found.where,)
        words: tuple[str, ...] = ("",)
        parts: list[tuple[Any, Any, Any]] = [(None, None, getattr(found, "problem", None))]
        if isinstance(found, Example):
            words, parts = (found.string,), [_short(answer)]
            if found.places and isinstance(answer, WordPredictions):
                places, words = found.places, answer.words
                pairs = zip(answer.labels, _rounded(answer), strict=True)
                parts = [(*pair, None) for pair in pairs]
        for place, word, added in zip(places, words, parts, strict=True):
            if self._given:
                *before, row = self._until(place)
                yield from map(self.cells, before)
                yield self.cells(row, added)
            else:
                yield [*([self._texts, word] if "word" in self.kinds else [word]), *added[: 2 + self.errors]]

    def _until(self, place: str) -> Iterator[Row]:
        """Yield the rows of the file that were not yet written, up to one."""
        while self.source.rows:
            yield (row := self.source.rows.popleft())
            if (row.where if isinstance(row, Unreadable) else row[0]) == place:
                return
        raise DataError(f"{place}: this row was not found again", code="row-count", where=place)

    def cells(self, row: Row, added: Cells = (None, None, None)) -> Cells:
        """Return the cells of a row of the file, and what is added."""
        if isinstance(row, Unreadable):  # its cells are texts, and go into columns of texts
            texts = (name for name, kinds in self.kinds.items() if str in kinds)
            row = row.where, dict(zip(texts, row.cells, strict=False))
        return [*map(row[1].get, self.kinds), *added[: 2 + self.errors]]

    def record(self, found: Found, answer: Answer | None) -> dict[str, Any]:
        """Return the JSON form of a text: its line, the cells of its row, and its answer."""
        record = {self.added("line"): line_number(found.where)}
        if self._given:
            *_, row = self._until(found.where)
            record |= row[1] if isinstance(row, tuple) and not getattr(found, "places", ()) else {}
        if isinstance(found, Unreadable) or answer is None:
            return record | {self.added("error"): getattr(found, "problem", "")}
        for key, value in answer_record(found.string, answer).items():
            if key not in ("text", "words"):
                record[self.added(key)] = value
            elif isinstance(found.text, Pair):  # which is in the columns of its row
                continue
            elif key not in record or str(record[key]).split() == value:  # words in one string
                record[key] = value
        return record


def answer_record(text: str | Pair, answer: Answer) -> dict[str, Any]:
    """Return what `json_parts` writes of an answer, with probabilities to 6 digits; those of words are iterators."""

    def rounded(row: dict[str, float]) -> dict[str, float]:
        return {label: round(value, 6) for label, value in row.items()}

    if isinstance(answer, WordPredictions):
        found: dict[str, Any] = {"words": list(answer.words), "labels": list(answer.labels)}
        found["confidence"] = _rounded(answer)
        if answer.spans != NO_SPANS:
            found["entities"] = [asdict(one) | {"confidence": round(one.confidence, 6)} for one in answer.entities]
        return found | {"probabilities": map(rounded, answer.probabilities)}
    given = list(text) if isinstance(text, Pair) else text
    several = {"labels": list(answer.labels)} if isinstance(answer, LabelPredictions) else {"label": answer.label}
    found = {"text": given, **several, "confidence": round(answer.confidence, 6)}
    return found | {"probabilities": rounded(answer.probabilities)}


def _rounded(answer: WordPredictions) -> Iterator[float]:
    """Yield the confidence of each word to 6 digits."""
    return (round(row[label], 6) for row, label in zip(answer.probabilities, answer.labels, strict=True))


def _short(answer: Answer | None) -> tuple[Any, Any, None]:
    """Return label and confidence in a cell each."""
    if isinstance(answer, WordPredictions):
        return " ".join(answer.labels), " ".join(map(str, _rounded(answer))), None
    return (None, None, None) if answer is None else (answer.label, round(answer.confidence, 6), None)


Write = Callable[[Any], object]
Form = Callable[[Path, Columns], AbstractContextManager[Write]]  # opens a file, and gives what writes a row into it


@contextmanager
def _json_lines(path: Path, columns: Columns) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        yield lambda record: file.writelines(itertools.chain(json_parts(record), "\n"))


@contextmanager
def _separated(path: Path, columns: Columns, separator: str) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as file:

        def write(row: Cells) -> None:
            file.write(separator.join(_quoted(_as_text(cell), separator) for cell in row) + "\n")

        write(columns.names)
        yield write


def _quoted(text: str, separator: str) -> str:
    """Quote a cell by RFC 4180 if it needs that; Python's own writer leaves a lone carriage return unquoted."""
    return '"{}"'.format(text.replace('"', '""')) if {*text} & {separator, '"', "\r", "\n"} else text


def _as_text(cell: Any) -> str:
    """Return a cell as valid text: what was not UTF-8 is written as an escape."""
    if cell is None or isinstance(cell, str):
        return (cell or "").encode("utf-8", "backslashreplace").decode()
    return json_text(cell) if isinstance(cell, list | dict | bool) else str(cell)


def json_parts(record: dict[str, Any]) -> Iterator[str]:
    """Yield the JSON of an answer in parts: all of a long text's at once takes gigabytes."""
    for number, (key, value) in enumerate(record.items()):
        yield ("{" if number == 0 else ", ") + json_text(key) + ": "
        if not isinstance(value, Iterator):
            yield json_text(value)
            continue
        before = "["
        while part := list(itertools.islice(value, BATCH_ROWS)):
            yield before + json_text(part)[1:-1]
            before = ", "
        yield "]" if before == ", " else "[]"
    yield "}"


def json_text(value: Any) -> str:
    """Return valid JSON: a number that is not finite is null."""
    return json.dumps(_finite(value), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _parquet(path: Path, columns: Columns) -> Iterator[Write]:
    """Columns of a parquet file keep their types; others have that of all their cells, or are texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, types = columns.source.path, {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    known = pa.schema([])
    if source.suffix.lower() == ".parquet":
        with suppress(pa.ArrowInvalid):  # it was read in another format
            known = pq.read_schema(source)
    named = classes_of(known)
    kinds = dict.fromkeys(columns.names, types[str]) | {columns.added("confidence"): types[columns.confidence]}
    for name, found in columns.kinds.items():
        cells = found - {type(None)}
        if name in named:  # its numbers became the names of classes
            kinds[name] = pa.list_(types[str]) if list in cells else types[str]
        elif name in known.names:
            kinds[name] = known.field(name).type
        elif len(cells) == 1 or (cells == {int, float} and name not in columns.inexact):
            kinds[name] = types.get(float if len(cells) == 2 else next(iter(cells)), types[str])
    texts, rows = [kind == types[str] for kind in kinds.values()], list[list[Any]]()

    def flush() -> None:
        parts = zip(kinds.values(), zip(*rows, strict=True), strict=True)
        writer.write_table(pa.table([pa.array(part, kind) for kind, part in parts], list(kinds)))
        rows.clear()

    def write(row: Cells) -> None:
        pairs = zip(row, texts, strict=True)
        rows.append([_as_text(cell) if text and cell is not None else cell for cell, text in pairs])
        if len(rows) == BATCH_ROWS:
            flush()

    try:
        with pq.ParquetWriter(path, pa.schema(kinds.items())) as writer:
            yield write
            if rows:
                flush()
    except pa.ArrowException as error:
        problem = f"parquet cannot hold the answers: {first_line(error)}; give --out a .csv or .jsonl file"
        raise DataError(problem, code="parquet-limit") from error


@contextmanager
def _workbook(path: Path, columns: Columns) -> Iterator[Write]:
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book, count = Workbook(write_only=True), itertools.count(1)
    sheet = book.create_sheet("predictions")

    def cell_of(value: Any) -> Any:
        if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < SHEET_NUMBERS):
            return value
        if len(text := _as_text(value)) > SHEET_CHARACTERS:
            raise _too_much(f"a text has {len(text):,} characters, and a cell holds {SHEET_CHARACTERS:,}")
        cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub(lambda found: f"_x{ord(found[0]):04X}_", text))
        cell.data_type = "s"  # also if it begins like a formula
        return cell

    def write(row: Cells) -> None:
        if next(count) > SHEET_ROWS:
            raise _too_much(f"there are more than {SHEET_ROWS:,} rows")
        sheet.append([cell_of(value) for value in row])

    write(columns.names)
    try:
        yield write
    except BaseException:
        sheet.close()
        raise
    book.save(path)


def _too_much(problem: str) -> DataError:
    return DataError(f"a workbook cannot hold the answers: {problem}; give --out a .csv file", code="workbook-limit")


def form_of(out: str | Path) -> Form | None:
    """Return what writes a table of the ending of a file, none for JSON lines; DataError for other known endings."""
    ending = Path(out).suffix.lower()
    if ending in _OTHERS:
        remedy = f"give --out one of {', '.join(FORMS)} or .jsonl"
        raise DataError(f"{out}: cannot write {ending} files; {remedy}", code="output-format", ending=ending)
    if ending == ".xlsx":
        require("openpyxl", "excel", f"writing {out}")
    return FORMS.get(ending)


FORMS: dict[str, Form] = {
    ".csv": functools.partial(_separated, separator=","),
    ".tsv": functools.partial(_separated, separator="\t"),
    ".parquet": _parquet,
    ".xlsx": _workbook,
}
_OTHERS: tuple[str, ...] = (".xls", ".xlsm", ".ods", ".zip", ".gz", ".bz2", ".xz", ".zst", ".7z", ".feather")
_OTHERS += (".arrow", ".conll", ".conllu")
