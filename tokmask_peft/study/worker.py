"""A process that trains one cell after the other: `python -m tokmask_peft.study.worker`, and its handle.

A crash or a lack of memory ends that process and not the sweep. It keeps its imports between runs, which take seconds;
after a run that failed the next one gets a new process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokmask_peft.artifacts import RunFolder, read_log
from tokmask_peft.recipe.schema import Recipe

COMMAND = (sys.executable, "-m", "tokmask_peft.study.worker")
INTERRUPTED = 130


class Worker:
    """The sweep's handle of a process that trains its cells.

    Args:
        command: starts the process, which reads what to train with `tasks`.
        threads: CPU threads of the process, unless OMP_NUM_THREADS is set.
    """

    recipe: Recipe
    run: RunFolder
    log: Path
    signals: int
    _began: float

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self._command, self._threads = list(command), threads
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, recipe: Recipe) -> None:
        """Start to train a cell, in the process of the last one if that is still there."""
        self.recipe, self.run = recipe, RunFolder(recipe.run_dir)
        self.log = self.run.root.parent / "logs" / f"{recipe.name}.log"
        self._began, self.signals, self._read, self._is_done = time.monotonic(), 0, 0, False
        self.log.parent.mkdir(parents=True, exist_ok=True)
        task = {"recipe": recipe.model_dump(mode="json"), "resume": not self.run.is_empty(), "log": str(self.log)}
        if self._process is None or self._process.poll() is not None:
            environment = {"OMP_NUM_THREADS": str(self._threads), **os.environ, "PYTHONUNBUFFERED": "1"}
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            with self.log.open("ab") as log:
                # in a session of its own: Ctrl-C reaches only the sweep, which then stops its workers one by one
                started: Any = subprocess.Popen(  # noqa: S603 (our own command)
                    self._command, **pipes, stderr=log, env=environment, start_new_session=True
                )
            self._process, self._input, self._answers = started, started.stdin, started.stdout
            os.set_blocking(self._answers.fileno(), False)
        with contextlib.suppress(OSError):  # it died at once; its exit code says why
            self._input.write(json.dumps(task).encode() + b"\n")

    @property
    def seconds(self) -> float:
        """Seconds since the cell began."""
        return time.monotonic() - self._began

    def poll(self) -> int | None:
        """Return 0 if the cell is trained, the exit code if the process has ended, none while it trains."""
        if self._process is None:
            return None
        code = self._process.poll()
        self._is_done = self._is_done or b"done" in (self._answers.read(1024) or b"")
        return 0 if self._is_done else code

    def stop(self) -> None:
        """Ask for a checkpoint and the end; the second time, end the process at once."""
        self.signals += 1
        if self._process is not None:
            self._process.send_signal(signal.SIGINT if self.signals == 1 else signal.SIGKILL)

    def end(self) -> None:
        """End the process, also in the middle of a run, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._input, self._answers):
                pipe.close()
        self._process = None

    def new_evaluations(self) -> Iterator[tuple[int, float]]:
        """Yield step and validation macro-F1 of evaluations since the last call."""
        rows = read_log(self.run.log)
        start, self._read = self._read, len(rows)
        for row in rows[start:]:
            if "eval_f1_macro" in row:
                yield row["step"], float(row["eval_f1_macro"])

    def progress(self) -> str:
        """Return the last step and loss of the run's log."""
        *_, row = [{}, *read_log(self.run.log)]
        loss = f", loss {row['loss']:.4f}" if isinstance(row.get("loss"), float) else ""
        return f"step {row['step']}{loss}" if row else "starting"

    def interrupted(self, code: int) -> bool:
        """Return whether the process ended because it was asked to."""
        return code == INTERRUPTED or (self.signals > 0 and code != 0)

    def reason(self, code: int) -> str:
        """Return why the run failed, from the exit code and the end of its log."""
        if code == 0:
            return "the process ended without a result"
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        lines = self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines() or ["no message"]
        start = max((i for i, line in enumerate(lines) if line.startswith("Error: ")), default=len(lines) - 1)
        return f"{' '.join(map(str.strip, lines[start:])).removeprefix('Error: ')} (exit code {code})"


def tasks() -> Iterator[dict[str, Any]]:
    """Yield the tasks that standard input holds, a JSON line each; asking for the next reports the last as done.

    What a task prints goes to its log. The sweep keeps the other end of standard input: its end means that the sweep
    has ended, by whatever signal, and then this process exits at once. One that went on would train in a folder that
    the next worker takes over.
    """
    found: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        with open(0, "rb", buffering=0, closefd=False) as lines:
            for line in lines:
                found.put(line)
        os._exit(INTERRUPTED)

    threading.Thread(target=read, daemon=True).start()
    answers = os.dup(1)
    while True:
        task = json.loads(found.get())
        with Path(task["log"]).open("ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        yield task
        os.write(answers, b"done\n")


def main() -> int:
    """Train what standard input asks for; return the exit code of the first run that fails."""
    for task in tasks():
        import torch

        from tokmask_peft.console import quiet_libraries
        from tokmask_peft.errors import RunInterruptedError, TokmaskError

        quiet_libraries()
        from tokmask_peft.training.train import train

        try:
            train(Recipe.model_validate(task["recipe"]), resume=task["resume"])
        except RunInterruptedError as error:
            print(error, flush=True)  # noqa: T201 (the log of the run)
            return INTERRUPTED
        except TokmaskError as error:
            print(f"Error: {error}", flush=True)  # noqa: T201
            return 2
        gc.collect()  # the next run must find neither memory of this one nor its peak
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the resident set's peak, on Linux
    return 0


if __name__ == "__main__":
    sys.exit(main())
