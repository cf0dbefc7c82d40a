"""Read the runs of a sweep from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokmask_peft.errors import SweepError
from tokmask_peft.study.arms import AS_RECIPE, NONE
from tokmask_peft.study.sweep import SWEEP_FILE
from tokmask_peft.training.run_folder import RunFolder

METRICS = ("f1_macro", "f1_weighted")


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """What is compared over seeds: one arm under one setting of the other axes.

    Attributes:
        setting: value by key of each `--grid` axis.
        regularizers: `recipe` where the recipe decides, else `none` or names joined by `+`.
        p: masking rate.
    """

    setting: tuple[tuple[str, str], ...]
    regularizers: str
    p: float

    @property
    def is_reference(self) -> bool:
        """Whether other arms of the setting are compared with this one."""
        return self.p == 0 and self.regularizers in (NONE, AS_RECIPE)

    @property
    def arm(self) -> str:
        """Name the arm."""
        if self.regularizers == AS_RECIPE:
            return f"p = {self.p:g}"
        if self.p == 0:
            return self.regularizers
        return f"mask {self.p:g}" + ("" if self.regularizers == NONE else f" + {self.regularizers}")

    @property
    def label(self) -> str:
        """Name the arm and its setting."""
        return "; ".join([self.arm, *(f"{key.rpartition('.')[2]} = {value}" for key, value in self.setting)])


@dataclass(frozen=True, slots=True)
class SweepResults:
    """The finished runs of a sweep.

    Attributes:
        name: of the sweep.
        task: sequence or token.
        recipe: what all runs share.
        runs: result by row and seed, rows in the order of the sweep.
        folders: their folders.
        missing: cells without a result.
        has_test: whether every run was scored on test.
    """

    name: str
    task: str
    recipe: dict[str, Any]
    runs: dict[Row, dict[int, dict[str, Any]]]
    folders: dict[tuple[Row, int], RunFolder]
    missing: tuple[str, ...]
    has_test: bool

    @property
    def split(self) -> str:
        """The split that the report is about."""
        return "test" if self.has_test else "validation"

    def scores(self, row: Row, metric: str, split: str | None = None) -> dict[int, float]:
        """Return the scores of a row by seed."""
        return {seed: float(run[split or self.split][metric]) for seed, run in self.runs[row].items()}

    def predictions(self, row: Row, seed: int) -> dict[str, Any] | None:
        """Return gold and predicted ids per text, and the labels; none where the run did not leave them."""
        file = self.folders[row, seed].predictions
        if not file.is_file():
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
        return {"labels": content["labels"], **content[self.split]} if self.split in content else None


def read_sweep(folder: Path) -> SweepResults:
    """Read a sweep's folder.

    Raises:
        SweepError: the folder is no sweep, has no finished run, or cannot be compared arm by arm.
    """
    file = folder / SWEEP_FILE
    if not file.is_file():
        raise SweepError(f"{folder} is not the folder of a sweep (it holds no {SWEEP_FILE})")
    sweep = json.loads(file.read_text(encoding="utf-8"))
    if sweep["sampler"] != "grid":
        raise SweepError(
            f"the sweep {sweep['name']} drew its values ({sweep['sampler']}), so there are no arms to compare seed by "
            "seed. Its trials are in its storage; compare the best values with a grid over seeds."
        )
    runs: dict[Row, dict[int, dict[str, Any]]] = {}
    folders: dict[tuple[Row, int], RunFolder] = {}
    missing = []
    for name, cell in sweep["cells"].items():
        run = RunFolder(folder / name)
        if not run.finished():
            missing.append(name)
            continue
        arm = cell["arm"]
        row = Row(tuple(sorted(cell["setting"].items())), arm["regularizers"], float(arm["p"]))
        runs.setdefault(row, {})[int(cell["seed"])] = json.loads(run.result.read_text(encoding="utf-8"))
        folders[row, int(cell["seed"])] = run
    if not runs:
        raise SweepError(f"the sweep {folder} has no finished run yet; run it with the command that began it")
    has_test = all("test" in run for by_seed in runs.values() for run in by_seed.values())
    ordered = {row: dict(sorted(runs[row].items())) for row in _in_order(list(runs))}
    return SweepResults(
        sweep["name"], sweep["recipe"]["data"]["task"], sweep["recipe"], ordered, folders, tuple(missing), has_test
    )


def _in_order(rows: list[Row]) -> list[Row]:
    """Sort by setting and regularizers as they came, then by rate; the reference comes first of its setting."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    kinds = list(dict.fromkeys(row.regularizers for row in rows))
    return sorted(
        rows,
        key=lambda row: (
            settings.index(row.setting),
            not row.is_reference,
            row.p > 0,
            kinds.index(row.regularizers),
            row.p,
        ),
    )
