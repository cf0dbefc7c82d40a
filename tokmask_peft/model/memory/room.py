"""How much memory there is: of a device that is here, or of a GPU that one thinks of buying time on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tokmask_peft.errors import RecipeError

USABLE = 0.95
"""Share of the memory that is counted on: what the allocator cannot hand out in one piece is left over."""

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its limits (cgroup v2)."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that a run may take.

    Attributes:
        bytes: in all.
        name: what to call it.
    """

    bytes: int
    name: str

    def fits(self, total: int) -> bool:
        """Say whether so many bytes fit."""
        return total <= USABLE * self.bytes


def gpu_room(size: str) -> Room:
    """Return the memory of a GPU named by its size, as 6GB; a GB of a GPU is 2**30 bytes.

    Raises:
        RecipeError: this is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:Gi?B?)?", size.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise RecipeError([f"--gpu: is {size!r}; expected a size such as 6GB"], source="estimate")
    return Room(int(float(found[1]) * 2**30), f"a GPU of {found[1]} GiB")


def device_room(device: torch.device) -> Room | None:
    """Return the memory of a device that this process can have in all, what it already holds included.

    Returns:
        None where nobody tells.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        context = 600 * 2**20 if torch.cuda.is_initialized() else 0  # made already, and part of an estimate
        return Room(free + torch.cuda.memory_reserved(device) + context, torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return None
    import psutil

    available = min([psutil.virtual_memory().available, *_cgroup_rest()])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mine: int = psutil.Process().memory_info().rss
    return Room(available // processes + mine, "this machine's free memory")


def _cgroup_rest() -> list[int]:
    """Return what a container may still take, where it has a limit: all but its working set.

    `memory.current` holds the page cache, too, of which the kernel drops the inactive part before it refuses memory.
    """
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return []
    return [limit - max(used - _inactive_file(), 0)]


def _inactive_file() -> int:
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split(" ", 1) for line in lines)
    return int(found.get("inactive_file", 0))


def shown(count: int) -> str:
    """Return bytes for a reader."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
