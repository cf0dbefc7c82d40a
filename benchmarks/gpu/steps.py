"""QLoRA steps of three shapes with random weights: real sub-tokens a second and peak memory, and those of PEFT's way.

Weights are made on the device layer by layer in NF4, so that a 7B needs no checkpoint. LoRA on all linear layers,
masking, 32 texts a step. Ours is padded, grouped and without padding, each with and without gradient checkpointing, and
without padding with the embedding on the host; theirs is `prepare_model_for_kbit_training` with its checkpointing,
padded to the batch's longest text and to 128. All settings of a model take turns in every round. Peaks are what is
allocated above what was there before the model; the share is that of 4 x weights x real sub-tokens FLOPs at the bf16
matrix rate of the same process.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import insides
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from instruments import DEVICE, DRY, Record, allocated, clock, fresh_peak, matrix_rate, peak
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, Qwen2Config
from workload import Stepper, benchmark_texts, order, padded_collator

SIZE, CLASSES = 4 if DRY else 32, 3
SHAPES = {"Qwen2.5-0.5B": "Qwen2.5-0.5B", "TinyLlama-1.1B": "TinyLlama-1.1B-Chat-v1.0", "Qwen2.5-7B": "Qwen2.5-0.5B"}
"""The folder below TOKMASK_TOKENIZERS; Qwen2.5 has one tokenizer for all sizes."""
QWEN_7B = Qwen2Config(  # Qwen/Qwen2.5-7B
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=131072, rms_norm_eps=1e-6, rope_theta=1_000_000.0,
    tie_word_embeddings=False, bos_token_id=151643, eos_token_id=151643,
)  # fmt: skip


@dataclass
class Setup:
    """One way to train a backbone, and what was measured of it.

    Attributes:
        batching: padded, grouped, padding_free, or padded to 128.
        checkpointed: whether activations are recomputed.
        embedding: resident or offload.
        rates: real sub-tokens a second, round by round.
        peak, estimate: bytes above what there was before the model; PEFT's way has no estimate.
        ran_out: of memory.
    """

    batching: str
    checkpointed: bool = False
    embedding: str = "resident"
    rates: list[float] = field(default_factory=list)
    peak: int = 0
    estimate: int | None = None
    ran_out: bool = False


def shape(name: str) -> tuple[Any, Any]:
    """Return config and tokenizer; in a dry run everything but the vocabulary is small."""
    folder = Path(os.environ["TOKMASK_TOKENIZERS"]) / SHAPES[name]
    config = QWEN_7B if name == "Qwen2.5-7B" else AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found = {**config.to_dict(), "num_labels": CLASSES, "use_cache": False, "pad_token_id": tokenizer.pad_token_id}
    if DRY:
        found |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        found |= {"head_dim": 16, "num_hidden_layers": 2}
    if found.get("layer_types"):
        found["layer_types"] = found["layer_types"][: found["num_hidden_layers"]]
    return type(config)(**found), tokenizer


def random_backbone(config: Any, tokenizer: Any) -> insides.Backbone:
    """Return a frozen classification model as a run loads it: NF4 with double quantization, head in fp32."""
    torch.manual_seed(0)
    model: Any = insides.bare_model(config, "sequence", torch.bfloat16)
    heads = tuple(insides.head_modules(model))
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if type(module) is nn.Linear and name not in heads:
            setattr(model.get_submodule(parent), last, _quantized(module))
        elif "inv_freq" in module._buffers:  # rotary positions, computed when the module is made
            setattr(model.get_submodule(parent), last, type(module)(config=model.config).to(DEVICE))
        else:
            for key, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[key] = nn.Parameter(_drawn(weight), requires_grad=False)
    model.is_loaded_in_4bit = True  # what PEFT asks for
    insides.hold_in_fp32(model, heads)
    insides.keep_gradients_after_eval(model)
    return insides.Backbone(model, tokenizer, heads, (), torch.bfloat16, "nf4")


def _drawn(weight: Tensor) -> Tensor:
    made = torch.empty(weight.shape, dtype=weight.dtype, device=DEVICE)
    return made.normal_(std=0.02) if weight.dim() > 1 else made.fill_(1.0)


def _quantized(linear: nn.Linear) -> nn.Module:
    bias = linear.bias is not None
    made = Linear4bit(linear.in_features, linear.out_features, bias, torch.bfloat16, True, "nf4", device="meta")
    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True, "module": made}
    made.weight = Params4bit(_drawn(linear.weight), requires_grad=False, **options)
    if bias:
        made.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=torch.bfloat16, device=DEVICE), False)
    return made.to(DEVICE)


class Steps(Stepper):
    """A model in training, and the batches of its setups; `before` is what was allocated before it was made."""

    def __init__(self, model: Any, tokenizer: Any, masked: bool, before: int) -> None:
        super().__init__(model.train(), bf16=True, ours=False, device=DEVICE)
        self.tokenizer, self.masked, self.before = tokenizer, masked, before
        self.as_trained.enter_context(insides.inputs_as_they_come(self.model, autocast=True))
        if masked:
            insides.TokenMasker.attach(model, tokenizer, insides.TokenMaskConfig(p=0.1))

    def batches(self, batching: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the batches of an epoch, on the host."""
        drawn = order(rows, SIZE, 0, batching == "grouped")
        collate = padded_collator(self.tokenizer)
        if batching == "padding_free":
            collate = insides.PackedCollator("sequence")
        elif batching == "padded to 128":
            collate = DataCollatorWithPadding(self.tokenizer, padding="max_length", max_length=128)
        return [collate([rows[index] for index in drawn[at : at + SIZE]]) for at in range(0, len(drawn), SIZE)]

    def epoch(self, batches: list[dict[str, Any]]) -> None:
        """Take a step on each batch."""
        for batch in batches:
            self.step(batch)

    def measure(self, setups: list[Setup], rows: list[dict[str, Any]], rounds: int) -> None:
        """Measure setups in turns; the first round makes kernels and optimizer states, and gives the peak."""
        epochs = [self.batches(setup.batching, rows) for setup in setups]
        for number in range(rounds + 1):
            for setup, batches in zip(setups, epochs, strict=True):
                if setup.ran_out:
                    continue
                if self.masked and setup.checkpointed:  # PEFT's preparation has switched its own on
                    insides.enable_checkpointing(self.model)
                elif self.masked:
                    self.model.gradient_checkpointing_disable()
                try:
                    self._round(setup, batches, first=number == 0)
                except torch.OutOfMemoryError:
                    setup.ran_out = True
                    self.optimizer.zero_grad()
                    allocated()  # gives back what is left over

    def _round(self, setup: Setup, batches: list[dict[str, Any]], first: bool) -> None:
        if first:
            self.epoch(batches)
            fresh_peak()
            self.epoch(batches)
            setup.peak = peak()["allocated"] - self.before
            return
        masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
        start = clock()
        self.epoch(batches)
        setup.rates.append(sum(int(mask.sum()) for mask in masks) / (clock() - start))

    def estimate(self, setup: Setup, config: Any, rows: list[dict[str, Any]]) -> int:
        """Return the bytes that `tokmask estimate` gives for the largest batch."""
        model = {"backbone": "random", "quantization": "nf4", "precision": "bf16", "embedding": setup.embedding}
        model |= {"gradient_checkpointing": setup.checkpointed}
        packed = setup.batching == "padding_free"
        largest = max(self.batches(setup.batching, rows), key=lambda batch: batch["input_ids"].numel())
        lengths = largest["cu_seqlens"].diff().tolist() if packed else tuple(largest["input_ids"].shape)
        found = insides.estimated(config, {"model": model}, torch.bfloat16, lengths, (1, 8), packed_rows=packed)
        return found.tensors


