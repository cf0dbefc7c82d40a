"""Lift the confounds of the authors' code one at a time (arXiv 2505.11746), and analyse what each changes.

    TOKMASK_DATA=FOLDER TOKMASK_TOKENIZERS=FOLDER python benchmarks/studies/confounds.py   # runs what is missing

A finished run has its record in the folder of the runs and is never run again. When all are there, the analysis goes to
`benchmarks/results/confounds.json`, from which `page.py` writes the tables of `docs/results.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from confounds_training import SETTINGS, Protocol, RunSpec, Setting, record_of, stop_epoch
from figures import RESULTS, clear
from numpy.typing import NDArray
from page import write

from tokmask_peft.artifacts import write_json
from tokmask_peft.examples import NO_PREDICTION
from tokmask_peft.study.statistics import spread
from tokmask_peft.training.environment import environment
from tokmask_peft.training.metrics import bootstrap_differences, percentile_interval, text_counts

RATES = (0.0, 0.1, 0.3)
REPLICATES = 2000
METHODS = {
    "score": "test macro-F1 over the words or texts that the model sees, at the epoch that the arm's rule chooses",
    "difference": "score at p minus score at p = 0 of the same arm and seed",
    "change": "difference of the arm minus difference of the authors' protocol, same p and seed",
    "interval": "95% interval of the mean over seeds, Student's t",
    "bootstrap": f"95% percentile interval of {REPLICATES} draws of seeds and texts, crossed (Owen 2007)",
    "clear": "both intervals exclude 0; not corrected for the number of comparisons",
}
Select = Literal["test", "validation"]
Cells = dict[tuple[str, float], list[dict[str, Any]]]
Draws = dict[tuple[str, float], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Arm:
    """One protocol under several masking rates."""

    group: str
    name: str
    lifted: str  # the change in words
    protocol: Protocol
    select: Select = "test"  # the split that chooses the checkpoint that is reported
    runs_of: str | None = None  # the arm whose runs it reads, if only `select` differs
    zero_of: str | None = None  # the arm whose runs at p = 0 are its own: the change affects masked tokens alone

    def source(self, p: float) -> str:
        """Return the arm whose runs contain the scores at rate `p`."""
        return self.runs_of or (self.zero_of if p == 0 else None) or self.name


ENCODER = Protocol()
WORDS = Protocol(hashtags_kept=False, max_length=15)
CAUSAL = Protocol(masked_by="id0", pads_masked=True, max_length=20)
SHORT: dict[str, Any] = {"warm_up": 0.1, "peak": 0.1}
"""The same sum of rates as with the authors' warm-up, so that only the shape differs."""
NOTHING, CHOSEN = "nothing: the authors' protocol", "checkpoint chosen on validation"
ARMS = (
    Arm("encoder", "authors", NOTHING, ENCODER),
    Arm("encoder", "dropout", "dropout stays on after epoch 1", replace(ENCODER, dropout_kept=True)),
    Arm("encoder", "warm-up", "warm-up a tenth of the run, same sum of rates", replace(ENCODER, **SHORT)),
    *(
        Arm("encoder", token, f"[MASK] to {words}", replace(ENCODER, masked_by=token), zero_of="authors")
        for token, words in {
            "id0": "id 0, the padding token",
            "unk": "the unknown token",
            "spare": "an unused row, the mean embedding, held fixed",
            "trained": "the same row, trained",
        }.items()
    ),
    Arm("encoder", "selection", CHOSEN, ENCODER, "validation", runs_of="authors"),
    Arm("encoder", "all", "dropout, warm-up and selection", replace(ENCODER, dropout_kept=True, **SHORT), "validation"),
    Arm("words", "authors", NOTHING, WORDS),
    Arm("words", "whole-texts", "hashtags kept, length 128", replace(WORDS, hashtags_kept=True, max_length=128)),
    Arm("words", "selection", CHOSEN, WORDS, "validation", runs_of="authors"),
    Arm("causal", "authors", NOTHING, CAUSAL),
    Arm("causal", "padding", "padding never masked", replace(CAUSAL, pads_masked=False), zero_of="authors"),
    Arm("causal", "row", "id 0 to a spare row, trained", replace(CAUSAL, masked_by="trained"), zero_of="authors"),
    Arm("causal", "selection", CHOSEN, CAUSAL, "validation", runs_of="authors"),
    Arm("causal", "all", "padding, mask token, warm-up and selection",
        replace(CAUSAL, masked_by="trained", pads_masked=False, dropout_kept=True, **SHORT), "validation"),
)  # fmt: skip


def runs(seeds: Sequence[int]) -> list[RunSpec]:
    """Return the runs that the arms need, seed by seed."""
    return [
        RunSpec(arm.group, arm.name, p, seed, arm.protocol, SETTINGS[arm.group])
        for seed in seeds
        for arm in ARMS
        for p in RATES
        if arm.source(p) == arm.name
    ]


def chosen_epoch(epochs: Sequence[dict[str, Any]], by: Select, setting: Setting) -> int:
    """Return the index of the epoch with the best macro-F1 of a split, before early stopping by its loss."""
    allowed = stop_epoch([epoch[by]["loss"] for epoch in epochs], setting)
    return max(range(allowed or len(epochs)), key=lambda index: epochs[index][by]["f1_macro"])


