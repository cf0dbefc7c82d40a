"""How fast `predict` is compared with `transformers.pipeline`, and whether memory grows with the file.

    OMP_NUM_THREADS=1 python benchmarks/predict.py [RUN]                        # two minutes; in `make bench`
    TOKMASK_DATA=FOLDER python benchmarks/predict.py RUN --rows 100000          # a file instead of the pipeline

RUN is a run of a sequence task; the texts are those it was trained on, in random order. Without it MiniLM is trained
for a minute, on TREC if TOKMASK_DATA is set, otherwise on the built-in posts, so that its adapter is large enough to be
merged in bf16 as well, as those of real runs are; whether it was is in the JSON.
Classifier and pipeline have the same adapter, the pipeline merged into the backbone, each in fp32 and, if the run was
trained in it, in bf16; the pipeline at the best batch size of several, found first. They take turns in every round. On
a CPU times are CPU times. With `--rows` a file of that many texts goes through `tokmask predict` in a process of its
own, whose memory is read every second, and the rate is that of the clock.
"""

from __future__ import annotations

import argparse
import os
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
from workload import interleaved, matrix_rate, ratio, report

from tokmask_peft import load, train
from tokmask_peft.artifacts import find_saved
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.inference.export import export_merged
from tokmask_peft.recipe.schema import Recipe

BATCH_SIZES = (1, 4, 8, 16, 32, 64)
FEW = 100
"""Texts to find the best batch size with."""


def short_run(folder: str) -> str:
    """Train MiniLM for some steps and return the run."""
    recipe = "trec/minilm" if os.environ.get("TOKMASK_DATA") else "quickstart"
    options = ["data.task=sequence", "data.max_train=512", "training.max_steps=96", "training.baseline=false"]
    return str(train(Recipe.load(recipe, [*options, f"output_dir={folder}"]), quiet=True).folder.root)


def texts_of(run: str, count: int) -> list[str]:
    """Return texts of the run's train split in random order, repeated until there are enough."""
    recipe = Recipe.load(str(Path(run) / "recipe.yaml"))
    texts = [example.string for example in load_corpus(recipe.data.expanded(), recipe.seed).train]
    random.Random(0).shuffle(texts)
    return list(islice(cycle(texts), count))


def rate(classify: Callable[[list[str]], Any], texts: list[str], device: str) -> float:
    """Return texts per second, on a CPU per CPU second."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    classify(texts)
    return len(texts) / (clock() - start)


def rivals(
    run: str, folder: str, few: list[str], device: str
) -> tuple[dict[str, Callable[..., Any]], dict[str, Any], dict[str, str]]:
    """Return what is compared, the rates of the pipelines at each batch size, and what was done with the adapter."""
    merged = export_merged(run, Path(folder) / "merged").folder
    found: dict[str, Callable[..., Any]] = {}
    tried, adapter = {}, {}
    precisions = {"fp32": torch.float32}
    if find_saved(run).model.precision != "fp32":
        precisions["bf16"] = torch.bfloat16
    for name, dtype in precisions.items():
        classifier = load(run, device, precision=name)
        found[f"classifier {name}"] = classifier.predict
        adapter[name] = next(one.choice for one in classifier.decisions if one.what == "adapter")
        pipe = pipeline("text-classification", model=str(merged), device=device, dtype=dtype)
        rates = {
            size: statistics.median(
                rate(lambda part, s=size, p=pipe: p(part, batch_size=s), few, device) for _ in range(3)
            )
            for size in BATCH_SIZES
        }
        tried[name] = {str(size): round(value, 1) for size, value in rates.items()}
        best = max(rates, key=rates.__getitem__)
        found[f"pipeline {name}"] = lambda part, s=best, p=pipe: p(part, batch_size=s)
    return found, tried, adapter


def forward_flops(run: str, texts: list[str]) -> float:
    """Return 2 x parameters x sub-tokens of a text, on average: the physical limit's FLOPs of a forward pass."""
    classifier = load(run, "cpu")
    inside = sum(part.numel() for name, part in classifier.model.named_parameters() if "embeddings" not in name)
    ids = classifier.tokenizer(texts)["input_ids"]
    return 2 * inside * sum(map(len, ids)) / len(ids)


