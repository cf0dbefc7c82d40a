"""Train the MiniLM recipes on real text, several seeds with and without masking, and tabulate what came out.

    TOKMASK_DATA=FOLDER python benchmarks/main_job.py            # trains what is missing, then writes the table
    python benchmarks/main_job.py --table                        # only rewrites the table from the committed JSON

A finished run is not trained again. The scores of every run go to `benchmarks/results/main_job.json`, the table to
standard output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "main_job.json"
RECIPES = ("trec", "melid_mareng", "mesent_mareng")
SEEDS = (1, 2, 3)
RATES = (0.0, 0.1)


def train_missing(runs: Path) -> None:
    """Train every combination that has no result yet."""
    for recipe in RECIPES:
        for seed in SEEDS:
            for p in RATES:
                name = run_name(recipe, p, seed)
                if (runs / name / "result.json").is_file():
                    continue
                options = [f"output_dir={runs}", f"name={name}", f"seed={seed}", f"masking.p={p:g}"]
                command = [sys.executable, "-m", "tokmask_peft", "train", f"{recipe}/minilm", *options, "--quiet"]
                if (runs / name / "recipe.yaml").is_file():
                    command.append("--resume")
                subprocess.run(command, check=True)


def run_name(recipe: str, p: float, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"{recipe}-p{p:g}-s{seed}"


def collect(runs: Path) -> list[dict[str, Any]]:
    """Return a row per run: what was trained, its scores, and what it ran on."""
    rows = []
    for recipe in RECIPES:
        for p in RATES:
            for seed in SEEDS:
                result = json.loads((runs / run_name(recipe, p, seed) / "result.json").read_text(encoding="utf-8"))
                parts = {key: result[key] for key in ("validation", "test", "baseline")}
                rows.append(
                    {
                        "recipe": recipe,
                        "p": p,
                        "seed": seed,
                        **{
                            f"{name}_{score}": part[score]
                            for name, part in parts.items()
                            for score in ("f1_macro", "f1_weighted", "accuracy")
                        },
                        "steps": result["steps"],
                        "step_seconds": result["speed"]["step_seconds"],
                        "environment": result["speed"]["environment"],
                    }
                )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table: mean and standard deviation of test macro-F1 over seeds, and the difference."""
    by_arm: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    floor: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_arm[row["recipe"], row["p"]][row["seed"]] = row["test_f1_macro"]
        floor[row["recipe"]].append(row["baseline_f1_macro"])
    lines = [
        "| recipe | character n-grams | p = 0 | p = 0.1 | difference, seed by seed |",
        "|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        cells = []
        for p in RATES:
            values = list(by_arm[recipe, p].values())
            cells.append(f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}")
        differences = [by_arm[recipe, RATES[1]][seed] - by_arm[recipe, RATES[0]][seed] for seed in SEEDS]
        shown = ", ".join(f"{difference:+.4f}" for difference in differences)
        lines.append(f"| {recipe} | {statistics.mean(floor[recipe]):.4f} | {cells[0]} | {cells[1]} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/main_job"), help="folder of the runs")
    parser.add_argument("--table", action="store_true", help="only rewrite the table from the committed JSON")
    arguments = parser.parse_args()
    if not arguments.table:
        train_missing(arguments.runs)
        rows = collect(arguments.runs)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
