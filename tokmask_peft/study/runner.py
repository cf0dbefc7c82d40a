"""Run a sweep: its folder, the loop over its cells, what it prints, and what came of it."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.live import Live
from rich.text import Text

from tokmask_peft.artifacts import Result, RunFolder, is_run
from tokmask_peft.console import make_console, stop_signals
from tokmask_peft.errors import RecipeError, RunError, RunInterruptedError, SweepError, boundary
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
        problem = f"{run.root} holds a run of another recipe: {'; '.join(changed)}"
        raise SweepError(problem, code="other-run", differences=changed)
    try:
        return Result.read(run.result)
    except RunError as error:
        raise SweepError(f"{error}; remove it to continue the run", code="broken-result") from error


def remaining_seconds(cells: Mapping[str, CellState], elapsed: Sequence[float], workers: int) -> float | None:
    """Estimate how long the rest takes: the mean time of a finished run, over all that run at once.

    `elapsed` holds the seconds so far of each run of this process, which runs `workers` at once.
    """
    known = [cell.seconds for cell in cells.values() if cell.seconds]
    if not known:
        return None
    states, mean = [cell.state for cell in cells.values()], statistics.fmean(known)
    unfinished = sum(state not in FINAL for state in states)
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
    """How a sweep runs; only `prune` changes a result."""

    workers: int = 1  # runs at once in this process
    keep_checkpoints: bool = False  # of finished runs
    prune: bool = False  # stop a run whose validation macro-F1 is below the median of earlier ones at the same step
    retry_failed: bool = False
    command: tuple[str, ...] = COMMAND  # starts a process that trains cells
    pause: float = 0.2  # seconds between two looks at the processes
    look: float = 2.0  # seconds between two looks at the storage while a worker is idle


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
        try:
            with stop_signals(self._ask):
                self._look()
                self._print(f"Sweep {self.plan.name}: {summary_line(self.cells)}")
                with Live(console=self.console, refresh_per_second=2, transient=True) as live:  # only in a terminal
                    while self._step():
                        live.update(self.lines())
                        time.sleep(self.options.pause)
        finally:
            for worker in self.workers:
                worker.end()
            with contextlib.suppress(Exception):  # what ended the loop may be a storage that fails
                for claim in self.running.values():
                    self.ledger.close(claim.trial_id, "interrupted")
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
        sign = [None] if time.monotonic() >= self._next_beat else []
        self._next_beat = time.monotonic() + HEARTBEAT if sign else self._next_beat
        for worker in list(self.running):
            self._report(worker, [*sign, *(worker.new_evaluations() if self.options.prune and not self._asked else [])])
        if self._asked:
            return self._wind_down()
        if time.monotonic() >= self._next_look:
            self._look()
        idle = next((worker for worker in self.workers if worker not in self.running), None)
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
            return self._fail(claim, str(error))
        if result is not None:  # its worker was killed after the run's last line, or another sweep's state was lost
            return self._finish(claim, result, None)
        worker.begin(recipe)
        self.running[worker] = claim
        if not self.console.is_terminal:
            self._print("  ".join((f"started {claim.cell.name}", *claim.drawn)))
        return None

    def _settle(self, worker: Worker) -> None:
        """Record the outcome of a run that has ended."""
        claim, code, result = self.running.pop(worker), worker.poll() or 0, worker.run.result
        if code == 0 and result.is_file():
            self._finish(claim, Result.read(result), worker.seconds)
        elif self._asked and worker.interrupted(code):
            self.ledger.close(claim.trial_id, "interrupted")
        else:
            if result.is_file():  # the run failed after writing it, so it must not count
                result.replace(result.with_name("result.rejected.json"))
            self._fail(claim, worker.reason(code))

    def _close(self, claim: Claim, outcome: Literal["done", "pruned", "error"], *score: float, **details: Any) -> None:
        """Close the trial of a run that is over, and remove its checkpoints: several times the size of its adapter."""
        self.ledger.close(claim.trial_id, outcome, *score, **details)
        if outcome != "error" and not self.options.keep_checkpoints:
            shutil.rmtree(RunFolder(self.plan.folder / claim.cell.name).checkpoints, ignore_errors=True)
        self._look()

    def _finish(self, claim: Claim, result: Result, seconds: float | None) -> None:
        score = result.validation["f1_macro"]
        test = {key: result.test[key] for key in ("f1_macro", "f1_weighted")} if result.test else {}
        self._close(claim, "done", score, seconds=seconds, **test)
        took = f" in {duration(seconds)}" if seconds else ""
        rest = "" if self.console.is_terminal else f". {self._summary()}"
        self._print(f"done {claim.cell.name}{took}: validation macro-F1 {score:.4f}{rest}")

    def _fail(self, claim: Claim, reason: str) -> None:
        self._close(claim, "error", reason=reason[:1000])
        self._print(f"failed {claim.cell.name}: {reason} (log: {self.plan.folder / 'logs' / claim.cell.name}.log)")

    def _report(self, worker: Worker, evaluations: Iterable[tuple[int, float] | None]) -> None:
        """Report evaluations, or none as a sign of life; end a run that is pruned or that another worker has."""
        claim = self.running[worker]
        for evaluation in evaluations:
            is_mine = self.ledger.beat(claim, evaluation)
            if is_mine and (evaluation is None or worker.poll() is not None or not self.ledger.is_hopeless(claim)):
                continue
            worker.end()
            del self.running[worker]
            if evaluation is None or not is_mine:
                return self._print(f"{claim.cell.name} was taken over by another worker; stopped here")
            self._close(claim, "pruned")
            step, score = evaluation
            return self._print(f"pruned {claim.cell.name} at step {step}: {score:.4f} is below the median")
        return None

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
        problem = f"the sweep was stopped with {done} of {len(self.cells)} runs finished"
        raise RunInterruptedError(f"{problem}; repeat the command to continue it")


def run_sweep(
    plan: Plan, storage: str | None = None, options: Options | None = None, *, quiet: bool = False
) -> dict[str, CellState]:
    """Run what is left of a sweep, alone or with other processes on the same storage; return each cell's final state.

    The storage is the URL of a database; without one it is a journal in the folder of the sweep.

    Raises:
        SweepError: the folder or the storage cannot be used.
        RunInterruptedError: on Ctrl-C or SIGTERM; the same command continues the sweep.
    """
    options = options or Options()
    if is_run(plan.folder):
        problem = f"{plan.folder} is the folder of a run, not of a sweep; choose another --name"
        raise SweepError(problem, code="is-a-run")
    with boundary(f"making the folder of the sweep, {plan.folder},", SweepError, "no-folder"):
        plan.folder.mkdir(parents=True, exist_ok=True)
    old = plan.folder / "sweep.db"  # before version 0.2 a sweep kept its state in SQLite
    place = storage or (f"sqlite:///{old}" if old.is_file() else plan.folder / "sweep.journal")
    ledger = Ledger(plan, place, prune=options.prune, retry_failed=options.retry_failed)
    plan.write()
    return Loop(plan, ledger, options, quiet=quiet).run()


def closing_lines(plan: Plan, cells: Mapping[str, CellState]) -> list[str]:
    """Return the lines that end a sweep: what came of it, failures by reason, and what to do next."""
    lines = [summary_line(cells)]
    failed = [(cell.reason, name) for name, cell in cells.items() if cell.state == "failed"]
    for reason in dict.fromkeys(reason for reason, _ in failed):
        names = [name for other, name in failed if other == reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"failed: {', '.join(names[:3])}{more}: {reason}")
    lines += ["Run the failed cells again with --retry-failed."] if failed else []
    best = best_of(cells)
    if best and plan.sampler == "grid":
        lines.append(f"Next: tokmask report {plan.folder}")
    elif best:
        run = RunFolder(plan.folder / best[1])
        recipe = load_recipe(run.recipe).model_dump(mode="json")
        values = {axis.key: functools.reduce(operator.getitem, axis.key.split("."), recipe) for axis in plan.axes}
        drawn = " ".join(f"{key}={shown(value)}" for key, value in values.items())
        lines.append(f"Best: {run.root}: {drawn}. Compare it with p = 0 over seeds before you rely on it.")
    return lines
