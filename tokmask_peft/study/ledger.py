"""Who runs which cell: the cells of a sweep as Optuna trials that many processes share.

A process takes a cell by adding a running trial for it. Trials are numbered as they were committed, so whoever adds one
sees all earlier ones: the first of a cell keeps it, and the others close themselves. No lock or queue is needed.
"""

import contextlib
import functools
import itertools
import logging
import os
import random
import socket
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from tokmask_peft.errors import ExtraError, SweepError, first_line
from tokmask_peft.recipe.loading import flat
from tokmask_peft.study.plan import Cell, Plan

try:
    import optuna
    import sqlalchemy.exc
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    from optuna.trial import TrialState
except ImportError as error:
    raise ExtraError(f"a sweep needs {error.name}: pip install 'tokmask-peft[sweep]'", extra="sweep") from error

HEARTBEAT = 15  # seconds between signs of life of a running trial
GRACE = 120  # seconds without one after which another machine takes the trial over
FINAL = ("done", "pruned", "failed")  # states in which nothing is left to do


def open_storage(place: str | Path) -> Any:
    """Open a storage of Optuna: a database by its URL, or a journal in a file, which machines may share, too."""
    for name in ("optuna", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    if isinstance(place, Path):
        with errors_of_storage():
            return optuna.storages.JournalStorage(JournalFileBackend(str(place), JournalFileOpenLock(str(place))))
    settings = {"connect_args": {"timeout": 60}} if place.startswith("sqlite") else {"pool_pre_ping": True}
    attempts = 5  # another process may be making the tables
    while True:
        try:
            return optuna.storages.RDBStorage(place, engine_kwargs=settings)
        except (ImportError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
            attempts -= 1
            if attempts == 0 or isinstance(error, ImportError | sqlalchemy.exc.ArgumentError):
                reason = first_line(getattr(error, "orig", None) or error)
                remedy = "the URL of a database, as postgresql://USER@HOST/DATABASE, and its driver to be installed"
                message = f"--storage {place} cannot be opened: {reason}; expected {remedy}"
                raise SweepError(message, code="bad-storage", storage=place) from error
            time.sleep(random.uniform(0.05, 0.3))  # noqa: S311


@contextlib.contextmanager
def errors_of_storage() -> Iterator[None]:
    """Turn a failure of the storage into a SweepError."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ValueError, OSError) as error:
        reason = first_line(error.__cause__ or error)
        remedy = "repeat the command to continue. If the file sweep.journal is damaged, remove it first"
        message = f"the storage of the sweep failed ({reason}); finished runs are not lost: {remedy}"
        raise SweepError(message, code="storage-failed") from error


@functools.cache
def identity() -> dict[str, Any]:
    """Return what distinguishes this process from all others: machine, boot, container, process id, start time."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # only Linux has these; elsewhere the start time tells reboots apart
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return {"host": "|".join(parts), "pid": os.getpid(), "started": psutil.Process().create_time()}


@dataclass(frozen=True, slots=True)
class CellState:
    """The state of a cell; of a finished run its validation macro-F1 and seconds, of a failed one the reason."""

    state: Literal["waiting", "running", "done", "pruned", "failed"]
    score: float | None = None
    seconds: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """A cell that this process has taken, its trial in the storage, and the overrides that a sampler drew."""

    cell: Cell
    trial_id: int
    drawn: tuple[str, ...] = ()


class Ledger:
    """The state of a sweep in its storage, as `open_storage` takes it, where it is made if it is new.

    `prune` stops trials below the median of earlier ones at the same step; `retry_failed` lets this process run the
    cells again that have failed until now. SweepError if the storage fails, or holds another sweep of that name.
    """

    @errors_of_storage()
    def __init__(self, plan: Plan, place: str | Path, *, prune: bool = False, retry_failed: bool = False) -> None:
        self.plan, self.storage = plan, open_storage(place)
        samplers = {"tpe": optuna.samplers.TPESampler(constant_liar=True)}
        self._study = optuna.create_study(
            storage=self.storage,
            study_name=plan.name,
            direction="maximize",
            load_if_exists=True,
            sampler=samplers.get(plan.sampler, optuna.samplers.RandomSampler()),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1) if prune else None,
        )
        self.study_id = self.storage.get_study_id_from_name(plan.name)
        if "definition" not in self._study.user_attrs:
            self._study.set_user_attr("definition", plan.definition())
        before, now = flat(self._study.user_attrs["definition"]), flat(plan.definition())
        if changed := [
            f"{key.removeprefix('recipe.')}: {before.get(key)} before, {now.get(key)} now"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]:
            problem = f"the sweep {plan.name} was started with another recipe; continuing would mix two sweeps"
            message = f"{problem}. Differences: {'; '.join(changed)}. Choose another --name."
            raise SweepError(message, code="other-sweep", differences=changed)
        known = itertools.chain(*self._trials().values()) if retry_failed else ()
        self._retried = {trial.number for trial in known}  # if they failed, that does not count
        self._beats: dict[int, tuple[Any, float]] = {}

    @errors_of_storage()
    def look(self) -> dict[str, CellState]:
        """Give up trials whose worker is gone, and return the state of each cell of the plan."""
        by_cell = self._trials()
        if lost := [trial for trial in itertools.chain(*by_cell.values()) if self._is_lost(trial)]:
            for trial in lost:
                self.close(trial._trial_id, "lost")
            by_cell = self._trials()
        return {cell.name: self._state_of(by_cell[cell.name]) for cell in self.plan.cells}

    @errors_of_storage()
    def claim(self) -> Claim | None:
        """Take the first cell of the plan that waits, in the state that `look` leaves; none if none waits."""
        states = self.look()
        for cell in (cell for cell in self.plan.cells if states[cell.name].state == "waiting"):
            drawn = next((trial.params for trial in self._trials()[cell.name][::-1] if trial.params), None)
            trial = optuna.trial.create_trial(
                state=TrialState.RUNNING,
                user_attrs={"cell": cell.name, "seed": cell.seed, "worker": identity(), "beat": time.time()},
                system_attrs={"fixed_params": drawn} if drawn else {},  # it continues from its checkpoints
            )
            trial_id = self.storage.create_new_trial(self.study_id, template_trial=trial)
            number = self.storage.get_trial(trial_id).number
            earlier = [other for other in self._trials()[cell.name] if other.number < number]
            if self._state_of(earlier).state != "waiting":
                self.close(trial_id, "duplicate")
                continue
            if self.plan.sampler == "grid":
                return Claim(cell, trial_id)
            self._study.get_trials(deepcopy=False)  # Optuna's cache does not know a trial before it has read it
            trial = optuna.trial.Trial(self._study, trial_id)
            return Claim(cell, trial_id, tuple(f"{axis.key}={axis.suggest(trial)}" for axis in self.plan.axes))
        return None

    @errors_of_storage()
    def beat(self, claim: Claim, evaluation: tuple[int, float] | None = None) -> bool:
        """Give a sign of life, with the score at a step if there is one; return false if another worker has the cell.

        Optuna's own heartbeats exist only for databases and compare clocks. A value that changes works on every
        storage: whoever sees it unchanged for `GRACE` seconds of its own clock gives the trial up.
        """
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(claim.trial_id, "beat", time.time())
            if evaluation is not None:
                self.storage.set_trial_intermediate_value(claim.trial_id, *evaluation)
            return True
        return False

    @errors_of_storage()
    def is_hopeless(self, claim: Claim) -> bool:
        """Return whether the trial is below the median of earlier ones at the same step."""
        return bool(self._study.pruner.prune(self._study, self.storage.get_trial(claim.trial_id)))

    @errors_of_storage()
    def close(self, trial_id: int, outcome: str, score: float | None = None, **details: Any) -> None:
        """Record how a trial ended, with its validation macro-F1; what another process has closed stays as it is.

        A cell that ended in an `error` (give its `reason`) is not run again unless asked for; `interrupted` and `lost`
        ones are continued by whoever comes next. Other outcomes are `done`, `pruned` and `duplicate`.
        """
        state = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(outcome, TrialState.FAIL)
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial_id, "outcome", {"kind": outcome, **details})
            self.storage.set_trial_state_values(trial_id, state, None if score is None else [score])

    def _trials(self) -> defaultdict[str, list[Any]]:
        """Return the trials of each cell, the oldest first."""
        by_cell: defaultdict[str, list[Any]] = defaultdict(list)
        for trial in sorted(self.storage.get_all_trials(self.study_id, deepcopy=False), key=lambda one: one.number):
            by_cell[trial.user_attrs.get("cell", "")].append(trial)
        return by_cell

    def _is_lost(self, trial: Any) -> bool:
        """Return whether the trial's worker has died on this machine, or shows no sign of life on another."""
        who, beat, now = trial.user_attrs.get("worker"), trial.user_attrs.get("beat"), time.monotonic()
        if trial.state != TrialState.RUNNING or who == identity():
            return False
        if who and who["host"] == identity()["host"]:
            try:
                process = psutil.Process(who["pid"])
                if abs(process.create_time() - who["started"]) > 1.0 or process.status() == psutil.STATUS_ZOMBIE:
                    return True
            except psutil.NoSuchProcess:
                return True
            except psutil.Error:  # it lives, but this user may not look at it
                pass
        seen = self._beats.get(trial.number)
        if seen is None or seen[0] != beat:
            seen = self._beats[trial.number] = (beat, now)
        return now - seen[1] > GRACE

    def _state_of(self, trials: Sequence[Any]) -> CellState:
        by_state = {trial.state: trial for trial in trials}
        if done := by_state.get(TrialState.COMPLETE):
            return CellState("done", done.value, done.user_attrs.get("outcome", {}).get("seconds"))
        if TrialState.PRUNED in by_state or TrialState.RUNNING in by_state:
            return CellState("pruned" if TrialState.PRUNED in by_state else "running")
        outcomes = (trial.user_attrs.get("outcome", {}) for trial in trials[::-1] if trial.number not in self._retried)
        reason = next((outcome["reason"] for outcome in outcomes if outcome.get("kind") == "error"), None)
        return CellState("waiting") if reason is None else CellState("failed", reason=reason)
