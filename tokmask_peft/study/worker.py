"""Who a worker is, and whether it still lives: told by its process where that can be seen, else by its heartbeat."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from pathlib import Path
from typing import Any

import psutil


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
