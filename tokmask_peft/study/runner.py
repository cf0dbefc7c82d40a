"""Run a sweep: its folder, the loop over its cells, what it prints, and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.live import Live
from rich.text import Text

from tokmask_peft.artifacts import Result, RunFolder
from tokmask_peft.console import make_console
from tokmask_peft.errors import RecipeError, RunInterruptedError, SweepError
from tokmask_peft.recipe.errors import shown
from tokmask_peft.recipe.loading import differences, load_recipe
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.study.ledger import FINAL, HEARTBEAT, CellState, Claim, Ledger
from tokmask_peft.study.plan import Plan
from tokmask_peft.study.worker import COMMAND, Worker


def finished_result(recipe: Recipe) -> Result | None:
    """Return the result of a run if it is finished, none if it is not.

    Raises:
        SweepError: the folder holds the run of another recipe, or a result that cannot be read.
    """
    run = RunFolder(recipe.run_dir)
    if not run.finished():
        return None
    if run.recipe.is_file() and (changed := differences(load_recipe(run.recipe), recipe)):
        raise SweepError(
            f"{run.root} holds a run of another recipe: {'; '.join(changed)}", code="other-run", differences=changed
        )
    try:
        return Result.from_dict(json.loads(run.result.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise SweepError(
            f"{run.result} cannot be read ({error}); remove it to continue the run", code="broken-result"
        ) from error


def remaining_seconds(cells: Mapping[str, CellState], elapsed: Sequence[float], workers: int) -> float | None:
    """Estimate how long the rest takes: the mean time of a finished run, over all that run at once.

    `elapsed` holds the seconds so far of each run of this process, which runs `workers` at once.
    """
    states, known = [cell.state for cell in cells.values()], [cell.seconds for cell in cells.values() if cell.seconds]
    unfinished = sum(state not in FINAL for state in states)
    if not known:
        return None
    mean = sum(known) / len(known)
    at_once = min(max(workers, states.count("running")), max(unfinished, 1))
    return max(0.0, (unfinished * mean - sum(min(seconds, mean) for seconds in elapsed)) / at_once)


def duration(seconds: float) -> str:
    """Write seconds as people do: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def best_of(cells: Mapping[str, CellState]) -> tuple[float, str] | None:
    """Return the highest validation macro-F1 and its cell."""
    return max(((cell.score, name) for name, cell in cells.items() if cell.score is not None), default=None)


def summary_line(cells: Mapping[str, CellState], left: float | None = None) -> str:
    """Summarise the state of a sweep in a line; `left` is the estimated rest in seconds."""
    states = [cell.state for cell in cells.values()]
    line = f"{states.count('done')}/{len(states)} done, {states.count('running')} running"
    line += "".join(f", {states.count(state)} {state}" for state in ("failed", "pruned") if state in states)
    if best := best_of(cells):
        line += f"; best {best[1]} (validation macro-F1 {best[0]:.4f})"
    if left is not None and any(state not in FINAL for state in states):
        line += f"; about {duration(left)} left"
    return line


@dataclass(frozen=True, slots=True)
class Options:
    """How a sweep runs; only `prune`, which stops runs early, changes a result.

    Attributes:
        workers: runs at once in this process.
        keep_checkpoints: keep those of finished runs.
        prune: stop a run whose validation macro-F1 is below the median of earlier ones at the same step.
        retry_failed: run failed cells again.
        command: starts a process that trains cells.
        pause: seconds between two looks at the processes.
        look: seconds between two looks at the storage while a worker is idle.
    """

    workers: int = 1
    keep_checkpoints: bool = False
    prune: bool = False
    retry_failed: bool = False
    command: tuple[str, ...] = COMMAND
    pause: float = 0.2
    look: float = 2.0


