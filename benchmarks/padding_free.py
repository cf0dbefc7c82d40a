"""Time a training step with dynamic padding, with grouped texts and without padding; and with half an adapter.

    OMP_NUM_THREADS=1 python benchmarks/padding_free.py             # drawn texts
    TOKMASK_DATA=FOLDER python benchmarks/padding_free.py           # real tweets (L3Cube-MeSent) instead

MiniLM (22 million parameters) with the adapter, masking and loss of the recipes, 32 texts a batch; and once as a stock
Trainer steps, without the tutorials' dropout on the adapter's input, which would slow it down further. What is counted
is CPU time (`time.process_time`), so that other work on the machine does little harm, in interleaved rounds; each round
takes every fifth batch of an epoch, so that grouped batches of all lengths come in turn. The physical limit is
4 x parameters of the layers x real sub-tokens FLOPs at the matrix rate of the same process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding
from transformers.trainer_pt_utils import LengthGroupedSampler
from workload import CPU, MINILM, benchmark_texts, matrix_rate, ratio, report

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.adapter import add_adapter, inputs_as_they_come
from tokmask_peft.model.backbone import backbone_location, load_backbone, load_tokenizer, quick_dropout
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig
from tokmask_peft.tasks import get_task
from tokmask_peft.training.losses import ClassificationLoss

TEXTS, BATCH, ROUNDS = 640, 32, 5
STOCK = "Trainer"
"""What people would use: dynamic padding, weights in fp32 (in bf16 under autocast, as `bf16=True` has it), torch's
dropout, PEFT's copies of what enters an adapter, no masking."""
ARMS = [
    (STOCK, "all"),
    ("padded", "all"),
    ("grouped", "all"),
    ("padding_free", "all"),
    ("grouped", 0.5),
    ("padding_free", 0.5),
]


def stock(config: ModelConfig) -> Any:
    """Return the model as a script with a Trainer and PEFT makes it, without dropout on the adapter's input."""
    model = AutoModelForSequenceClassification.from_pretrained(
        backbone_location(config), num_labels=3, ignore_mismatched_sizes=True
    )
    targets = ["query", "key", "value", "dense"]
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=targets)).train()


class Arm:
    """A model in training, with one way to make batches."""

    def __init__(self, batching: str, layers: Any, precision: str) -> None:
        self.batching, self.bf16 = batching, precision == "bf16"
        torch.manual_seed(0)
        self.as_trained = ExitStack()  # for as long as the arm lives
        config = ModelConfig(**MINILM, precision=precision)
        self.tokenizer = load_tokenizer(config)
        self.model = stock(config) if batching == STOCK else self.ours(config, layers)
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        self.loss = ClassificationLoss()
        self.collate = {
            STOCK: DataCollatorWithPadding(self.tokenizer),  # to the longest text exactly, as the tutorials do
            "padded": get_task("sequence").collator(self.tokenizer),  # to a multiple of 8, as our runs do
            "grouped": get_task("sequence").collator(self.tokenizer),
            "padding_free": PackedCollator("sequence"),
        }[batching]

    def ours(self, config: ModelConfig, layers: Any) -> Any:
        """Return the model as a run trains it."""
        backbone = load_backbone(config, "sequence", ("a", "b", "c"), CPU)
        if self.batching == "padding_free":
            enable_padding_free(backbone.model)
        model, _ = add_adapter(backbone, AdapterConfig(layers=layers, dropout=0.0), "sequence")
        model.train()
        self.as_trained.enter_context(inputs_as_they_come(model, self.bf16))
        self.as_trained.enter_context(quick_dropout(model))
        TokenMasker.attach(model, self.tokenizer, TokenMaskConfig(p=0.1))
        return model

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


def measure(arms: dict[str, Arm], rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return, for each arm, real tokens per CPU second and CPU seconds per step in every round."""
    found: dict[str, dict[str, list[float]]] = {name: {"tokens": [], "step": []} for name in arms}
    for arm in arms.values():  # the first steps are slow, and so is the first batch of every shape
        for turn in range(ROUNDS):
            for batch in arm.batches(rows, turn):
                arm.step(batch)
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


def main() -> None:
    """Measure both precisions, print the table and write the JSON."""
    result: dict[str, Any] = {}
    rows: dict[str, tuple[list[float], str]] = {}
    for precision in ("fp32", "bf16"):
        arms = {f"{batching}, {layers}": Arm(batching, layers, precision) for batching, layers in ARMS}
        tokenizer = next(iter(arms.values())).tokenizer
        origin, texts = benchmark_texts(tokenizer, TEXTS)
        found = measure(arms, [{"input_ids": text, "labels": index % 3} for index, text in enumerate(texts)])
        tokens, step = ({name: part[key] for name, part in found.items()} for key in ("tokens", "step"))
        inside = sum(w.numel() for name, w in arms["padded, all"].model.named_parameters() if "layer." in name)
        rate = matrix_rate(torch.bfloat16 if precision == "bf16" else torch.float32)
        share = [4 * inside * value / rate for value in tokens["padding_free, all"]]
        result["texts"], result[precision] = origin, {"arms": found, "flops_per_second": rate}
        packed, grouped = "padding_free, all", "grouped, all"
        rows |= {
            f"{precision}: padding-free, real tokens per CPU second": (tokens[packed], ""),
            f"{precision}: padding-free, share of the matrix rate": (share, ""),
            f"{precision}: padding-free to a Trainer's step, dynamic padding": (
                ratio(tokens, packed, f"{STOCK}, all"),
                "1.9",
            ),
            f"{precision}: padding-free to padded": (ratio(tokens, packed, "padded, all"), "1.9"),
            f"{precision}: padding-free to grouped": (ratio(tokens, packed, grouped), "0.9"),
            f"{precision}: upper half to all layers, padding-free step": (
                ratio(step, "padding_free, 0.5", packed),
                "0.75",
            ),
            f"{precision}: upper half to all layers, grouped step": (ratio(step, "grouped, 0.5", grouped), "0.75"),
        }
    report("padding_free", result, rows)


if __name__ == "__main__":
    main()
