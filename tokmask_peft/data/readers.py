"""Formats and sources of texts: which reader a file needs, which file a split means, and what must be in it."""

from __future__ import annotations

import gzip
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from tokmask_peft.console import Decision
from tokmask_peft.data import tables
from tokmask_peft.data.conll import BLANK, Columns, ConllReader, Row
from tokmask_peft.data.split import NAME_A_SPLIT, aliases, canonical
from tokmask_peft.data.tables import DataFile, readable, unicode_problem
from tokmask_peft.errors import DataError, TokmaskError, first_line, nearest
from tokmask_peft.recipe.schema import SourceConfig
from tokmask_peft.tasks import Example, Unreadable, get_task

SHOWN = 5
_PLACEHOLDERS = {"", "-", "_", "?", "-1", "none", "null"}
_PACKED = {".xlsx", ".xls", ".ods", ".zip", ".gz", ".bz2", ".xz", ".zst", ".7z"}
_QUOTED = r'"(?:[^"]++|"")*+"'
_CELL = rf'(?:{_QUOTED}|[^"\t\n]*+)'
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")

Reader = Callable[[DataFile, Columns], Iterable[Example | Unreadable]]
"""Reads the texts of a file in order, with an `Unreadable` in place of each that cannot be read."""


def table(rows: Callable[[DataFile], Iterator[Row]]) -> Reader:
    """Return the reader of a format that has a text in each row, with named columns."""
    return lambda file, columns: tables.examples(rows(file), file.name, columns)


def read_conll(file: DataFile, columns: Columns) -> Iterable[Example | Unreadable]:
    """Read a column file; see `data.conll`."""
    return ConllReader(file.lines(), file.name, columns)


def separator_of(file: DataFile) -> str:
    """Return what separates the columns of a CSV file: what gives all rows the same number of columns, or a comma."""
    for separator in ",;\t|":
        rows = islice(tables.records(file.again().lines(keep_ends=True), separator), tables.SNIFFED)
        if len(widths := {len(cells) for _, cells in rows if cells and cells != [""]}) == 1 and widths != {1}:
            return separator
    return ","


def is_quoted(file: DataFile) -> bool:
    """Return whether the quotes of a TSV file are those of pandas or Excel: every one belongs to a quoted cell.

    At least one of these cells must have needed it, or all cells be quoted: a post may be a quotation.
    """
    needed, every = False, True
    for taken, cells in tables.records(file.again().lines(keep_ends=True), "\t"):
        row = "".join(taken).removesuffix("\n").removesuffix("\r")
        if '"' in row:
            if cells is None or not re.fullmatch(rf"{_CELL}(?:\t{_CELL})*", row):
                return False
            needed = needed or any(re.search('["\t\n]', cell) for cell in cells)
        every = every and (not row or re.fullmatch(rf"{_QUOTED}(?:\t{_QUOTED})*", row) is not None)
    return needed or every


def read_csv(file: DataFile, columns: Columns) -> Iterable[Example | Unreadable]:
    """Read CSV; its separator may also be a semicolon, a tab or a vertical bar."""
    if (separator := separator_of(file)) != ",":
        why = "it gives all rows the same columns, a comma does not"
        columns.decisions.append(Decision(f"separator of {file.path.name}", repr(separator), why))
    return _separated(file, columns, separator, quoted=True)


def read_tsv(file: DataFile, columns: Columns) -> Iterable[Example | Unreadable]:
    """Read TSV, with its quotes as part of the texts unless all are those of a program that writes tables."""
    if quoted := is_quoted(file):
        why = "all of them enclose cells, as pandas and Excel write them"
        columns.decisions.append(Decision(f"quotes of {file.path.name}", "removed", why))
    return _separated(file, columns, "\t", quoted)


def _separated(file: DataFile, columns: Columns, separator: str, quoted: bool) -> Iterable[Example | Unreadable]:
    rows = tables.cells_of(file, separator, quoted)
    return tables.examples(tables.named(rows, file, columns, separator), file.name, columns)


