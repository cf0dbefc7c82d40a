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
from tokmask_peft.recipe.loading import load_recipe, with_overrides
from tokmask_peft.recipe.schema import Recipe, all_fields, section_of

RESERVED = {
    "seed": "--seeds 1,2,3",
    "masking.p": "--p 0,0.1",
    "name": "--name NAME (each run is named by its place in the grid)",
    "output_dir": "output_dir=FOLDER, for the whole sweep",
}

_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"


@dataclass(frozen=True, slots=True)
class Axis:
    """A recipe key and the values that it takes.

    Attributes:
        key: dotted.
        values: as they were written; empty for a range.
        low: lower bound of a range.
        high: its upper bound.
        log: draw the logarithm uniformly.
    """

    key: str
    values: tuple[str, ...] = ()
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False

    def suggest(self, trial: Any) -> str:
        """Let an Optuna trial choose a value; return it as text."""
        if self.values:
            return str(trial.suggest_categorical(self.key, list(self.values)))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return str(trial.suggest_int(self.key, self.low, self.high, log=self.log))
        return repr(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        if self.values:
            return {"values": list(self.values)}
        return {"low": self.low, "high": self.high, "log": self.log}


def read_axis(text: str, problems: list[str]) -> Axis | None:
    """Read `key=1,2,3`, or a range `key=low..high` or `key=low..high:log`, of `--grid`."""
    key, sign, written = text.partition("=")
    key = key.strip()
    if not sign or not key or not written.strip():
        problems.append(f"--grid {text}: expected dotted.key=value,value, as training.learning_rate=1e-4,3e-4")
        return None
    if key in RESERVED:
        problems.append(f"--grid {key}: use {RESERVED[key]}")
        return None
    field = next((field for name, field in Recipe.model_fields.items() if name == key), None)
    if field is not None and section_of(field.annotation) is not None:
        known = [path for path, _ in all_fields() if path.startswith(f"{key}.")]
        problems.append(f"--grid {key}: is a section; name a key in it, such as {', '.join(known[:3])}")
        return None
    found = re.fullmatch(rf"\s*({_NUMBER})\.\.({_NUMBER})(:log)?\s*", written)
    return _range(key, found, problems) if found else _listed(key, written, problems)


def read_rates(text: str, problems: list[str]) -> tuple[str, ...]:
    """Read the masking rates of `--p`."""
    rates = split_values(text)
    for rate in rates:
        try:
            if 0 <= float(rate) < 1:
                continue
        except ValueError:
            pass
        problems.append(f"--p {text}: '{rate}' is no masking rate; expected numbers from 0 to below 1, as 0,0.1,0.2")
        return ()
    if len({float(rate) for rate in rates}) < len(rates) or not rates:
        problems.append(f"--p {text}: {'a rate is given twice' if rates else 'expected rates, as 0,0.1,0.2'}")
        return ()
    return rates


def read_seeds(text: str, problems: list[str]) -> tuple[int, ...]:
    """Read `--seeds`: a number n means the seeds 1 to n; several, those."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+", part) and int(part) < 2**32 for part in parts if part) or not any(parts):
        problems.append(f"--seeds {text}: expected how many (5 is the seeds 1 to 5), or which: 11,12,13 (one: 11,)")
        return ()
    seeds = [int(part) for part in parts if part]
    if len(parts) == 1:
        if not 1 <= seeds[0] <= 1000:
            problems.append(f"--seeds {text}: expected 1 to 1000 seeds; for the one seed {text} write {text},")
            return ()
        return tuple(range(1, seeds[0] + 1))
    if len(set(seeds)) < len(seeds):
        problems.append(f"--seeds {text}: a seed is given twice")
    return tuple(seeds)


def split_values(text: str) -> tuple[str, ...]:
    """Split at commas, but not at those inside brackets, braces or quotes."""
    found = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*'|[^,])+", text)
    return tuple(part.strip() for part in found if part.strip())


def _listed(key: str, written: str, problems: list[str]) -> Axis | None:
    values = split_values(written)
    if len(set(values)) < len(values):
        problems.append(f"--grid {key}: a value is given twice in {written}")
        return None
    return Axis(key, values)


def _range(key: str, found: re.Match[str], problems: list[str]) -> Axis | None:
    whole = all(re.fullmatch(r"[-+]?\d+", part) for part in found.group(1, 2))
    low, high = ((int if whole else float)(part) for part in found.group(1, 2))
    if low >= high or (found[3] and low <= 0):
        rule = "above 0 and rising" if found[3] else "rising"
        problems.append(f"--grid {key}: the range {found[0].strip()} is not {rule}")
        return None
    return Axis(key, (), low, high, bool(found[3]))


OFF = {
    "adapter.dropout": "0.0",
    "model.attention_dropout": "0.0",
    "training.neftune_alpha": "null",
    "training.label_smoothing": "0.0",
}
"""The recipe keys of the regularizers, with the values that switch them off."""

REGULARIZERS = {
    "lora_dropout": ("adapter.dropout", "0.1"),
    "attention_dropout": ("model.attention_dropout", "0.1"),
    "neftune": ("training.neftune_alpha", "5"),
    "label_smoothing": ("training.label_smoothing", "0.1"),
}
"""Name -> recipe key and usual strength; an arm may name another, as `neftune:15`."""

MASK, NONE, AS_RECIPE = "mask", "none", "recipe"


@dataclass(frozen=True, slots=True)
class Arm:
    """What the runs of one line of the comparison share, but for the seed and the grid.

    Attributes:
        regularizers: `none`, or names joined by `+`; `recipe` where the recipe decides.
        p: masking rate, as it was written.
        overrides: `dotted.key=value`.
    """

    regularizers: str
    p: str
    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name the arm as in a cell's name: `p0.1`, `none`, `mask0.1+neftune`."""
        rate, names = f"{float(self.p):g}", self.regularizers.replace(":", "")
        if names == AS_RECIPE:
            return f"p{rate}"
        if float(self.p) == 0:
            return names
        return f"{MASK}{rate}" + ("" if names == NONE else f"+{names}")


def masking_arms(rates: Sequence[str]) -> list[Arm]:
    """Return an arm per masking rate, everything else as the recipe has it."""
    return [Arm(AS_RECIPE, rate, (f"masking.p={rate}",)) for rate in rates]


def regularizer_arms(names: Sequence[str], rates: Sequence[str], batching: str, problems: list[str]) -> list[Arm]:
    """Return the arms of `--arms`; those with `mask` once per rate above 0.

    NEFTune scales its noise by the length of a padded batch, so an arm with it takes padded batches where the recipe
    has padding-free ones: the same texts in the same order.

    Args:
        names: as the user wrote them, for example `none`, `neftune:15`, `mask+label_smoothing`.
        rates: masking rates above 0.
        batching: the recipe's `training.batching`.
        problems: takes a line per name that is not known.
    """
    arms: list[Arm] = []
    for name in names:
        parts = name.split("+")
        settings = dict(OFF)
        shown: list[str] = []
        for part in parts:
            word, _, strength = part.partition(":")
            if word in REGULARIZERS and part.rstrip(":") == part:
                key, usual = REGULARIZERS[word]
                settings[key] = strength or usual
                shown.append(part)
            elif part not in (MASK, NONE) or (part == NONE and len(parts) > 1):
                known = (NONE, *REGULARIZERS, MASK)
                problems.append(
                    f"--arms: there is no arm '{name}'.{nearest(word, known)} "
                    f"Known: {', '.join(known)}, and combinations such as mask+neftune, with a strength as neftune:15"
                )
                break
        else:
            if settings["training.neftune_alpha"] != "null" and batching == "padding_free":
                settings["training.batching"] = "padded"
            overrides = tuple(f"{key}={value}" for key, value in settings.items())
            for rate in rates if MASK in parts else ["0"]:
                arms.append(Arm("+".join(shown) or NONE, rate, (*overrides, f"masking.p={rate}")))
    return arms


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
