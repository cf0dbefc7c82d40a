"""Backbones of real shapes with random weights, in NF4, made on the device layer by layer: no checkpoint is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoConfig, AutoTokenizer, Qwen2Config

from tokmask_peft.model.backbone import Backbone, head_modules, hold_in_fp32, keep_gradients_after_eval
from tokmask_peft.model.memory.step import bare_model

CLASSES = 3
FOLDERS = {"Qwen2.5-0.5B": "Qwen2.5-0.5B", "TinyLlama-1.1B": "TinyLlama-1.1B-Chat-v1.0", "Qwen2.5-7B": "Qwen2.5-0.5B"}
"""Folders below TOKMASK_TOKENIZERS; Qwen2.5 has one tokenizer for all sizes."""

QWEN_7B = Qwen2Config(  # Qwen/Qwen2.5-7B; the same numbers in torchtune's qwen2_5_7b_base
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    tie_word_embeddings=False,
    bos_token_id=151643,
    eos_token_id=151643,
)


def shape(name: str, layers: int | None, smoke: bool) -> tuple[Any, Any]:
    """Return config and tokenizer.

    Args:
        name: of `FOLDERS`.
        layers: at most so many.
        smoke: shrink everything but the vocabulary, to try the code.
    """
    folder = Path(os.environ["TOKMASK_TOKENIZERS"]) / FOLDERS[name]
    config = QWEN_7B if name == "Qwen2.5-7B" else AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    changes: dict[str, Any] = {"num_labels": CLASSES, "use_cache": False, "pad_token_id": tokenizer.pad_token_id}
    if smoke:
        changes |= {**small, "head_dim": 16}
    if layers is not None:
        changes["num_hidden_layers"] = min(layers, config.num_hidden_layers)
    found = {**config.to_dict(), **changes}
    if found.get("layer_types"):
        found["layer_types"] = found["layer_types"][: found["num_hidden_layers"]]
    return type(config)(**found), tokenizer


def random_backbone(config: Any, tokenizer: Any, device: torch.device) -> Backbone:
    """Return a frozen classification model as `load_backbone` leaves it: NF4 with double quantization, head in fp32."""
    torch.manual_seed(0)
    model: Any = bare_model(config, "sequence", torch.bfloat16)
    heads = tuple(head_modules(model))
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if type(module) is nn.Linear and name not in heads:
            setattr(model.get_submodule(parent), last, _quantized(module, device))
        elif "inv_freq" in module._buffers:  # of rotary positions, computed where the module is made
            setattr(model.get_submodule(parent), last, type(module)(config=model.config).to(device))
        else:
            for key, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[key] = nn.Parameter(_drawn(weight, device), requires_grad=False)
    model.is_loaded_in_4bit = True  # what PEFT asks for
    hold_in_fp32(model, heads)
    keep_gradients_after_eval(model)
    return Backbone(model, tokenizer, heads, (), torch.bfloat16, "nf4")


def linear_weights(config: Any) -> int:
    """Return the number of weights of the backbone's linear layers."""
    model = bare_model(config, "sequence", torch.bfloat16)
    return sum(module.weight.numel() for module in model.base_model.modules() if type(module) is nn.Linear)


def _drawn(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    made = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    return made.normal_(std=0.02) if weight.dim() > 1 else made.fill_(1.0)


def _quantized(linear: nn.Linear, device: torch.device) -> nn.Module:
    bias = linear.bias is not None
    made = Linear4bit(linear.in_features, linear.out_features, bias, torch.bfloat16, True, "nf4", device="meta")
    made.weight = Params4bit(
        _drawn(linear.weight, device),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
        module=made,
    )
    if bias:
        made.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=torch.bfloat16, device=device), False)
    return made.to(device)
