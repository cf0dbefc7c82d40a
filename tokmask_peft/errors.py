"""Errors that a user can act on: what was expected, what was found, what to do.

The command line prints their text without a traceback; library callers catch `TokmaskError`.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from typing import Any


class TokmaskError(Exception):
    """Base of every error that tokmask_peft raises on purpose.

    Args:
        message: what was expected, what was found, and what to do.
        code: a stable, lower-case name of the mistake, for example `no-labels`; default: that of the class.
        fields: what the message is about, for example `file`, `column`, `label`.

    Attributes:
        code: as given; stable between versions, unlike the message.
        fields: as given.
    """

    code: str = "error"

    def __init__(self, message: str, *, code: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.fields = fields


class RecipeError(TokmaskError):
    """A recipe cannot be used. Holds every problem found, not only the first.

    Attributes:
        problems: one line each, `dotted.path: what is wrong; what to do`.
    """

    code = "recipe"

    def __init__(
        self, problems: Iterable[str], source: str = "recipe", *, code: str | None = None, **fields: Any
    ) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  {line}" for line in self.problems)]), code=code, **fields)


class DataError(TokmaskError):
    """Data cannot be read, or does not fit the task."""

    code = "data"


class ModelError(TokmaskError):
    """A backbone or an adapter cannot be built or loaded as asked."""

    code = "model"


class MaskTokenError(TokmaskError):
    """No usable mask token, or a masker is attached where it cannot be."""

    code = "mask-token"


class RunError(TokmaskError):
    """A run folder is missing, taken or unfinished, or a run went wrong in a way that would pass unnoticed."""

    code = "run"


class SweepError(TokmaskError):
    """A sweep cannot be run, continued or reported as asked."""

    code = "sweep"


class HubError(TokmaskError):
    """An adapter cannot be pushed to the Hugging Face Hub as asked."""

    code = "hub"


class ExtraError(TokmaskError):
    """A command needs an optional library that is not installed."""

    code = "missing-extra"


class RunInterruptedError(RunError):
    """A signal stopped the run; it can be resumed."""

    code = "interrupted"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest candidate or the one that `name` begins, or an empty string."""
    names = list(candidates)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    match = close or ([other for other in names if other.startswith(name)] if name else [])
    return f" Did you mean '{match[0]}'?" if match else ""


def first_line(error: object) -> str:
    """Return the first line of an error's text, or the name of its class if the text is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require(module: str, extra: str, what: str) -> None:
    """Check that the library of an extra is installed, without importing it.

    Raises:
        ExtraError: it is not.
    """
    if importlib.util.find_spec(module) is None:
        raise ExtraError(f"{what} needs {module}: pip install 'tokmask-peft[{extra}]'", extra=extra)
