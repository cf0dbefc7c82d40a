"""What a sweep will run: every cell with its recipe, checked before anything starts."""

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokmask_peft.errors import RecipeError, SweepError, boundary, nearest, read_json, write_json
from tokmask_peft.recipe.loading import load_recipe, with_overrides
from tokmask_peft.recipe.schema import Recipe, all_fields, regularizers

SWEEP_FILE = "sweep.json"
SAMPLERS = ("grid", "random", "tpe")
RESERVED = {
    "seed": "--seeds 1,2,3",
    "masking.p": "--p 0,0.1",
    "name": "--name NAME (each run is named after its cell)",
    "output_dir": "output_dir=FOLDER, for the whole sweep",
}
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_NAME_LENGTH = 80
_MASKS_AT_ZERO = "masking.p_start: is above 0, so p = 0 would mask too; set masking.p_start=0"


@dataclass(frozen=True, slots=True)
class Axis:
    """A dotted recipe key and its values as written on the command line, or a range; `log` draws its logarithm."""

    key: str
    values: tuple[str, ...] = ()
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False

    def space(self) -> dict[str, Any]:
        """Return what a sampler draws from, JSON-able."""
        return {"values": [*self.values]} if self.values else {"low": self.low, "high": self.high, "log": self.log}

    def suggest(self, trial: Any) -> str:
        """Let an Optuna trial choose a value; return it as text."""
        if self.values:
            return str(trial.suggest_categorical(self.key, list(self.values)))
        draw = trial.suggest_float if isinstance(self.low, float) else trial.suggest_int
        return repr(draw(self.key, self.low, self.high, log=self.log))


def read_axis(text: str, problems: list[str]) -> Axis | None:
    """Read `key=1,2,3`, or a range `key=low..high` or `key=low..high:log`, of `--grid`."""
    key, _, written = (part.strip() for part in text.partition("="))
    axis, problem = Axis(key, split_values(written)), ""
    if not key or not written:
        problem = f"{text}: expected dotted.key=value,value, as training.learning_rate=1e-4,3e-4"
    elif key in RESERVED:
        problem = f"{key}: use {RESERVED[key]}"
    elif found := re.fullmatch(rf"({_NUMBER})\.\.({_NUMBER})(:log)?", written):
        kind = int if all(re.fullmatch(r"[-+]?\d+", bound) for bound in found.group(1, 2)) else float
        axis = Axis(key, (), low := kind(found[1]), high := kind(found[2]), log := found[3] is not None)
        if low >= high or (log and low <= 0):
            problem = f"{key}: the range {written} is not {'above 0 and ' if log else ''}rising"
    elif len(set(axis.values)) < len(axis.values):
        problem = f"{key}: a value is given twice in {written}"
    if problem:
        problems.append(f"--grid {problem}")
    return None if problem else axis


def read_rates(text: str, problems: list[str]) -> tuple[str, ...]:
    """Read the masking rates of `--p`."""
    rates = split_values(text)
    if wrong := [rate for rate in rates if not 0 <= number(rate) < 1]:
        problems.append(f"--p {text}: '{wrong[0]}' is not a masking rate; expected numbers from 0 to below 1")
    elif not rates or len({float(rate) for rate in rates}) < len(rates):
        problems.append(f"--p {text}: {'a rate is given twice' if rates else 'expected rates, as 0,0.1,0.2'}")
    else:
        return rates
    return ()


