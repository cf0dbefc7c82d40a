"""From the runs of a sweep to what may be said about its arms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokmask_peft.artifacts import RunFolder
from tokmask_peft.errors import SweepError
from tokmask_peft.study.plan import AS_RECIPE, NONE
from tokmask_peft.study.runner import SWEEP_FILE
from tokmask_peft.study.statistics import (
    GAINS,
    TextCounts,
    bootstrap_differences,
    hedges_gz,
    holm,
    percentile_interval,
    sd_interval,
    seeds_needed,
    sign_flip_p,
    smallest_p,
    spread,
)

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


REPLICATES = 2000
METHODS = {
    "interval": "95% interval of the mean over seeds, Student's t",
    "bootstrap": f"95% percentile interval of {REPLICATES} draws of seeds and texts, crossed (Owen 2007)",
    "p_value": "two-sided sign-flip permutation test over seeds, exact up to 16 seeds (Fisher 1935)",
    "p_holm": "Holm's step-down over the arms of a setting, for each metric on its own",
    "effect_size": "Cohen's d_z with Hedges' exact correction (g_z): mean over standard deviation of the differences",
    "seeds_needed": "two-sided paired t-test at level .05 with power .8, exact by the noncentral t distribution",
}


def analyse(results: SweepResults) -> dict[str, Any]:
    """Return everything that the report says, JSON-able."""
    rows = [_row(results, row) for row in results.runs]
    by_row = dict(zip(results.runs, rows, strict=True))
    for setting in dict.fromkeys(row.setting for row in results.runs):
        group = [row for row in results.runs if row.setting == setting]
        reference = next((row for row in group if row.is_reference), None)
        if reference is None:
            continue
        others = [row for row in group if row != reference]
        for row in others:
            by_row[row]["difference"] = _difference(results, reference, row)
            by_row[row]["cost"] = _ratio(by_row[row]["seconds_per_step"], by_row[reference]["seconds_per_step"])
        _adjust([by_row[row]["difference"] for row in others])
    return {
        "sweep": results.name,
        "task": results.task,
        "scored_on": results.split,
        "seeds": sorted({seed for runs in results.runs.values() for seed in runs}),
        "rows": rows,
        "chosen_by_validation": _choice(results),
        "paper": _paper(results, rows),
        "baseline": _baseline(results),
        "missing": list(results.missing),
        "versions": _versions(results),
        "methods": METHODS,
    }


def _row(results: SweepResults, row: Row) -> dict[str, Any]:
    scores = {metric: list(results.scores(row, metric).values()) for metric in METRICS}
    validation = results.scores(row, "f1_macro", "validation")
    speeds = [run["speed"] for run in results.runs[row].values() if run.get("speed", {}).get("steps")]
    seconds = [speed["step_seconds"] / speed["steps"] for speed in speeds]  # a resumed run timed its last steps only
    return {
        "arm": row.arm,
        "label": row.label,
        "setting": dict(row.setting),
        "regularizers": row.regularizers,
        "p": row.p,
        "is_reference": row.is_reference,
        "seeds": list(results.runs[row]),
        **{metric: {"by_seed": values, **spread(values)} for metric, values in scores.items()},
        "validation_f1_macro": {"by_seed": list(validation.values()), **spread(list(validation.values()))},
        "seconds_per_step": float(np.median(seconds)) if seconds else None,
    }


def _difference(results: SweepResults, reference: Row, row: Row) -> dict[str, Any]:
    seeds = [seed for seed in results.runs[reference] if seed in results.runs[row]]
    found: dict[str, Any] = {"seeds": seeds}
    if not seeds:
        return found
    replicates, problem = _replicates(results, reference, row, seeds)
    found["bootstrap_problem"] = problem
    for metric in METRICS:
        before, after = results.scores(reference, metric), results.scores(row, metric)
        differences = [after[seed] - before[seed] for seed in seeds]
        found[metric] = {
            "by_seed": differences,
            **spread(differences),
            "bootstrap": percentile_interval(replicates[metric]) if replicates else None,
            "p_value": float(sign_flip_p(differences)),
            "smallest_p": smallest_p(len(seeds)),
            "effect_size": hedges_gz(differences),
        }
    return found


def _replicates(
    results: SweepResults, reference: Row, row: Row, seeds: Sequence[int]
) -> tuple[dict[str, Any] | None, str | None]:
    """Bootstrap the differences; or say why that cannot be done."""
    counts: dict[Row, list[TextCounts]] = {reference: [], row: []}
    gold = None
    for one in (reference, row):
        for seed in seeds:
            found = results.predictions(one, seed)
            if found is None:
                return None, f"{results.folders[one, seed].root.name} has no predictions.json"
            gold = found["gold"] if gold is None else gold
            if found["gold"] != gold:
                return None, f"the {results.split} texts differ between seeds"
            counts[one].append(TextCounts.of(found["gold"], found["predicted"], len(found["labels"])))
    return bootstrap_differences(counts, reference, REPLICATES)[row], None


def _adjust(differences: Sequence[dict[str, Any]]) -> None:
    """Add Holm's p-values, in place."""
    for metric in METRICS:
        tested = [one[metric] for one in differences if metric in one]
        for one, adjusted in zip(tested, holm([one["p_value"] for one in tested]), strict=True):
            one["p_holm"] = adjusted


