"""A trial's process: start it, watch it, stop it, and say why it failed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokmask_peft.errors import SweepError
from tokmask_peft.recipe import Recipe
from tokmask_peft.recipe.io import differences, load_recipe
from tokmask_peft.study.ledger import Claim
from tokmask_peft.study.trial import INTERRUPTED
from tokmask_peft.training.run_folder import RunFolder

TRIAL = (sys.executable, "-m", "tokmask_peft.study.trial")
_TAIL = 4000  # bytes of a log that are looked at for the reason of a failure


class TrialProcess:
    """A trial that runs in a process of its own.

    Args:
        claim: the trial.
        recipe: of the cell.
        command: what to start; it is told the task in JSON, a line on its standard input.
        threads: CPU threads for it, unless OMP_NUM_THREADS says else.
    """

    def __init__(self, claim: Claim, recipe: Recipe, command: Sequence[str], threads: int) -> None:
        self.claim, self.recipe = claim, recipe
        self.run = RunFolder(recipe.run_dir)
        self.log = self.run.root.parent / "logs" / f"{claim.cell.name}.log"
        self.started = time.monotonic()
        self.signals = 0
        self._read = 0
        self.log.parent.mkdir(parents=True, exist_ok=True)
        resume = self.run.root.is_dir() and any(self.run.root.iterdir())
        task = {"recipe": recipe.model_dump(mode="json"), "resume": resume}
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as said:
            # a session of its own: Ctrl-C reaches the sweep alone, which then stops its trials one by one
            self._process = subprocess.Popen(  # noqa: S603 (our own command)
                list(command),
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code tells
            self._stdin.write(json.dumps(task).encode() + b"\n")
            self._stdin.flush()

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def poll(self) -> int | None:
        """Return the exit code, or none while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask for a checkpoint and the end; the second time, end it at once."""
        self.signals += 1
        number = signal.SIGINT if self.signals == 1 else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let go of the pipe; the process ends if it still runs."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def new_evaluations(self) -> Iterator[tuple[int, float]]:
        """Yield step and validation macro-F1 of evaluations since the last call, from the run's log."""
        if not self.run.log.is_file():
            return
        lines = self.run.log.read_text(encoding="utf-8").splitlines()
        start, self._read = self._read, len(lines)
        for line in lines[start:]:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                content = json.loads(line)
                yield int(content["step"]), float(content["eval_f1_macro"])

    def reason(self, code: int) -> str:
        """Say why it failed, from its exit code and the end of its log."""
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL))
            lines = file.read().decode("utf-8", errors="replace").rstrip().splitlines()
        start = next((i for i in reversed(range(len(lines))) if lines[i].startswith("Error: ")), len(lines) - 1)
        said = " ".join(line.strip() for line in lines[start:]).removeprefix("Error: ") if lines else "no message"
        return f"{said} (exit code {code})"


def finished_result(recipe: Recipe, check: bool = True) -> dict[str, Any] | None:
    """Return the result of a run that is finished; none if it is not.

    Args:
        recipe: of the run.
        check: make sure that the run is of this recipe.

    Raises:
        SweepError: the folder holds the run of another recipe, or a result that cannot be read.
    """
    run = RunFolder(recipe.run_dir)
    if not run.finished():
        return None
    if check and run.recipe.is_file() and (changed := differences(load_recipe(run.recipe), recipe)):
        raise SweepError(f"{run.root} holds a run of another recipe: {'; '.join(changed)}")
    try:
        found: dict[str, Any] = json.loads(run.result.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SweepError(f"{run.result} cannot be read ({error}); remove it, and the run goes on") from error
    return found


def interrupted(code: int, process: TrialProcess) -> bool:
    """Return whether a process ended because it was asked to."""
    return code == INTERRUPTED or (process.signals > 0 and code != 0)


def drop_checkpoints(recipe: Recipe) -> None:
    """Remove the checkpoints of a finished run: its adapter is saved, and they are several times its size."""
    shutil.rmtree(RunFolder(recipe.run_dir).checkpoints, ignore_errors=True)


def reject_result(recipe: Recipe) -> None:
    """Set the result of a run aside that failed after writing it, so that nobody takes it for finished."""
    run = RunFolder(recipe.run_dir)
    if run.result.is_file():
        run.result.replace(Path(run.root) / "result.rejected.json")
