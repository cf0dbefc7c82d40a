"""From the records of the confound study to paired differences, and to what each lifted confound changes in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from confounds_protocol import ARMS, RATES, SETTINGS, Arm, Select, chosen_epoch, stop_epoch
from numpy.typing import NDArray

from tokmask_peft.study.statistics import bootstrap_differences, percentile_interval, spread, text_counts
from tokmask_peft.tasks import NO_PREDICTION

REPLICATES = 2000
METHODS = {
    "score": "test macro-F1 over the words or texts that the model sees, at the epoch that the arm's rule chooses",
    "difference": "score at p minus score at p = 0 of the same arm and seed",
    "change": "difference of the arm minus difference of the authors' protocol, same p and seed",
    "interval": "95% interval of the mean over seeds, Student's t",
    "bootstrap": f"95% percentile interval of {REPLICATES} draws of seeds and texts, crossed (Owen 2007)",
    "clear": "both intervals exclude 0; not corrected for the number of comparisons",
}
Records = dict[str, dict[str, Any]]


def analyse(records: Records, seeds: Sequence[int]) -> dict[str, Any]:
    """Return everything that the report says, JSON-able.

    Args:
        records: of all runs, by name.
        seeds: of the runs.
    """
    groups = {name: _group(name, records, seeds) for name in SETTINGS}
    groups = {name: group for name, group in groups.items() if group is not None}
    return {
        "seeds": list(seeds),
        "rates": sorted(RATES),
        "settings": {name: asdict(SETTINGS[name]) for name in groups},
        "methods": METHODS,
        "groups": groups,
        "runs": [summary(record) for record in records.values() if record["group"] in groups],
    }


def run_name(arm: Arm, p: float, seed: int) -> str:
    """Name the run that holds an arm's scores at a rate."""
    return f"{arm.group}-{arm.source(p)}-p{p:g}-s{seed}"


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Return a run without its texts: what was done, the scores after each epoch, and what either rule chooses."""
    setting = SETTINGS[record["group"]]
    epochs = [
        {**epoch, "test": {key: value for key, value in epoch["test"].items() if key != "predictions"}}
        for epoch in record["epochs"]
    ]
    rules: tuple[Select, ...] = ("test", "validation")
    kept = ("group", "arm", "p", "seed", "protocol", "texts", "scored_share", "masked_share", "moved_share", "seconds")
    return {
        **{key: record[key] for key in kept if key in record},
        "chosen_by": {rule: 1 + chosen_epoch(epochs, rule, setting) for rule in rules},
        "epochs": epochs,
    }


def _group(group: str, records: Records, seeds: Sequence[int]) -> dict[str, Any] | None:
    """Analyse a group; arms and rates that lack a run of any seed are left out, all if the authors' arm is."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    arms = [arm for arm in ARMS if arm.group == group]
    for arm in arms:
        for p in sorted(arm.rates):
            found = [records.get(run_name(arm, p, seed)) for seed in seeds]
            if all(found):
                cells[arm.name, p] = [_cell(arm, record) for record in found if record is not None]
    first = arms[0].name
    if (first, 0.0) not in cells:
        return None
    replicates = _replicates(cells, (first, 0.0))
    rows = []
    for arm in arms:
        rates = [p for p in sorted(arm.rates) if (arm.name, p) in cells]
        if 0.0 in rates:
            by_rate = {f"{p:g}": _rate(cells, replicates, first, arm.name, p) for p in rates}
            rows.append({"arm": arm.name, "lifted": arm.lifted, "select": arm.select, "rates": by_rate})
    return {"arms": rows, "selection": _optimism(group, records)}


def _cell(arm: Arm, record: dict[str, Any]) -> dict[str, Any]:
    """Return what an arm reports of a run."""
    setting = SETTINGS[arm.group]
    index = chosen_epoch(record["epochs"], arm.select, setting)
    epoch = record["epochs"][index]
    gold, predicted = [], []
    for one, two in zip(record["gold"], epoch["test"]["predictions"], strict=True):
        seen = [place for place, label in enumerate(two) if label != NO_PREDICTION]
        gold.append([one[place] for place in seen])
        predicted.append([two[place] for place in seen])
    return {
        "score": epoch["test"]["f1_macro"],
        "score_all": epoch["test"]["f1_macro_all"],
        "epoch": index + 1,
        "learning_rate": epoch["learning_rate"],
        "stopped_early": stop_epoch([one[arm.select]["loss"] for one in record["epochs"]], setting) is not None,
        "scored_share": record["scored_share"],
        "moved_share": record.get("moved_share"),
        "counts": text_counts(gold, predicted, len(record["labels"])),
    }


def _replicates(cells: dict[Any, list[dict[str, Any]]], reference: Any) -> dict[Any, NDArray[np.float64]]:
    """Return bootstrap draws of each cell's mean score minus the reference's; the same draws for all."""
    counts = {key: [cell["counts"] for cell in by_seed] for key, by_seed in cells.items()}
    drawn = {key: found["f1_macro"] for key, found in bootstrap_differences(counts, reference, REPLICATES).items()}
    return {reference: np.zeros(REPLICATES), **drawn}


def _rate(
    cells: dict[Any, list[dict[str, Any]]], drawn: dict[Any, NDArray[np.float64]], first: str, arm: str, p: float
) -> dict[str, Any]:
    """Return scores of an arm at a rate, its difference to p = 0, and how far that lies from the authors' one."""
    here = cells[arm, p]
    found: dict[str, Any] = {
        key: _spread([cell[key] for cell in here]) for key in ("score", "score_all", "epoch", "learning_rate")
    }
    found["stopped_early"] = [cell["stopped_early"] for cell in here]
    found["scored_share"] = float(np.mean([cell["scored_share"] for cell in here]))
    if here[0]["moved_share"] is not None:
        found["moved_share"] = float(np.mean([cell["moved_share"] for cell in here]))
    if p == 0:
        return found
    differences = _differences(cells, arm, p)
    draws = drawn[arm, p] - drawn[arm, 0.0]
    found["difference"] = _tested(differences, draws)
    if arm != first and (first, p) in cells:
        changes = [one - other for one, other in zip(differences, _differences(cells, first, p), strict=True)]
        found["change"] = _tested(changes, draws - drawn[first, p] + drawn[first, 0.0])
    return found


def _differences(cells: dict[Any, list[dict[str, Any]]], arm: str, p: float) -> list[float]:
    return [one["score"] - zero["score"] for one, zero in zip(cells[arm, p], cells[arm, 0.0], strict=True)]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"by_seed": list(values), **spread(values)}


def _tested(values: Sequence[float], draws: NDArray[np.float64]) -> dict[str, Any]:
    found = {**_spread(values), "bootstrap": percentile_interval(draws)}
    bounds = [found["interval"], found["bootstrap"]]
    found["clear"] = all(bound is not None and (bound[0] > 0 or bound[1] < 0) for bound in bounds)
    return found


def _optimism(group: str, records: Records) -> dict[str, Any]:
    """Return, over all runs of a group, the test score chosen on test minus the one chosen on validation."""
    setting, gaps = SETTINGS[group], []
    for record in records.values():
        if record["group"] != group:
            continue
        scores = [epoch["test"]["f1_macro"] for epoch in record["epochs"]]
        rules: tuple[Select, ...] = ("test", "validation")
        one, other = (scores[chosen_epoch(record["epochs"], rule, setting)] for rule in rules)
        gaps.append(one - other)
    return {"runs": len(gaps), "mean": float(np.mean(gaps)), "most": max(gaps), "least": min(gaps)}
