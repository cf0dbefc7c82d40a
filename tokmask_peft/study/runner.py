"""Run a sweep: its folder, the loop over its cells, and what came of it."""

import contextlib
import functools
import operator
import os
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.live import Live
from rich.text import Text

from tokmask_peft.artifacts import Result, RunFolder, is_run
from tokmask_peft.console import make_console, printable, stop_signals
from tokmask_peft.errors import RecipeError, RunError, RunInterruptedError, SweepError, boundary
from tokmask_peft.recipe.errors import shown
from tokmask_peft.recipe.loading import differences, load_recipe
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.study.ledger import FINAL, HEARTBEAT, CellState, Claim, Ledger
from tokmask_peft.study.plan import Plan
from tokmask_peft.study.report import TEMPLATES
from tokmask_peft.study.worker import Worker, train_cell

TEXTS: Any = TEMPLATES.get_template("progress.txt.j2").module


@dataclass(frozen=True, slots=True)
class Options:
    """How a sweep runs; only `prune` changes a result."""

    workers: int = 1  # runs at once in this process
    keep_checkpoints: bool = False  # of finished runs
    prune: bool = False  # stop a run whose validation macro-F1 is below the median of earlier ones at the same step
    retry_failed: bool = False
    train: Callable[[Recipe, bool], object] = train_cell  # is called in the process of a worker
    pause: float = 0.2  # seconds between two looks at the processes
    look: float = 2.0  # seconds between two looks at the storage while a worker is idle