def batch_effect(classify: Callable[..., Any], texts: list[str]) -> float:
    """Return by how much any probability moves, at the most, between texts one by one and in batches."""
    pairs = zip(classify(texts), classify(texts, batch_size=1), strict=True)
    return max(
        abs(one.probabilities[label] - other.probabilities[label])
        for one, other in pairs
        for label in one.probabilities
    )


def measure(run: str, count: int, rounds: int, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rates of all in every round and how many labels agree, and the rows of the table."""
    texts = texts_of(run, count)
    with tempfile.TemporaryDirectory() as folder:
        found, tried, adapter = rivals(run, folder, texts[:FEW], device)
    rates = interleaved({name: lambda way=way: rate(way, texts, device) for name, way in found.items()}, rounds)
    agreeing = {}
    for precision in tried:
        mine, theirs = (found[f"{who} {precision}"](texts) for who in ("classifier", "pipeline"))
        agreeing[precision] = sum(one.label == other["label"] for one, other in zip(mine, theirs, strict=True))
    moved = {precision: batch_effect(found[f"classifier {precision}"], texts[:FEW]) for precision in tried}
    own = "bf16" if "bf16" in tried else "fp32"
    second = "CPU second" if device == "cpu" else "second"
    rows: dict[str, Any] = {f"{name}, texts per {second}": (values, "") for name, values in rates.items()}
    both = ratio(rates, f"classifier {own}", "pipeline fp32")
    rows[f"as each comes: classifier {own} to pipeline fp32"] = (both, "3")
    if device == "cpu":
        flops = forward_flops(run, texts)
        for precision in tried:
            limit = matrix_rate(torch.bfloat16 if precision == "bf16" else torch.float32)
            share = [value * flops / limit for value in rates[f"classifier {precision}"]]
            rows[f"classifier {precision}, share of the matrix rate"] = (share, "")
    for precision in tried:
        both = ratio(rates, f"classifier {precision}", f"pipeline {precision}")
        rows[f"classifier to pipeline, both in {precision}"] = (both, "")
        rows[f"labels that agree, both in {precision} (share)"] = ([agreeing[precision] / count], "")
        rows[f"{precision}: largest change of a probability with the batch"] = ([moved[precision]], "")
    result = {"texts": count, "adapter": adapter, "pipeline_batch_sizes": tried, "texts_per_second": rates}
    return {**result, "labels_agreeing": agreeing}, rows


def measure_file(run: str, rows: int, device: str) -> dict[str, Any]:
    """Send a file through the command line, and return its rate and its memory over time."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.txt", Path(folder) / "out.jsonl"
        source.write_text("".join(f"{text}\n" for text in texts_of(run, rows)), encoding="utf-8")
        start, memory = time.perf_counter(), []
        command = [sys.executable, "-m", "tokmask_peft", "predict", run, "--file", str(source), "--out", str(out)]
        process = subprocess.Popen([*command, "--device", device], stderr=subprocess.DEVNULL)
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
    parser.add_argument("run", nargs="?", help="a run of a sequence task; default: one is made and deleted")
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, help="send a file of this many texts, and leave out the pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or short_run(folder)
        if arguments.rows is None:
            result, rows = measure(run, arguments.texts, arguments.rounds, arguments.device)
            report("predict", {"run": Path(run).name, **result}, rows, device)
            return
        found = measure_file(run, arguments.rows, arguments.device)
    tenths = [float(value) for value in found["rss_mib_by_tenth_of_the_time"]]
    rows = {
        "rows per second": ([found["rows_per_second"]], ""),
        "memory of the process, from its first to its last tenth (MiB)": (tenths, ""),
    }
    report("predict_file", {"run": Path(run).name, **found}, rows, device)


if __name__ == "__main__":
    main()