def measure(name: str, steps: int, rounds: int, rate: float) -> dict[str, Any]:
    """Measure a shape: every round of every setup, the peaks, their estimates, and the share of the matrix rate."""
    config, tokenizer = shape(name)
    _, texts = benchmark_texts(tokenizer, SIZE * steps)
    rows = [{"input_ids": text, "labels": number % CLASSES} for number, text in enumerate(texts)]
    own = [Setup(batching, again) for batching in ("padded", "grouped", "padding_free") for again in (False, True)]
    theirs = [Setup("padded", True), Setup("padded to 128", True)]
    offloaded = [Setup("padding_free", embedding="offload")]
    linear = [one for one in insides.bare_model(config, "sequence", torch.bfloat16).base_model.modules()
              if type(one) is nn.Linear]  # fmt: skip
    flops = 4 * sum(module.weight.numel() for module in linear)

    def ours(setups: list[Setup], before: int) -> Steps:
        backbone = random_backbone(config, tokenizer)
        insides.place_embedding(backbone.model, setups[0].embedding, DEVICE)
        insides.enable_padding_free(backbone.model)
        model, _ = insides.add_adapter(backbone, insides.AdapterConfig(), "sequence")
        return Steps(model, tokenizer, masked=True, before=before)

    def stock(_: list[Setup], before: int) -> Steps:
        model = prepare_model_for_kbit_training(random_backbone(config, tokenizer).model)
        lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
        return Steps(get_peft_model(model, lora), tokenizer, masked=False, before=before)

    for make, setups in ((ours, own), (ours, offloaded), (stock, theirs)):
        try:
            made = make(setups, allocated())
            made.measure(setups, rows, rounds)
            for setup in setups if made.masked else ():
                setup.estimate = made.estimate(setup, config, rows)
        except torch.OutOfMemoryError:  # while the model was made
            for setup in setups:
                setup.ran_out = setup.ran_out or not setup.rates
        made = None
    named = {"ours": [*own, *offloaded], "PEFT's preparation": theirs}
    return {
        "layers": config.num_hidden_layers,
        "bf16_tflops": rate / 1e12,
        **{who: [{**asdict(one), "share": [flops / rate * value for value in one.rates]} for one in setups]
           for who, setups in named.items()},
    }  # fmt: skip


def _part(part: str, names: list[str], steps: int) -> None:
    record, rate = Record(part), matrix_rate()
    for name in names:
        record.attempt(name, lambda name=name: measure(name, 2 if DRY else steps, 1 if DRY else 2, rate))


PARTS = {
    "bench": lambda: _part("bench", ["Qwen2.5-0.5B", "TinyLlama-1.1B"], 6),
    "bench7b": lambda: _part("bench7b", ["Qwen2.5-7B"], 4),
}
