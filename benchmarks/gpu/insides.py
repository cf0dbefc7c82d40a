"""All that the GPU measurement uses of the package besides its command line: the one place to follow a rename."""

# ruff: noqa: F401
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.encoding import Encoder
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model import packed
from tokmask_peft.model.adapter import add_adapter, inputs_as_they_come
from tokmask_peft.model.backbone import Backbone, head_modules, hold_in_fp32, keep_gradients_after_eval, load_backbone
from tokmask_peft.model.decisions import (
    bitsandbytes_problem,
    choose_precision,
    choose_quantization,
    enable_checkpointing,
)
from tokmask_peft.model.layers import place_embedding
from tokmask_peft.model.memory.estimate import Estimate, Setting, estimate
from tokmask_peft.model.memory.step import Shape, bare_model
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig, Recipe
from tokmask_peft.tasks import get_task
from tokmask_peft.training.environment import versions
from tokmask_peft.training.losses import ClassificationLoss


def padded_collator(tokenizer: Any, task: str) -> Any:
    """Return the collator that pads, as a run uses it."""
    return get_task(task).collator(tokenizer)


def encoded_rows(recipe: Path, tokenizer: Any, longest: int) -> tuple[Any, tuple[str, ...]]:
    """Return `input_ids` and `labels` of a recipe's training texts, and the names of the labels."""
    corpus = load_corpus(Recipe.load(recipe).data.expanded(), 0)
    rows = Encoder(tokenizer, "sequence", longest).cut(corpus.train, corpus.labels).dataset
    return rows.select_columns(["input_ids", "labels"]), corpus.labels


def decided(device: torch.device) -> dict[str, Any]:
    """Return what a run would decide on a device."""
    config = ModelConfig(backbone="x")
    return {
        "bitsandbytes_problem": bitsandbytes_problem(device.type),
        "precision": asdict(choose_precision(config, device)),
        "quantization": asdict(choose_quantization(config, device)),
        "varlen_kernel": str(packed._varlen_kernel()) if device.type == "cuda" else None,
    }


def packed_attention(layer: Any, rows: Sequence[Tensor], bounds: Tensor, longest: int, window: int | None) -> Tensor:
    """Return the attention of packed query, key and value, each [1, heads, total, size], as [1, total, heads, size]."""
    packing = packed.Packing.make(bounds, rows[0].shape[2], longest)
    return packed.packed_attention(layer, *rows, None, sliding_window=window, packing=packing)[0]


def estimated(config: Any, recipe: dict[str, Any], dtype: torch.dtype, lengths: Sequence[int] | tuple[int, int],
              evaluated: tuple[int, int], *, packed_rows: bool, quantization: str = "nf4") -> Estimate:  # fmt: skip
    """Return the estimate of a step on a GPU.

    Args:
        config: of the backbone.
        recipe: fields that differ from the defaults; see `Recipe`.
        dtype: of the computation.
        lengths: of the texts of a packed step, or texts and length of a padded one.
        evaluated: texts and length of a batch in evaluation.
        packed_rows: whether the step is packed.
        quantization: none, int8 or nf4.
    """
    content = {"name": "gpu", "data": {"task": "sequence", "builtin": True}, **recipe}
    step = Shape(tuple(lengths), packed=True) if packed_rows else Shape.padded(lengths[0], lengths[1])
    setting = Setting(config, "cuda", quantization, dtype)
    return estimate(Recipe.model_validate(content), setting, step, Shape.padded(*evaluated))
