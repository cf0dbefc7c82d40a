"""Does masking help? The sweeps behind `docs/results.md`, each an ordinary `tokmask sweep`.

    TOKMASK_DATA=FOLDER python benchmarks/studies/masking.py trec trec-500   # these, then the JSON and the tables
    TOKMASK_DATA=FOLDER python benchmarks/studies/masking.py --all           # hours
    python benchmarks/studies/masking.py --list                              # the commands, to run them elsewhere

The command of a sweep is in `benchmarks/results/masking/NAME.json` or, if it belongs to the second study (`PLAN.md`),
in `masking2/NAME.json`, and its figures go there; for a new sweep write a file with a `command` alone. A finished run
is not trained again, and an interrupted sweep is continued.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from figures import sweep_files
from page import write

from tokmask_peft.artifacts import Result, write_json
from tokmask_peft.study.results import SweepResults, analyse, read_sweep
from tokmask_peft.training.metrics import METRICS


def single(run: Result) -> dict[str, Any]:
    """Return the figures of one run; the log-loss is that of the uncalibrated probabilities."""
    scores = {split: getattr(run, split) for split in ("validation", "test")}
    return {
        **{split: {metric: found[metric] for metric in METRICS} for split, found in scores.items() if found},
        "log_loss": {split: run.calibration[split]["before"]["nll"] for split in scores if split in run.calibration},
        "best_step": run.best_step,
        "precision": next(one["choice"] for one in run.decisions if one["what"] == "precision"),
        "mask_token": next((one["choice"] for one in run.decisions if one["what"] == "mask token"), None),
    }


def collected(command: str, results: SweepResults) -> dict[str, Any]:
    """Return what the tables need of a sweep: its command, the analysis, the texts, and the machine."""
    runs = results.all_runs
    environments: list[dict[str, Any]] = []
    for run in runs:
        if (one := run.speed["environment"]) not in environments:
            environments.append(one)
    splits = runs[0].data["splits"]
    singles = [
        {"arm": row.label, "seed": seed, **single(run)}
        for row, by_seed in results.runs.items()
        for seed, run in by_seed.items()
    ]
    pairs = zip(runs, singles, strict=True)
    if len(kinds := {f"{one['precision']} on {run.speed['environment']['device']}" for run, one in pairs}) > 1:
        sys.exit(f"{results.name}: its runs are of several kinds, which are not mixed: {', '.join(sorted(kinds))}")
    return {
        "command": command,
        "analysis": analyse(results),
        "texts": {name: split["texts"] for name, split in splits.items()},
        "words": {name: split["words"] for name, split in splits.items()},
        "labels": len(runs[0].labels),
        "runs": singles,
        "steps": runs[0].steps,
        "best_at_end": {
            row.label: statistics.mean(run.best_step == run.steps for run in by_seed.values())
            for row, by_seed in results.runs.items()
        },
        "seconds_per_run": statistics.median(run.speed["step_seconds"] for run in runs),
        "environments": environments,
    }


def main() -> None:
    """Run the command line of this file."""
    files = {file.stem: file for file in sweep_files()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(files)}")
    parser.add_argument("--all", action="store_true", help="every sweep, which takes hours")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the sweeps")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--collect", action="store_true", help="train nothing; take what is finished")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    arguments = parser.parse_args()
    if unknown := {*arguments.names} - {*files}:
        parser.error(f"there is no sweep called {', '.join(sorted(unknown))}; there are {', '.join(files)}")
    if not (arguments.names or arguments.all or arguments.list):
        parser.error("name the sweeps to train, or give --all")
    for name in arguments.names or files:
        command = json.loads(files[name].read_text(encoding="utf-8"))["command"]
        if arguments.list:
            print(command)
            continue
        if not arguments.collect:
            options = [f"output_dir={arguments.runs}", "--workers", str(arguments.workers)]
            words = [sys.executable, "-m", "tokmask_peft", *shlex.split(command)[1:], *options]
            subprocess.run(words, check=True)
        if any((arguments.runs / name).glob("*/result.json")):
            write_json(files[name], collected(command, read_sweep(arguments.runs / name)))
    if not arguments.list:
        write()


if __name__ == "__main__":
    main()
