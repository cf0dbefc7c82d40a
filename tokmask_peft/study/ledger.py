"""Who runs which cell: Optuna's trials as a queue that many processes share.

A cell is enqueued at least once and run exactly once. Enqueuing needs no lock: whoever finds a cell without a trial
adds one, and of two trials of one cell the later gives way when it is claimed. Optuna numbers trials in the order in
which they were committed, so whoever claims one sees all earlier ones. The claim itself is Optuna's step from WAITING
to RUNNING, which only one process can make.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from tokmask_peft.errors import SweepError, first_line
from tokmask_peft.study.plan import Cell, Plan

HEARTBEAT = 15
"""Seconds between signs of life of a running trial."""
GRACE = 120
"""Seconds without one, after which another machine takes the trial over."""
_ATTEMPTS = 20
_PATIENCE = 60.0  # seconds that SQLite waits for another process's transaction


def open_storage(url: str) -> Any:
    """Open the storage, making its tables if there are none.

    Raises:
        SweepError: Optuna is not installed, or the storage cannot be opened.
    """
    try:
        import optuna
        import sqlalchemy.exc
    except ImportError as error:
        raise SweepError(
            f"a sweep needs Optuna ({error.name} is missing): pip install 'tokmask-peft[sweep]'"
        ) from error
    logging.getLogger("optuna").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    sqlite = url.startswith("sqlite")
    settings: dict[str, Any] = {"connect_args": {"timeout": _PATIENCE}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(_ATTEMPTS):
        try:
            storage = optuna.storages.RDBStorage(
                url, engine_kwargs=settings, heartbeat_interval=HEARTBEAT, grace_period=GRACE
            )
        except ImportError as error:
            raise SweepError(f"--storage needs a database driver that is not installed: {error.__cause__}") from error
        except sqlalchemy.exc.ArgumentError as error:
            raise SweepError(
                "--storage is not a database URL; expected, for example, postgresql://USER@HOST/DATABASE or "
                "sqlite:///FILE"
            ) from error
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
            # another process that starts at the same moment may be making the tables
            if attempt == _ATTEMPTS - 1 or not _may_pass(error):
                reason = first_line(getattr(error, "orig", None) or error)
                raise SweepError(f"--storage cannot be opened: {reason}") from error
            time.sleep(random.uniform(0.05, 0.3))  # noqa: S311 (no secret)
            continue
        if sqlite:
            _lock_whole_transactions(storage.engine)
        return storage
    raise AssertionError("unreachable")


@contextlib.contextmanager
def errors_of_storage() -> Iterator[None]:
    """Turn a storage that fails in the middle of a sweep into an error of ours."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise SweepError(
            f"the storage of the sweep failed ({first_line(error.__cause__ or error)}); "
            "nothing is lost: the same command goes on"
        ) from error


def _may_pass(error: Exception) -> bool:
    text = f"{error} {error.__cause__}".lower()
    return any(word in text for word in ("exist", "unique", "duplicate", "locked", "no such table"))


