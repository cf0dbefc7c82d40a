"""How fast `predict` is beside `transformers.pipeline`, and whether memory grows with the file.

    TOKMASK_DATA=FOLDER python benchmarks/predict.py RUN [--texts 1000] [--rounds 5] [--rows 100000] [--out FILE.json]

RUN is a run of a sequence task; the texts are those it was trained on, in random order. Classifier and pipeline hold
the same adapter, the pipeline merged into the backbone, each in fp32 and, where the run was trained so, in bf16; the
pipeline at the best batch size of several, found first. They take turns in every round, so that what else the machine
does meets all of them. Then a file of `--rows` texts goes through `tokmask predict` in a process of its own, whose
memory is read every second.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import pipeline

from tokmask_peft import load
from tokmask_peft.data import load_corpus
from tokmask_peft.inference.export import export_merged
from tokmask_peft.inference.saved import find_saved
from tokmask_peft.recipe import Recipe
from tokmask_peft.training.environment import environment

BATCH_SIZES = (1, 4, 8, 16, 32, 64)


def texts_of(run: str, count: int) -> list[str]:
    """Return texts of the run's train split in random order, repeated until there are enough."""
    recipe = Recipe.load(str(Path(run) / "recipe.yaml"))
    texts = [example.string for example in load_corpus(recipe.data.expanded(), recipe.seed).train]
    random.Random(0).shuffle(texts)
    return list(islice(cycle(texts), count))


def rate(classify: Callable[[list[str]], Any], texts: list[str]) -> float:
    """Return texts per second."""
    start = time.perf_counter()
    classify(texts)
    return len(texts) / (time.perf_counter() - start)


def rivals(run: str, folder: str, few: list[str], device: str) -> tuple[dict[str, Callable[..., Any]], dict[str, Any]]:
    """Return what is compared, and the rates of the pipelines at each batch size."""
    merged = export_merged(run, Path(folder) / "merged").folder
    found: dict[str, Callable[..., Any]] = {}
    tried: dict[str, Any] = {}
    precisions = {"fp32": torch.float32}
    if find_saved(run).model.precision != "fp32":
        precisions["bf16"] = torch.bfloat16
    for name, dtype in precisions.items():
        found[f"classifier {name}"] = load(run, device, precision=name).predict
        pipe = pipeline("text-classification", model=str(merged), device=device, dtype=dtype)
        rates = {
            size: statistics.median(rate(lambda part, s=size, p=pipe: p(part, batch_size=s), few) for _ in range(3))
            for size in BATCH_SIZES
        }
        tried[name] = {str(size): round(value, 1) for size, value in rates.items()}
        best = max(rates, key=rates.__getitem__)
        found[f"pipeline {name}"] = lambda part, s=best, p=pipe: p(part, batch_size=s)
    return found, tried


def measure(run: str, count: int, rounds: int, device: str) -> dict[str, Any]:
    """Return the rates of all in every round, medians, ranges, ratios, and how many labels agree."""
    texts = texts_of(run, count)
    with tempfile.TemporaryDirectory() as folder:
        found, tried = rivals(run, folder, texts[:200], device)
    rates: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds):
        for name in sorted(found, reverse=bool(number % 2)):
            rates[name].append(rate(found[name], texts))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    agreeing = {
        precision: sum(
            mine.label == other["label"]
            for mine, other in zip(
                found[f"classifier {precision}"](texts), found[f"pipeline {precision}"](texts), strict=True
            )
        )
        for precision in tried
    }
    pairs = [(precision, other) for precision in tried for other in tried if (precision, other) != ("fp32", "bf16")]
    return {
        "texts": count,
        "pipeline_batch_sizes": tried,
        "texts_per_second": {
            name: {"median": round(medians[name], 1), "lowest": round(min(values), 1), "highest": round(max(values), 1)}
            for name, values in rates.items()
        },
        "median_ratio_of_rounds": {
            f"classifier {mine} / pipeline {other}": round(
                statistics.median(
                    a / b for a, b in zip(rates[f"classifier {mine}"], rates[f"pipeline {other}"], strict=True)
                ),
                3,
            )
            for mine, other in pairs
        },
        "labels_agreeing": agreeing,
    }


def measure_file(run: str, rows: int, device: str) -> dict[str, Any]:
    """Send a file through the command line, and return its rate and its memory over time."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.txt", Path(folder) / "out.jsonl"
        source.write_text("".join(f"{text}\n" for text in texts_of(run, rows)), encoding="utf-8")
        start = time.perf_counter()
        command = [sys.executable, "-m", "tokmask_peft", "predict", run, "--file", str(source), "--out", str(out)]
        process = subprocess.Popen([*command, "--device", device], stderr=subprocess.DEVNULL)
        memory: list[int] = []
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            size = sum(path.stat().st_size for path in Path(folder).glob(".out.jsonl.*"))
            if size:  # the model is loaded and rows are coming
                memory.append(watched.memory_info().rss)
            time.sleep(1)
        seconds = time.perf_counter() - start
        assert process.returncode == 0
        with out.open(encoding="utf-8") as lines:
            assert sum(1 for _ in lines) == rows
    assert memory, "the file was done before a second was over: give more --rows"
    tenths = [memory[min(len(memory) - 1, len(memory) * part // 10)] >> 20 for part in range(1, 11)]
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds, 1),
        "rss_mib_by_tenth_of_the_time": tenths,
        "rss_mib_peak": max(memory) >> 20,
    }


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of a sequence task")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "predict.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"run": Path(arguments.run).name}
    result |= measure(arguments.run, arguments.texts, arguments.rounds, arguments.device)
    result["file"] = measure_file(arguments.run, arguments.rows, arguments.device)
    result["environment"] = environment(torch.device(arguments.device))
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("texts_per_second", "median_ratio_of_rounds", "file")}, indent=1))


if __name__ == "__main__":
    main()
