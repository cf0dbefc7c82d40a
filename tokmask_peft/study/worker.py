"""A process that trains one cell after the other, and the sweep's handle of it.

A crash ends that process and not the sweep; imports, which take seconds, are kept between runs that succeed.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tokmask_peft.artifacts import RunFolder, read_log
from tokmask_peft.errors import RunInterruptedError, TokmaskError
from tokmask_peft.recipe.schema import Recipe

INTERRUPTED = 130


class Worker:
    """The sweep's handle of a process that trains its cells.

    `train` is called in the process, with a recipe and whether to resume its run; `threads` are the process's CPU
    threads, unless OMP_NUM_THREADS is set.
    """

    def __init__(self, train: Callable[[Recipe, bool], object], threads: int) -> None:
        self._train, self._threads = train, threads
        self._process: Any = None
        self._logged = 0  # bytes that earlier attempts have left in the log

    def begin(self, recipe: Recipe) -> None:
        """Start to train a cell, in the process of the last one if that is still there."""
        self.run = RunFolder(recipe.run_dir)
        self.log = self.run.root.parent / "logs" / f"{recipe.name}.log"
        self._began, self.signals, self._read, self._is_done = time.monotonic(), 0, 0, False
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self._logged = self.log.stat().st_size
        if self._process is None or not self._process.is_alive():
            spawn = multiprocessing.get_context("spawn")
            self._pipe, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_serve, args=(theirs, self._train, self._threads))
            self._process.start()
            theirs.close()
        resume = not self.run.is_empty()
        with contextlib.suppress(OSError):  # it died at once; its exit code says why
            self._pipe.send((recipe.model_dump(mode="json"), resume, self.log))

    @property
    def seconds(self) -> float:
        """Seconds since the cell began."""
        return time.monotonic() - self._began

    def poll(self) -> int | None:
        """Return 0 if the cell is trained, the exit code if the process has ended, none while it trains."""
        code: int | None = self._process.exitcode
        with contextlib.suppress(EOFError, OSError):
            self._is_done = self._is_done or (self._pipe.poll() and self._pipe.recv())
        return 0 if self._is_done else code

    def stop(self) -> None:
        """Ask for a checkpoint and the end; the second time, end the process at once."""
        self.signals += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGINT if self.signals == 1 else signal.SIGKILL)

    def end(self) -> None:
        """End the process, also in the middle of a run, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None

    def new_evaluations(self) -> Iterator[tuple[int, float]]:
        """Yield step and validation macro-F1 of evaluations since the last call."""
        rows = read_log(self.run.log)
        start, self._read = self._read, len(rows)
        yield from ((row["step"], float(row["eval_f1_macro"])) for row in rows[start:] if "eval_f1_macro" in row)

    def progress(self) -> str:
        """Return the last step and loss of the run's log."""
        *_, row = [{}, *read_log(self.run.log)]
        loss = f", loss {row['loss']:.4f}" if isinstance(row.get("loss"), float) else ""
        return f"step {row['step']}{loss}" if row else "starting"

    def reason(self, code: int) -> str:
        """Return why the run failed, from the exit code and the end of its log."""
        if code == 0:
            return "the process ended without a result"
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        text = self.log.read_bytes()[self._logged :].decode("utf-8", errors="replace")
        lines = text.rstrip().splitlines() or ["no message"]
        start = max((i for i, line in enumerate(lines) if line.startswith("Error: ")), default=len(lines) - 1)
        return f"{' '.join(map(str.strip, lines[start:])).removeprefix('Error: ')} (exit code {code})"


def _serve(tasks: Connection, train: Callable[[Recipe, bool], object], threads: int) -> None:
    """Train what the sweep sends, with a log for each run; exit with the sweep, whose folders others take over."""

    def watch() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(INTERRUPTED)

    os.setsid()  # Ctrl-C reaches only the sweep, which then stops its workers one by one
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    threading.Thread(target=watch, daemon=True).start()
    while True:
        recipe, resume, file = tasks.recv()
        with file.open("ab") as log:
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
                os.dup2(log.fileno(), stream.fileno())
        train(Recipe.model_validate(recipe), resume)
        tasks.send(True)


def train_cell(recipe: Recipe, resume: bool) -> None:
    """Train a cell, and leave neither its memory nor its peak to the next; exit if it fails."""
    from tokmask_peft.console import quick_imports

    with quick_imports():
        import torch

        from tokmask_peft.training.train import train

    try:
        train(recipe, resume=resume)
    except TokmaskError as error:
        is_asked_for = isinstance(error, RunInterruptedError)
        print(error if is_asked_for else f"Error: {error}", flush=True)  # noqa: T201 (the log of the run)
        sys.exit(INTERRUPTED if is_asked_for else 2)
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the resident set's peak, on Linux
