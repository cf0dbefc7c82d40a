"""Formats and sources of texts: which reader a file needs, which file a split means, and what must be in it."""

import functools
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
from tokmask_peft.data.conll import WITHHELD, Columns, ConllReader, Row, blank_row, is_conll, readable, split_columns
from tokmask_peft.data.hub import builtin_examples, read_hub
from tokmask_peft.data.opening import PACKED, DataFile, damaged, sheet_cells, unicode_problem
from tokmask_peft.data.split import NAME_A_SPLIT, SHARD, aliases, check_shards
from tokmask_peft.data.tables import SNIFFED
from tokmask_peft.errors import DataError, nearest
from tokmask_peft.examples import Example, Pair, Unreadable
from tokmask_peft.recipe.data import SourceConfig, known_separator
from tokmask_peft.tasks import get_task

SHOWN = 5
_PLACEHOLDERS = {"", "-", "_", "?", "-1", "none", "null"}
Reader = Callable[[DataFile, Columns], Iterable[Example | Unreadable]]  # reads the texts of a file, in order
Rows = Callable[[DataFile, Columns], Iterator[Row]]  # reads the rows of a table, in order


def table(rows: Callable[[DataFile], Iterator[Row]]) -> Reader:
    """Return the reader of a format that has a text in each row, with named columns."""
    return _table_reader(lambda file, columns: rows(file))


@functools.cache  # so that formats that are read alike have the same reader
def _table_reader(rows: Rows) -> Reader:
    return lambda file, columns: tables.examples(rows(file, columns), file.name, columns)


def read_conll(file: DataFile, columns: Columns) -> Iterable[Example | Unreadable]:
    """Read a column file; see `data.conll`."""
    _check_task("conll", columns)
    return ConllReader(file.lines(), file.name, columns)


def csv_rows(file: DataFile, columns: Columns) -> Iterator[Row]:
    """Read CSV; its separator may also be a semicolon, a tab or a vertical bar, or what the recipe says."""
    separator = columns.mark or tables.separator_of(file)
    if columns.mark is None and separator != ",":
        why = "it gives most rows as many columns as the first, a comma does not; data.separator changes it"
        columns.decisions.append(Decision(f"separator of {file.path.name}", repr(separator), why))
    return tables.named(tables.cells_of(file, separator), file, columns, separator)


def tsv_rows(file: DataFile, columns: Columns) -> Iterator[Row]:
    """Read TSV, with its quotes as part of the texts unless all are those of a program that writes tables."""
    separator = columns.mark or "\t"
    if quoted := tables.is_quoted(file, separator):
        why = "all of them enclose cells, as pandas and Excel write them"
        columns.decisions.append(Decision(f"quotes of {file.path.name}", "removed", why))
    return tables.named(tables.cells_of(file, separator, quoted), file, columns, separator)


def read_txt(file: DataFile, columns: Columns) -> Iterable[Example | Unreadable]:
    """Read a text per line if no labels are needed; labelled texts in a .txt file are in CoNLL format."""
    if columns.labelled:
        return read_conll(file, columns)
    _check_task("txt", columns)
    lines = enumerate(file.lines(), start=1)
    return (columns.task.example(line, None, f"{file.name}:{number}") for number, line in lines)


def read_tagged(file: DataFile, columns: Columns) -> Iterator[Example | Unreadable]:
    """Read a text per line whose words have tags, `ami/bn busy/en` or `ami_bn`; the last separator of a word counts."""
    _check_task("tagged", columns, columns.task.words_given)
    mark = columns.mark or _mark_of_tags(file)
    for number, line in enumerate(file.lines(), start=1):
        where = f"{file.name}:{number}"
        words, tags = [], []
        for word in split_columns(line):
            before, _, tag = word.rpartition(mark)
            words.append(before if tag and mark in word else word)
            tags.append(tag if mark in word else "")
        if not line.strip(" \t"):
            yield blank_row(where)
        elif columns.labelled and "" in tags:
            problem = f"'{words[tags.index('')]}' has no tag: expected word{mark}tag, or another data.separator"
            yield Unreadable(where, problem, "no-tag")
        else:
            yield columns.task.example(words, tuple(tags) if columns.labelled else None, where)


def _mark_of_tags(file: DataFile) -> str:
    """Return what separates words from tags, a slash or an underscore: what most words have, and gives fewer tags."""
    words = [word for line in islice(file.again().lines(), SNIFFED) for word in split_columns(line) if word]
    tags = {mark: [word.rpartition(mark)[2] for word in words if mark in word[1:-1]] for mark in "/_"}
    return max(tags, key=lambda mark: (len(tags[mark]), -len(set(tags[mark]))))


