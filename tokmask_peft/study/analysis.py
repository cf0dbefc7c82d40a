"""From the runs of a sweep to what may be said about its arms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokmask_peft.study.bootstrap import TextCounts, bootstrap_differences, percentile_interval
from tokmask_peft.study.paper import GAINS
from tokmask_peft.study.results import METRICS, Row, SweepResults
from tokmask_peft.study.statistics import hedges_gz, holm, sd_interval, seeds_needed, sign_flip_p, smallest_p, spread

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
