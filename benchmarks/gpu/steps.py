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

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from instruments import DEVICE, DRY, Record, allocated, bf16_rate, clock, fresh_peak, peak, small
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, Qwen2Config
from workload import Stepper, benchmark_texts, order, padded_collator, prepared_by_peft

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import Backbone, head_modules, hold_in_fp32, keep_gradients_after_eval
from tokmask_peft.model.decisions import enable_checkpointing
from tokmask_peft.model.layers import place_embedding
from tokmask_peft.model.memory.estimate import Setting, estimate
from tokmask_peft.model.memory.step import Shape, bare_model
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe.schema import AdapterConfig, Recipe

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
    """One way to train a backbone, and what was measured of it."""

    batching: str  # padded, grouped, padding_free, or padded to 128
    checkpointed: bool = False
    embedding: str = "resident"  # or offload
    rates: list[float] = field(default_factory=list)  # real sub-tokens a second, round by round
    peak: int = 0  # bytes above what there was before the model, as `estimate`
    estimate: int | None = None  # None for PEFT's way
    ran_out: bool = False  # of memory


def random_backbone(config: Any, tokenizer: Any) -> Backbone:
    """Return a frozen classification model as a run loads it: NF4 with double quantization, head in fp32."""
    torch.manual_seed(0)
    model: Any = bare_model(config, "sequence", torch.bfloat16)
    heads = tuple(head_modules(model))
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
    hold_in_fp32(model, heads)
    keep_gradients_after_eval(model)
    return Backbone(model, tokenizer, heads, (), torch.bfloat16, "nf4")


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


def batches(setup: Setup, tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the batches of an epoch, on the host."""
    collate = padded_collator(tokenizer)
    if setup.batching == "padding_free":
        collate = PackedCollator("sequence")
    elif setup.batching == "padded to 128":
        collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=128)
    drawn = order(rows, SIZE, 0, setup.batching == "grouped")
    return [collate([rows[index] for index in drawn[at : at + SIZE]]) for at in range(0, len(drawn), SIZE)]


def take_turns(setups: list[Setup], stock: bool, config: Any, tokenizer: Any, rows: list[Any], rounds: int) -> None:
    """Make a model and measure its setups in turns: two epochs for the peak, and one a round for the rates."""
    before, backbone = allocated(), random_backbone(config, tokenizer)
    if stock:
        model = prepared_by_peft(backbone.model, dropout=0.05)
    else:
        place_embedding(backbone.model, setups[0].embedding, DEVICE)
        enable_padding_free(backbone.model)
        model = add_adapter(backbone, AdapterConfig(), "sequence")[0].train()
    stepper = Stepper(model, bf16=True, ours=True, device=DEVICE)
    if not stock:
        TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.1))
    epochs = [(setup, batches(setup, tokenizer, rows)) for setup in setups]
    for number in range(rounds + 1):
        for setup, epoch in epochs:
            if setup.ran_out:
                continue
            if not stock:  # PEFT's preparation has switched its own on
                new = hasattr(model, "activation_checkpointing_disable")  # the old name goes in transformers 6
                disable = model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable
                enable_checkpointing(model) if setup.checkpointed else disable()
            try:
                for _ in range(1 if number else 2):  # the very first makes kernels and optimizer states
                    fresh_peak()
                    start = clock()
                    for batch in epoch:
                        stepper.step(batch)
                    seconds = clock() - start
            except torch.OutOfMemoryError:
                setup.ran_out = True
                stepper.optimizer.zero_grad()
                allocated()  # gives back what is left over
                continue
            if number:
                masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in epoch]
                setup.rates.append(sum(int(mask.sum()) for mask in masks) / seconds)
            else:
                setup.peak = peak()["allocated"] - before
    for setup, epoch in () if stock else epochs:
        setup.estimate = estimated(setup, config, epoch)


def estimated(setup: Setup, config: Any, epoch: list[dict[str, Any]]) -> int:
    """Return the bytes that `tokmask estimate` gives for the largest batch."""
    model = {"backbone": "random", "embedding": setup.embedding, "gradient_checkpointing": setup.checkpointed}
    recipe = {"name": "gpu", "data": {"task": "sequence", "builtin": True}, "model": model}
    largest = max(epoch, key=lambda batch: batch["input_ids"].numel())
    shape = Shape.padded(*largest["input_ids"].shape)
    if "cu_seqlens" in largest:
        shape = Shape(tuple(largest["cu_seqlens"].diff().tolist()), packed=True)
    setting = Setting(config, "cuda", "nf4", torch.bfloat16)
    return estimate(Recipe.model_validate(recipe), setting, shape, Shape.padded(1, 8)).tensors


def measure(name: str, steps: int, rounds: int, rate: float) -> dict[str, Any]:
    """Measure a shape: every round of every setup, the peaks, their estimates, and the share of the matrix rate."""
    folder = Path(os.environ["TOKMASK_TOKENIZERS"]) / SHAPES[name]
    config = small(QWEN_7B if name == "Qwen2.5-7B" else AutoConfig.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config.num_labels, config.use_cache, config.pad_token_id = CLASSES, False, tokenizer.pad_token_id
    _, texts = benchmark_texts(tokenizer, SIZE * steps)
    rows = [{"input_ids": text, "labels": number % CLASSES} for number, text in enumerate(texts)]
    own = [Setup(batching, again) for batching in ("padded", "grouped", "padding_free") for again in (False, True)]
    offloaded = [Setup("padding_free", embedding="offload")]
    theirs = [Setup("padded", True), Setup("padded to 128", True)]
    for setups in (own, offloaded, theirs):
        try:
            take_turns(setups, setups is theirs, config, tokenizer, rows, rounds)
        except torch.OutOfMemoryError:  # while the model was made
            for setup in setups:
                setup.ran_out = setup.ran_out or not setup.rates
    layers = bare_model(config, "sequence", torch.bfloat16).base_model.modules()
    flops = 4 * sum(layer.weight.numel() for layer in layers if type(layer) is nn.Linear)
    found: dict[str, Any] = {"layers": config.num_hidden_layers, "bf16_tflops": rate / 1e12}
    for who, setups in {"ours": [*own, *offloaded], "PEFT's preparation": theirs}.items():
        found[who] = [{**asdict(one), "share": [flops / rate * value for value in one.rates]} for one in setups]
    return found


def _part(part: str, names: list[str], steps: int) -> None:
    record, rate = Record(part), bf16_rate()
    for name in names:
        record.attempt(name, lambda name=name: measure(name, 2 if DRY else steps, 1 if DRY else 2, rate))


PARTS = {
    "bench": lambda: _part("bench", ["Qwen2.5-0.5B", "TinyLlama-1.1B"], 6),
    "bench7b": lambda: _part("bench7b", ["Qwen2.5-7B"], 4),
}