def _lock_whole_transactions(engine: Any) -> None:
    """Take SQLite's write lock when a transaction begins, not when it first writes.

    Optuna reads a trial's state and then sets it, with SELECT … FOR UPDATE in between. SQLite has no such clause: two
    processes can both read WAITING and both go on to run the trial. (SQLAlchemy's documentation on pysqlite and
    serializable isolation gives this remedy. Can go when Optuna locks on SQLite.)
    """
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def lock(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before know nothing of it


@functools.cache
def identity() -> dict[str, Any]:
    """Return what tells this process from every other: machine, boot and container, process id and its start."""
    return {"host": _host(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _host() -> str:
    """Name the machine, its boot, and the container: process ids of another one mean nothing here."""
    parts = [socket.gethostname()]
    boot, container = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    with contextlib.suppress(OSError):  # no Linux: processes of an earlier boot are told apart by their start
        parts += [boot.read_text(encoding="ascii").strip(), str(container.readlink())]
    return "|".join(parts)


def is_gone(who: dict[str, Any] | None) -> bool:
    """Return whether a worker of this machine is dead; false where nobody can tell from here."""
    if not who or who["host"] != identity()["host"]:
        return False
    try:
        process = psutil.Process(who["pid"])
        return abs(process.create_time() - who["started"]) > 1.0 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


State = Literal["missing", "waiting", "running", "done", "pruned", "failed"]
FINAL: tuple[State, ...] = ("done", "pruned", "failed")


@dataclass(frozen=True, slots=True)
class CellState:
    """Where a cell stands.

    Attributes:
        state: `missing` if it has to be enqueued.
        score: validation macro-F1 of a finished run.
        seconds: that it took.
        reason: why it failed.
        newest: number of its newest trial; -1 if it has none.
    """

    state: State
    score: float | None = None
    seconds: float | None = None
    reason: str = ""
    newest: int = -1


@dataclass(frozen=True, slots=True)
class Claim:
    """A trial that this process has taken.

    Attributes:
        cell: to run.
        trial_id: in the storage.
        drawn: overrides that a sampler drew.
    """

    cell: Cell
    trial_id: int
    drawn: tuple[str, ...]


class Ledger:
    """The state of a sweep in its storage."""

    def __init__(self, plan: Plan, url: str, *, prune: bool = False) -> None:
        """Open the sweep in the storage, making it if it is new.

        Raises:
            SweepError: the storage cannot be opened, or holds another sweep of that name.
        """
        self.plan = plan
        self.storage = open_storage(url)
        import optuna

        self._states = optuna.trial.TrialState
        self._study = optuna.create_study(
            storage=self.storage,
            study_name=plan.name,
            direction="maximize",
            load_if_exists=True,
            sampler=_sampler(plan),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1) if prune else None,
        )
        self.study_id = self.storage.get_study_id_from_name(plan.name)
        self._check_definition()
        self._retry: dict[str, int] = {}

    def _check_definition(self) -> None:
        mine = self.plan.definition()
        known = self.storage.get_study_user_attrs(self.study_id).get("definition")
        if known is None:
            self.storage.set_study_user_attr(self.study_id, "definition", mine)
            known = self.storage.get_study_user_attrs(self.study_id)["definition"]
        changed = sorted(_differences(known, mine))
        if changed:
            raise SweepError(
                f"the sweep {self.plan.name} was started with another recipe; going on would mix two sweeps. "
                f"Differences: {'; '.join(changed)}. Choose another --name."
            )

    def retry_failed(self) -> None:
        """Let this process run the cells again that have failed until now."""
        self._retry = {name: cell.newest for name, cell in self.look().items() if cell.state == "failed"}

    def look(self) -> dict[str, CellState]:
        """Return where each cell of the plan stands."""
        by_cell = self._trials()
        return {cell.name: self._state_of(cell.name, by_cell.get(cell.name, [])) for cell in self.plan.cells}

    def tidy(self) -> dict[str, CellState]:
        """Give up trials whose worker is gone, enqueue what has to be run, and return where each cell stands."""
        import optuna

        for trials in self._trials().values():
            for trial in trials:
                if trial.state == self._states.RUNNING and is_gone(trial.user_attrs.get("worker")):
                    self._close(trial._trial_id, self._states.FAIL, kind="lost", reason="its worker was killed")
        optuna.storages.fail_stale_trials(self._study)  # of other machines; they carry no outcome, which means lost
        found = self.look()
        for cell in self.plan.cells:
            if found[cell.name].state == "missing":
                self._enqueue(cell, found[cell.name].newest)
        return self.look() if any(one.state == "missing" for one in found.values()) else found

    def claim(self) -> Claim | None:
        """Take a waiting trial; none if there is none."""
        import optuna

        place = {cell.name: number for number, cell in enumerate(self.plan.cells)}
        waiting = self.storage.get_all_trials(self.study_id, deepcopy=False, states=(self._states.WAITING,))
        mine = [trial for trial in waiting if trial.user_attrs.get("cell") in place]
        # in the order of the plan: what is run again belongs to a seed that is half done
        for trial in sorted(mine, key=lambda one: (place[one.user_attrs["cell"]], one.number)):
            cell = self.plan.cells[place[trial.user_attrs["cell"]]]
            self.storage.record_heartbeat(trial._trial_id)  # before: a running trial without one is never given up
            try:
                if not self.storage.set_trial_state_values(trial._trial_id, self._states.RUNNING):
                    continue
                self.storage.set_trial_user_attr(trial._trial_id, "worker", identity())
            except optuna.exceptions.UpdateFinishedTrialError:
                continue
            if self._gives_way(trial.number, trial.user_attrs):
                self._close(trial._trial_id, self._states.FAIL, kind="duplicate", reason="enqueued twice")
                continue
            return Claim(cell, trial._trial_id, tuple(self._draw(trial._trial_id)))
        return None

    def beat(self, claim: Claim) -> bool:
        """Give a sign of life; return false when another worker has taken the trial over."""
        if self.storage.get_trial(claim.trial_id).state != self._states.RUNNING:
            return False
        self.storage.record_heartbeat(claim.trial_id)
        return True

    def report(self, claim: Claim, step: int, score: float) -> bool:
        """Record an evaluation in the middle of a trial; return false when another worker has taken it over."""
        import optuna

        try:
            self.storage.set_trial_intermediate_value(claim.trial_id, step, score)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True

    def is_hopeless(self, claim: Claim) -> bool:
        """Ask the pruner: is the trial below the median of earlier ones at the same step?"""
        return bool(self._study.pruner.prune(self._study, self.storage.get_trial(claim.trial_id)))

    def done(self, claim: Claim, score: float, details: dict[str, Any]) -> None:
        """Close a trial with its validation macro-F1."""
        self._close(claim.trial_id, self._states.COMPLETE, [score], kind="done", **details)

    def pruned(self, claim: Claim) -> None:
        """Close a hopeless trial."""
        self._close(claim.trial_id, self._states.PRUNED, kind="pruned", reason="below the median")

    def failed(self, claim: Claim, reason: str) -> None:
        """Close a trial that failed; it is not run again unless asked for."""
        self._close(claim.trial_id, self._states.FAIL, kind="error", reason=reason[:1000])

    def give_back(self, claim: Claim) -> None:
        """Close an interrupted trial; whoever comes next goes on with it."""
        self._close(claim.trial_id, self._states.FAIL, kind="interrupted", reason="interrupted")

    def _close(self, trial_id: int, state: Any, values: Sequence[float] | None = None, **outcome: Any) -> None:
        import optuna

        # what another process has closed stays as it is
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial_id, "outcome", outcome)
            self.storage.set_trial_state_values(trial_id, state, values)

    def _trials(self) -> dict[str, list[Any]]:
        by_cell: dict[str, list[Any]] = {}
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False)
        for trial in sorted(trials, key=lambda one: one.number):
            by_cell.setdefault(trial.user_attrs.get("cell", ""), []).append(trial)
        return by_cell

    def _state_of(self, name: str, trials: Sequence[Any]) -> CellState:
        states = self._states
        newest = trials[-1].number if trials else -1
        for trial in trials:
            if trial.state == states.COMPLETE:
                seconds = trial.user_attrs.get("outcome", {}).get("seconds")
                return CellState("done", trial.value, seconds, newest=newest)
        if any(trial.state == states.PRUNED for trial in trials):
            return CellState("pruned", newest=newest)
        if any(trial.state == states.RUNNING for trial in trials):
            return CellState("running", newest=newest)
        if any(trial.state == states.WAITING for trial in trials):
            return CellState("waiting", newest=newest)
        errors = [trial for trial in trials if _kind(trial) == "error"]
        if errors and self._retry.get(name, -1) < errors[-1].number:
            return CellState("failed", reason=errors[-1].user_attrs["outcome"]["reason"], newest=newest)
        return CellState("missing", newest=newest)

    def _enqueue(self, cell: Cell, after: int) -> None:
        import optuna

        attributes: dict[str, Any] = {"cell": cell.name, "after": after, "seed": cell.seed}
        attributes["overrides"] = list(cell.overrides)
        system: dict[str, Any] = {}
        if self.plan.sampler != "grid":
            earlier = self._trials().get(cell.name, [])
            drawn = next((trial.params for trial in reversed(earlier) if trial.params), None)
            if drawn:  # it goes on from its checkpoints
                system["fixed_params"] = drawn
        waiting = optuna.trial.create_trial(state=self._states.WAITING, user_attrs=attributes, system_attrs=system)
        self.storage.create_new_trial(self.study_id, template_trial=waiting)

    def _gives_way(self, number: int, attributes: dict[str, Any]) -> bool:
        """Return whether an earlier trial of the cell stands for it, or one has finished it."""
        states = self._states
        for other in self._trials().get(attributes["cell"], []):
            if other.state in (states.COMPLETE, states.PRUNED):
                return True
            if other.number >= number:
                continue
            if other.state in (states.WAITING, states.RUNNING):
                return True
            if _kind(other) == "error" and other.number > attributes["after"]:
                return True
        return False

    def _draw(self, trial_id: int) -> Iterator[str]:
        if self.plan.sampler == "grid":
            return
        import optuna

        self._study.get_trials(deepcopy=False)  # Optuna's cache knows no trial that it has not read
        trial = optuna.trial.Trial(self._study, trial_id)
        for axis in self.plan.axes:
            yield f"{axis.key}={axis.suggest(trial)}"


def _kind(trial: Any) -> str:
    return str(trial.user_attrs.get("outcome", {}).get("kind", "lost")) if trial.state.name == "FAIL" else ""


def _sampler(plan: Plan) -> Any:
    import optuna

    if plan.sampler == "tpe":
        return optuna.samplers.TPESampler(constant_liar=True)
    return optuna.samplers.RandomSampler()


def _differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {*before, *after}:
            below = f"{path}.{key}" if path and path != "recipe" else key
            yield from _differences(before.get(key), after.get(key), below)
    elif before != after:
        yield f"{path}: {before} before, {after} now"
