"""From the runs of a sweep to what may be said about its arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokmask_peft.artifacts import Result, RunFolder
from tokmask_peft.errors import SweepError, read_json
from tokmask_peft.study import statistics
from tokmask_peft.study.plan import AS_RECIPE, NONE, SWEEP_FILE
from tokmask_peft.study.statistics import METRICS, PAPER_GAINS, spread

REPLICATES = 2000
METHODS = {
    "interval": "95% interval of the mean over seeds, Student's t",
    "bootstrap": f"95% percentile interval of {REPLICATES} draws of seeds and texts, crossed (Owen 2007)",
    "p_value": "two-sided sign-flip permutation test over seeds, exact up to 16 seeds (Fisher 1935)",
    "p_holm": "Holm's step-down over the arms of a setting, for each metric on its own",
    "effect_size": "Cohen's d_z with Hedges' exact correction (g_z): mean over standard deviation of the differences",
    "seeds_needed": "two-sided paired t-test at level .05 with power .8, exact by the noncentral t distribution",
}


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """What is compared over seeds: one arm (see `plan.Arm`) under one setting of the `--grid` axes."""

    setting: tuple[tuple[str, str], ...]
    regularizers: str
    p: float

    @property
    def is_reference(self) -> bool:
        """Whether other arms of the setting are compared with this one."""
        return self.p == 0 and self.regularizers in (NONE, AS_RECIPE)

    @property
    def arm(self) -> str:
        """Name of the arm."""
        if self.regularizers == AS_RECIPE:
            return f"p = {self.p:g}"
        if self.p == 0:
            return self.regularizers
        return f"mask {self.p:g}" + ("" if self.regularizers == NONE else f" + {self.regularizers}")

    @property
    def label(self) -> str:
        """Name of the arm, and its setting."""
        return "; ".join([self.arm, *(f"{key.rpartition('.')[2]} = {value}" for key, value in self.setting)])


@dataclass(frozen=True, slots=True)
class SweepResults:
    """The finished runs of a sweep by row and seed, rows in the sweep's order, and the cells without a result."""

    name: str
    task: str
    runs: dict[Row, dict[int, Result]]
    folders: dict[tuple[Row, int], RunFolder]
    missing: tuple[str, ...]

    @property
    def all_runs(self) -> list[Result]:
        """The results of all rows and seeds."""
        return [run for runs in self.runs.values() for run in runs.values()]

    @property
    def split(self) -> str:
        """The split that the report is about: test if every run was scored on it."""
        return "test" if all(run.test is not None for run in self.all_runs) else "validation"

    def scores(self, row: Row, metric: str, split: str | None = None) -> dict[int, float]:
        """Return the scores of a row by seed."""
        return {seed: float(getattr(run, split or self.split)[metric]) for seed, run in self.runs[row].items()}

    def predictions(self, row: Row, seed: int) -> dict[str, Any] | None:
        """Return gold and predicted ids per text, and the labels; none if the run did not save them."""
        file = self.folders[row, seed].predictions
        content = read_json(file, SweepError, "bad-predictions") if file.is_file() else {}
        return {"labels": content["labels"], **content[self.split]} if self.split in content else None


