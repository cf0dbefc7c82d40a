"""Open the Optuna storage of a sweep so that many processes can share it safely, on SQLite too."""

from __future__ import annotations

import contextlib
import logging
import random
import time
import warnings
from collections.abc import Iterator
from typing import Any

from tokmask_peft.errors import SweepError, first_line

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
