"""What a sweep will run: every cell with its recipe, checked before anything starts."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokmask_peft.errors import RecipeError, nearest
from tokmask_peft.recipe import Recipe
from tokmask_peft.recipe.io import load_recipe, with_overrides
from tokmask_peft.study.arms import OFF, Arm, masking_arms, regularizer_arms
from tokmask_peft.study.axes import RESERVED, Axis, read_axis, read_rates, read_seeds, split_values

SAMPLERS = ("grid", "random", "tpe")
_NAME_LENGTH = 80
_MASKS_AT_ZERO = "masking.p_start: is above 0, so p = 0 would mask, too; set masking.p_start=0"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of the cell and of its run folder.
        seed: of the run.
        arm: none where a sampler draws the values.
        setting: values of the `--grid` axes.
        overrides: on top of the sweep's recipe.
    """

    name: str
    seed: int
    arm: Arm | None
    setting: tuple[tuple[str, str], ...]
    overrides: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `sweep.json` holds of a cell."""
        arm = None if self.arm is None else {"regularizers": self.arm.regularizers, "p": float(self.arm.p)}
        return {"seed": self.seed, "arm": arm, "setting": dict(self.setting), "overrides": list(self.overrides)}


@dataclass(frozen=True, slots=True)
class Plan:
    """A sweep, before it runs."""

    name: str
    base: Recipe
    sampler: Literal["grid", "random", "tpe"]
    cells: tuple[Cell, ...]
    axes: tuple[Axis, ...] = field(default=())

    @property
    def folder(self) -> Path:
        """The folder of the sweep; its runs lie in it."""
        return Path(self.base.output_dir) / self.name

    def recipe_of(self, cell: Cell, drawn: Sequence[str] = ()) -> Recipe:
        """Return the recipe of a cell, with the values that a sampler drew."""
        place = {"name": cell.name, "output_dir": str(self.folder), "seed": cell.seed}
        return with_overrides(self.base, (*cell.overrides, *drawn)).model_copy(update=place)

    def definition(self) -> dict[str, Any]:
        """Return what must stay the same when a sweep goes on; rates, seeds, values and trials may be added."""
        base = self.base.model_dump(mode="json", exclude={"name", "output_dir", "seed"})
        base["masking"].pop("p")
        fixed = {"sampler": self.sampler, "axes": sorted(axis.key for axis in self.axes), "recipe": base}
        if self.sampler != "grid":
            fixed["space"] = {axis.key: axis.to_dict() for axis in self.axes}
        return fixed


def make_plan(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    p: str | None = None,
    seeds: str = "5",
    grid: Sequence[str] = (),
    arms: str | None = None,
    sampler: str = "grid",
    trials: int | None = None,
    name: str | None = None,
) -> Plan:
    """Turn what the command line says into cells, and check the recipe of each.

    Raises:
        RecipeError: with every problem found.
    """
    problems: list[str] = []
    base = _load(recipe, overrides, problems)
    axes = [axis for text in grid if (axis := read_axis(text, problems))]
    rates = read_rates(p, problems) if p is not None else ()
    chosen_seeds = read_seeds(seeds, problems)
    problems.extend(_clashes(overrides, axes, p, arms, sampler, trials))
    for axis in axes:
        for value in axis.values or (str(axis.low), str(axis.high)):
            _load(recipe, (*overrides, f"{axis.key}={value}"), problems)
    if name is not None and (not re.fullmatch(r"[\w.+-]+", name) or set(name) <= {"."}):
        problems.append(f"--name {name}: the name becomes a folder: letters, digits, '.', '_', '+' and '-'")
    if base is None or problems:
        raise RecipeError(dict.fromkeys(problems), source=recipe)
    if not rates:
        rates = (str(base.masking.p),)
    listed = _arms(arms, rates, base, problems)
    if sampler == "grid":
        cells = _grid(base, listed, axes, chosen_seeds)
    else:
        if any(float(rate) == 0 for rate in rates) and not base.masking.model_copy(update={"p": 0.0}).is_off:
            problems.append(_MASKS_AT_ZERO)
        axes = [*axes, *([Axis("masking.p", rates)] if p is not None else [])]
        cells = [
            Cell(f"trial-{number:04d}", chosen_seeds[number % len(chosen_seeds)], None, (), ())
            for number in range(trials or 0)
        ]
    chosen = name or f"{base.name}-sweep"
    plan = Plan(chosen, base, sampler, tuple(cells), tuple(axes))  # type: ignore[arg-type]
    problems.extend(_check_cells(plan))
    if problems:
        raise RecipeError(dict.fromkeys(problems), source=recipe)
    return plan


def _load(recipe: str, overrides: Sequence[str], problems: list[str]) -> Recipe | None:
    try:
        return load_recipe(recipe, overrides)
    except RecipeError as error:
        problems.extend(line for line in error.problems if line not in problems)
        return None


def _clashes(
    overrides: Sequence[str], axes: Sequence[Axis], p: str | None, arms: str | None, sampler: str, trials: int | None
) -> Iterable[str]:
    keys = [axis.key for axis in axes]
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in ("seed", "name") or (key == "masking.p" and p is not None):
            yield f"{override}: in a sweep use {RESERVED[key]}"
        if key in keys:
            yield f"{override}: the key is an axis of --grid, too"
    for key in dict.fromkeys(keys):
        if keys.count(key) > 1:
            yield f"--grid {key}: is given twice"
        if arms is not None and key in OFF:
            yield f"--grid {key}: --arms sets it; give the strength in the arm, as label_smoothing:0.2"
    if sampler not in SAMPLERS:
        yield f"--sampler {sampler}: expected {', '.join(SAMPLERS)}.{nearest(sampler, SAMPLERS)}"
    elif sampler == "grid":
        if trials is not None:
            yield "--trials: a grid has as many trials as cells; use it with --sampler random or tpe"
        for axis in axes:
            if not axis.values:
                yield f"--grid {axis.key}: a range needs --sampler random or tpe; for a grid list the values"
    else:
        if trials is None or trials < 1:
            yield f"--sampler {sampler}: say how many runs with --trials N"
        if arms is not None:
            yield f"--arms: arms are compared seed by seed, which --sampler {sampler} does not do; use grid"
        if not axes and p is None:
            yield f"--sampler {sampler}: there is nothing to draw; give --p or --grid"


def _arms(text: str | None, rates: Sequence[str], base: Recipe, problems: list[str]) -> list[Arm]:
    if text is None:
        return masking_arms(rates)
    above = [rate for rate in rates if float(rate) > 0] or ["0.1"]
    arms = regularizer_arms(split_values(text), above, base.training.batching, problems)
    labels = [arm.label for arm in arms]
    problems.extend(f"--arms: '{label}' is given twice" for label in dict.fromkeys(labels) if labels.count(label) > 1)
    return arms


def _grid(base: Recipe, arms: Sequence[Arm], axes: Sequence[Axis], seeds: Sequence[int]) -> list[Cell]:
    """Return the cells seed by seed, so that a sweep that is broken off has whole comparisons.

    The n-gram baseline is the same for all arms of a seed and setting: the first arm alone fits it.
    """
    settings = list(itertools.product(*([(axis.key, value) for value in axis.values] for axis in axes)))
    cells = []
    for seed in seeds:
        for setting in settings:
            for number, arm in enumerate(arms):
                overrides = (*(f"{key}={value}" for key, value in setting), *arm.overrides)
                if number and base.training.baseline:
                    overrides = (*overrides, "training.baseline=false")
                cells.append(Cell(_cell_name(arm, setting, seed), seed, arm, tuple(setting), overrides))
    return cells


def _cell_name(arm: Arm, setting: Sequence[tuple[str, str]], seed: int) -> str:
    parts = [arm.label, *(f"{key.rpartition('.')[2]}{value}" for key, value in setting)]
    exact = "-".join([arm.label, *(f"{key}={value}" for key, value in setting)])
    text = "-".join(parts)
    safe = re.sub(r"[^\w.+-]+", "_", text)
    keys = [key.rpartition(".")[2] for key, _ in setting]
    if len(safe) > _NAME_LENGTH or safe != text or len(set(keys)) < len(keys):
        safe = f"{safe[:_NAME_LENGTH]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
    return f"{safe}-seed{seed}"


def _check_cells(plan: Plan) -> Iterable[str]:
    """Check the recipe of every cell, and that no two cells are the same run."""
    seen: dict[str, str] = {}
    for cell in plan.cells:
        try:
            recipe = plan.recipe_of(cell)
        except RecipeError as error:
            yield from error.problems
            continue
        if cell.arm is not None and float(cell.arm.p) == 0 and not recipe.masking.is_off:
            yield _MASKS_AT_ZERO
        same = recipe.model_dump_json(exclude={"name": True, "output_dir": True, "training": {"baseline"}})
        if plan.sampler == "grid" and same in seen:
            yield f"{cell.name} and {seen[same]} are the same run: two values of an axis mean the same"
        seen[same] = cell.name
