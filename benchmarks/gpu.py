"""QLoRA steps on a GPU: real sub-tokens a second and peak memory, beside PEFT's preparation as a Trainer runs it.

    TOKMASK_TOKENIZERS=FOLDER python benchmarks/gpu.py              # meant to take less than eight minutes of one GPU
    ... python benchmarks/gpu.py --only Qwen2.5-7B --layers 14      # fewer layers for a small GPU; the table says so
    ... python benchmarks/gpu.py --device cpu --smoke               # tries the code; its figures mean nothing

Shapes of Qwen2.5-0.5B, TinyLlama-1.1B and Qwen2.5-7B with random weights in NF4, LoRA on all linear layers, masking and
32 texts a step: tweets where TOKMASK_DATA is set, else drawn lengths. Ours runs padded, grouped and padding-free, each
with and without gradient checkpointing, and padding-free with the embedding on the host. Against it stands
`prepare_model_for_kbit_training` with its checkpointing, padded to the batch's longest text and to 128; the Trainer
around it, which adds about a hundredth of a step, is left out of both. All ways of one model take turns in every round.
Peaks are `max_memory_allocated` above what was there before the model; beside each of ours stands what `tokmask
estimate` says of its largest batch. The share is that of 4 x weights x real sub-tokens FLOPs at the bf16 matrix rate
measured in the same run. TOKMASK_TOKENIZERS holds tokenizers and configs of the first two. A way that runs out of
memory is left out of the table and named below it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from device_meter import allocated, clock, matrix_rate, peak_of
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from random_backbone import CLASSES, FOLDERS, linear_weights, random_backbone, shape
from torch import Tensor
from transformers import DataCollatorWithPadding
from transformers.trainer_pt_utils import LengthGroupedSampler
from workload import benchmark_texts, report

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.adapter import add_adapter, inputs_as_they_come
from tokmask_peft.model.decisions import enable_checkpointing
from tokmask_peft.model.memory.estimate import Setting, estimate
from tokmask_peft.model.memory.step import Shape
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.model.placement import place_embedding
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.recipe.schema import AdapterConfig, Recipe
from tokmask_peft.tasks import get_task
from tokmask_peft.training.losses import ClassificationLoss


@dataclass
class Way:
    """A way to train one backbone.

    Attributes:
        batching: padded, grouped, padding_free, or padded to 128.
        checkpointing: whether activations are computed again.
        embedding: resident or offload.
        rates: real sub-tokens a second, round by round.
        peak: bytes above what there was before the model.
        predicted: bytes by the estimate; none for PEFT's preparation.
        ran_out: of memory.
    """

    batching: str
    checkpointing: bool = False
    embedding: str = "resident"
    rates: list[float] = field(default_factory=list)
    peak: int = 0
    predicted: int | None = None
    ran_out: bool = False

    @property
    def name(self) -> str:
        """What to call it."""
        parts = [self.batching, "checkpointed" if self.checkpointing else "", self.embedding.replace("resident", "")]
        return ", ".join(part for part in parts if part)


def batches(way: Way, rows: list[dict[str, Any]], tokenizer: Any, size: int) -> list[dict[str, Any]]:
    """Return the batches of an epoch, on the host."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator).tolist()
    if way.batching == "grouped":
        lengths = [len(row["input_ids"]) for row in rows]
        order = list(LengthGroupedSampler(size, lengths=lengths, generator=generator))
    collate: Any = get_task("sequence").collator(tokenizer)
    if way.batching == "padding_free":
        collate = PackedCollator("sequence")
    elif way.batching == "padded to 128":
        collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=128)
    return [collate([rows[index] for index in order[at : at + size]]) for at in range(0, len(order), size)]


