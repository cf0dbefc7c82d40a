"""The loop of a sweep: claim cells, give each a process, and leave the storage so that anyone can go on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from tokmask_peft.errors import RecipeError, RunInterruptedError, SweepError
from tokmask_peft.study import process as processes
from tokmask_peft.study.ledger import FINAL, CellState, Claim, Ledger
from tokmask_peft.study.live import SweepDisplay, duration, remaining_seconds, summary_line
from tokmask_peft.study.plan import Plan
from tokmask_peft.study.process import TRIAL, TrialProcess
from tokmask_peft.study.storage import HEARTBEAT


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
            result = processes.finished_result(recipe)
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
        result = processes.finished_result(trial.recipe, check=False) if code == 0 else None
        if result is not None:
            self._finish(trial.claim, trial.recipe, result, trial.seconds)
        elif self.asked and processes.interrupted(code, trial):
            self.ledger.give_back(trial.claim)
        else:
            processes.reject_result(trial.recipe)
            reason = trial.reason(code) if code else "the process ended without a result"
            self._fail(trial.claim, reason)

    def _finish(self, claim: Claim, recipe: Any, result: dict[str, Any], seconds: float | None) -> None:
        test = result.get("test") or {}
        details = {"seconds": seconds, **{key: test[key] for key in ("f1_macro", "f1_weighted") if key in test}}
        self.ledger.done(claim, result["validation"]["f1_macro"], details)
        if not self.options.keep_checkpoints:
            processes.drop_checkpoints(recipe)
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
                        processes.drop_checkpoints(trial.recipe)
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
