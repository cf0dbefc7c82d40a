"""One decision for all processes, where each sees its own free memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from tokmask_peft.model.decisions import Decision

Found = tuple[Decision, str | None]
"""A decision on gradient checkpointing, and a warning of what will not fit."""


def agreed(decision: Decision, warning: str | None) -> Found:
    """Return what the process with the least memory decided; every process has to call this, where there are several.

    Else a run would have gradient checkpointing on some GPUs only, and tell of the first process's memory alone, which
    is the one that prints.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return decision, warning
    found: list[Found | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (decision, warning))
    return tightest([one for one in found if one is not None])


def tightest(found: list[Found]) -> Found:
    """Return the decision, of one per process, that needs the least memory; of equals, that of the first."""
    number, (decision, warning) = max(enumerate(found), key=lambda one: (one[1][0].choice == "on", bool(one[1][1])))
    if number > 0:
        decision = replace(decision, reason=f"{decision.reason} (process {number})")
    return decision, warning
