"""The command line. Thin: each command imports what it needs, so that `tokmask --help` answers at once."""

import codecs
import contextlib
import io
import json
import sys
from typing import Any

from tokmask_peft.cli import adapters, results
from tokmask_peft.cli.app import app

__all__ = ["adapters", "app", "main", "results"]


def main() -> None:
    """Run the command line; what the encoding of its output lacks, as on Windows in a pipe, is written as in JSON."""

    def escaped(error: Any) -> tuple[str, int]:
        return json.dumps(error.object[error.start : error.end])[1:-1], error.end

    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        codecs.register_error("json", escaped)
        with contextlib.suppress(OSError):  # a file that became a pipe
            sys.stdout.reconfigure(errors="json")
    app()