def analyse(records: dict[str, dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Return everything that is reported, JSON-able, from the records of all runs by name."""
    return {
        "seeds": list(seeds),
        "rates": list(RATES),
        "settings": {name: asdict(setting) for name, setting in SETTINGS.items()},
        "methods": METHODS,
        "groups": {name: _group(name, records, seeds) for name in SETTINGS},
        "runs": [_summary(record) for record in records.values()],
    }


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    """Return a run without its texts: what was done, the scores after each epoch, and what either rule chooses."""
    kept = ("group", "arm", "p", "seed", "protocol", "texts", "scored_share", "masked_share", "moved_share", "seconds")
    return {
        **{key: record[key] for key in kept if key in record},
        "chosen_by": {rule: 1 + index for rule, index in _chosen(record).items()},
        "epochs": [
            {**epoch, "test": {key: value for key, value in epoch["test"].items() if key != "predictions"}}
            for epoch in record["epochs"]
        ],
    }


def _chosen(record: dict[str, Any]) -> dict[Select, int]:
    rules: tuple[Select, ...] = ("test", "validation")
    return {rule: chosen_epoch(record["epochs"], rule, SETTINGS[record["group"]]) for rule in rules}


def _group(group: str, records: dict[str, dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    arms = [arm for arm in ARMS if arm.group == group]
    cells = {
        (arm.name, p): [_cell(arm, records[f"{group}-{arm.source(p)}-p{p:g}-s{seed}"]) for seed in seeds]
        for arm in arms
        for p in RATES
    }
    zero = ("authors", 0.0)
    counts = {key: [cell["counts"] for cell in by_seed] for key, by_seed in cells.items()}
    drawn = bootstrap_differences(counts, zero, REPLICATES)  # the same draws for all
    draws = {zero: np.zeros(REPLICATES), **{key: one["f1_macro"] for key, one in drawn.items()}}
    gaps = []  # over all runs, the test score chosen on test minus the one chosen on validation
    for record in records.values():
        if record["group"] == group:
            one, other = (record["epochs"][index]["test"]["f1_macro"] for index in _chosen(record).values())
            gaps.append(one - other)
    rows = [
        {"arm": arm.name, "lifted": arm.lifted, "select": arm.select,
         "rates": {f"{p:g}": _rate(cells, draws, arm.name, p) for p in RATES}}
        for arm in arms
    ]  # fmt: skip
    selection = {"runs": len(gaps), "mean": float(np.mean(gaps)), "most": max(gaps), "least": min(gaps)}
    return {"arms": rows, "selection": selection}


def _cell(arm: Arm, record: dict[str, Any]) -> dict[str, Any]:
    """Return what an arm reports of a run."""
    index = _chosen(record)[arm.select]
    epoch, losses = record["epochs"][index], [one[arm.select]["loss"] for one in record["epochs"]]
    pairs = [
        [(one, two) for one, two in zip(gold, predicted, strict=True) if two != NO_PREDICTION]
        for gold, predicted in zip(record["gold"], epoch["test"]["predictions"], strict=True)
    ]
    gold, predicted = ([[pair[side] for pair in text] for text in pairs] for side in (0, 1))
    return {
        "score": epoch["test"]["f1_macro"],
        "score_all": epoch["test"]["f1_macro_all"],
        "epoch": index + 1,
        "learning_rate": epoch["learning_rate"],
        "stopped_early": stop_epoch(losses, SETTINGS[arm.group]) is not None,
        "scored_share": record["scored_share"],
        "moved_share": record.get("moved_share"),
        "counts": text_counts(gold, predicted, len(record["labels"])),
    }


def _rate(cells: Cells, draws: Draws, arm: str, p: float) -> dict[str, Any]:
    """Return scores of an arm at a rate, its difference to p = 0, and how far that is from the authors' one."""
    here, found = cells[arm, p], dict[str, Any]()
    for key in ("score", "score_all", "epoch", "learning_rate"):
        found[key] = _with_seeds([cell[key] for cell in here])
    found["stopped_early"] = [cell["stopped_early"] for cell in here]
    for key in ("scored_share", "moved_share"):
        if here[0][key] is not None:
            found[key] = float(np.mean([cell[key] for cell in here]))
    if p == 0:
        return found

    def differences(name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        one, zero = (np.array([cell["score"] for cell in cells[name, rate]]) for rate in (p, 0.0))
        return one - zero, draws[name, p] - draws[name, 0.0]

    own, theirs = differences(arm), differences("authors")
    found["difference"] = _tested(*own)
    if arm != "authors":
        found["change"] = _tested(own[0] - theirs[0], own[1] - theirs[1])
    return found


def _with_seeds(values: Sequence[float]) -> dict[str, Any]:
    return {"by_seed": list(values), **spread(values)}


def _tested(values: NDArray[np.float64], draws: NDArray[np.float64]) -> dict[str, Any]:
    found = {**_with_seeds(values.tolist()), "bootstrap": percentile_interval(draws)}
    return {**found, "clear": clear(found)}


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/confounds"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    records = {run.name: record_of(run, options.runs) for run in runs(options.seeds)}
    content = {
        "command": "python benchmarks/studies/confounds.py --seeds " + " ".join(map(str, options.seeds)),
        "precision": "bf16 autocast",
        "environment": environment(torch.device("cpu")),
        **analyse(records, options.seeds),
        "language_model": json.loads((options.runs / "language_model.json").read_text(encoding="utf-8")),
    }
    rounded = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.6g}"))
    write_json(RESULTS / "confounds.json", rounded, indent=1)
    write()


if __name__ == "__main__":
    main()
