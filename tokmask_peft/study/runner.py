"""Run a sweep: its folder and plan on disk, the loop over its cells, and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokmask_peft.artifacts import RunFolder, write_json
from tokmask_peft.errors import RecipeError, RunInterruptedError, SweepError
from tokmask_peft.recipe.errors import shown
from tokmask_peft.recipe.loading import differences, load_recipe
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.study.ledger import FINAL, HEARTBEAT, CellState, Claim, Ledger, errors_of_storage
from tokmask_peft.study.plan import Plan
from tokmask_peft.study.trial import INTERRUPTED

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


def sweep_console(quiet: bool = False) -> Console:
    """Return the console of a sweep; away from a terminal its lines are not wrapped."""
    terminal = sys.stdout.isatty()
    return Console(quiet=quiet, width=None if terminal else 120, highlight=False, soft_wrap=not terminal)


def remaining_seconds(cells: Mapping[str, CellState], elapsed: Mapping[str, float], workers: int) -> float | None:
    """Estimate how long the rest takes: the mean time of a finished trial, over all that run at once.

    Args:
        cells: where each cell stands.
        elapsed: seconds so far of the trials of this process.
        workers: trials that this process runs at once.
    """
    known = [cell.seconds for cell in cells.values() if cell.seconds]
    if not known:
        return None
    mean = sum(known) / len(known)
    states = [cell.state for cell in cells.values()]
    open_cells = sum(state not in FINAL for state in states)
    at_once = max(workers, states.count("running"), 1)
    done_already = sum(min(seconds, mean) for seconds in elapsed.values())
    return max(0.0, (open_cells * mean - done_already) / min(at_once, max(open_cells, 1)))


def duration(seconds: float) -> str:
    """Write seconds as people do: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def best_of(cells: Mapping[str, CellState]) -> tuple[str, float] | None:
    """Return the cell with the highest validation macro-F1."""
    scored = [(cell.score, name) for name, cell in cells.items() if cell.score is not None]
    return (max(scored)[1], max(scored)[0]) if scored else None


def summary_line(cells: Mapping[str, CellState], left: float | None) -> str:
    """Say in a line where the sweep stands."""
    states = [cell.state for cell in cells.values()]
    counts = [f"{states.count('done')}/{len(states)} done", f"{states.count('running')} running"]
    counts += [f"{states.count(state)} {state}" for state in ("failed", "pruned") if state in states]
    line = ", ".join(counts)
    if best := best_of(cells):
        line += f"; best {best[0]} (validation macro-F1 {best[1]:.4f})"
    if left is not None and any(state not in FINAL for state in states):
        line += f"; about {duration(left)} left"
    return line


