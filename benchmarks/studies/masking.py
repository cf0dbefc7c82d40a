"""Does masking help? The sweeps behind `docs/results.md`, each an ordinary `tokmask sweep`.

    TOKMASK_DATA=FOLDER python benchmarks/studies/masking.py trec trec-500   # these, then the JSON and the tables
    TOKMASK_DATA=FOLDER python benchmarks/studies/masking.py --all           # hours
    python benchmarks/studies/masking.py --list                              # the commands, to run them elsewhere

The command of a sweep is in `benchmarks/results/masking/NAME.json`, and its figures go there; for a new sweep write a
file with a `command` alone. A finished run is not trained again, and an interrupted sweep is continued.
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

from figures import RESULTS
from page import write

from tokmask_peft.artifacts import write_json
from tokmask_peft.study.results import SweepResults, analyse, read_sweep


def collected(command: str, results: SweepResults) -> dict[str, Any]:
    """Return what the tables need of a sweep: its command, the analysis, the texts, and the machine."""
    runs = results.all_runs
    environments: list[dict[str, Any]] = []
    for run in runs:
        if (one := run.speed["environment"]) not in environments:
            environments.append(one)
    splits = runs[0].data["splits"]
    return {
        "command": command,
        "analysis": analyse(results),
        "texts": {name: split["texts"] for name, split in splits.items()},
        "words": {name: split["words"] for name, split in splits.items()},
        "labels": len(runs[0].labels),
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
    files = {file.stem: file for file in sorted((RESULTS / "masking").glob("*.json"))}
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