def real_tokens(batch: dict[str, Any]) -> int:
    """Return the sub-tokens of a batch that are no padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def predicted(way: Way, config: Any, found: list[dict[str, Any]], device: torch.device) -> int:
    """Return the bytes that the estimate gives for the largest batch."""
    model = {"backbone": "random", "quantization": "nf4", "precision": "bf16", "embedding": way.embedding}
    model["gradient_checkpointing"] = way.checkpointing
    recipe = Recipe.model_validate({"name": "gpu", "model": model, "data": {"task": "sequence", "builtin": True}})
    largest = max(found, key=lambda batch: batch["input_ids"].numel())
    if way.batching == "padding_free":
        shape_ = Shape(tuple(largest["cu_seqlens"].diff().tolist()), packed=True)
    else:
        shape_ = Shape.padded(*largest["input_ids"].shape)
    return estimate(recipe, Setting(config, device.type, "nf4", torch.bfloat16), shape_, Shape.padded(1, 8)).tensors


class Runner:
    """A model in training on one device."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, masked: bool) -> None:
        self.model, self.tokenizer, self.device = model.to(device).train(), tokenizer, device
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=device.type == "cuda")
        self.loss = ClassificationLoss()
        self.as_trained = ExitStack()  # for as long as the runner lives; on a GPU PEFT makes no fp32 copies in autocast
        self.as_trained.enter_context(inputs_as_they_come(self.model, autocast=True))
        if masked:
            TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.1))

    def epoch(self, found: list[dict[str, Any]]) -> None:
        """Take a step on each batch."""
        for batch in found:
            here = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            labels = here.pop("labels")
            with torch.autocast(self.device.type, torch.bfloat16):
                output = self.model(**here)
            self.loss(output, labels).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def measure(self, ways: list[Way], rows: list[dict[str, Any]], size: int, rounds: int, before: int) -> None:
        """Measure the ways in turns."""
        epochs = {way.name: batches(way, rows, self.tokenizer, size) for way in ways}
        for number in range(rounds + 1):
            for way in ways:
                if way.ran_out:
                    continue
                self._switch(way)
                try:
                    self._round(way, epochs[way.name], number == 0, before)
                except torch.OutOfMemoryError:
                    way.ran_out = True
                    self.optimizer.zero_grad()
                    allocated(self.device)  # gives back what is left over

    def _round(self, way: Way, found: list[dict[str, Any]], first: bool, before: int) -> None:
        if first:  # kernels and the optimizer's states are made
            self.epoch(found)
            way.peak = peak_of(lambda: self.epoch(found), self.model, self.optimizer, self.device) - before
            return
        start = clock(self.device)
        self.epoch(found)
        way.rates.append(sum(map(real_tokens, found)) / (clock(self.device) - start))

    def _switch(self, way: Way) -> None:
        if way.checkpointing:
            enable_checkpointing(self.model)
        else:
            self.model.gradient_checkpointing_disable()


class StockRunner(Runner):
    """PEFT's preparation switches its checkpointing on itself."""

    def _switch(self, way: Way) -> None:
        pass


def stock(config: Any, tokenizer: Any, device: torch.device) -> Any:
    """Return the model as PEFT's guide prepares it."""
    model = prepare_model_for_kbit_training(random_backbone(config, tokenizer, device).model)
    lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    return get_peft_model(model, lora)


@contextmanager
def left_out(ways: list[Way]) -> Iterator[None]:
    """Mark ways that have not been measured where memory runs out, as it may while a model is made."""
    try:
        yield
    except torch.OutOfMemoryError:
        for way in ways:
            way.ran_out = way.ran_out or not way.rates