def read_labelled(file: DataFile, columns: Columns) -> Iterator[Example | Unreadable]:
    """Read a text per line after its label, `1 a moving film`; a tab or a space is between them."""
    _check_task("labelled", columns, not columns.task.words_given)
    tabs = all("\t" in line for line in islice(file.again().lines(), SNIFFED) if line.strip())
    mark = columns.mark or ("\t" if tabs else None)
    for number, line in enumerate(file.lines(), start=1):
        where = f"{file.name}:{number}"
        label, *rest = split_columns(line, 1) if mark is None else line.split(mark, 1)
        if not (text := "".join(rest).strip(" \t")):
            problem = "no text after the label; if something else is between them, set data.separator"
            yield Unreadable(where, problem, "empty-text") if line.strip(" \t") else blank_row(where)
            continue
        try:
            given = columns.task.parted(label, columns.labels) if columns.labelled else None
            yield columns.task.from_cells(text, given, where, ("text", "label"))
        except DataError as error:
            yield Unreadable(where, str(error), error.code)


def _check_task(format: str, columns: Columns, fits: bool = True) -> None:
    if not fits or columns.second is not None:
        says = f"a pair is in two columns of a table, which {format} lacks: set data.format to csv, tsv, jsonl, …"
        says = says if fits else f"data.format={format} does not fit data.task, which has {columns.task.description}"
        raise DataError(says, code="format", field="format", format=format)


_JSON_FORM = (
    "Needed: one object per line, or one array of objects. For objects over several lines: jq -c . FILE > NEW.jsonl"
)


def jsonl_rows(file: DataFile) -> Iterator[Row]:
    """Read one JSON object per line, or an array of objects, read whole; DataError if it only begins like one."""
    lines = enumerate(file.lines(), start=1)
    start, first = 1, ""
    for start, first in lines:
        if first.strip():
            break
        yield blank_row(f"{file.name}:{start}")
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
        yield _json_row(_json(line, file.name, number), where) if line.strip() else blank_row(where)


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


TABLES: dict[str, Rows] = {
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".jsonl": lambda file, columns: jsonl_rows(file),
    ".parquet": lambda file, columns: tables.parquet_rows(file),
    ".xlsx": lambda file, columns: tables.named(sheet_cells(file), file, columns),
}
TABLES[".ndjson"] = TABLES[".json"] = TABLES[".jsonl"]
READERS: dict[str, Reader] = {
    ".conll": read_conll,
    ".conllu": read_conll,
    **{ending: _table_reader(rows) for ending, rows in TABLES.items()},
    ".txt": read_txt,
    ".tagged": read_tagged,
    ".labelled": read_labelled,
}
"""By ending, in `data.format` without the dot. Another format is added here: `READERS[".mine"] = read_mine`."""
_SNIFFED = {ending: READERS[ending] for ending in (".csv", ".tsv", ".txt")}
"""These endings may hold another format, unless somebody reads them in a way of their own."""


def reader_of(path: Path, asked: str = "auto") -> Reader:
    """Return the reader of a format, or, for `auto`, of a file's ending; DataError if there is none."""
    ending = path.suffix.lower() if asked == "auto" else f".{asked}"
    if ending in READERS:
        return READERS[ending]
    formats = ["auto", *(known.removeprefix(".") for known in READERS)]
    guess = "" if asked == "auto" else nearest(asked, formats)
    problem = f"no reader for the format '{ending[1:]}'.{guess} Set data.format to one of {', '.join(formats)}."
    raise DataError(f"{path}: {problem}", code="unknown-format", format=ending[1:])


def _recognised(file: DataFile, columns: Columns) -> Reader | None:
    """Return the reader of what is in a file if its ending says nothing else; DataError if data.format must be set."""
    ending = file.inner.suffix.lower()
    if file.workbook:
        return READERS[".xlsx"]
    if READERS.get(ending) is not _SNIFFED.get(ending):
        return None
    if is_conll(file.again().lines(), columns):
        if ending != ".txt" or not columns.labelled:  # otherwise that is what txt means
            why = "blocks of lines have the same columns; data.format changes it"
            columns.decisions.append(Decision(f"format of {file.path.name}", "conll", why))
        return read_conll
    if columns.labelled and ending not in (".csv", ".tsv") and (better := _better_format(file, columns)):
        problem = f"{file.name} looks like {better}: set data.format={better}, or to what it is, such as conll"
        raise DataError(problem, code="format", field="format", format=better)
    return None


