"""A local file that is being read: its lines without losing one, and how much of it is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokmask_peft.errors import DataError
from tokmask_peft.tasks import Example, Unreadable

_ALIASES = {"train": {"training"}, "validation": {"dev", "valid", "val", "development"}, "test": {"testing"}}
NAME_A_SPLIT = (
    "Name one in data.train, data.validation or data.test; data.validation may be a share of train such as 0.1, and "
    "data.test may be null."
)


def aliases(split: str) -> set[str]:
    """Return the names that mean the same split: `validation`, `dev`, `valid` and `val` are one."""
    name = canonical(split)
    return {name.lower(), *_ALIASES.get(name, ())}


def canonical(split: str) -> str:
    """Return one name for all aliases of a split."""
    return next((name for name, others in _ALIASES.items() if split.lower() in {name, *others}), split)


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

        Args:
            keep_ends: keep the line ends, which CSV needs inside quotes.

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
                    raise DataError(
                        f"{self.name}:{number}: byte {error.start + 1} of the line is not UTF-8 ({error.reason}). Save "
                        f"the file as UTF-8, for example: iconv -f latin1 -t utf-8 '{self.path.name}'",
                        code="not-utf8",
                        where=f"{self.name}:{number}",
                    ) from error
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
