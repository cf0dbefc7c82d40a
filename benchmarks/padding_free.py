"""Time a training step with dynamic padding, with grouped texts and without padding; and with half an adapter.

    OMP_NUM_THREADS=1 python benchmarks/padding_free.py             # drawn texts
    TOKMASK_DATA=FOLDER python benchmarks/padding_free.py           # real tweets (L3Cube-MeSent) instead

MiniLM (22 million parameters) with the adapter, masking and loss of the recipes, 32 texts a batch; and once as a stock
Trainer steps: dynamic padding, weights in fp32 (in bf16 under autocast, as with `bf16=True`), torch's dropout, PEFT's
copies of what enters an adapter, no masking; without the tutorials' dropout on the adapter's input, which would slow it
down further. Times are CPU times (`time.process_time`), so that other work on the machine matters little, in
interleaved rounds; each round takes every fifth batch of an epoch, so that grouped batches of all lengths occur. The
physical limit is 4 x parameters of the layers x real sub-tokens FLOPs at the matrix rate of the same process.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DataCollatorWithPadding
from workload import (
    MINILM,
    Stepper,
    benchmark_texts,
    matrix_rate,
    order,
    our_model,
    padded_collator,
    ratio,
    report,
    tutorial_model,
)

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.model.backbone import load_tokenizer
from tokmask_peft.recipe.schema import ModelConfig

TEXTS, BATCH, ROUNDS = 640, 32, 5
STOCK = "Trainer"
ARMS = [(STOCK, "all"), *((name, "all") for name in ("padded", "grouped", "padding_free"))]
ARMS += [("grouped", 0.5), ("padding_free", 0.5)]


class Arm(Stepper):
    """A model in training, with one way to make batches."""

    def __init__(self, batching: str, layers: Any, precision: str) -> None:
        torch.manual_seed(0)
        config = ModelConfig(**MINILM, precision=precision)
        self.batching, self.tokenizer = batching, load_tokenizer(config)
        if batching == STOCK:
            model = tutorial_model(config, dropout=0.0)
        else:
            model, _ = our_model(config, packed=batching == "padding_free", layers=layers, dropout=0.0)
        super().__init__(model, precision == "bf16", ours=batching != STOCK)
        self.collate: Any = padded_collator(self.tokenizer)
        if batching == STOCK:
            self.collate = DataCollatorWithPadding(self.tokenizer)  # to the longest text exactly, as the tutorials do
        elif batching == "padding_free":
            self.collate = PackedCollator("sequence")

    def round(self, rows: list[dict[str, Any]], turn: int) -> tuple[int, int]:
        """Take the steps of a round, as the Trainer samples them; return their real sub-tokens and their number."""
        drawn, tokens = order(rows, BATCH, turn, self.batching == "grouped"), 0
        starts = range(turn * BATCH, len(drawn), ROUNDS * BATCH)
        for start in starts:
            batch = self.collate([rows[index] for index in drawn[start : start + BATCH]])
            tokens += int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
            self.step(batch)
        return tokens, len(starts)


def measure(arms: dict[str, Arm], rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return, for each arm, real tokens per CPU second and CPU seconds per step in every round."""
    found: dict[str, dict[str, list[float]]] = {}
    for turn in [*range(ROUNDS), *range(ROUNDS)]:
        if turn == 0:  # again: the first steps are slow, and so is the first batch of every shape
            found = {name: {"tokens": [], "step": []} for name in arms}
        for name, arm in arms.items():
            start = time.process_time()
            tokens, steps = arm.round(rows, turn)
            seconds = time.process_time() - start
            found[name]["tokens"].append(round(tokens / seconds, 1))
            found[name]["step"].append(round(seconds / steps, 4))
    return found


def main() -> None:
    """Measure both precisions, print the table and write the JSON."""
    result: dict[str, Any] = {}
    rows: dict[str, tuple[list[float], str]] = {}
    packed, grouped = "padding_free, all", "grouped, all"
    for precision in ("fp32", "bf16"):
        arms = {f"{batching}, {layers}": Arm(batching, layers, precision) for batching, layers in ARMS}
        origin, texts = benchmark_texts(arms[packed].tokenizer, TEXTS)
        found = measure(arms, [{"input_ids": text, "labels": index % 3} for index, text in enumerate(texts)])
        tokens, step = ({name: part[key] for name, part in found.items()} for key in ("tokens", "step"))
        inside = sum(w.numel() for name, w in arms["padded, all"].model.named_parameters() if "layer." in name)
        rate = matrix_rate(torch.bfloat16 if precision == "bf16" else torch.float32)
        result["texts"], result[precision] = origin, {"arms": found, "flops_per_second": rate}
        lines = {
            "padding-free, real tokens per CPU second": (tokens[packed], ""),
            "padding-free, share of the matrix rate": ([4 * inside * value / rate for value in tokens[packed]], ""),
            "padding-free to a Trainer's step, dynamic padding": (ratio(tokens, packed, f"{STOCK}, all"), "1.9"),
            "padding-free to padded": (ratio(tokens, packed, "padded, all"), "1.9"),
            "padding-free to grouped": (ratio(tokens, packed, grouped), "0.9"),
            "upper half to all layers, padding-free step": (ratio(step, "padding_free, 0.5", packed), "0.75"),
            "upper half to all layers, grouped step": (ratio(step, "grouped, 0.5", grouped), "0.75"),
        }
        rows |= {f"{precision}: {name}": line for name, line in lines.items()}
    report("padding_free", result, rows)


if __name__ == "__main__":
    main()
