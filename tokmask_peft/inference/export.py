"""Merge an adapter into its backbone: a plain transformers model that needs neither PEFT nor this package."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokmask_peft.errors import ModelError
from tokmask_peft.inference.memory import loading_memory_errors
from tokmask_peft.inference.onnx import check_onnx_installed, export_onnx, ordinary_batch
from tokmask_peft.inference.outputs import check_folder
from tokmask_peft.inference.saved import SavedAdapter, find_saved
from tokmask_peft.model.adapter import load_adapter
from tokmask_peft.model.backbone import load_backbone

TOLERANCE = 1e-4
"""Allowed difference of a logit, as a share of the largest logit where that is above 1."""
_PROBES, _PROBE_LENGTH = 8, 24


@dataclass(frozen=True, slots=True)
class Export:
    """A merged model.

    Attributes:
        folder: the model and its tokenizer.
        difference: largest difference between its logits and the adapter's, in fp32, on the same backbone.
        rounding: the same for the model as saved: what rounding to bf16 costs, if asked for.
        notes: what a user of the model should know.
        onnx: largest difference between onnxruntime's logits and the saved model's; none without `model.onnx`.
    """

    folder: Path
    difference: float
    rounding: float
    notes: tuple[str, ...]
    onnx: float | None = None


def export_merged(
    model: str | Path | SavedAdapter,
    folder: str | Path,
    *,
    precision: str = "fp32",
    backbone: str | None = None,
    onnx: bool = False,
) -> Export:
    """Merge an adapter into its backbone and save the result, with the head and the label names.

    The saved model is loaded again and its logits compared with the adapter's, before `folder` appears.

    Args:
        model: a run folder, an adapter folder, or a Hub id.
        folder: what to make; must not exist, or be empty.
        precision: `fp32` or `bf16`, of the saved weights.
        backbone: where to load the backbone from, in place of what the adapter names.
        onnx: write `model.onnx`, too, and compare it (extra `onnx`; fp32 only).

    Raises:
        ModelError: there is no adapter or no backbone, `folder` is taken, the merged model differs from the adapter, or
            it cannot be exported to ONNX; or memory runs out.
    """
    if onnx:
        check_onnx_installed()
    if onnx and precision != "fp32":
        raise ModelError("onnx is written in fp32 only: onnxruntime computes little in bf16 on CPUs")
    if precision not in ("fp32", "bf16"):
        raise ModelError(f"precision is {precision}, expected fp32 or bf16")
    target = check_folder(folder)
    saved = model if isinstance(model, SavedAdapter) else find_saved(model, backbone)
    with loading_memory_errors(torch.device("cpu"), "while the model was merged"):
        return _export(saved, target, precision, onnx)


def _export(saved: SavedAdapter, target: Path, precision: str, onnx: bool) -> Export:
    plain = saved.model.model_copy(update={"quantization": "none", "precision": "fp32", "embedding": "resident"})
    loaded = load_backbone(plain, saved.task, saved.labels, torch.device("cpu"))
    probes = ordinary_batch(_PROBES, _PROBE_LENGTH, loaded.tokenizer)
    adapted = load_adapter(loaded, saved.folder)
    expected = _logits(adapted, probes)
    merged = adapted.merge_and_unload(safe_merge=True)
    difference = _distance(_logits(merged, probes), expected)
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise ModelError(_unequal("the merged model's logits", difference, allowed))
    merged.config.use_cache = True  # as the backbone came; training switched it off
    if precision == "bf16":
        merged.to(torch.bfloat16)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        merged.save_pretrained(str(temporary))
        loaded.tokenizer.save_pretrained(str(temporary))
        plain_model = _reloaded(temporary, saved, merged)
        rounding = _distance(_logits(plain_model, probes), expected)
        if precision == "fp32" and not rounding <= allowed:
            raise ModelError(_unequal("the saved model's logits", rounding, allowed))
        measured = export_onnx(plain_model, loaded.tokenizer, temporary, TOLERANCE) if onnx else None
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Export(target, difference, rounding, tuple(_notes(saved, precision, rounding)), measured)


def _notes(saved: SavedAdapter, precision: str, rounding: float) -> list[str]:
    notes = []
    if saved.model.quantization not in ("none", "auto"):
        notes.append(
            f"the adapter was trained on the {saved.model.quantization} backbone and is merged into the unquantized "
            "one: the logits are those of the adapter on the unquantized backbone, not those of the run"
        )
    if saved.model.embedding == "8bit":
        notes.append(
            "the adapter was trained on the 8-bit embedding and is merged into the backbone with the exact one: the "
            "logits are those of the adapter on the exact embedding, not those of the run"
        )
    if precision == "bf16":
        notes.append(f"the weights are rounded to bf16, which moves logits by up to {rounding:.2g}")
    if saved.temperature != 1.0:
        notes.append(
            f"the temperature of the calibration ({saved.temperature:.3f}) is not part of the model: "
            "its probabilities are uncalibrated, its labels the same"
        )
    return notes


@torch.inference_mode()
def _logits(model: nn.Module, probes: dict[str, Tensor]) -> Tensor:
    """Return the logits of the probes, 0 at padding."""
    logits: Tensor = model.eval()(**probes).logits.float()
    return logits * probes["attention_mask"][..., None] if logits.dim() == 3 else logits


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _reloaded(folder: Path, saved: SavedAdapter, merged: nn.Module) -> nn.Module:
    """Load what was saved as a user would, and compare weights and label names.

    Raises:
        ModelError: something was lost on the way.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    auto = AutoModelForSequenceClassification if saved.task == "sequence" else AutoModelForTokenClassification
    model: Any = auto.from_pretrained(str(folder))
    kept, wanted = model.state_dict(), merged.state_dict()
    lost = sorted(name for name in wanted.keys() | kept.keys() if not _equal(wanted.get(name), kept.get(name)))
    if lost:
        raise ModelError(f"the saved model lost or changed {', '.join(lost[:5])}; nothing was written")
    if [model.config.id2label[number] for number in range(len(saved.labels))] != list(saved.labels):
        raise ModelError("the saved model lost its label names; nothing was written")
    return model


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _unequal(what: str, difference: float, allowed: float) -> str:
    return (
        f"{what} differ from the adapter's by {difference:.2g} (allowed: {allowed:.2g}); nothing was written. "
        "Please report the backbone and the versions of torch, transformers and peft."
    )