def _better_format(file: DataFile, columns: Columns) -> str | None:
    """Return the format that a file, which is not a column file, seems to have, or none."""
    lines = [line for line in islice(file.again().lines(), SNIFFED) if line.strip(" \t")]
    names = {name.strip().lower() for name in re.split(r"[\t,;|]", lines[0])} if lines else set()
    if names & {*columns.task.text_columns} and names & {*columns.task.label_columns}:
        return "tsv" if "\t" in lines[0] else "csv"
    words = [split_columns(line) for line in lines]
    if columns.task.words_given:
        marks = [mark for mark in "/_" if all(mark in word[1:-1] for line in words for word in line)]
        return "tagged" if lines and marks else None
    labels, sizes = {line[0] for line in words}, {len(line) for line in words}
    likely = 1 < len(labels) <= min(50, 0.7 * len(lines)) and len(sizes) > 1 and 1 not in sizes
    return "labelled" if likely else None


def find_files(path: str, split: str, asked: str = "auto") -> list[Path]:
    """Find the file, or the parquet shards, of a split; DataError if no file fits, or several do.

    `path` is a folder, or the file of `train`, with other splits next to it; `split` may be an alias or a file name;
    the format `asked` settles a tie between `train.tsv` and `train.conll`.
    """
    root = Path(path).expanduser()
    if not (root.is_file() or root.is_dir()):
        problem = "is neither a file nor a folder" if root.exists() else f"does not exist (seen from {Path.cwd()})"
        raise DataError(f"data.path: '{path}' {problem}", code="no-path", path=path)
    if root.is_file():
        if split in (root.name, root.stem) or "train" in aliases(split):
            return [root]
        root = root.parent
    if (literal := root / split).is_file():
        return [literal]
    there = sorted(file for file in root.iterdir() if file.is_file())
    inner = {file: file.with_suffix("") if file.suffix.lower() in PACKED else file for file in there}
    files = [file for file in there if inner[file] != file or file.suffix.lower() in READERS]
    stems = {file: inner[file].stem if inner[file].suffix.lower() in READERS else inner[file].name for file in files}
    fitting = [file for file in files if SHARD.sub("", stems[file]).lower() in aliases(split)]
    if not fitting:  # reading it says what it is, and what to do
        fitting = [file for file in there if file.name.partition(".")[0].lower() in aliases(split)]
    if asked != "auto":
        wanted = {reader_of(root, asked)} | ({read_txt} if asked in ("conll", "tagged", "labelled") else set())
        fitting = [file for file in fitting if READERS.get(inner[file].suffix.lower()) in wanted] or fitting
    if fitting and (len(fitting) == 1 or all(SHARD.search(file.name) for file in fitting)):
        check_shards([file.name for file in fitting], str(root))
        return fitting
    names = tuple(file.name for file in fitting or files)
    listing = ", ".join(names) or "no data file"
    guess = nearest(split, [*names, *stems.values()])
    problem = f"no file for the split '{split}'. The folder contains {listing}.{guess} {NAME_A_SPLIT}"
    if fitting:
        problem = f"several files fit the split '{split}': {listing}. Name one of them instead, or set data.format."
    raise DataError(f"{root}: {problem}", code="several-files" if fitting else "no-split", split=split, files=names)


def read_split(source: SourceConfig, split: str, task: str, decisions: list[Decision] | None = None) -> list[Example]:
    """Read a labelled split, or a file, from a local path, the Hub or the built-in corpus: the first that is set.

    `decisions` takes what was decided about its form. A text that is missing, or a label of which is, as
    `source.missing` says, has no label. DataError if the split is missing, empty, unlabelled or malformed.
    """
    text, second = source.text_column if isinstance(source.text_column, tuple) else (source.text_column, None)
    columns = Columns(get_task(task), text, source.label_column, header=source.header, second=second)
    columns = replace(columns, group=source.group_column, separator=source.separator, labels=source.label_separator)
    left_out = {*map(str.strip, source.missing or ())}
    if source.path is not None:
        files = find_files(source.path, split, source.format)
        name = ", ".join(str(file) for file in files)
        opened = (DataFile(file, encoding=source.encoding, decisions=columns.decisions) for file in files)
        found = (one for file in opened for one in _read(file, columns, source.format))
        if "" in left_out:
            empty = ("empty-word", "empty-text")
            found = (Example("", None, one.where) if getattr(one, "code", "") in empty else one for one in found)
        examples = readable(found)
    elif source.hub is not None:
        name = f"{source.hub} [{split}]"
        examples = read_hub(source, split, columns)
    else:
        name = f"built-in corpus [{split}]"
        examples = builtin_examples(task, split)
    if decisions is not None:
        decisions += columns.decisions
    missing = {id(found) for found in examples if {*map(str.strip, (*found.parts, *found.given))} & left_out}
    missing |= {id(found) for found in examples if "" in left_out and "" in found.words}
    _check_complete([found for found in examples if id(found) not in missing], name, task)
    return [replace(found, label=None) if id(found) in missing else found for found in examples]