def run_sweep(
    plan: Plan, storage: str | None = None, options: Options | None = None, *, quiet: bool = False
) -> dict[str, CellState]:
    """Run what is left of a sweep, alone or with other processes on the same storage; return each cell's final state.

    The storage is the URL of a database; without one it is a journal in the sweep's folder. SweepError if either cannot
    be used; RunInterruptedError on Ctrl-C or SIGTERM: the same command continues the sweep.
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
    scores, best = [(cell.score, name) for name, cell in cells.items() if cell.score is not None], ""
    if scores and plan.sampler != "grid":
        run = RunFolder(plan.folder / max(scores)[1])
        recipe = load_recipe(run.recipe).model_dump(mode="json")
        drawn = {axis.key: functools.reduce(operator.getitem, axis.key.split("."), recipe) for axis in plan.axes}
        best = f"{run.root}: {' '.join(f'{key}={shown(value)}' for key, value in drawn.items())}"
    return [*TEXTS.closing(cells, shlex.quote(str(plan.folder)), best).splitlines()]


def finished_result(recipe: Recipe) -> Result | None:
    """Return a run's result, none if unfinished; SweepError if the run is another recipe's, or its result damaged."""
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
    """Estimate the seconds for what is left, none if nothing is; `elapsed` are those of our runs under way."""
    states, known = [cell.state for cell in cells.values()], [cell.seconds for cell in cells.values() if cell.seconds]
    unfinished = sum(state not in FINAL for state in states)
    if not known or not unfinished:
        return None
    mean, at_once = statistics.fmean(known), min(max(workers, states.count("running")), unfinished)
    return max(0.0, (unfinished * mean - sum(min(seconds, mean) for seconds in elapsed)) / at_once)


class Loop:
    """One process's share of a sweep, whose ledger it shares with other processes."""

    def __init__(self, plan: Plan, ledger: Ledger, options: Options, *, quiet: bool = False) -> None:
        self.plan, self.ledger, self.options, self.console = plan, ledger, options, make_console(quiet)
        threads = max(1, (os.cpu_count() or 1) // options.workers)
        self.workers = [Worker(options.train, threads) for _ in range(options.workers)]
        self.running: dict[Worker, Claim] = {}
        self.cells: dict[str, CellState] = {}
        self._asked = 0  # how often to stop
        self._next_look = self._next_beat = 0.0

    def run(self) -> dict[str, CellState]:
        """Run cells until none is left, or until a signal asks to stop; return their states."""
        try:
            with stop_signals(self._ask):
                self._look()
                self._print(f"Sweep {self.plan.name}: {TEXTS.summary(self.cells)}")
                with Live(console=self.console, refresh_per_second=2, transient=True) as live:  # only in a terminal
                    while self.step():
                        live.update(self.screen())
                        time.sleep(self.options.pause)
        finally:
            for worker in self.workers:
                worker.end()
            with contextlib.suppress(Exception):  # what ended the loop may be a storage that fails
                for claim in self.running.values():
                    self.ledger.close(claim.trial_id, "interrupted")
        return self.cells

    def screen(self) -> Text:
        """Return what a terminal shows while the sweep runs."""
        return Text(printable(TEXTS.screen(self.cells, self._left(), self.running)))

    def step(self) -> bool:
        """Do what is due; return false at the end."""
        for worker in [worker for worker in self.running if worker.poll() is not None]:
            self._settle(worker, self.running.pop(worker))
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

    def _left(self) -> float | None:
        return remaining_seconds(self.cells, [worker.seconds for worker in self.running], self.options.workers)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False)

    def _ask(self, *_: Any) -> None:
        self._asked += 1

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

    def _settle(self, worker: Worker, claim: Claim) -> None:
        """Record the outcome of a run that has ended."""
        code, result = worker.poll() or 0, worker.run.result
        if code == 0 and result.is_file():
            self._finish(claim, Result.read(result), worker.seconds)
        elif self._asked and code:
            self.ledger.close(claim.trial_id, "interrupted")
        else:
            if result.is_file():  # the run failed after writing it, so it must not count
                result.replace(result.with_name("result.rejected.json"))
            self._fail(claim, worker.reason(code))

    def _finish(self, claim: Claim, result: Result, seconds: float | None) -> None:
        score, took = result.validation["f1_macro"], f" in {TEXTS.duration(seconds)}" if seconds else ""
        test = {key: result.test[key] for key in ("f1_macro", "f1_weighted")} if result.test else {}
        self._close(claim, "done", f"{took}: validation macro-F1 {score:.4f}", score, seconds=seconds, **test)

    def _fail(self, claim: Claim, reason: str) -> None:
        line = f": {reason} (log: {self.plan.folder / 'logs' / claim.cell.name}.log)"
        self._close(claim, "error", line, reason=reason[:1000])

    def _close(self, claim: Claim, outcome: str, line: str, *score: float, **details: Any) -> None:
        """Close the trial of a run that is over, and remove its checkpoints: several times the size of its adapter."""
        self.ledger.close(claim.trial_id, outcome, *score, **details)
        if outcome != "error" and not self.options.keep_checkpoints:
            shutil.rmtree(RunFolder(self.plan.folder / claim.cell.name).checkpoints, ignore_errors=True)
        self._look()
        if not self.console.is_terminal:
            line = f"{line}. {TEXTS.summary(self.cells, self._left())}"
        self._print(f"{'failed' if outcome == 'error' else outcome} {claim.cell.name}{line}")

    def _report(self, worker: Worker, evaluations: Iterable[tuple[int, float] | None]) -> None:
        """Report evaluations, or none as a sign of life; end a run that is pruned or that another worker has."""
        claim = self.running[worker]
        for evaluation in evaluations:
            if not self.ledger.beat(claim, evaluation):
                worker.end()
                del self.running[worker]
                self._print(f"{claim.cell.name} was taken over by another worker; stopped here")
                return
            if evaluation and worker.poll() is None and self.ledger.is_hopeless(claim):
                worker.end()
                del self.running[worker]
                self._close(claim, "pruned", f" at step {evaluation[0]}: {evaluation[1]:.4f} is below the median")
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
        problem = f"the sweep was stopped with {done} of {len(self.cells)} runs finished"
        raise RunInterruptedError(f"{problem}; repeat the command to continue it")
