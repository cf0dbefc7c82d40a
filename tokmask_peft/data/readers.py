"""Formats and sources of texts: which reader a file needs, which file a split means, and what must be in it."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tokmask_peft.data import tables
from tokmask_peft.data.conll import ConllReader
from tokmask_peft.data.split import NAME_A_SPLIT, aliases, canonical
from tokmask_peft.data.tables import Columns, DataFile, Row, readable, unicode_problem
from tokmask_peft.errors import DataError, nearest
from tokmask_peft.recipe.schema import SourceConfig
from tokmask_peft.tasks import Example, Unreadable, get_task

SHOWN = 5
_PLACEHOLDERS = {"", "-", "_", "?", "-1", "none", "null"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")

Reader = Callable[[DataFile, Columns], Iterable[Example | Unreadable]]
"""Reads the texts of a file in order, with an `Unreadable` in place of each that cannot be read."""


def table(rows: Callable[[DataFile], Iterator[Row]]) -> Reader:
    """Return the reader of a format that has a text in each row, with named columns."""
    return lambda file, columns: tables.examples(rows(file), file.name, columns)


def read_conll(file: DataFile, columns: Columns) -> Iterable[Example | Unreadable]:
    """Read a column file; see `data.conll`."""
    return ConllReader(file.lines(), file.name, columns)


def read_txt(file: DataFile, columns: Columns) -> Iterable[Example | Unreadable]:
    """Read a text per line if no labels are needed; labelled texts in a .txt file are in CoNLL format."""
    if columns.labelled:
        return read_conll(file, columns)
    lines = enumerate(file.lines(), start=1)
    return (columns.task.example(line, None, f"{file.name}:{number}") for number, line in lines)


READERS: dict[str, Reader] = {
    ".conll": read_conll,
    ".conllu": read_conll,
    ".csv": table(tables.csv_rows),
    ".tsv": table(tables.tsv_rows),
    ".jsonl": table(tables.jsonl_rows),
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


def read_split(source: SourceConfig, split: str, task: str) -> list[Example]:
    """Read a labelled split, or a file, from a local path, the Hub or the built-in corpus: the first that is set.

    A text that is missing, or a label of which is, as `source.missing` says, has no label.

    Raises:
        DataError: the split is missing, empty, unlabelled or malformed.
    """
    if source.path is not None:
        found = find_files(source.path, split, source.format)
        name = ", ".join(str(file) for file in found)
        columns = Columns(get_task(task), source.text_column, source.label_column)
        read = (reader_of(file, source.format)(DataFile(file), columns) for file in found)
        examples = list(readable(chain.from_iterable(read)))
    elif source.hub is not None:
        from tokmask_peft.data.hub import read_hub

        name = f"{source.hub} [{split}]"
        examples = read_hub(source, split, task)
    else:
        name = f"built-in corpus [{split}]"
        examples = builtin_examples(task, split)
    missing = {id(found) for found in examples if {found.string, *(found.tags or ("",))} & {*(source.missing or ())}}
    _check_complete([found for found in examples if id(found) not in missing], name, task)
    return [replace(found, label=None) if id(found) in missing else found for found in examples]


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
        "text": [example.where for example in examples if not example.words or "" in example.words],
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

    The format is txt (a text per line) or another ending of `READERS`; auto goes by the file's own ending.

    Raises:
        DataError: the file is missing, its format is not known, no column fits, or the file as a whole is not what its
            format says.
    """

    def __init__(self, path: str | Path, task: str, format: str = "auto", text_column: str | int | None = None) -> None:
        if not Path(path).is_file():
            raise DataError(f"{path}: there is no such file", code="no-path", path=str(path))
        super().__init__(Path(path), tolerant=True)
        self._reader = reader_of(self.path, format)
        self._columns = Columns(get_task(task), text_column, labelled=False)
        next(iter(self), None)  # a mistake in the file as a whole shows here, before a model is loaded
        self.done = 0

    def __iter__(self) -> Iterator[Example | Unreadable]:
        """Read from the beginning."""
        self.done = 0
        for found in self._reader(self, self._columns):
            problem = _problem(found) if isinstance(found, Example) else None
            yield found if problem is None else Unreadable(found.where, problem)


def _problem(example: Example) -> str | None:
    """Return why a text cannot be classified, or none."""
    if not any(example.words):
        return "the text is empty"
    return "a word is empty" if "" in example.words else unicode_problem(example.string)


def line_number(where: str) -> int | None:
    """Return n of `file:n`, or n + 1 of row n in `file[n]`: numbers count from 1."""
    match = re.search(r":(?P<line>\d+)$|\[(?P<row>\d+)\]$", where)
    if match is None:
        return None
    return int(match["line"]) if match["line"] else int(match["row"]) + 1