def _read(file: DataFile, columns: Columns, format: str) -> Iterator[Example | Unreadable]:
    """Read a file, with an `Unreadable` for what is not Unicode, and one DataError if the whole file is damaged."""
    with damaged(file, "a file of texts", "unreadable-file"):
        reader = _recognised(file, columns) if format == "auto" else None
        for found in (reader or reader_of(file.inner, format))(file, columns):
            problem = unicode_problem(" ".join([found.string, *found.tags])) if isinstance(found, Example) else None
            yield found if problem is None else Unreadable(found.where, problem, "not-unicode")


def _check_complete(examples: list[Example], name: str, task: str) -> None:
    """Refuse a split in which a text or a label is missing, with the first places and the count."""
    if not examples:
        raise DataError(f"{name}: there are no texts in it", code="no-texts", source=name)
    if all(tag.strip().lower() in _PLACEHOLDERS for example in examples for tag in example.tags):
        hint = ""
        if not get_task(task).words_given and ".conll" in name:
            hint = " A CoNLL file has a text's label in a comment, '# sent_enum = 7 positive'. If words have labels, "
            hint += "set data.task to the task for words."
        raise DataError(f"{name}: no text has a label.{hint} {WITHHELD}", code="no-labels", source=name)
    lacking = {
        "text": [example.where for example in examples if example.is_empty],
        "word": [example.where for example in examples if not example.is_empty and "" in example.words],
        "label": [example.where for example in examples if "" in example.given],
    }
    for what, places in lacking.items():
        if places:
            more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            problem = f"an empty {what} at {', '.join(places[:SHOWN])}{more} ({len(places)} in all)"
            remedy = 'Nothing is dropped silently: remove these lines, fill them in, or set data.missing=[""].'
            raise DataError(f"{name}: {problem}. {remedy}", code=f"empty-{what}", places=tuple(places))


class TextFile(DataFile):
    """The texts of one file for prediction, in order and streamed; one that cannot be read is an `Unreadable`.

    The format is txt (a text per line) or another ending of `READERS`; auto goes by the file's own ending, and by what
    is in it. The other arguments are as in `data.`. Every row of the file is in the result: a blank line too, and a
    text of several lines or rows once. `rows` takes the rows of a table, with all their cells, as the texts are read
    from them; remove those that you have used. DataError if the file as a whole cannot be read, or no column fits.
    """

    def __init__(
        self,
        path: str | Path,
        task: str,
        format: str = "auto",
        text_column: str | int | tuple[str, str] | None = None,
        header: bool | Literal["auto"] = "auto",
        separator: str = "auto",
        encoding: str = "auto",
        group_column: str | int | None = None,
        name: str | None = None,
    ) -> None:
        if not Path(path).is_file():
            problem = "is a folder: name a file in it" if Path(path).is_dir() else "there is no such file"
            raise DataError(f"{path}: {problem}", code="no-path", path=str(path))
        try:
            separator = known_separator(separator)
        except ValueError as error:
            problem = f"data.separator: {error}. Found '{separator}'."
            raise DataError(problem, code="separator", field="separator") from error
        self._format, self.rows = format, deque[Row]()
        text, second = text_column if isinstance(text_column, tuple) else (text_column, None)
        asked = (text, None, False, header, group_column, separator)
        self._columns = Columns(get_task(task), *asked, rows=self.rows, second=second)
        super().__init__(Path(path), name, True, encoding, self._columns.decisions)
        self.decisions: tuple[Decision, ...] = ()
        self.worded: Callable[[str], str] = str  # of a problem, such as with the options of a command
        next(iter(self), None)  # a mistake in the file as a whole shows here, before a model is loaded
        self.done = 0
        self.decisions = tuple(self._columns.decisions)

    def __iter__(self) -> Iterator[Example | Unreadable]:
        """Read from the beginning."""
        self.done = 0
        self.rows.clear()
        for found in _read(self, self._columns, self._format):
            problem = _problem(found) if isinstance(found, Example) else None
            found = found if problem is None else Unreadable(found.where, problem)
            yield replace(found, problem=self.worded(found.problem)) if isinstance(found, Unreadable) else found
        known = {one.what for one in self.decisions}  # others show at the end of the file
        self.decisions += tuple({one.what: one for one in self._columns.decisions if one.what not in known}.values())


def _problem(example: Example) -> str | None:
    """Return why a text cannot be classified, or none."""
    if not all(map(str.strip, example.parts)):
        return "a text of the pair is empty" if isinstance(example.text, Pair) else "the text is empty"
    return "a word is empty" if "" in example.words else None
