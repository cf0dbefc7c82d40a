"""The whole default run compared with what tutorials do: a Trainer that pads to 128, or to the batch's longest text.

    OMP_NUM_THREADS=1 python benchmarks/default_run.py

MiniLM with LoRA on all linear layers, 32 texts a batch, optimizer and all, CPU seconds of `Trainer.train()` on the same
texts, in interleaved rounds. The tutorials' runs compute in fp32, without masking, and with dropout on the adapter's
input, as tutorials have it; ours as the recipes say, which have none, and once with the tutorials' dropout. With
`TOKMASK_DATA` set the texts are real tweets: Marathi-English ones, of 31 sub-tokens on average, and Twi ones, of 19.
The share of a physical limit is that of 4 x parameters x real sub-tokens FLOPs (forward pass and gradients of the
inputs; the frozen weights have none) at the machine's matrix rate.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from workload import (
    CPU,
    LABELS,
    MINILM,
    SHORT,
    TWEETS,
    benchmark_texts,
    interleaved,
    matrix_rate,
    padded_collator,
    ratio,
    report,
    tutorial_model,
)

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.errors import DataError
from tokmask_peft.masking.callback import TokenMaskCallback
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.location import backbone_location
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe.schema import ModelConfig, Recipe
from tokmask_peft.training.losses import ClassificationLoss
from tokmask_peft.training.trainer import OrderedEvalTrainer, training_arguments

STEPS, BATCH, ROUNDS = 10, 32, 3
DROPOUT = 0.05
OURS = {  # what about ours: its arm, and the targets of its ratios
    "": ("default", {"padded to 128": "12; 6 on fp32 CPUs", "dynamic padding": "3.5"}),
    " with the same dropout": (
        "default, with dropout", {"padded to 128": "12; 6 on fp32 CPUs", "dynamic padding": "3.5"}),
    " in fp32": ("default, fp32", {"padded to 128": "6", "dynamic padding": ""}),
}  # fmt: skip
THEIRS = {"padded to 128": "padded to 128, fp32", "dynamic padding": "dynamic, fp32"}


def trained(trainer: Trainer) -> float:
    """Train silently and return the CPU seconds."""
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    return time.process_time() - start


def tutorial(rows: Dataset, tokenizer: Any, folder: str, **padding: Any) -> float:
    """Train as the tutorials do and return the CPU seconds."""
    set_seed(0)
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=5e-4, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    model, collate = tutorial_model(ModelConfig(**MINILM), DROPOUT), DataCollatorWithPadding(tokenizer, **padding)
    return trained(Trainer(model, arguments, train_dataset=rows, data_collator=collate))


def default(rows: Dataset, folder: str, *changes: str) -> float:
    """Train as the recipes do, with `changes`, and return the CPU seconds."""
    recipe = Recipe.load("trec/minilm", ["data.path=.", f"training.max_steps={STEPS}", *changes])
    set_seed(0)
    backbone = load_backbone(recipe.model, "sequence", LABELS, CPU)
    enable_padding_free(backbone.model)
    model, _ = add_adapter(backbone, recipe.adapter, "sequence")
    arguments = training_arguments(recipe, Path(folder), CPU, backbone.dtype == torch.bfloat16)
    arguments.eval_strategy, arguments.save_strategy, arguments.load_best_model_at_end = "no", "no", False
    trainer = OrderedEvalTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=padded_collator(backbone.tokenizer),
        processing_class=backbone.tokenizer,
        train_collator=PackedCollator("sequence"),
        compute_loss_func=ClassificationLoss(),
        callbacks=[TokenMaskCallback(TokenMaskConfig(p=0.1), announce=False)],
    )
    return trained(trainer)


def measured(texts: list[list[int]], tokenizer: Any, dropout: bool) -> dict[str, list[float]]:
    """Return the CPU seconds of each arm on `texts`, round by round; `dropout` adds ours with theirs."""
    labels, lengths = [number % 3 for number in range(len(texts))], [len(text) for text in texts]
    rows = Dataset.from_dict({"input_ids": texts, "labels": labels, "length": lengths})
    plain = rows.remove_columns("length")
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            "default": lambda: default(rows, folder),
            "default, fp32": lambda: default(rows, folder, "model.precision=fp32"),
            "default, with dropout": lambda: default(rows, folder, f"adapter.dropout={DROPOUT}"),
            "dynamic, fp32": lambda: tutorial(plain, tokenizer, folder),
            "padded to 128, fp32": lambda: tutorial(plain, tokenizer, folder, padding="max_length", max_length=128),
        }
        if not dropout:
            del arms["default, with dropout"]
        default(rows, folder)  # what is slow the first time
        return interleaved(arms, ROUNDS)


def main() -> None:
    """Measure, print the table and write the JSON."""
    config = ModelConfig(**MINILM)
    tokenizer = AutoTokenizer.from_pretrained(backbone_location(config))
    backbone = load_backbone(config, "sequence", LABELS, CPU)
    inside = sum(weight.numel() for name, weight in backbone.model.named_parameters() if "embeddings" not in name)
    computed = "bf16" if backbone.dtype == torch.bfloat16 else "fp32"
    rates = {"bf16": matrix_rate(torch.bfloat16), "fp32": matrix_rate(torch.float32)}
    result: dict[str, Any] = {"steps": STEPS, "texts": {}, "cpu_seconds": {}, "flops_per_second": rates}
    rows: dict[str, tuple[list[float], str]] = {}
    for number, name in enumerate((TWEETS, SHORT)):
        try:
            origin, texts = benchmark_texts(tokenizer, STEPS * BATCH, name)
        except DataError as error:  # the second corpus is used only if it is there
            if number == 0:
                raise
            print(f"{name} left out: {error}")
            continue
        if origin in result["texts"]:  # drawn texts have no second corpus
            continue
        found = measured(texts, tokenizer, dropout=number == 0)
        prefix, tokens = f"{origin}: " if number else "", sum(map(len, texts))
        sizes = {"texts": len(texts), "mean": tokens / len(texts), "longest": max(map(len, texts))}
        result["texts"][origin], result["cpu_seconds"][origin] = sizes, found
        for way, (own, targets) in OURS.items():
            for theirs, target in targets.items() if own in found else ():
                rows[f"{prefix}{theirs}, to the default run{way}"] = (ratio(found, THEIRS[theirs], own), target)
        for what, arm, kind in (("default run", "default", computed), ("dynamic padding", "dynamic, fp32", "fp32")):
            share = [4 * inside * tokens / rates[kind] / seconds for seconds in found[arm]]
            rows[f"{prefix}{what}, share of the {kind} matrix rate"] = (share, "")
    report("default_run", result, rows)


if __name__ == "__main__":
    main()