def _choice(results: SweepResults) -> dict[str, Any]:
    """Return what validation would have chosen, for each seed and over all, and what that scores."""
    validation = {row: results.scores(row, "f1_macro", "validation") for row in results.runs}
    seeds = sorted({seed for scores in validation.values() for seed in scores})
    whole = [seed for seed in seeds if all(seed in scores for scores in validation.values())]
    per_seed: list[dict[str, Any]] = []
    for seed in whole:  # of equals the first, which is the one with less masking
        chosen = max(results.runs, key=lambda row: validation[row][seed])
        per_seed.append({"seed": seed, "label": chosen.label, "p": chosen.p, **_test(results, chosen, seed)})
        references = [row for row in results.runs if row.is_reference]
        if references:
            plain = max(references, key=lambda row: validation[row][seed])
            per_seed[-1]["gain"] = per_seed[-1]["f1_macro"] - _test(results, plain, seed)["f1_macro"]
    found: dict[str, Any] = {"per_seed": per_seed, "seeds_left_out": sorted(set(seeds) - set(whole))}
    if whole:
        found["f1_macro"] = spread([one["f1_macro"] for one in per_seed])
        found["f1_weighted"] = spread([one["f1_weighted"] for one in per_seed])
        if all("gain" in one for one in per_seed):
            found["gain"] = spread([one["gain"] for one in per_seed])
        best = max(results.runs, key=lambda row: np.mean([validation[row][seed] for seed in whole]))
        tests = [_test(results, best, seed) for seed in whole]
        found["overall"] = {"label": best.label, "p": best.p}
        found["overall"].update({metric: spread([one[metric] for one in tests]) for metric in METRICS})
    return found


def _test(results: SweepResults, row: Row, seed: int) -> dict[str, float]:
    return {metric: results.scores(row, metric)[seed] for metric in METRICS}


def _paper(results: SweepResults, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how many seeds would show the gains that the authors report, given how much the differences vary here."""
    task, gains = GAINS[results.task]
    needed = []
    for row in rows:
        found = row.get("difference", {}).get("f1_macro")
        if row["p"] == 0 or not found or found["sd"] is None:
            continue
        low, high = sd_interval(found["sd"], found["n"])
        counts = {
            backbone: {
                "seeds": seeds_needed(gain, found["sd"]),
                "interval": [seeds_needed(gain, low), seeds_needed(gain, high)],
            }
            for backbone, gain in gains.items()
        }
        needed.append({"label": row["label"], "sd": found["sd"], "sd_interval": [low, high], "needed": counts})
    return {"task": task, "gains": gains, "rows": needed}


def _baseline(results: SweepResults) -> dict[str, Any] | None:
    floors = [run["baseline"] for runs in results.runs.values() for run in runs.values() if run.get("baseline")]
    if not floors or not results.has_test:
        return None
    return {metric: float(np.mean([floor[metric] for floor in floors])) for metric in METRICS}


def _versions(results: SweepResults) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for runs in results.runs.values():
        for run in runs.values():
            for package, version in run.get("speed", {}).get("environment", {}).get("versions", {}).items():
                found.setdefault(package, set()).add(version)
    return {package: sorted(versions) for package, versions in found.items()}


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part and whole else None
