"""Find the file of a split, and read its lines without losing one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tokmask_peft.errors import DataError, nearest

FORMATS = {
    ".conll": "conll",
    ".conllu": "conll",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "conll",
}
_ALIASES = {
    "train": {"train", "training"},
    "validation": {"validation", "dev", "valid", "val", "development"},
    "test": {"test", "testing"},
}
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}$")


def aliases(split: str) -> set[str]:
    """Names that mean the same split: `validation`, `dev`, `valid` and `val` are one."""
    return next((names for names in _ALIASES.values() if split.lower() in names), {split.lower()})


def canonical(split: str) -> str:
    """One name for all aliases of a split."""
    return next((name for name, names in _ALIASES.items() if split.lower() in names), split)


def file_format(path: Path, asked: str = "auto") -> str:
    """Format of a file: as asked, or by its ending.

    Raises:
        DataError: the ending is not known.
    """
    if asked != "auto":
        return asked
    ending = path.suffix.lower()
    if ending in FORMATS:
        return FORMATS[ending]
    raise DataError(
        f"{path}: the ending '{ending}' is not one of {', '.join(FORMATS)}. Set data.format to conll, csv, tsv, jsonl "
        "or parquet."
    )


def find_files(path: str, split: str, asked: str = "auto") -> list[Path]:
    """Find the file, or the parquet shards, of a split.

    Args:
        path: a folder, or one file: then `train` is that file, and other splits are files beside it.
        split: a split name (with aliases), or a file name.
        asked: the recipe's format, which settles a tie between `train.tsv` and `train.conll`.

    Raises:
        DataError: nothing fits, or more than one file does; lists what is there.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"data.path: '{path}' does not exist (seen from {Path.cwd()})")
    if root.is_file():
        if split in (root.name, root.stem) or "train" in aliases(split):
            return [root]
        root = root.parent
    literal = root / split
    if literal.is_file():
        return [literal]
    files = sorted(file for file in root.iterdir() if file.is_file() and file.suffix.lower() in FORMATS)
    fitting = [file for file in files if _split_of(file) in aliases(split)]
    if asked != "auto":
        fitting = [file for file in fitting if FORMATS[file.suffix.lower()] == asked] or fitting
    listing = ", ".join(file.name for file in files) or "no data file"
    if not fitting:
        names = [file.name for file in files] + [file.stem for file in files]
        raise DataError(
            f"{root}: no file for the split '{split}'. The folder holds {listing}.{nearest(split, names)} "
            "Name a file in data.train, data.validation or data.test; data.validation may be a share of train such as "
            "0.1, and data.test may be null."
        )
    if len(fitting) > 1 and not all(_SHARD.match(file.stem) for file in fitting):
        raise DataError(
            f"{root}: several files fit the split '{split}': {', '.join(file.name for file in fitting)}. "
            "Name one of them instead of the split, or set data.format."
        )
    return fitting


def _split_of(file: Path) -> str:
    """Split that a file name stands for."""
    shard = _SHARD.match(file.stem)
    return (shard["split"] if shard else file.stem).lower()


def read_lines(
    path: Path, keep_ends: bool = False, tolerant: bool = False, advance: Callable[[int], None] | None = None
) -> Iterator[str]:
    """Read UTF-8 lines, with or without a byte-order mark, ended by LF or CRLF.

    Only line feeds end a line: a post may hold other characters that Unicode counts as line ends.

    Args:
        path: the file.
        keep_ends: keep the line ends, which CSV needs inside quotes.
        tolerant: keep bytes that are not UTF-8 as lone surrogates, for `unicode_problem` to find in the text.
        advance: called with the bytes of each line, for a progress bar.

    Raises:
        DataError: a line is not UTF-8 (unless `tolerant`); names it.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if advance is not None:
                advance(len(raw))
            try:
                line = raw.decode("utf-8", errors="surrogateescape" if tolerant else "strict")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8 ({error.reason}). Save the file "
                    f"as UTF-8, for example: iconv -f latin1 -t utf-8 '{path.name}'"
                ) from error
            yield line if keep_ends else line.removesuffix("\n").removesuffix("\r")


def unicode_problem(text: str) -> str | None:
    """Return why a text is not valid Unicode, or none: what no tokenizer takes, and JSON lines may bring along."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is not valid Unicode, or the file is not UTF-8"
    return None
