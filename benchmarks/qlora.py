"""Bytes and step time of QLoRA as this package prepares it, beside PEFT's preparation with every text padded to 128.

    OMP_NUM_THREADS=2 python benchmarks/qlora.py          # minutes, and some 8 GB of memory

A model of Qwen2.5-0.5B's shape with random weights, NF4 with double quantization, LoRA on all linear layers, 16 texts
with the lengths of posts. Static bytes are those of all parameters, buffers and quantization constants; saved bytes
those that autograd keeps for the backward pass, each storage once, parameters left out.
No arm makes the fp32 copies of what enters an adapter that PEFT makes on CPUs: on a GPU, in autocast, it makes none.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)
from workload import CPU, drawn_lengths, interleaved, matrix_rate, ratio, report

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.adapter import add_adapter, inputs_as_they_come
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig

TEXTS, PADDED, ROUNDS = 16, 128, 3
QWEN = Qwen2Config(  # of Qwen/Qwen2.5-0.5B
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    pad_token_id=0,
    num_labels=3,
    use_cache=False,
)


def save_backbone(folder: Path) -> None:
    """Save random weights of the shape in bf16, and a tokenizer of few words."""
    torch.manual_seed(0)
    Qwen2ForSequenceClassification(QWEN).to(torch.bfloat16).save_pretrained(folder)
    words = {"<pad>": 0, "<unk>": 1, "<end>": 2, "word": 3}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # type: ignore[call-arg]
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    tokenizer.save_pretrained(folder)


def ours(folder: Path) -> nn.Module:
    """Return the model as a run prepares it, with masking."""
    config = ModelConfig(backbone=str(folder), quantization="nf4", precision="bf16")
    backbone = load_backbone(config, "sequence", ("a", "b", "c"), CPU)
    enable_padding_free(backbone.model)
    model, _ = add_adapter(backbone, AdapterConfig(), "sequence")
    TokenMasker.attach(model, backbone.tokenizer, TokenMaskConfig(p=0.1))
    return model.train()


def stock(folder: Path, checkpointing: bool) -> nn.Module:
    """Return the model as PEFT's guide prepares it."""
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=quantized, dtype=torch.bfloat16, device_map={"": CPU}
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    return get_peft_model(model, lora).train()


def static_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters, buffers and quantization constants."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:
            tensors += [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
            state = getattr(state, "state2", None)
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def quantized(model: nn.Module) -> Iterator[Any]:
    """Yield the quantization constants of every 4-bit layer, with the layer's shape."""
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            yield state


def saved_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without the model's own tensors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}
    kept = []  # a storage that is freed would give its address to the next one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    kept_here = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with inputs_as_they_come(model, autocast=True):
        with kept_here, torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    model.zero_grad()
    return sum(seen.values())


def step(model: nn.Module, batch: dict[str, Any]) -> float:
    """Return the CPU seconds of a forward and a backward pass."""
    start = time.process_time()
    with inputs_as_they_come(model, autocast=True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    model.zero_grad()
    return time.process_time() - start


def main() -> None:
    """Measure, print the table and write the JSON."""
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 150_000, (length,), generator=draw) for length in drawn_lengths(TEXTS)]
    labels = torch.arange(TEXTS) % 3
    packed = PackedCollator("sequence")(
        [{"input_ids": text, "labels": int(label)} for text, label in zip(texts, labels, strict=True)]
    )
    ids = torch.zeros(TEXTS, PADDED, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    padded = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(Path(folder))
        own, checkpointed, plain = ours(Path(folder)), stock(Path(folder), True), stock(Path(folder), False)
    arms: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "ours": (own, packed),
        "PEFT's preparation": (plain, padded),
        "PEFT's preparation, checkpointed": (checkpointed, padded),
    }
    for name, (model, batch) in arms.items():
        found[name] = {"static": static_bytes(model), "saved": saved_bytes(model, batch)}
    seconds = interleaved(
        {name: lambda model=model, batch=batch: step(model, batch) for name, (model, batch) in arms.items()}, ROUNDS
    )
    total = {name: part["static"] + part["saved"] for name, part in found.items()}
    linear = sum(math.prod(state.shape) for state in quantized(own))
    rate, tokens = matrix_rate(torch.bfloat16, len(packed["input_ids"][0]), 896, 4864), len(packed["input_ids"][0])
    rows = {
        **{f"{name}, static + saved (MiB)": ([value / 2**20], "") for name, value in total.items()},
        "bytes, to PEFT's preparation": ([total["ours"] / total["PEFT's preparation"]], "0.2"),
        "step, to PEFT's checkpointed one": (ratio(seconds, "ours", "PEFT's preparation, checkpointed"), "0.75"),
        "ours, share of the bf16 matrix rate": ([4 * linear * tokens / rate / value for value in seconds["ours"]], ""),
    }
    lengths = [len(text) for text in texts]
    report("qlora", {"lengths": lengths, "padded_to": PADDED, "bytes": found, "cpu_seconds": seconds}, rows)


if __name__ == "__main__":
    main()