def read_txt(file: DataFile, columns: Columns) -> Iterable[Example | Unreadable]:
    """Read a text per line if no labels are needed; labelled texts in a .txt file are in CoNLL format."""
    if columns.labelled:
        return read_conll(file, columns)
    lines = enumerate(file.lines(), start=1)
    return (columns.task.example(line, None, f"{file.name}:{number}") for number, line in lines)


_JSON_FORM = (
    "Needed: one object per line, or one array of objects. For objects over several lines: jq -c . FILE > NEW.jsonl"
)


def jsonl_rows(file: DataFile) -> Iterator[Row]:
    """Read one JSON object per line, or one array of objects, which is read whole.

    Raises:
        DataError: the file begins like an array, but is not one.
    """
    lines = enumerate(file.lines(), start=1)
    start, first = 1, ""
    for start, first in lines:
        if first.strip():
            break
        yield Unreadable(f"{file.name}:{start}", "the row is blank", BLANK)
    if first.lstrip().startswith("["):
        rest = [line for _, line in lines]
        whole = _json("\n".join([first, *rest]), file.name, start)
        if not isinstance(whole, Unreadable):
            yield from (_json_row(item, f"{file.name}[{index}]") for index, item in enumerate(whole))
            return
        if isinstance(_json(first, file.name, start), Unreadable):
            raise DataError(f"{whole.where}: {whole.problem}", code=whole.code, where=whole.where)
        lines = enumerate(rest, start=start + 1)
    for number, line in chain([(start, first)] if first.strip() else [], lines):
        where = f"{file.name}:{number}"
        blank = Unreadable(where, "the row is blank", BLANK)
        yield _json_row(_json(line, file.name, number), where) if line.strip() else blank


def _json(text: str, name: str, number: int) -> Any:
    """Return the value of a JSON text that begins in the line of a number, or why there is none."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except DataError as error:
        return Unreadable(f"{name}:{number}", str(error), error.code, (text,))
    except (ValueError, RecursionError) as error:
        problem = f"this line is not JSON ({getattr(error, 'msg', error)}). {_JSON_FORM}"
        return Unreadable(f"{name}:{number + getattr(error, 'lineno', 1) - 1}", problem, "not-json", (text,))


def _json_row(value: Any, where: str) -> Row:
    if isinstance(value, Unreadable):
        return value
    problem = f"this is JSON, but a {type(value).__name__}. {_JSON_FORM}"
    if isinstance(value, dict):
        return where, value
    return Unreadable(where, problem, "not-json", (json.dumps(value, ensure_ascii=False),))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object whose names all differ."""
    if len(row := dict(pairs)) < len(pairs):
        tables.unique_names([name or '""' for name, _ in pairs])
    return row


READERS: dict[str, Reader] = {
    ".conll": read_conll,
    ".conllu": read_conll,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": table(jsonl_rows),
    ".parquet": table(tables.parquet_rows),
    ".txt": read_txt,
}
"""By ending; the name of a format in `data.format` is its ending without the dot.

Another format is added here: `READERS[".mine"] = read_mine`.
"""
READERS[".ndjson"] = READERS[".json"] = READERS[".jsonl"]


def reader_of(path: Path, asked: str = "auto") -> Reader:
    """Return the reader of a format, or, for `auto`, of a file's ending.

    Raises:
        DataError: there is none.
    """
    ending = path.suffix.lower() if asked == "auto" else f".{asked}"
    if ending in READERS:
        return READERS[ending]
    if path.is_file():
        tables.text_form(path)  # says what a workbook or an archive is
    formats = ["auto", *(known.removeprefix(".") for known in READERS)]
    guess = "" if asked == "auto" else nearest(asked, formats)
    problem = f"no reader for the format '{ending[1:]}'.{guess} Set data.format to one of {', '.join(formats)}."
    raise DataError(f"{path}: {problem}", code="unknown-format", format=ending[1:])