def number(text: str) -> float:
    """Return the number that a text holds; nan, which no range contains, if it does not hold one."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_seeds(text: str, problems: list[str]) -> tuple[int, ...]:
    """Read `--seeds`: a number n means the seeds 1 to n; several numbers are the seeds themselves."""
    parts = [part.strip() for part in text.split(",")]
    seeds = [int(part) for part in parts if re.fullmatch(r"\d+", part) and int(part) < 2**32]
    if not seeds or len(seeds) < sum(bool(part) for part in parts):
        problem = "expected a number (5 is the seeds 1 to 5), or seeds: 11,12,13 (one: 11,)"
    elif len(parts) == 1 and not 1 <= seeds[0] <= 1000:
        problem = f"expected 1 to 1000 seeds; for the one seed {text} write {text},"
    elif len(set(seeds)) < len(seeds):
        problem = "a seed is given twice"
    else:
        return tuple(range(1, seeds[0] + 1) if len(parts) == 1 else seeds)
    problems.append(f"--seeds {text}: {problem}")
    return ()


def split_values(text: str) -> tuple[str, ...]:
    """Split at commas, except inside brackets, braces or quotes."""
    found = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*'|[^,])+", text)
    return tuple(part.strip() for part in found if part.strip())


REGULARIZERS = {found.name: key for key, found in regularizers().items()}  # name of an arm -> its recipe key
MASK, NONE, AS_RECIPE = "mask", "none", "recipe"

MASKED = {
    "drop": ("0.1", ("masking.replace=drop", "masking.p={}"), "masked sub-tokens leave the text"),
    "anneal": (
        "0.2",
        ("masking.schedule=linear", "masking.p_start={}", "masking.end=0.7", "masking.p=0"),
        "the rate falls from here to 0 in the first 70% of training",
    ),
    "share": ("0.5", ("masking.share={}", "masking.p=0.1"), "only this share of the texts is masked"),
    "overfit": (
        "0.3",
        ("masking.schedule=overfit", "masking.share=0.5", "masking.p={}"),
        "half of the texts are masked; the rate, at most this one, rises while the others are answered well",
    ),
    "random": ("0.1", ("masking.replace=random", "masking.p={}"), "masked sub-tokens become others of the vocabulary"),
    "own": ("0.1", ("masking.mask_token=mask", "masking.p={}"), "masked by the tokenizer's mask token, trained or not"),
    "unk": ("0.1", ("masking.mask_token=unk", "masking.p={}"), "masked by the unknown token"),
    "trained": (
        "0.1",
        ("masking.mask_token=mask", "masking.trainable_mask=true", "masking.p={}"),
        "masked by the tokenizer's mask token, whose embedding is trained",
    ),
}
"""Arms that mask in a way of their own, whatever `--p` says: the usual strength, what it sets, and what that means."""


def explained(arms: Iterable[str]) -> dict[str, str]:
    """Return what the parts of the names of arms (`Arm.name`) mean, without rates, and the keys that they set."""
    fields, found = dict(all_fields()), dict[str, str]()
    for part in dict.fromkeys(part.partition(" ")[0] for name in arms for part in re.split(r" ?\+ ?", name)):
        word, _, strength = part.partition(":")
        if word in MASKED:
            usual, keys, about = MASKED[word]
            found[part] = f"{about} ({' '.join(keys).format(strength or usual)})"
        elif key := REGULARIZERS.get(word):
            found[part] = f"{key}={strength or regularizers()[key].usual}: {fields[key].description}"
        elif word == NONE:
            found[part] = "every regularizer is off, and nothing is masked"
        elif word in (MASK, "p"):
            found[part] = f"masking.p: {fields['masking.p'].description}"
    return found


@dataclass(frozen=True, slots=True)
class Arm:
    """What the runs of one line of the comparison share, apart from seed and grid; `p` is as it was written."""

    regularizers: str  # `none`, names joined by `+`, or `recipe` if that decides
    p: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The arm's name in tables: `p = 0.1`, `none`, `mask 0.1 + neftune`."""
        rate = f"{float(self.p):g}"
        if self.regularizers == AS_RECIPE:
            return f"p = {rate}"
        return f"{MASK} {rate} + {self.regularizers}".removesuffix(f" + {NONE}") if float(self.p) else self.regularizers

    @property
    def is_unmasked(self) -> bool:
        """Whether nothing is masked: the rate is 0, and no part of the arm masks in a way of its own."""
        return float(self.p) == 0 and not {part.partition(":")[0] for part in self.regularizers.split("+")} & {*MASKED}

    @property
    def label(self) -> str:
        """The arm's part of a cell's name: `p0.1`, `none`, `mask0.1+neftune`."""
        return re.sub("[ :=]", "", self.name)


