"""A training step that is really taken, on a CPU, with the bytes that autograd keeps for its backward pass."""

import weakref
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import real_tokenizer, tiny_tokenizer
from transformers import AutoConfig, AutoModel

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.model.adapter import add_adapter, inputs_as_they_come
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import enable_checkpointing
from tokmask_peft.model.layers import quick_dropout
from tokmask_peft.model.memory.step import LiveBytes, Shape, with_layers
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe.schema import Recipe

CPU = torch.device("cpu")
LABELS = ("a", "b", "c")


def make_recipe(folder: Path | str, task: str = "sequence", **sections: Any) -> Recipe:
    content = {"name": "x", "model": {"backbone": str(folder)}, "data": {"task": task, "builtin": True}}
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    return Recipe.model_validate(content)


def save_random(config: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Save a backbone with random weights."""
    with torch.random.fork_rng():
        AutoModel.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_real(name: str, layers: int, precision: str, folder: Path) -> tuple[Any, torch.dtype]:
    """Save a backbone of a real shape with random weights and few layers; return its config and dtype."""
    config = with_layers(AutoConfig.from_pretrained(real_tokenizer(name).name_or_path, num_labels=3), layers)
    # no answer depends on the rows of the embedding, which take time to make
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = 500, 0, None, None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    save_random(config, tiny_tokenizer("wordpiece"), folder, dtype)
    return config, dtype


def loaded(recipe: Recipe, shape: Shape) -> tuple[Any, Any, dict[str, Any]]:
    """Return a backbone, the model with the adapter, and a padded batch."""
    backbone = load_backbone(recipe.model, recipe.data.task, LABELS, CPU)
    backbone.model.config.pad_token_id = 0  # tests cut the vocabulary below the real one
    row = 7 if recipe.masking.trainable_mask else None
    model, _ = add_adapter(backbone, recipe.adapter, recipe.data.task, row)
    ids = torch.full((len(shape.lengths), max(shape.lengths)), 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][0, -2:] = 0
    return backbone, model, batch


def measure_step(recipe: Recipe, shape: Shape) -> tuple[int, int, int]:
    """Take a step; return the bytes that autograd saved, the most alive at once besides the model, and the model's.

    Saved tensors are found by autograd's hooks, independently of `LiveBytes`.
    """
    backbone, model, batch = loaded(recipe, shape)
    model.train()
    if recipe.model.gradient_checkpointing is True:
        enable_checkpointing(model)
    if shape.packed:
        enable_padding_free(backbone.model)
        batch = PackedCollator("sequence")([{"input_ids": [5] * length} for length in shape.lengths])
    frozen = [*model.parameters(), *model.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in frozen}
    packed: list[weakref.ref[torch.UntypedStorage]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            packed.append(weakref.ref(storage))
        return tensor.detach()  # what keeps its own output, as tanh does, would keep itself alive

    labels = torch.zeros(len(shape.lengths) if recipe.data.task == "sequence" else shape.tokens, dtype=torch.long)
    with LiveBytes() as live:
        live.exclude(*frozen, *(value for value in batch.values() if isinstance(value, torch.Tensor)))
        low = backbone.dtype != torch.float32
        autocast = torch.autocast("cpu", backbone.dtype, enabled=low)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with inputs_as_they_come(model, low), quick_dropout(model):
            with hooks, autocast:
                loss = F.cross_entropy(model(**batch).logits.flatten(0, -2).float(), labels)
            # not what BERT's pooler keeps of a packed row, whose answer nobody takes
            saved = {kept.data_ptr(): kept.nbytes() for storage in packed if (kept := storage()) is not None}
            loss.backward()
    return sum(saved.values()), live.peak, _bytes(model)


def measure_forward(recipe: Recipe, shape: Shape) -> int:
    """Run a padded batch of an evaluation; return the most bytes alive at once besides the model.

    torch's profiler tells what the allocator handed out. `LiveBytes` would not see what bitsandbytes unpacks within
    one operation (TinyLlama's 4-bit layers: 56 of 80 MiB).
    """
    backbone, model, batch = loaded(recipe, shape)
    model.eval()
    in_bf16 = backbone.dtype == torch.bfloat16
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=in_bf16)
    with torch.no_grad(), profile as profiler, autocast, inputs_as_they_come(model, in_bf16):
        model(**batch)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def _bytes(model: torch.nn.Module) -> int:
    total = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if getattr(parameter, "SCB", None) is not None:
            total += 4 * parameter.SCB.numel()
    return total