def read_sweep(folder: Path) -> SweepResults:
    """Read a sweep's folder; rows by setting and regularizers in the sweep's order, then by rate, references first.

    Raises:
        SweepError: the folder is not a sweep, has no finished run, or cannot be compared arm by arm.
        RunError: a result cannot be read.
    """
    file = folder / SWEEP_FILE
    if not file.is_file():
        raise SweepError(f"{folder} is not the folder of a sweep (it holds no {SWEEP_FILE})", code="not-a-sweep")
    sweep = read_json(file, SweepError, "bad-sweep")
    if sweep["sampler"] != "grid":
        problem = f"drew its values ({sweep['sampler']}), so there are no arms to compare seed by seed"
        remedy = "Its trials are in its storage; compare the best values with a grid over seeds."
        raise SweepError(f"the sweep {sweep['name']} {problem}. {remedy}", code="no-arms")
    folders: dict[tuple[Row, int], RunFolder] = {}
    missing = []
    for name, cell in sweep["cells"].items():
        run = RunFolder(folder / name)
        row = Row(tuple(sorted(cell["setting"].items())), cell["arm"]["regularizers"], float(cell["arm"]["p"]))
        if run.finished():
            folders[row, int(cell["seed"])] = run
        else:
            missing.append(name)
    if not folders:
        remedy = "run it with the command that began it"
        raise SweepError(f"the sweep {folder} has no finished run yet; {remedy}", code="no-finished-run")
    rows = [row for row, _ in folders]
    settings, kinds = ([getattr(row, name) for row in rows] for name in ("setting", "regularizers"))

    def place(row: Row) -> tuple[Any, ...]:
        return settings.index(row.setting), not row.is_reference, row.p > 0, kinds.index(row.regularizers), row.p

    runs: dict[Row, dict[int, Result]] = {row: {} for row in sorted(rows, key=place)}
    for row, seed in sorted(folders, key=lambda one: one[1]):
        runs[row][seed] = Result.read(folders[row, seed].result)
    return SweepResults(sweep["name"], sweep["recipe"]["data"]["task"], runs, folders, tuple(missing))


def analyse(results: SweepResults) -> dict[str, Any]:
    """Return everything that the report says, JSON-able."""
    rows = {row: _row(results, row) for row in results.runs}
    references = {row.setting: row for row in reversed(rows) if row.is_reference}  # of several the first
    for setting, reference in references.items():
        others = [row for row in rows if row.setting == setting and row != reference]
        for row in others:
            rows[row]["difference"] = _difference(results, reference, row)
            part, whole = rows[row]["seconds_per_step"], rows[reference]["seconds_per_step"]
            rows[row]["cost"] = part / whole if part and whole else None
        for metric in METRICS:
            tested = [found[metric] for row in others if metric in (found := rows[row]["difference"])]
            for one, adjusted in zip(tested, statistics.holm([one["p_value"] for one in tested]), strict=True):
                one["p_holm"] = adjusted
    floors = [run.baseline for run in results.all_runs if run.baseline and results.split == "test"]
    versions: dict[str, set[str]] = {}
    for run in results.all_runs:
        for package, version in run.speed.get("environment", {}).get("versions", {}).items():
            versions.setdefault(package, set()).add(version)
    return {
        "sweep": results.name,
        "task": results.task,
        "scored_on": results.split,
        "seeds": sorted({seed for runs in results.runs.values() for seed in runs}),
        "rows": list(rows.values()),
        "chosen_by_validation": _choice(results),
        "paper": _paper(results, list(rows.values())),
        "baseline": {name: float(np.mean([floor[name] for floor in floors])) for name in METRICS} if floors else None,
        "missing": list(results.missing),
        "versions": {package: sorted(found) for package, found in versions.items()},
        "methods": METHODS,
    }


def _row(results: SweepResults, row: Row) -> dict[str, Any]:
    def over_seeds(metric: str, split: str | None = None) -> dict[str, Any]:
        values = list(results.scores(row, metric, split).values())
        return {"by_seed": values, **spread(values)}

    speeds = [run.speed for run in results.runs[row].values() if run.speed.get("steps")]
    seconds = [speed["step_seconds"] / speed["steps"] for speed in speeds]  # a resumed run timed its last steps only
    return {
        "arm": row.arm,
        "label": row.label,
        "setting": dict(row.setting),
        "regularizers": row.regularizers,
        "p": row.p,
        "is_reference": row.is_reference,
        "seeds": list(results.runs[row]),
        **{metric: over_seeds(metric) for metric in METRICS},
        "validation_f1_macro": over_seeds("f1_macro", "validation"),
        "seconds_per_step": float(np.median(seconds)) if seconds else None,
    }


