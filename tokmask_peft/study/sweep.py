"""Run a sweep: its folder and plan on disk, the loop over its cells, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokmask_peft.errors import SweepError
from tokmask_peft.recipe.errors import shown
from tokmask_peft.recipe.io import load_recipe
from tokmask_peft.study.ledger import CellState, Ledger
from tokmask_peft.study.live import SweepDisplay, best_of, summary_line, sweep_console
from tokmask_peft.study.loop import Loop, Options
from tokmask_peft.study.plan import Plan
from tokmask_peft.study.storage import errors_of_storage
from tokmask_peft.training.run_folder import RunFolder, write_json

SWEEP_FILE = "sweep.json"


def run_sweep(
    plan: Plan, storage: str | None = None, options: Options | None = None, *, quiet: bool = False
) -> dict[str, CellState]:
    """Run what is left of a sweep, alone or together with others on the same storage.

    Args:
        plan: what to run.
        storage: URL of the storage; none is SQLite in the folder of the sweep.
        options: how to run it.
        quiet: print nothing.

    Returns:
        Where each cell stands at the end: done, pruned or failed.

    Raises:
        SweepError: the folder or the storage cannot be used.
        RunInterruptedError: on Ctrl-C or SIGTERM; the same command goes on.
    """
    options = options or Options()
    _make_folder(plan)
    ledger = Ledger(plan, storage or f"sqlite:///{plan.folder / 'sweep.db'}", prune=options.prune)
    write_plan(plan)
    with errors_of_storage(), SweepDisplay(sweep_console(quiet), options.workers) as display:
        if options.retry_failed:
            ledger.retry_failed()
        return Loop(plan, ledger, options, display).run()


def _make_folder(plan: Plan) -> None:
    if RunFolder(plan.folder).recipe.is_file():
        raise SweepError(f"{plan.folder} is the folder of a run, not of a sweep; choose another --name")
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"the folder of the sweep, {plan.folder}, cannot be made: {error.strerror}") from error


def write_plan(plan: Plan) -> None:
    """Write `sweep.json`: what the sweep is, for its report. Cells of an earlier command stay in it.

    Raises:
        SweepError: the folder cannot be written, or its `sweep.json` is broken.
    """
    file = plan.folder / SWEEP_FILE
    content: dict[str, Any] = {"name": plan.name, **plan.definition(), "cells": {}}
    try:
        if file.is_file():
            content["cells"] = json.loads(file.read_text(encoding="utf-8"))["cells"]
        content["cells"].update({cell.name: cell.to_dict() for cell in plan.cells})
        write_json(file, content)
    except (OSError, ValueError, KeyError) as error:
        raise SweepError(f"the folder of the sweep, {plan.folder}, cannot be used: {error}") from error


def failures(cells: dict[str, CellState]) -> dict[str, list[str]]:
    """Return the failed cells by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, cell in cells.items():
        if cell.state == "failed":
            by_reason.setdefault(cell.reason, []).append(name)
    return by_reason


def closing_lines(plan: Plan, cells: dict[str, CellState]) -> Sequence[str]:
    """Say at the end what came of the sweep, and what to do next."""
    lines = [summary_line(cells, None)]
    for reason, names in failures(cells).items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"failed: {shown}: {reason}")
    if failures(cells):
        lines.append("Run failed trials again with --retry-failed.")
    best = best_of(cells)
    if best and plan.sampler == "grid":
        lines.append(f"Next: tokmask report {plan.folder}")
    elif best:
        run = RunFolder(plan.folder / best[0])
        recipe = load_recipe(run.recipe).model_dump(mode="json") if run.recipe.is_file() else {}
        values = [f"{axis.key}={_value(recipe, axis.key)}" for axis in plan.axes]
        lines.append(f"Best: {run.root}: {' '.join(values)}. Compare it with p = 0 over seeds before you believe it.")
    return lines


def _value(recipe: dict[str, Any], key: str) -> Any:
    found: Any = recipe
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return shown(found)
