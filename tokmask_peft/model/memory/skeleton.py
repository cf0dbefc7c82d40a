"""The model of a run without its weights: the real classes with the real adapter, on fake tensors.

Building one takes no memory to speak of, whatever the size of the backbone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import Backbone
from tokmask_peft.model.head import HEAD_NAMES, head_modules, hold_in_fp32
from tokmask_peft.recipe import Recipe, Task


def bare_model(config: Any, task: Task, dtype: torch.dtype) -> nn.Module:
    """Return the classification model of a config of transformers on the meta device.

    Args:
        config: of the backbone, with `num_labels` set.
        task: sequence or token.
        dtype: of its weights.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    auto = AutoModelForSequenceClassification if task == "sequence" else AutoModelForTokenClassification
    config = copy.deepcopy(config)
    config.use_cache = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the loaded backbone
    if config.pad_token_id is None:
        config.pad_token_id = 0
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, dtype=dtype)
    return model


def with_layers(config: Any, layers: int) -> Any:
    """Return a copy of a config with so many layers."""
    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers
    return config


def skeleton(
    config: Any,
    recipe: Recipe,
    quantization: str,
    dtype: torch.dtype,
    adapted: int | None = None,
    trained_row: bool = True,
) -> tuple[Any, FakeTensorMode]:
    """Return the model with its adapter, ready for a step, and the mode in which its tensors live.

    Args:
        config: of the backbone, with as many layers as wanted.
        recipe: adapter and task.
        quantization: nf4, int8 or none.
        dtype: of what is not quantized.
        adapted: how many upper layers get an adapter; all of them by default.
        trained_row: whether a mask row that the recipe trains is part of the adapter, for which PEFT copies the whole
            embedding in each forward and makes a gradient of it; else the gradient only flows down to the embedding.
    """
    model: Any = bare_model(config, recipe.data.task, dtype)
    new_modules = tuple(head_modules(model))
    if quantization != "none":
        from tokmask_peft.model.memory.simulated import simulate_quantized

        simulate_quantized(model, quantization, dtype, (*HEAD_NAMES, *new_modules))
    hold_in_fp32(model, new_modules)
    backbone = Backbone(model, None, new_modules, (), dtype, quantization)
    adapter = recipe.adapter.model_copy(update={"layers": adapted or "all"})
    trained = recipe.masking.trainable_mask
    with torch.device("meta"):
        wrapped, _ = add_adapter(backbone, adapter, recipe.data.task, 0 if trained and trained_row else None)
    if trained and not trained_row:
        model.enable_input_require_grads()
    return wrapped.train(), make_fake(wrapped)


def make_fake(model: nn.Module) -> FakeTensorMode:
    """Turn meta tensors into fake ones of a CPU, in place, and return their mode: autocast has no meta device."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    fresh = made.setdefault(id(value), nn.Parameter(_empty(value), value.requires_grad))
                    module._parameters[name] = _like(fresh, value)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _empty(buffer)
    return mode


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _like(fresh: Any, value: Any) -> Any:
    """Keep what PEFT reads off the weights of bitsandbytes."""
    for name in ("quant_type", "compress_statistics", "quant_state", "has_fp16_weights", "CB", "SCB"):
        if hasattr(value, name):
            setattr(fresh, name, getattr(value, name))
    return fresh