def _difference(results: SweepResults, reference: Row, row: Row) -> dict[str, Any]:
    seeds = [seed for seed in results.runs[reference] if seed in results.runs[row]]
    found: dict[str, Any] = {"seeds": seeds}
    if not seeds:
        return found
    replicates, found["bootstrap_problem"] = _replicates(results, reference, row, seeds)
    for metric in METRICS:
        before, after = results.scores(reference, metric), results.scores(row, metric)
        differences = [after[seed] - before[seed] for seed in seeds]
        found[metric] = {
            "by_seed": differences,
            **spread(differences),
            "bootstrap": statistics.percentile_interval(replicates[metric]) if replicates else None,
            "p_value": float(statistics.sign_flip_p(differences)),
            "smallest_p": statistics.smallest_p(len(seeds)),
            "effect_size": statistics.hedges_gz(differences),
        }
    return found


def _replicates(
    results: SweepResults, reference: Row, row: Row, seeds: Sequence[int]
) -> tuple[dict[str, Any] | None, str | None]:
    """Bootstrap the differences, or return the reason why that is not possible."""
    counts: dict[Row, list[Any]] = {reference: [], row: []}
    gold = None
    for one, runs in counts.items():
        for seed in seeds:
            found = results.predictions(one, seed)
            if found is None:
                return None, f"{results.folders[one, seed].root.name} has no predictions.json"
            gold = gold or found["gold"]
            if found["gold"] != gold:
                return None, f"the {results.split} texts differ between seeds"
            runs.append(statistics.text_counts(found["gold"], found["predicted"], len(found["labels"])))
    return statistics.bootstrap_differences(counts, reference, REPLICATES)[row], None


def _choice(results: SweepResults) -> dict[str, Any]:
    """Return what validation would have chosen, for each seed and over all, and its scores."""
    validation = {row: results.scores(row, "f1_macro", "validation") for row in results.runs}
    seeds = sorted({seed for scores in validation.values() for seed in scores})
    whole = [seed for seed in seeds if all(seed in scores for scores in validation.values())]
    references = [row for row in results.runs if row.is_reference]
    scored = {metric: {row: results.scores(row, metric) for row in results.runs} for metric in METRICS}
    per_seed: list[dict[str, Any]] = []
    for seed in whole:  # of equals the first, which is the one with less masking
        chosen = max(results.runs, key=lambda row: validation[row][seed])
        scores = {metric: scored[metric][chosen][seed] for metric in METRICS}
        per_seed.append({"seed": seed, "label": chosen.label, "p": chosen.p, **scores})
        if references:
            plain = max(references, key=lambda row: validation[row][seed])
            per_seed[-1]["gain"] = scores["f1_macro"] - scored["f1_macro"][plain][seed]
    found: dict[str, Any] = {"per_seed": per_seed, "seeds_left_out": sorted(set(seeds) - set(whole))}
    if whole:
        for metric in (*METRICS, *(["gain"] if references else [])):
            found[metric] = spread([one[metric] for one in per_seed])
        best = max(results.runs, key=lambda row: np.mean([validation[row][seed] for seed in whole]))
        overall = {metric: spread([scored[metric][best][seed] for seed in whole]) for metric in METRICS}
        found["overall"] = {"label": best.label, "p": best.p, **overall}
    return found


def _paper(results: SweepResults, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how many seeds would show the gains that the authors report, given how much the differences vary here."""
    about, gains = PAPER_GAINS.get(results.task, ("", {}))
    needed = []
    for row in rows:
        found = row.get("difference", {}).get("f1_macro")
        if not gains or row["p"] == 0 or not found or found["sd"] is None:
            continue
        bounds, counts = statistics.sd_interval(found["sd"], found["n"]), {}
        for backbone, gain in gains.items():
            seeds, *ends = (statistics.seeds_needed(gain, sd) for sd in (found["sd"], *bounds))
            counts[backbone] = {"seeds": seeds, "interval": ends}
        needed.append({"label": row["label"], "sd": found["sd"], "sd_interval": list(bounds), "needed": counts})
    return {"task": about, "gains": gains, "rows": needed}