class Loop:
    """One process's share of a sweep, whose ledger it shares with other processes."""

    def __init__(self, plan: Plan, ledger: Ledger, options: Options, *, quiet: bool = False) -> None:
        self.plan, self.ledger, self.options, self.console = plan, ledger, options, make_console(quiet)
        threads = max(1, (os.cpu_count() or 1) // options.workers)
        self.workers = [Worker(options.command, threads) for _ in range(options.workers)]
        self.running: dict[Worker, Claim] = {}
        self.cells: dict[str, CellState] = {}
        self._asked = 0  # how often to stop
        self._next_look = self._next_beat = 0.0

    def run(self) -> dict[str, CellState]:
        """Run cells until none is left; return their states.

        Raises:
            RunInterruptedError: a signal asked it to stop.
        """
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        live = Live(console=self.console, refresh_per_second=2, transient=True)
        try:
            self._look()
            self._print(f"Sweep {self.plan.name}: {summary_line(self.cells)}")
            with live if self.console.is_terminal and not self.console.quiet else contextlib.nullcontext():
                while self._step():
                    live.update(self.lines())
                    time.sleep(self.options.pause)
        finally:
            for worker in self.workers:
                worker.end()
            with contextlib.suppress(Exception):  # what ended the loop may be a storage that fails
                for claim in self.running.values():
                    self.ledger.close(claim.trial_id, "interrupted")
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.cells

    def lines(self) -> Text:
        """Return what a terminal shows: the summary, a line per running cell, and the failures."""
        lines = [self._summary()]
        lines += [f"{c.cell.name}  {w.progress()}  {duration(w.seconds)}" for w, c in self.running.items()]
        elsewhere = sum(cell.state == "running" for cell in self.cells.values()) - len(self.running)
        lines += [f"{elsewhere} more in other processes"] if elsewhere > 0 else []
        failed = {name: cell.reason for name, cell in self.cells.items() if cell.state == "failed"}
        return Text("\n".join([*lines, *(f"failed: {name}: {reason[:100]}" for name, reason in failed.items())]))

    def _summary(self) -> str:
        elapsed = [worker.seconds for worker in self.running]
        return summary_line(self.cells, remaining_seconds(self.cells, elapsed, self.options.workers))

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False)

    def _ask(self, *_: Any) -> None:
        self._asked += 1

    def _step(self) -> bool:
        """Do what is due; return false at the end."""
        for worker in [worker for worker in self.running if worker.poll() is not None]:
            self._settle(worker)
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + HEARTBEAT
            for worker, claim in list(self.running.items()):
                if not self.ledger.beat(claim):
                    self._let_go(worker)
        if self._asked:
            return self._wind_down()
        if self.options.prune:
            for worker in list(self.running):
                self._prune(worker)
        idle = next((worker for worker in self.workers if worker not in self.running), None)
        if time.monotonic() >= self._next_look:
            self._look()
        waits = any(cell.state == "waiting" for cell in self.cells.values())
        if idle and waits and (taken := self.ledger.claim()):
            self._start(idle, taken)
            self._look()
        return bool(self.running) or any(cell.state not in FINAL for cell in self.cells.values())

    def _look(self) -> None:
        self.cells = self.ledger.look()
        self._next_look = time.monotonic() + self.options.look * (1 if len(self.running) < self.options.workers else 5)

    def _start(self, worker: Worker, claim: Claim) -> None:
        try:
            recipe = self.plan.recipe_of(claim.cell, claim.drawn)
            result = finished_result(recipe)
        except (RecipeError, SweepError) as error:
            self._fail(claim, str(error))
            return
        if result is not None:  # its worker was killed after the run's last line, or another sweep's state was lost
            self._finish(claim, recipe, result, None)
            return
        worker.begin(recipe)
        self.running[worker] = claim
        if not self.console.is_terminal:
            self._print(f"started {claim.cell.name}" + "".join(f"  {drawn}" for drawn in claim.drawn))

    def _settle(self, worker: Worker) -> None:
        """Record the outcome of a run that has ended."""
        claim, code, result = self.running.pop(worker), worker.poll() or 0, worker.run.result
        if code == 0 and result.is_file():
            found = Result.from_dict(json.loads(result.read_text(encoding="utf-8")))
            self._finish(claim, worker.recipe, found, worker.seconds)
        elif self._asked and worker.interrupted(code):
            self.ledger.close(claim.trial_id, "interrupted")
        else:
            if result.is_file():  # the run failed after writing it, so it must not count
                result.replace(result.with_name("result.rejected.json"))
            self._fail(claim, worker.reason(code))

    def _finish(self, claim: Claim, recipe: Recipe, result: Result, seconds: float | None) -> None:
        score = result.validation["f1_macro"]
        test = {key: result.test[key] for key in ("f1_macro", "f1_weighted")} if result.test else {}
        self.ledger.close(claim.trial_id, "done", score, seconds=seconds, **test)
        self._drop_checkpoints(recipe)
        self._look()
        took = f" in {duration(seconds)}" if seconds else ""
        rest = "" if self.console.is_terminal else f". {self._summary()}"
        self._print(f"done {claim.cell.name}{took}: validation macro-F1 {score:.4f}{rest}")

    def _drop_checkpoints(self, recipe: Recipe) -> None:
        """Remove the checkpoints of a run that is over: they are several times the size of its adapter."""
        if not self.options.keep_checkpoints:
            shutil.rmtree(RunFolder(recipe.run_dir).checkpoints, ignore_errors=True)

    def _fail(self, claim: Claim, reason: str) -> None:
        self.ledger.close(claim.trial_id, "error", reason=reason[:1000])
        self._print(f"failed {claim.cell.name}: {reason} (log: {self.plan.folder / 'logs' / claim.cell.name}.log)")
        self._look()

    def _let_go(self, worker: Worker) -> None:
        worker.end()
        self._print(f"{self.running.pop(worker).cell.name} was taken over by another worker; stopped here")

    def _prune(self, worker: Worker) -> None:
        claim = self.running[worker]
        for step, score in worker.new_evaluations():
            if not self.ledger.report(claim, step, score):
                self._let_go(worker)
                return
            if worker.poll() is None and self.ledger.is_hopeless(claim):
                worker.end()
                self.ledger.close(self.running.pop(worker).trial_id, "pruned")
                self._drop_checkpoints(worker.recipe)
                self._look()
                self._print(f"pruned {claim.cell.name} at step {step}: {score:.4f} is below the median")
                return

    def _wind_down(self) -> bool:
        """Stop what runs; the second Ctrl-C does not wait for checkpoints."""
        for worker, claim in self.running.items():
            if worker.signals == 0:
                self._print(f"stopping {claim.cell.name} at its next step (Ctrl-C again: at once)")
            if worker.signals < min(self._asked, 2):
                worker.stop()
        if self.running:
            return True
        done = sum(cell.state in FINAL for cell in self.ledger.look().values())
        raise RunInterruptedError(
            f"the sweep was stopped with {done} of {len(self.cells)} runs finished; repeat the command to continue it"
        )