def measure_shape(name: str, options: argparse.Namespace, rate: float) -> tuple[dict[str, Any], Any]:
    """Measure one backbone; return the rows of the table, and what else was found."""
    device = torch.device(options.device)
    config, tokenizer = shape(name, options.layers, options.smoke)
    size, steps, rounds = (4, 2, 1) if options.smoke else (options.batch, options.steps, options.rounds)
    _, texts = benchmark_texts(tokenizer, size * steps)
    rows = [{"input_ids": text, "labels": number % CLASSES} for number, text in enumerate(texts)]
    own = [Way(batching, again) for batching in ("padded", "grouped", "padding_free") for again in (False, True)]
    offloaded = [Way("padding_free", embedding="offload")]
    theirs = [Way("padded", True), Way("padded to 128", True)]
    before = allocated(device)

    def measure_own(ways: list[Way]) -> None:
        backbone = random_backbone(config, tokenizer, device)
        place_embedding(backbone.model, ways[0].embedding, device)
        enable_padding_free(backbone.model)
        model, _ = add_adapter(backbone, AdapterConfig(), "sequence")
        Runner(model, tokenizer, device, masked=True).measure(ways, rows, size, rounds, before)
        for way in ways:
            way.predicted = predicted(way, config, batches(way, rows, tokenizer, size), device)

    for ways in (own, offloaded):
        with left_out(ways):
            measure_own(ways)
        before = allocated(device)
    with left_out(theirs):
        StockRunner(stock(config, tokenizer, device), tokenizer, device, False).measure(
            theirs, rows, size, rounds, before
        )
    allocated(device)
    flops = 4 * linear_weights(config)
    title = f"{name}, {config.num_hidden_layers} layers"
    return _table(title, [*own, *offloaded], theirs, flops / rate), [
        {"name": way.name, **vars(way)} for way in (*own, *offloaded, *theirs)
    ]


def _table(title: str, own: list[Way], theirs: list[Way], share: float) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for prefix, ways in ((title, own), (f"{title}: PEFT's preparation", theirs)):
        for way in ways:
            if way.ran_out:
                continue
            rows[f"{prefix}: {way.name}: real sub-tokens a second"] = (way.rates, "")
            rows[f"{prefix}: {way.name}: share of the matrix rate"] = ([share * value for value in way.rates], "")
            rows[f"{prefix}: {way.name}: peak (MiB)"] = ([way.peak / 2**20], "")
            if way.predicted is not None:
                rows[f"{prefix}: {way.name}: estimate to peak"] = ([way.predicted / way.peak], "0.85 to 1.15")
    best = next(way for way in own if way.name == "padding_free")
    for way in theirs:
        if best.ran_out or way.ran_out:
            continue
        ratios = [mine / other for mine, other in zip(best.rates, way.rates, strict=True)]
        rows[f"{title}: padding_free to PEFT's preparation, {way.name}: speed"] = (ratios, "")
        rows[f"{title}: padding_free to PEFT's preparation, {way.name}: peak"] = ([best.peak / way.peak], "")
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=list(FOLDERS), nargs="+", default=list(FOLDERS))
    parser.add_argument("--layers", type=int, help="at most so many layers")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="try the code on tiny layers; nothing is written")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; `--device cpu --smoke` tries the code without one")
    if not options.device.startswith("cuda") and not options.smoke:
        parser.error("figures of a CPU would mean nothing: add --smoke, or leave out --device")
    if not os.environ.get("TOKMASK_TOKENIZERS"):
        parser.error("TOKMASK_TOKENIZERS, the folder of the backbones' tokenizers and configs, is not set")
    if options.smoke:
        options.layers = options.layers or 2
    device = torch.device(options.device)
    rate = matrix_rate(device)
    rows: dict[str, Any] = {"bf16 matrix rate (TFLOPs a second)": ([rate / 1e12], "")}
    result: dict[str, Any] = {"texts_a_step": options.batch, "ways": {}}
    try:
        for name in options.only:
            found, result["ways"][name] = measure_shape(name, options, rate)
            rows |= found
    finally:  # whatever a later shape ends in, what was measured is not lost
        report("gpu", result, rows, device, write=bool(result["ways"]) and not options.smoke)
    ran_out = [f"{name}: {way['name']}" for name, ways in result["ways"].items() for way in ways if way["ran_out"]]
    if ran_out:
        print(f"\nOut of memory: {'; '.join(ran_out)}")


if __name__ == "__main__":
    main()
