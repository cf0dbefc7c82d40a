"""Bytes and step time of QLoRA as this package prepares it, compared with PEFT's preparation, texts padded to 128.

    OMP_NUM_THREADS=2 python benchmarks/qlora.py          # minutes, and some 8 GB of memory

A model of Qwen2.5-0.5B's shape with random weights, NF4 with double quantization, LoRA on all linear layers, 16 texts
with the lengths of posts. Static bytes are those of all parameters, buffers and quantization constants; saved bytes
those that autograd keeps for the backward pass, each storage once, without parameters. No arm makes the fp32 copies of
what enters an adapter that PEFT makes on CPUs: on a GPU, under autocast, it makes none.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification
from workload import CPU, drawn_lengths, interleaved, matrix_rate, our_model, packed_batch, ratio, report, stock_qlora

from tokmask_peft.model.adapter import inputs_as_they_come
from tokmask_peft.recipe.schema import ModelConfig

TEXTS, PADDED, ROUNDS = 16, 128, 3
QWEN = Qwen2Config(  # of Qwen/Qwen2.5-0.5B
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, num_labels=3, use_cache=False,
)  # fmt: skip
OURS, PEFT, CHECKPOINTED = "ours", "PEFT's preparation", "PEFT's preparation, checkpointed"


def save_backbone(folder: Path) -> None:
    """Save random weights of the shape in bf16, and a tokenizer of few words."""
    torch.manual_seed(0)
    Qwen2ForSequenceClassification(QWEN).to(torch.bfloat16).save_pretrained(folder)
    raw: Any = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<end>": 2, "word": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    tokenizer.save_pretrained(folder)


def quantized(model: nn.Module) -> Iterator[Any]:
    """Yield the quantization constants of every 4-bit layer."""
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            yield state


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of every storage by its address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def static_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters, buffers and quantization constants."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in quantized(model):
        while state is not None:
            tensors += [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
            state = getattr(state, "state2", None)
    return sum(storages(tensors).values())


def saved_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without the model's own tensors."""
    known = storages([*model.parameters(), *model.buffers()])
    kept: list[torch.Tensor] = []  # a storage that is freed would give its address to the next one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor)
        return tensor

    forward_and_backward(model, batch, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
    return sum(storages(kept).values())


def forward_and_backward(model: nn.Module, batch: dict[str, Any], hooks: AbstractContextManager[Any]) -> None:
    """Take a forward pass, with hooks, and a backward pass."""
    with inputs_as_they_come(model, autocast=True):
        with hooks, torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    model.zero_grad()


def step(model: nn.Module, batch: dict[str, Any]) -> float:
    """Return the CPU seconds of a forward and a backward pass."""
    start = time.process_time()
    forward_and_backward(model, batch, nullcontext())
    return time.process_time() - start


def main() -> None:
    """Measure, print the table and write the JSON."""
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 150_000, (length,), generator=draw) for length in drawn_lengths(TEXTS)]
    packed, ids = packed_batch(texts), torch.zeros(TEXTS, PADDED, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    padded = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.arange(TEXTS) % 3}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_backbone(folder)
        own, _ = our_model(ModelConfig(backbone=name, quantization="nf4", precision="bf16"))
        checkpointed, plain = (stock_qlora(folder, CPU, again, dropout=0.05) for again in (True, False))
    arms = {OURS: (own, packed), PEFT: (plain, padded), CHECKPOINTED: (checkpointed, padded)}
    found = {name: {"static": static_bytes(arm[0]), "saved": saved_bytes(*arm)} for name, arm in arms.items()}
    seconds = interleaved({name: lambda arm=arm: step(*arm) for name, arm in arms.items()}, ROUNDS)
    total = {name: sum(part.values()) for name, part in found.items()}
    tokens, linear = len(packed["input_ids"][0]), sum(math.prod(state.shape) for state in quantized(own))
    flops = 4 * linear * tokens / matrix_rate(torch.bfloat16, tokens, 896, 4864)
    rows = {
        **{f"{name}, static + saved (MiB)": ([value / 2**20], "") for name, value in total.items()},
        "bytes, to PEFT's preparation": ([total[OURS] / total[PEFT]], "0.2"),
        "step, to PEFT's checkpointed one": (ratio(seconds, OURS, CHECKPOINTED), "0.75"),
        "ours, share of the bf16 matrix rate": ([flops / value for value in seconds[OURS]], ""),
    }
    lengths = [len(text) for text in texts]
    report("qlora", {"lengths": lengths, "padded_to": PADDED, "bytes": found, "cpu_seconds": seconds}, rows)


if __name__ == "__main__":
    main()
