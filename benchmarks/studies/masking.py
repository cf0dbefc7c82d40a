"""Does masking help? The sweeps behind `benchmarks/RESULTS.md`, each an ordinary `tokmask sweep`.

    TOKMASK_DATA=FOLDER python benchmarks/studies/masking.py trec trec-500   # these, then JSON and page
    TOKMASK_DATA=FOLDER python benchmarks/studies/masking.py --all           # hours
    python benchmarks/studies/masking.py --list                              # the commands, to run them elsewhere

A finished run is not trained again, a sweep that was broken off goes on. What came of each sweep goes to
`benchmarks/results/masking/NAME.json`, and `benchmarks/RESULTS.md` is written from these files alone.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from figures import STUDY
from page import PAGE, write
from sweeps import SWEEPS, Sweep

from tokmask_peft.artifacts import write_json
from tokmask_peft.study.results import SweepResults, analyse, read_sweep


def collected(sweep: Sweep, results: SweepResults) -> dict[str, Any]:
    """Return what the page needs of a sweep: its command, what was compared, the texts, and the machine."""
    runs = [run for by_seed in results.runs.values() for run in by_seed.values()]
    splits = runs[0]["data"]["splits"]
    return {
        "command": shlex.join(["tokmask", *sweep.command]),
        "analysis": analyse(results),
        "texts": {name: split["texts"] for name, split in splits.items()},
        "words": {name: split["words"] for name, split in splits.items()},
        "labels": len(runs[0]["labels"]),
        "steps": runs[0]["steps"],
        "best_at_end": {
            row.label: statistics.mean(run["best_step"] == run["steps"] for run in by_seed.values())
            for row, by_seed in results.runs.items()
        },
        "seconds_per_run": statistics.median(run["speed"]["step_seconds"] for run in runs),
        "environments": environments(runs),
    }


def environments(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the machines and versions that the runs were made on, each once."""
    found: list[dict[str, Any]] = []
    for run in runs:
        if (one := run["speed"]["environment"]) not in found:
            found.append(one)
    return found


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(sweep.name for sweep in SWEEPS)}")
    parser.add_argument("--all", action="store_true", help="every sweep, which takes hours")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the sweeps")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--collect", action="store_true", help="train nothing; take what is finished")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    arguments = parser.parse_args()
    known = {sweep.name: sweep for sweep in SWEEPS}
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"there is no sweep called {', '.join(unknown)}; there are {', '.join(known)}")
    if not (arguments.names or arguments.all or arguments.list):
        parser.error("name the sweeps to train, or give --all")
    for sweep in [known[name] for name in arguments.names] or SWEEPS:
        if arguments.list:
            print(shlex.join(["tokmask", *sweep.command]))
        elif not arguments.collect:
            where = [f"output_dir={arguments.runs}", "--workers", str(arguments.workers)]
            subprocess.run([sys.executable, "-m", "tokmask_peft", *sweep.command, *where], check=True)
        folder = arguments.runs / sweep.name
        if not arguments.list and any(folder.glob("*/result.json")):
            STUDY.mkdir(exist_ok=True)
            write_json(STUDY / f"{sweep.name}.json", collected(sweep, read_sweep(folder)))
    if not arguments.list:
        write()
        print(PAGE)


if __name__ == "__main__":
    main()
