"""One trial in a process of its own: `python -m tokmask_peft.study.trial`, told on its standard input what to train.

A crash or a lack of memory then ends the trial and not the sweep, and no trial inherits another's state.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

INTERRUPTED = 130


def read_task() -> dict[str, Any]:
    """Read the one line that says what to do, and from then on exit at once when the sweep's process is gone.

    The sweep holds the other end of standard input and never writes again: the end of the file means that it died, by
    whatever signal. A trial that outlived it would train on in a folder that the next worker takes over.
    """
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_at_end, daemon=True).start()
    found: dict[str, Any] = task
    return found


def _exit_at_end() -> None:
    while os.read(0, 4096):
        pass
    os._exit(INTERRUPTED)


def main() -> int:
    """Train what standard input says; return the exit code."""
    task = read_task()
    from tokmask_peft.console import quiet_libraries
    from tokmask_peft.errors import RunInterruptedError, TokmaskError
    from tokmask_peft.recipe.schema import Recipe

    quiet_libraries()
    from tokmask_peft.training import train as run

    try:
        run.train(Recipe.model_validate(task["recipe"]), resume=task["resume"])
    except RunInterruptedError as error:
        print(error, flush=True)  # noqa: T201 (the log of the trial)
        return INTERRUPTED
    except TokmaskError as error:
        print(f"Error: {error}", flush=True)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
