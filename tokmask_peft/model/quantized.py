"""Everything that is particular to bitsandbytes: its configuration, and the way around one of its bugs."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn


def quantization_config(kind: str, compute_dtype: torch.dtype, keep: list[str]) -> Any:
    """Return the transformers configuration for `kind` (nf4 or int8), leaving the modules in `keep` alone.

    transformers strips only `.weight` when it looks for the last module, so that a head with a bias would be
    quantized; every head has to be named. Under FSDP 4-bit codes are stored as numbers of the other weights' type:
    it shards floating-point weights only, and would keep the whole backbone on every GPU.
    """
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=compute_dtype if parse_flag_from_env("ACCELERATE_USE_FSDP") else torch.uint8,
        llm_int8_skip_modules=keep,
    )


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a bitsandbytes layer."""
    return type(module).__module__.startswith("bitsandbytes.")


def keep_gradients_after_eval(model: nn.Module) -> int:
    """Stop 4-bit layers from repacking their weights for inference; return how many there are.

    On CPUs with avx512_bf16, bitsandbytes' `Linear4bit` repacks its weights at the first forward pass in eval
    mode and never unpacks them; from then on no gradient passes through, while the loss still falls because the
    head learns. Seen with bitsandbytes 0.50.2. Remove this when `test_gradients_survive_an_evaluation` passes
    without it on such a CPU.
    """
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return len(layers)
