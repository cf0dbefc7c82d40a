"""Lift the confounds of the authors' code one at a time (arXiv 2505.11746), and analyse what each changes.

    TOKMASK_DATA=FOLDER TOKMASK_TOKENIZERS=FOLDER python benchmarks/studies/confounds.py   # runs what is missing

A finished run has its record in the folder of the runs and is never run again; `--minutes` stops before a further run
begins. Every arm and rate that was run with all seeds goes to `benchmarks/results/confounds.json`, from which `page.py`
writes the tables of `benchmarks/RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from confounds_protocol import ARMS, RATES, SETTINGS, Arm, Select, chosen_epoch, runs, stop_epoch
from confounds_training import do, missing
from figures import RESULTS
from numpy.typing import NDArray
from page import write

from tokmask_peft.artifacts import write_json
from tokmask_peft.study.statistics import spread
from tokmask_peft.tasks import NO_PREDICTION
from tokmask_peft.training.environment import environment
from tokmask_peft.training.metrics import bootstrap_differences, percentile_interval, text_counts

REPLICATES = 2000
METHODS = {
    "score": "test macro-F1 over the words or texts that the model sees, at the epoch that the arm's rule chooses",
    "difference": "score at p minus score at p = 0 of the same arm and seed",
    "change": "difference of the arm minus difference of the authors' protocol, same p and seed",
    "interval": "95% interval of the mean over seeds, Student's t",
    "bootstrap": f"95% percentile interval of {REPLICATES} draws of seeds and texts, crossed (Owen 2007)",
    "clear": "both intervals exclude 0; not corrected for the number of comparisons",
}
RULES: tuple[Select, ...] = get_args(Select)
Records = dict[str, dict[str, Any]]


def analyse(records: Records, seeds: Sequence[int]) -> dict[str, Any]:
    """Return everything that is reported, JSON-able, from the records of all runs by name."""
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


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Return a run without its texts: what was done, the scores after each epoch, and what either rule chooses."""
    epochs = [
        {**epoch, "test": {key: value for key, value in epoch["test"].items() if key != "predictions"}}
        for epoch in record["epochs"]
    ]
    kept = ("group", "arm", "p", "seed", "protocol", "texts", "scored_share", "masked_share", "moved_share", "seconds")
    return {
        **{key: record[key] for key in kept if key in record},
        "chosen_by": {rule: 1 + chosen_epoch(epochs, rule, SETTINGS[record["group"]]) for rule in RULES},
        "epochs": epochs,
    }


def _group(group: str, records: Records, seeds: Sequence[int]) -> dict[str, Any] | None:
    """Analyse a group; arms and rates that lack a run of any seed are left out, all if the authors' arm is."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    arms = [arm for arm in ARMS if arm.group == group]
    for arm in arms:
        for p in sorted(RATES):
            found = [records.get(f"{group}-{arm.source(p)}-p{p:g}-s{seed}") for seed in seeds]
            if all(found):
                cells[arm.name, p] = [_cell(arm, record) for record in found if record is not None]
    first = arms[0].name
    if (first, 0.0) not in cells:
        return None
    counts = {key: [cell["counts"] for cell in by_seed] for key, by_seed in cells.items()}
    drawn = bootstrap_differences(counts, (first, 0.0), REPLICATES)  # the same draws for all
    replicates = {(first, 0.0): np.zeros(REPLICATES), **{key: found["f1_macro"] for key, found in drawn.items()}}
    rows = []
    for arm in arms:
        rates = [p for p in sorted(RATES) if (arm.name, p) in cells]
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


def _rate(
    cells: dict[Any, list[dict[str, Any]]], drawn: dict[Any, NDArray[np.float64]], first: str, arm: str, p: float
) -> dict[str, Any]:
    """Return scores of an arm at a rate, its difference to p = 0, and how far that is from the authors' one."""
    here = cells[arm, p]
    found: dict[str, Any] = {
        key: _with_seeds([cell[key] for cell in here]) for key in ("score", "score_all", "epoch", "learning_rate")
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


def _with_seeds(values: Sequence[float]) -> dict[str, Any]:
    return {"by_seed": list(values), **spread(values)}


def _tested(values: Sequence[float], draws: NDArray[np.float64]) -> dict[str, Any]:
    found = {**_with_seeds(values), "bootstrap": percentile_interval(draws)}
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
        one, other = (scores[chosen_epoch(record["epochs"], rule, setting)] for rule in RULES)
        gaps.append(one - other)
    return {"runs": len(gaps), "mean": float(np.mean(gaps)), "most": max(gaps), "least": min(gaps)}


def train_missing(folder: Path, seeds: tuple[int, ...], groups: list[str], bf16: bool, minutes: float) -> int:
    """Run what has no record yet, until the minutes are over; return how many runs are left."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [run for run in missing(folder, seeds) if run.group in groups]
    end = time.monotonic() + 60 * minutes
    while left and time.monotonic() < end:
        record = do(left[0], folder, bf16)
        scores = ", ".join(f"{epoch['test']['f1_macro']:.3f}" for epoch in record["epochs"])
        print(f"{left[0].name}: {record['seconds']:.0f} s, test macro-F1 by epoch {scores}", flush=True)
        left = left[1:]
    return len(left)


def collect(folder: Path, seeds: tuple[int, ...], bf16: bool) -> None:
    """Write the JSON from the records that are there."""
    model, files = folder / "language_model.json", {run.name: folder / f"{run.name}.json" for run in runs(seeds)}
    records = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    content = {
        "command": "python benchmarks/studies/confounds.py --seeds " + " ".join(map(str, seeds)),
        "precision": "bf16 autocast" if bf16 else "fp32",
        "environment": environment(torch.device("cpu")),
        **analyse(records, seeds),
        "language_model": json.loads(model.read_text(encoding="utf-8")) if model.is_file() else None,
    }
    rounded = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.6g}"))
    write_json(RESULTS / "confounds.json", rounded, indent=1)


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/confounds"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--groups", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast for MiniLM")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this many minutes")
    parser.add_argument("--collect", action="store_true", help="write the JSON even if runs are left")
    arguments = parser.parse_args()
    seeds = tuple(arguments.seeds)
    left = train_missing(arguments.runs, seeds, arguments.groups, not arguments.fp32, arguments.minutes)
    if left and not arguments.collect:
        raise SystemExit(f"{left} runs are left; the same command continues with them")
    collect(arguments.runs, seeds, not arguments.fp32)
    write()


if __name__ == "__main__":
    main()