class SweepDisplay:
    """Shows a sweep: drawn in place in a terminal, else a line when something happens.

    Args:
        console: where to.
        workers: trials at once.
    """

    def __init__(self, console: Console, workers: int) -> None:
        self.console, self.workers = console, workers
        self._live: Live | None = None

    def __enter__(self) -> SweepDisplay:
        """Open the table in a terminal."""
        if self.console.is_terminal and not self.console.quiet:
            self._live = Live(console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the table."""
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, markup=False)

    def update(self, cells: Mapping[str, CellState], elapsed: Mapping[str, float], progress: Sequence[str]) -> None:
        """Draw where the sweep stands; nothing away from a terminal."""
        if self._live is None:
            return
        left = remaining_seconds(cells, elapsed, self.workers)
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("running here", "for"):
            table.add_column(column, overflow="fold")
        for (name, seconds), line in zip(elapsed.items(), progress, strict=True):
            table.add_row(Text(f"{name}  {line}"), duration(seconds))
        elsewhere = sum(cell.state == "running" and name not in elapsed for name, cell in cells.items())
        if elsewhere:
            table.add_row(f"{elsewhere} more in other processes", "")
        for name, cell in cells.items():
            if cell.state == "failed":
                table.add_row(Text(f"failed: {name}: {cell.reason[:100]}", style="red"), "")
        self._live.update(Group(Text(summary_line(cells, left), style="bold"), table))


@dataclass(frozen=True, slots=True)
class Options:
    """How a sweep runs; nothing here changes a result, but `prune`, which stops runs early.

    Attributes:
        workers: trials at once in this process.
        keep_checkpoints: leave those of finished trials.
        prune: stop a trial whose validation macro-F1 is below the median of earlier ones at the same step.
        retry_failed: run failed cells again.
        command: what runs a trial.
        pause: seconds between two looks at the processes.
        look: seconds between two looks at the storage while a worker is idle.
    """

    workers: int = 1
    keep_checkpoints: bool = False
    prune: bool = False
    retry_failed: bool = False
    command: tuple[str, ...] = TRIAL
    pause: float = 0.2
    look: float = 2.0


class Loop:
    """One process's share of a sweep."""

    def __init__(self, plan: Plan, ledger: Ledger, options: Options, display: SweepDisplay) -> None:
        self.plan, self.ledger, self.options, self.display = plan, ledger, options, display
        self.running: list[TrialProcess] = []
        self.cells: dict[str, CellState] = {}
        self.asked = 0  # how often to stop
        self._threads = max(1, (os.cpu_count() or 1) // options.workers)
        self._next_look = self._next_beat = 0.0

    def run(self) -> dict[str, CellState]:
        """Run cells until none is left; return where each stands.

        Raises:
            RunInterruptedError: a signal asked it to stop.
        """
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._look()
            self.display.say(f"Sweep {self.plan.name}: {summary_line(self.cells, None)}")
            while self._step():
                time.sleep(self.options.pause)
        finally:
            for trial in self.running:  # only where something unforeseen ended the loop
                trial.kill()
                with contextlib.suppress(Exception):  # the storage may be what failed
                    self.ledger.give_back(trial.claim)
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.cells

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1

    def _step(self) -> bool:
        """Do what is due; return false at the end."""
        for trial in list(self.running):
            # settling one looks at the storage, which may stop another
            if trial in self.running and (code := trial.poll()) is not None:
                self._settle(trial, code)
        now = time.monotonic()
        if now >= self._next_beat:
            self._beat()
        if self.asked:
            return self._wind_down()
        if self.options.prune:
            self._prune()
        free = self.options.workers - len(self.running)
        if now >= self._next_look:
            self._look()
        if free and any(cell.state == "waiting" for cell in self.cells.values()) and (claim := self.ledger.claim()):
            self._start(claim)
            self._look()
        elapsed = {trial.claim.cell.name: trial.seconds for trial in self.running}
        self.display.update(self.cells, elapsed, [_progress(trial) for trial in self.running])
        return bool(self.running) or any(cell.state not in FINAL for cell in self.cells.values())

    def _look(self) -> None:
        self._beat()  # after the machine has slept none is due by this clock, but by the storage's all are too old
        self.cells = self.ledger.tidy()
        self._next_look = time.monotonic() + self.options.look * (1 if len(self.running) < self.options.workers else 5)

    def _start(self, claim: Claim) -> None:
        try:
            recipe = self.plan.recipe_of(claim.cell, claim.drawn)
            result = finished_result(recipe)
        except (RecipeError, SweepError) as error:
            self._fail(claim, str(error))
            return
        if result is not None:  # its worker was killed between the last line of the run and the storage
            self._finish(claim, recipe, result, None)
            return
        self.running.append(TrialProcess(claim, recipe, self.options.command, self._threads))
        if not self.display.console.is_terminal:
            self.display.say(f"started {claim.cell.name}" + "".join(f"  {drawn}" for drawn in claim.drawn))

    def _settle(self, trial: TrialProcess, code: int) -> None:
        """Take the outcome of a process that has ended."""
        self.running.remove(trial)
        trial.close()
        self._next_look = 0.0
        result = finished_result(trial.recipe, check=False) if code == 0 else None
        if result is not None:
            self._finish(trial.claim, trial.recipe, result, trial.seconds)
        elif self.asked and interrupted(code, trial):
            self.ledger.give_back(trial.claim)
        else:
            reject_result(trial.recipe)
            reason = trial.reason(code) if code else "the process ended without a result"
            self._fail(trial.claim, reason)

    def _finish(self, claim: Claim, recipe: Any, result: dict[str, Any], seconds: float | None) -> None:
        test = result.get("test") or {}
        details = {"seconds": seconds, **{key: test[key] for key in ("f1_macro", "f1_weighted") if key in test}}
        self.ledger.done(claim, result["validation"]["f1_macro"], details)
        if not self.options.keep_checkpoints:
            drop_checkpoints(recipe)
        self._look()
        took = f" in {duration(seconds)}" if seconds else ""
        score = f"validation macro-F1 {result['validation']['f1_macro']:.4f}"
        elapsed = {trial.claim.cell.name: trial.seconds for trial in self.running}
        left = remaining_seconds(self.cells, elapsed, self.options.workers)
        if self.display.console.is_terminal:
            self.display.say(f"done {claim.cell.name}{took}: {score}")
        else:
            self.display.say(f"done {claim.cell.name}{took}: {score}. {summary_line(self.cells, left)}")

    def _fail(self, claim: Claim, reason: str) -> None:
        self.ledger.failed(claim, reason)
        self.display.say(f"failed {claim.cell.name}: {reason} (log: {self.plan.folder / 'logs' / claim.cell.name}.log)")
        self._look()

    def _beat(self) -> None:
        self._next_beat = time.monotonic() + HEARTBEAT
        for trial in list(self.running):
            if not self.ledger.beat(trial.claim):
                self._let_go(trial)

    def _let_go(self, trial: TrialProcess) -> None:
        """Stop a trial that another worker has taken over."""
        trial.kill()
        self.running.remove(trial)
        trial.close()
        self.display.say(f"{trial.claim.cell.name} was taken over by another worker; stopped here")

    def _prune(self) -> None:
        for trial in list(self.running):
            for step, score in trial.new_evaluations():
                if not self.ledger.report(trial.claim, step, score):
                    self._let_go(trial)
                    break
                if trial.poll() is None and self.ledger.is_hopeless(trial.claim):
                    trial.kill()
                    self.running.remove(trial)
                    trial.close()
                    self.ledger.pruned(trial.claim)
                    if not self.options.keep_checkpoints:
                        drop_checkpoints(trial.recipe)
                    self.display.say(f"pruned {trial.claim.cell.name} at step {step}: {score:.4f} is below the median")
                    self._next_look = 0.0
                    break

    def _wind_down(self) -> bool:
        """Stop what runs; the second Ctrl-C does not wait for checkpoints."""
        for trial in self.running:
            if trial.signals < min(self.asked, 2):
                if trial.signals == 0:
                    self.display.say(f"stopping {trial.claim.cell.name} at its next step (Ctrl-C again: at once)")
                trial.stop()
        if self.running:
            return True
        done = sum(cell.state in FINAL for cell in self.ledger.look().values())
        raise RunInterruptedError(
            f"the sweep was stopped with {done} of {len(self.plan.cells)} trials finished; the same command goes on"
        )


def _progress(trial: TrialProcess) -> str:
    """Return what a run's log says last, in short."""
    try:
        with trial.run.log.open("rb") as file:
            file.seek(max(0, trial.run.log.stat().st_size - 2000))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return "starting"
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if "step" in found:
            loss = f", loss {found['loss']:.4f}" if isinstance(found.get("loss"), float) else ""
            return f"step {found['step']}{loss}"
    return "starting"


SWEEP_FILE = "sweep.json"


def run_sweep(
    plan: Plan, storage: str | None = None, options: Options | None = None, *, quiet: bool = False
) -> dict[str, CellState]:
    """Run what is left of a sweep, alone or together with others on the same storage.

    Args:
        plan: what to run.
        storage: URL of the storage; none is SQLite in the folder of the sweep.
        options: how to run it.
        quiet: print nothing.

    Returns:
        Where each cell stands at the end: done, pruned or failed.

    Raises:
        SweepError: the folder or the storage cannot be used.
        RunInterruptedError: on Ctrl-C or SIGTERM; the same command goes on.
    """
    options = options or Options()
    _make_folder(plan)
    ledger = Ledger(plan, storage or f"sqlite:///{plan.folder / 'sweep.db'}", prune=options.prune)
    write_plan(plan)
    with errors_of_storage(), SweepDisplay(sweep_console(quiet), options.workers) as display:
        if options.retry_failed:
            ledger.retry_failed()
        return Loop(plan, ledger, options, display).run()


def _make_folder(plan: Plan) -> None:
    if RunFolder(plan.folder).recipe.is_file():
        raise SweepError(f"{plan.folder} is the folder of a run, not of a sweep; choose another --name")
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"the folder of the sweep, {plan.folder}, cannot be made: {error.strerror}") from error


def write_plan(plan: Plan) -> None:
    """Write `sweep.json`: what the sweep is, for its report. Cells of an earlier command stay in it.

    Raises:
        SweepError: the folder cannot be written, or its `sweep.json` is broken.
    """
    file = plan.folder / SWEEP_FILE
    content: dict[str, Any] = {"name": plan.name, **plan.definition(), "cells": {}}
    try:
        if file.is_file():
            content["cells"] = json.loads(file.read_text(encoding="utf-8"))["cells"]
        content["cells"].update({cell.name: cell.to_dict() for cell in plan.cells})
        write_json(file, content)
    except (OSError, ValueError, KeyError) as error:
        raise SweepError(f"the folder of the sweep, {plan.folder}, cannot be used: {error}") from error


def failures(cells: dict[str, CellState]) -> dict[str, list[str]]:
    """Return the failed cells by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, cell in cells.items():
        if cell.state == "failed":
            by_reason.setdefault(cell.reason, []).append(name)
    return by_reason


def closing_lines(plan: Plan, cells: dict[str, CellState]) -> Sequence[str]:
    """Say at the end what came of the sweep, and what to do next."""
    lines = [summary_line(cells, None)]
    for reason, names in failures(cells).items():
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"failed: {listed}: {reason}")
    if failures(cells):
        lines.append("Run failed trials again with --retry-failed.")
    best = best_of(cells)
    if best and plan.sampler == "grid":
        lines.append(f"Next: tokmask report {plan.folder}")
    elif best:
        run = RunFolder(plan.folder / best[0])
        recipe = load_recipe(run.recipe).model_dump(mode="json") if run.recipe.is_file() else {}
        values = [f"{axis.key}={_value(recipe, axis.key)}" for axis in plan.axes]
        lines.append(f"Best: {run.root}: {' '.join(values)}. Compare it with p = 0 over seeds before you believe it.")
    return lines


def _value(recipe: dict[str, Any], key: str) -> Any:
    found: Any = recipe
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return shown(found)
