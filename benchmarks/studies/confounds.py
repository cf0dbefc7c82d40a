"""Lift the confounds of the authors' code one at a time (arXiv 2505.11746), and tabulate what each changes.

    TOKMASK_DATA=FOLDER TOKMASK_TOKENIZERS=FOLDER python benchmarks/studies/confounds.py   # runs what is missing
    python benchmarks/studies/confounds.py --report               # only the text, from the committed JSON

A finished run has its record in the folder of the runs and is never run again; `--minutes` stops before a further run
begins. What is reported goes to `benchmarks/results/confounds.json`: every arm and rate that was run with all seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from confounds_analysis import analyse
from confounds_protocol import SETTINGS
from confounds_report import section
from confounds_runs import LANGUAGE_MODEL, do, missing, read_records

from tokmask_peft.artifacts import write_json
from tokmask_peft.training.environment import environment

RESULTS = Path(__file__).parent.parent / "results" / "confounds.json"


def train_missing(folder: Path, seeds: tuple[int, ...], groups: list[str], bf16: bool, minutes: float) -> int:
    """Run what has no record yet, for at most so many minutes; return how many runs are left."""
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
    model = folder / f"{LANGUAGE_MODEL}.json"
    content = {
        "command": "python benchmarks/studies/confounds.py --seeds " + " ".join(map(str, seeds)),
        "precision": "bf16 autocast" if bf16 else "fp32",
        "environment": environment(torch.device("cpu")),
        **analyse(read_records(folder, seeds), seeds),
        "language_model": json.loads(model.read_text(encoding="utf-8")) if model.is_file() else None,
    }
    write_json(RESULTS, _rounded(content), indent=1)


def _rounded(content: Any) -> Any:
    """Return JSON-able content with six significant digits."""
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_rounded(value) for value in content]
    return float(f"{content:.6g}") if isinstance(content, float) else content


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/confounds"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--groups", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast for MiniLM")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    parser.add_argument("--collect", action="store_true", help="write the JSON though runs are left")
    parser.add_argument("--report", action="store_true", help="only print the text, from the committed JSON")
    arguments = parser.parse_args()
    if not arguments.report:
        seeds = tuple(arguments.seeds)
        left = train_missing(arguments.runs, seeds, arguments.groups, not arguments.fp32, arguments.minutes)
        if left and not arguments.collect:
            raise SystemExit(f"{left} runs are left; the same command goes on with them")
        collect(arguments.runs, seeds, not arguments.fp32)
    print(section(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
