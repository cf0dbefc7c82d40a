"""Load a trained adapter for prediction, and report each choice with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokmask_peft.artifacts import SavedAdapter, find_saved
from tokmask_peft.console import Decision
from tokmask_peft.errors import ModelError, first_line
from tokmask_peft.inference.classifier import Classifier
from tokmask_peft.inference.forward import loading_memory_errors
from tokmask_peft.model.adapter import load_adapter, merge_if_harmless
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import plan_loading
from tokmask_peft.model.packed import choose_batching, enable_padding_free

_LONGEST = 512  # sub-tokens per window if neither the run nor the model sets a limit


def load(
    model: str | Path | SavedAdapter,
    device: str | torch.device | None = None,
    quantization: str | None = None,
    precision: str | None = None,
    backbone: str | None = None,
) -> Classifier:
    """Load a trained adapter for prediction.

    Args:
        model: a run folder (`runs/NAME`), an adapter folder, or the id of an adapter on the Hub.
        device: `cuda`, `cpu`, …; default: a GPU if there is one.
        quantization: `nf4`, `int8` or `none`; default: that of training if it runs on this device.
        precision: `bf16` or `fp32`; default: that of training, or fp32 if the hardware has no bf16.
        backbone: a Hub id, a folder or `package:NAME/FOLDER` to load the backbone from, instead of what the adapter
            names.

    Raises:
        ModelError: there is no adapter or backbone, it cannot be loaded as asked, or memory runs out.
    """
    saved = model if isinstance(model, SavedAdapter) else find_saved(model, backbone)
    place = _device(device)
    with loading_memory_errors(place):
        plan = plan_loading(saved.model, place, quantization, precision)
        loaded = load_backbone(plan.model, saved.task, saved.labels, place)
        batching = _choose_batching(loaded.model, place)
        module = load_adapter(loaded, saved.folder)
        why = "as asked" if device is not None else "a GPU is there" if place.type == "cuda" else "no GPU was found"
        decisions = [Decision("device", str(place), why)]
        if loaded.quantization == "none":
            module, decision = merge_if_harmless(module.to(place))
            decisions.append(decision)
        for decision in loaded.decisions:
            if decision.what != "device":
                reason = plan.reasons.get(decision.what, decision.reason)
                decisions.append(Decision(decision.what, decision.choice, reason))
        decisions.append(batching)
        if "embedding" in plan.reasons:  # loading the backbone reports no resident one
            decisions.append(Decision("embedding", plan.model.embedding, plan.reasons["embedding"]))
        return Classifier(
            module.eval(),
            loaded.tokenizer,
            saved.task,
            saved.labels,
            max_length=saved.max_length or _model_limit(module, loaded.tokenizer),
            temperature=saved.temperature,
            dtype=loaded.dtype,
            decisions=tuple(decisions),
            masking=saved.masking,
        )


def _choose_batching(model: nn.Module, device: torch.device) -> Decision:
    """Choose between packed rows and padded batches, and prepare the model for them."""
    if device.type != "cpu":  # packed answers have not been compared with padded ones there
        return Decision("batching", "padded", f"predictions on packed rows have not been tried on {device.type}")
    decision = choose_batching("padding_free", model)
    if decision.choice == "padding_free":
        enable_padding_free(model)
    return decision


def _device(asked: str | torch.device | None) -> torch.device:
    """Return the device to compute on.

    Raises:
        ModelError: there is no such device, or it has no memory left.
    """
    if asked is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(asked)
        with loading_memory_errors(device):
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {asked} cannot be used: {first_line(error)}", code="device-unavailable", device=str(asked)
        ) from error
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _model_limit(model: nn.Module, tokenizer: Any) -> int:
    """Return the longest window for an adapter that does not say how long its texts were in training."""
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or _LONGEST
    return int(min(_LONGEST, positions, tokenizer.model_max_length))
