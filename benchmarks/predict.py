"""Texts per second of `Classifier.predict` beside `transformers.pipeline` on the merged model at its best batch size.

    python benchmarks/predict.py RUN [--texts 2000] [--rounds 3] [--out FILE.json]

Both classify the same texts with the same weights, in turns, so that what else the machine does meets both. The texts
are those of the built-in corpus, in random order, repeated until there are enough. Labels are compared, too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

from tokmask_peft import load
from tokmask_peft.data.builtin import builtin_examples
from tokmask_peft.inference.export import export_merged
from tokmask_peft.training.environment import environment

BATCH_SIZES = (1, 8, 32, 128)


def rate(classify: Callable[[list[str]], Any], texts: list[str]) -> float:
    """Return texts per second."""
    start = time.perf_counter()
    classify(texts)
    return len(texts) / (time.perf_counter() - start)


def measure(run: str, count: int, rounds: int, device: str) -> dict[str, Any]:
    """Return the rates of both in every round, their medians, and how many labels agree."""
    posts = [example.string for example in builtin_examples("sequence", "train")]
    random.Random(0).shuffle(posts)
    texts = (posts * (count // len(posts) + 1))[:count]
    classifier = load(run, device, quantization="none", precision="fp32")
    with tempfile.TemporaryDirectory() as folder:
        merged = export_merged(run, Path(folder) / "merged").folder
        pipe = pipeline("text-classification", model=str(merged), device=device)
    few = texts[: max(count // 8, 32)]
    tried = {size: rate(lambda part, size=size: pipe(part, batch_size=size), few) for size in BATCH_SIZES}
    best = max(tried, key=tried.__getitem__)
    rivals: dict[str, Callable[[list[str]], Sequence[Any]]] = {
        "classifier": classifier.predict,
        "pipeline": lambda part: pipe(part, batch_size=best),
    }
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds):
        for name in sorted(rivals, reverse=bool(number % 2)):
            found[name].append(round(rate(rivals[name], texts), 1))
    agreeing = sum(
        mine.label == other["label"]  # type: ignore[union-attr]
        for mine, other in zip(classifier.predict(texts), pipe(texts, batch_size=best), strict=True)
    )
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    return {
        "texts": count,
        "pipeline_batch_sizes": {str(size): round(value, 1) for size, value in tried.items()},
        "texts_per_second": found,
        "median": medians,
        "ratio": round(medians["classifier"] / medians["pipeline"], 3),
        "labels_agreeing": agreeing,
        "environment": environment(torch.device(device)),
    }


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of a sequence task")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "predict.json")
    arguments = parser.parse_args()
    result = measure(arguments.run, arguments.texts, arguments.rounds, arguments.device)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("median", "ratio", "labels_agreeing", "texts")}))


if __name__ == "__main__":
    main()