def run_sweep(
    plan: Plan, storage: str | None = None, options: Options | None = None, *, quiet: bool = False
) -> dict[str, CellState]:
    """Run what is left of a sweep, alone or together with other processes on the same storage.

    Args:
        plan: what to run.
        storage: URL of a database; none is a journal in the folder of the sweep.
        options: how to run it.
        quiet: print nothing.

    Returns:
        The final state of each cell.

    Raises:
        SweepError: the folder or the storage cannot be used.
        RunInterruptedError: on Ctrl-C or SIGTERM; the same command continues the sweep.
    """
    options = options or Options()
    if RunFolder(plan.folder).recipe.is_file():
        raise SweepError(
            f"{plan.folder} is the folder of a run, not of a sweep; choose another --name", code="is-a-run"
        )
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(
            f"the folder of the sweep, {plan.folder}, cannot be made: {error.strerror}", code="no-folder"
        ) from error
    old = plan.folder / "sweep.db"  # before version 0.2 a sweep kept its state in SQLite
    ledger = Ledger(
        plan, storage or (f"sqlite:///{old}" if old.is_file() else plan.folder / "sweep.journal"), prune=options.prune
    )
    plan.write()
    if options.retry_failed:
        ledger.retry_failed()
    return Loop(plan, ledger, options, quiet=quiet).run()


def closing_lines(plan: Plan, cells: Mapping[str, CellState]) -> list[str]:
    """Return the lines that end a sweep: what came of it, failures by reason, and what to do next."""
    lines = [summary_line(cells)]
    reasons: dict[str, list[str]] = {}
    for name, cell in cells.items():
        if cell.state == "failed":
            reasons.setdefault(cell.reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"failed: {', '.join(names[:3])}{more}: {reason}")
    if reasons:
        lines.append("Run the failed cells again with --retry-failed.")
    best = best_of(cells)
    if best and plan.sampler == "grid":
        lines.append(f"Next: tokmask report {plan.folder}")
    elif best:
        run = RunFolder(plan.folder / best[1])
        recipe: Any = load_recipe(run.recipe).model_dump(mode="json")
        values = []
        for axis in plan.axes:
            section, _, key = axis.key.rpartition(".")
            values.append(f"{axis.key}={shown((recipe[section] if section else recipe)[key])}")
        lines.append(f"Best: {run.root}: {' '.join(values)}. Compare it with p = 0 over seeds before you rely on it.")
    return lines