def find_files(path: str, split: str, asked: str = "auto") -> list[Path]:
    """Find the file, or the parquet shards, of a split.

    Args:
        path: a folder, or one file: then `train` is that file, and other splits are files next to it.
        split: a split name (with aliases), or a file name.
        asked: the recipe's format, which settles a tie between `train.tsv` and `train.conll`.

    Raises:
        DataError: no file fits, or several do; lists what is there.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"data.path: '{path}' does not exist (seen from {Path.cwd()})", code="no-path", path=path)
    if root.is_file():
        if split in (root.name, root.stem) or "train" in aliases(split):
            return [root]
        root = root.parent
    if (literal := root / split).is_file():
        return [literal]
    files = sorted(file for file in root.iterdir() if file.is_file() and file.suffix.lower() in READERS)
    fitting = [file for file in files if _SHARD.sub("", file.stem).lower() in aliases(split)]
    if not fitting:  # reading it says what it is, and what to do
        fitting = [file for file in root.iterdir() if file.name.partition(".")[0].lower() in aliases(split)]
        fitting = [file for file in fitting if file.suffix.lower() in _PACKED]
    if asked != "auto":
        wanted = {reader_of(root, asked)} | ({read_txt} if asked == "conll" else set())
        fitting = [file for file in fitting if reader_of(file) in wanted] or fitting
    if fitting and (len(fitting) == 1 or all(_SHARD.search(file.stem) for file in fitting)):
        return fitting
    names = tuple(file.name for file in fitting or files)
    listing = ", ".join(names) or "no data file"
    guess = nearest(split, [*names, *(file.stem for file in files)])
    problem = f"no file for the split '{split}'. The folder contains {listing}.{guess} {NAME_A_SPLIT}"
    if fitting:
        problem = f"several files fit the split '{split}': {listing}. Name one of them instead, or set data.format."
    raise DataError(f"{root}: {problem}", code="several-files" if fitting else "no-split", split=split, files=names)


def builtin_examples(task: str, split: str) -> list[Example]:
    """Return a split of the built-in corpus: 4,500 made-up Spanish-English posts, to try things out with.

    The posts have a sentiment; their words are tagged lang1 (English), lang2 (Spanish), ne or other. It is not a
    benchmark, but hard in the ways that matter here: sentiment depends on negation, contrast, questions, other people's
    opinions and sarcasm rather than on one word; emoji, hashtags and names agree with the label in train more than in
    test; every fifth word and some patterns occur in test only; 6% of the training sentiments are wrong. Many words are
    spelled alike in both languages (`pan`, `red`, `no`, `come`), and English stems take Spanish endings.

    Raises:
        DataError: there is no such split.
    """
    name, splits = canonical(split), ("train", "validation", "test")
    if name not in splits:
        problem = f"the built-in corpus has no split '{split}': {', '.join(splits)}.{nearest(split, splits)}"
        raise DataError(problem, code="no-split", split=split)
    path = Path(__file__).with_name("builtin") / f"{name}.conll.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        found = readable(ConllReader((line.removesuffix("\n") for line in file), name, Columns(get_task(task))))
        return [replace(example, where=f"built-in {name}[{index}]") for index, example in enumerate(found)]


def read_split(source: SourceConfig, split: str, task: str, decisions: list[Decision] | None = None) -> list[Example]:
    """Read a labelled split, or a file, from a local path, the Hub or the built-in corpus: the first that is set.

    `decisions` takes what was decided about its form. A text that is missing, or a label of which is, as
    `source.missing` says, has no label.

    Raises:
        DataError: the split is missing, empty, unlabelled or malformed.
    """
    columns = Columns(get_task(task), source.text_column, source.label_column)
    columns = replace(columns, header=source.header, group=source.group_column)
    if source.path is not None:
        files = find_files(source.path, split, source.format)
        name = ", ".join(str(file) for file in files)
        examples = readable(one for file in files for one in _read(DataFile(file), columns, source.format))
    elif source.hub is not None:
        from tokmask_peft.data.hub import read_hub

        name = f"{source.hub} [{split}]"
        examples = read_hub(source, split, columns)
    else:
        name = f"built-in corpus [{split}]"
        examples = builtin_examples(task, split)
    if decisions is not None:
        decisions += columns.decisions
    missing = {id(found) for found in examples if {found.string, *(found.tags or ("",))} & {*(source.missing or ())}}
    _check_complete([found for found in examples if id(found) not in missing], name, task)
    return [replace(found, label=None) if id(found) in missing else found for found in examples]


def _read(file: DataFile, columns: Columns, format: str) -> Iterator[Example | Unreadable]:
    """Read a file, with an `Unreadable` for what is not Unicode, and one error for whatever fails in a damaged file.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    try:
        for found in reader_of(file.path, format)(file, columns):
            problem = unicode_problem(" ".join([found.string, *found.tags])) if isinstance(found, Example) else None
            yield found if problem is None else Unreadable(found.where, problem, "not-unicode")
    except (TokmaskError, MemoryError):
        raise
    except Exception as error:
        problem = f"{file.name}: cannot be read: {type(error).__name__}: {first_line(error)}"
        raise DataError(problem, code="unreadable-file", file=file.name) from error