def regularizer_arms(names: Sequence[str], rates: Sequence[str], batching: str, problems: list[str]) -> list[Arm]:
    """Return the arms of `--arms`, such as `none`, `neftune:15`, `drop:0.1` or `mask+views`; with `mask` once per rate.

    NEFTune scales its noise by a padded batch's length, so its arm pads what a recipe packs: the same texts in order.
    """
    arms: list[Arm] = []
    known, arm_names = regularizers(), (NONE, *REGULARIZERS, MASK, *MASKED)
    for name in names:
        parts = name.split("+")
        chosen = {part: part.partition(":") for part in parts if part not in (MASK, NONE)}
        own = [word for word, _, _ in chosen.values() if word in MASKED]
        is_known = all(
            word in (*REGULARIZERS, *MASKED) and (strength or not colon) for word, colon, strength in chosen.values()
        )
        if not is_known or (NONE in parts and len(parts) > 1) or len(own) + (MASK in parts) > 1:
            remedy = "and combinations such as mask+neftune, with a strength as neftune:15"
            guess = f"{nearest(name, arm_names)} Known: {', '.join(arm_names)}, {remedy}"
            problems.append(f"--arms: there is no arm '{name}'.{guess}")
            continue
        settings: dict[str, Any] = {key: regularizer.off for key, regularizer in known.items()}
        masking: list[str] = []
        for word, _, strength in chosen.values():
            if word in MASKED:
                masking = [override.format(strength or MASKED[word][0]) for override in MASKED[word][1]]
            else:
                settings[REGULARIZERS[word]] = strength or known[REGULARIZERS[word]].usual
        if settings["training.neftune_alpha"] is not None and batching == "padding_free":
            settings["training.batching"] = "padded"
        overrides = tuple(f"{key}={'null' if value is None else value}" for key, value in settings.items())
        for rate in rates if MASK in parts else ["0"]:
            arms.append(Arm("+".join(chosen) or NONE, rate, (*overrides, *(masking or [f"masking.p={rate}"]))))
    return arms


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep, named like its folder, with its values of `--grid`; without an arm a sampler draws them."""

    name: str
    seed: int
    arm: Arm | None = None
    setting: tuple[tuple[str, str], ...] = ()
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A sweep, before it runs."""

    name: str
    base: Recipe
    sampler: str
    cells: tuple[Cell, ...]
    axes: tuple[Axis, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of the sweep, which holds its runs."""
        return Path(self.base.output_dir) / self.name

    def recipe_of(self, cell: Cell, drawn: Sequence[str] = ()) -> Recipe:
        """Return the recipe of a cell, with the values that a sampler drew."""
        place = {"name": cell.name, "output_dir": str(self.folder), "seed": cell.seed}
        return with_overrides(self.base, (*cell.overrides, *drawn)).model_copy(update=place)

    def definition(self) -> dict[str, Any]:
        """Return what must stay the same if a sweep is continued; rates, seeds, values and trials may be added."""
        left_out: Any = {**dict.fromkeys(("name", "output_dir", "seed"), True), "masking": {"p"}}
        base = self.base.model_dump(mode="json", exclude=left_out)
        fixed = {"sampler": self.sampler, "axes": sorted(axis.key for axis in self.axes), "recipe": base}
        if self.sampler != "grid":
            fixed["space"] = {axis.key: axis.space() for axis in self.axes}
        return fixed

    def write(self) -> None:
        """Write `sweep.json` for the report, with earlier commands' cells; SweepError if it cannot be written."""
        file = self.folder / SWEEP_FILE
        with boundary(f"writing {file}", SweepError, "folder"):
            before = read_json(file, SweepError, "folder")["cells"] if file.is_file() else {}
            for cell in self.cells:
                arm = None if cell.arm is None else {"regularizers": cell.arm.regularizers, "p": float(cell.arm.p)}
                entry = {"seed": cell.seed, "arm": arm, "setting": dict(cell.setting)}
                before[cell.name] = {**entry, "overrides": list(cell.overrides)}
            write_json(file, {"name": self.name, **self.definition(), "cells": before})


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
    """Turn the options of `tokmask sweep` into checked cells; RecipeError with every problem of any of them."""
    problems: list[str] = []

    def load(*more: str) -> Recipe | None:
        try:
            return load_recipe(recipe, (*overrides, *more))
        except RecipeError as error:
            problems.extend(error.problems)
            return None

    base = load()
    axes = [axis for text in grid if (axis := read_axis(text, problems))]
    rates = read_rates(p, problems) if p is not None else ()
    chosen_seeds = read_seeds(seeds, problems)
    problems.extend(_clashes(overrides, axes, p, arms, sampler, trials))
    for axis in axes:
        for value in axis.values or (str(axis.low), str(axis.high)):
            load(f"{axis.key}={value}")
    if name is not None and (not re.fullmatch(r"[\w.+-]+", name) or set(name) <= {"."}):
        problems.append(f"--name {name}: the name becomes a folder: letters, digits, '.', '_', '+' and '-'")
    if base is None or problems:
        raise RecipeError(dict.fromkeys(problems), recipe, code="sweep-plan")
    rates = rates or (str(base.masking.p),)
    if sampler == "grid":
        listed = [Arm(AS_RECIPE, rate, (f"masking.p={rate}",)) for rate in rates]
        if arms is not None:
            above = [rate for rate in rates if float(rate) > 0] or ["0.1"]
            listed = regularizer_arms(split_values(arms), above, base.training.batching, problems)
            labels = [arm.label for arm in listed]
            problems.extend(f"--arms: '{label}' is given twice" for label in labels if labels.count(label) > 1)
        cells = _grid(base, listed, axes, chosen_seeds)
    else:
        if any(float(rate) == 0 for rate in rates) and not base.masking.model_copy(update={"p": 0.0}).is_off:
            problems.append(_MASKS_AT_ZERO)
        axes += [Axis("masking.p", rates)] if p is not None else []
        cells = [Cell(f"trial-{n:04d}", chosen_seeds[n % len(chosen_seeds)]) for n in range(trials or 0)]
    plan, seen = Plan(name or f"{base.name}-sweep", base, sampler, tuple(cells), tuple(axes)), dict[str, str]()
    for cell in plan.cells:
        try:
            found = plan.recipe_of(cell)
        except RecipeError as error:
            problems.extend(error.problems)
            continue
        if cell.arm is not None and cell.arm.is_unmasked and not found.masking.is_off:
            problems.append(_MASKS_AT_ZERO)
        same = found.model_dump_json(exclude={"name": True, "output_dir": True, "training": {"baseline"}})
        if cell.arm is not None and same in seen:
            problems.append(f"{cell.name} and {seen[same]} are the same run: two values of an axis mean the same")
        seen[same] = cell.name
    if problems:
        raise RecipeError(dict.fromkeys(problems), recipe, code="sweep-plan")
    return plan


def _clashes(
    overrides: Sequence[str], axes: Sequence[Axis], p: str | None, arms: str | None, sampler: str, trials: int | None
) -> Iterator[str]:
    keys = [axis.key for axis in axes]
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in ("seed", "name") or (key == "masking.p" and p is not None):
            yield f"{override}: in a sweep use {RESERVED[key]}"
        if key in keys:
            yield f"{override}: the key is also an axis of --grid"
    yield from (f"--grid {key}: is given twice" for key in keys if keys.count(key) > 1)
    for key in {*keys} & {*REGULARIZERS.values()} if arms is not None else ():
        yield f"--grid {key}: --arms sets it; give the strength in the arm, as label_smoothing:0.2"
    if sampler == "grid":
        if trials is not None:
            yield "--trials: a grid has as many trials as cells; use it with --sampler random or tpe"
        for key in (axis.key for axis in axes if not axis.values):
            yield f"--grid {key}: a range needs --sampler random or tpe; for a grid list the values"
    elif sampler not in SAMPLERS:
        yield f"--sampler {sampler}: expected {', '.join(SAMPLERS)}.{nearest(sampler, SAMPLERS)}"
    else:
        if trials is None or trials < 1:
            yield f"--sampler {sampler}: give the number of runs with --trials N"
        if arms is not None:
            yield f"--arms: arms are compared seed by seed, which --sampler {sampler} does not do; use grid"
        if not axes and p is None:
            yield f"--sampler {sampler}: there is nothing to draw; give --p or --grid"


def _grid(base: Recipe, arms: Sequence[Arm], axes: Sequence[Axis], seeds: Sequence[int]) -> list[Cell]:
    """Return the cells seed by seed, so that whole comparisons come first; the first arm of each fits the n-grams."""
    settings = list(itertools.product(*([(axis.key, value) for value in axis.values] for axis in axes)))
    keys = [axis.key.rpartition(".")[2] for axis in axes]
    cells = []
    for seed, setting, (place, arm) in itertools.product(seeds, settings, enumerate(arms)):
        text = "-".join([arm.label, *(f"{key}{value}" for key, (_, value) in zip(keys, setting, strict=True))])
        name = re.sub(r"[^\w.+-]+", "_", text)
        if len(name) > _NAME_LENGTH or name != text or len(set(keys)) < len(keys):
            exact = "-".join([arm.label, *(f"{key}={value}" for key, value in setting)])
            name = f"{name[:_NAME_LENGTH]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
        overrides = (*(f"{key}={value}" for key, value in setting), *arm.overrides)
        if place and base.training.baseline:
            overrides = (*overrides, "training.baseline=false")
        cells.append(Cell(f"{name}-seed{seed}", seed, arm, tuple(setting), overrides))
    return cells
