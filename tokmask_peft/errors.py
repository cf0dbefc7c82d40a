"""Errors that a user can act on, and the boundary to exceptions of others, and to files, which are written whole."""

import contextlib
import difflib
import errno
import glob
import importlib.util
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

LONGEST_GUESSED, MOST_COMPARED = 100, 1000


class TokmaskError(Exception):
    """Base of every error that tokmask_peft raises on purpose.

    The message says what was expected, what was found, and what to do. `code` is a lower-case name of the mistake, such
    as `no-labels`, stable between versions; default: that of the class. `fields` are what the message is about, such as
    `file`, `column` or `label`.
    """

    code: str = "error"

    def __init_subclass__(cls, code: str | None = None) -> None:
        cls.code = code or cls.code

    def __init__(self, message: str, *, code: str | None = None, **fields: Any) -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # half characters cannot be printed
        self.code = code or type(self).code
        self.fields = fields


class RecipeError(TokmaskError, code="recipe"):
    """A recipe cannot be used: `problems` has a line for each, `dotted.path: what is wrong; what to do`."""

    def __init__(
        self, problems: Iterable[str], source: str = "recipe", *, code: str | None = None, **fields: Any
    ) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  {line}" for line in self.problems)]), code=code, **fields)


class DataError(TokmaskError, code="data"):
    """Data cannot be read, or does not fit the task."""


class ModelError(TokmaskError, code="model"):
    """A backbone or an adapter cannot be built or loaded as asked."""


class MaskTokenError(TokmaskError, code="mask-token"):
    """No usable mask token, or a masker is attached where it cannot be."""


class RunError(TokmaskError, code="run"):
    """A run folder is missing, taken or unfinished, or a run went wrong in a way that would pass unnoticed."""


class SweepError(TokmaskError, code="sweep"):
    """A sweep cannot be run, continued or reported as asked."""


class HubError(TokmaskError, code="hub"):
    """An adapter cannot be pushed to the Hugging Face Hub as asked."""


class ExtraError(TokmaskError, code="missing-extra"):
    """A command needs an optional library that is not installed."""


class RunInterruptedError(RunError, code="interrupted"):
    """A signal stopped the run; it can be resumed."""


_FULL = r"No space left|os error 2[78]\b|file write failed"  # a full disk, as safetensors and torch report it


def as_ours(
    error: Exception, doing: str = "", kind: type[TokmaskError] = TokmaskError, code: str | None = None, **fields: Any
) -> TokmaskError:
    """Return one clear error for an exception that is not ours; `doing` names the file or the step that failed."""
    if isinstance(error, TokmaskError):
        return error
    number, reason, found = getattr(error, "errno", None), first_line(error)[:300], "system"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(_FULL, str(error)):
        found, remedy = "no-space", "; free some space, or choose another place"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        found, remedy = "no-access", "; choose another place, or change its permissions"
    elif isinstance(error, OSError):
        remedy = "; check that path" if error.filename else ""
    else:
        found, reason = "unexpected", f"{type(error).__name__}: {reason}"
        remedy = "; if the input is in order, please report this with what TOKMASK_DEBUG=1 shows"
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return kind(f"{doing} failed: {reason}{remedy}".removeprefix(" failed: "), code=code or found, **fields)


@contextlib.contextmanager
def boundary(doing: str = "", *given: Any, **fields: Any) -> Iterator[None]:
    """Turn an exception that is not ours, except a lack of memory, into one of ours by `as_ours`; also a decorator."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TokmaskError) or re.search("memory|alloc", f"{type(error)} {error}", re.IGNORECASE):
            raise
        raise as_ours(error, doing, *given, **fields) from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield where to write a file or a folder, which then takes the place of `path`; on an exception nothing changes.

    So a reader sees the old one or the new one, also after a power cut. What killed processes left is removed first.
    """
    import psutil

    for stray in path.parent.glob(f".{glob.escape(path.name)}.*"):
        number = stray.suffix[1:]
        if re.fullmatch(r"\d{1,9}", number) and (int(number) == os.getpid() or not psutil.pid_exists(int(number))):
            _remove(stray)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield new
        for part in (new, *new.rglob("*")):
            if part.is_file():
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
        if path.is_dir():
            shutil.rmtree(path)
        new.replace(path)
    finally:
        _remove(new)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_place(path: Path, kind: type[TokmaskError], code: str, *, folder: bool = False) -> Path:
    """Return a file or a `folder` that `whole` can write; otherwise raise an error of that kind, with the field `path`.

    A file is made there and removed: permissions do not tell of disks that are read only, or of long names.
    """
    remedy = "choose another place"
    try:
        if path.exists() and not (path.is_dir() if folder else path.is_file()):
            problem = f"it is not a {'folder' if folder else 'file'}"
        elif not path.name:
            problem = "it has no name of its own"
        elif not (parent := path.absolute().parent).is_dir():
            problem, remedy = f"there is no folder {parent}", f"make it first, or {remedy}"
        else:
            new = path.with_name(f".{path.name}.{os.getpid()}")
            new.touch()
            new.unlink()
            return path
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or first_line(error)
    raise kind(f"{path} cannot be written: {problem}; {remedy}", code=code, path=path)


def write_whole(path: Path, text: str) -> None:
    """Write a file as `whole` does."""
    with whole(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write JSON as `whole` does; in one line without `indent`."""
    write_whole(path, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, kind: type[TokmaskError], code: str) -> dict[str, Any]:
    """Read a JSON object; an error of that kind and code, with the field `path`, if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # a pipe would never end
        problem = f"it holds a {type(found).__name__}" if path.is_file() else "there is no such file"
    except (OSError, ValueError, RecursionError) as error:
        found, problem = None, first_line(error)
    if not isinstance(found, dict):
        raise kind(f"{path} is not a JSON object that can be read: {problem}", code=code, path=path)
    return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `log.jsonl`; a line that a killed run left half-written is skipped."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [row for row in found if isinstance(row, dict) and isinstance(row.get("step"), int)]


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest candidate or the one that `name` begins, or an empty string."""
    if len(name) > LONGEST_GUESSED:  # difflib takes quadratic time
        return ""
    names = [other for other in islice(candidates, MOST_COMPARED) if len(other) <= LONGEST_GUESSED]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    match = close or ([other for other in names if other.startswith(name)] if name else [])
    return f" Did you mean '{match[0]}'?" if match else ""


def first_line(error: object) -> str:
    """Return the first line of an error's text, with the next after a colon; without a text the name of its class."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {rest[0]}" if rest and first.endswith(":") else first


def require(module: str, extra: str, what: str) -> None:
    """Raise an ExtraError if the library of an extra is not installed, without importing it."""
    if importlib.util.find_spec(module) is None:
        raise ExtraError(f"{what} needs {module}: pip install 'tokmask-peft[{extra}]'", extra=extra)


def is_whole(path: Path) -> bool:
    """Return whether a file of weights or states is as long as it says, and a folder of shards is not empty."""
    from safetensors import safe_open

    try:
        if not path.is_file():  # or a pipe
            return path.is_dir() and any(path.iterdir())
        if path.suffix == ".safetensors":
            with safe_open(path, "numpy"):
                return True
        with zipfile.ZipFile(path) as states:  # as torch saves them, with checksums
            return states.testzip() is None
    except Exception:  # of whatever kind: it cannot be read
        return False