def _check_complete(examples: list[Example], name: str, task: str) -> None:
    """Refuse a split in which a text or a label is missing, with the first places and the count."""
    if not examples:
        raise DataError(f"{name}: there are no texts in it", code="no-texts", source=name)
    if all(tag.strip().lower() in _PLACEHOLDERS for example in examples for tag in example.tags):
        hint = ""
        if not get_task(task).words_given and ".conll" in name:
            hint = " A CoNLL file has a text's label in a comment, '# sent_enum = 7 positive'. If words have labels, "
            hint += "set data.task to the task for words."
        problem = (
            f"{name}: no text has a label.{hint} If this is the test set of a shared task, whose labels are withheld, "
            "set data.test to validation (or dev) and data.validation to a share of train such as 0.1, so that the "
            "texts that select the checkpoint do not score it as well."
        )
        raise DataError(problem, code="no-labels", source=name)
    lacking = {
        "text": [example.where for example in examples if not any(example.words)],
        "word": [example.where for example in examples if any(example.words) and "" in example.words],
        "label": [example.where for example in examples if not example.tags or "" in example.tags],
    }
    for what, places in lacking.items():
        if places:
            more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            problem = f"an empty {what} at {', '.join(places[:SHOWN])}{more} ({len(places)} in all)"
            remedy = 'Nothing is dropped silently: remove these lines, fill them in, or set data.missing=[""].'
            raise DataError(f"{name}: {problem}. {remedy}", code=f"empty-{what}", places=tuple(places))


class TextFile(DataFile):
    """The texts of one file for prediction, in order and streamed; one that cannot be read is an `Unreadable`.

    The format is txt (a text per line) or another ending of `READERS`; auto goes by the file's own ending. Every row of
    the file is in the result: a blank line too, and a text of several lines or rows once. `rows` takes the rows of a
    table, with all their cells, as the texts are read from them; whoever wants them removes them.

    Raises:
        DataError: the file is missing, its format is not known, no column fits, or the file as a whole is not what its
            format says.
    """

    def __init__(
        self,
        path: str | Path,
        task: str,
        format: str = "auto",
        text_column: str | int | None = None,
        header: bool | Literal["auto"] = "auto",
        group_column: str | int | None = None,
        name: str | None = None,
    ) -> None:
        if not Path(path).is_file():
            raise DataError(f"{path}: there is no such file", code="no-path", path=str(path))
        super().__init__(Path(path), name, tolerant=True)
        self._format, self.rows = format, deque[Row]()
        self._columns = Columns(get_task(task), text_column, None, False, header, group_column, rows=self.rows)
        next(iter(self), None)  # a mistake in the file as a whole shows here, before a model is loaded
        self.done = 0
        self.decisions = tuple(self._columns.decisions)

    def __iter__(self) -> Iterator[Example | Unreadable]:
        """Read from the beginning."""
        self.done = 0
        self.rows.clear()
        for found in _read(self, self._columns, self._format):
            problem = _problem(found) if isinstance(found, Example) else None
            yield found if problem is None else Unreadable(found.where, problem)


def _problem(example: Example) -> str | None:
    """Return why a text cannot be classified, or none."""
    if not example.string.strip():
        return "the text is empty"
    return "a word is empty" if "" in example.words else None


def line_number(where: str) -> int | None:
    """Return n of `file:n`, or n + 1 of row n in `file[n]`: numbers count from 1."""
    match = re.search(r":(?P<line>\d+)$|\[(?P<row>\d+)\]$", where)
    if match is None:
        return None
    return int(match["line"]) if match["line"] else int(match["row"]) + 1
