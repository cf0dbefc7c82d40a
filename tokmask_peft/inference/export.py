"""Merge an adapter into its backbone: a plain transformers model that needs neither PEFT nor this package."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokmask_peft.artifacts import SavedAdapter, find_saved, open_run
from tokmask_peft.errors import DataError, ModelError, first_line
from tokmask_peft.hub.card import PICTURE, merged_card
from tokmask_peft.hub.push import check_push, push_adapter, push_model
from tokmask_peft.inference.forward import loading_memory_errors
from tokmask_peft.model.adapter import load_adapter
from tokmask_peft.model.backbone import load_backbone


def check_output(out: str | Path, source: str | Path | None, force: bool = False) -> Path:
    """Return the path to write to, before anything is loaded.

    Raises:
        DataError: it exists (unless `force`), is the input itself, or cannot be made.
    """
    path = Path(out)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DataError(f"{out} cannot be written: " + ("it is a folder" if path.is_dir() else "its folder is missing"))
    if path.exists() and source is not None and Path(source).exists() and path.samefile(source):
        raise DataError(f"{out} is the input itself; give another file")
    if path.exists() and not force:
        raise DataError(f"{out} exists; give another file, or --force to replace it")
    return path


def check_folder(folder: str | Path) -> Path:
    """Return the folder to make.

    Raises:
        ModelError: it is taken, or its parent is missing.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ModelError(f"{folder} exists and is not empty; give another folder")
    if not path.absolute().parent.is_dir():
        raise ModelError(f"{folder} cannot be made: {path.parent} is not a folder")
    return path


FILE = "model.onnx"
SHAPES = ((1, 1), (1, 9), (3, 24), (7, 40))
"""Texts and sub-tokens of the batches on which the file is compared; the export itself sees another shape."""

_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_onnx_installed() -> None:
    """Make sure that the packages of the extra are there, before anything is loaded.

    Raises:
        ModelError: one is missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"--onnx needs {', '.join(missing)}: pip install 'tokmask-peft[onnx]'")


class _Logits(nn.Module):
    """The model as a function of ids and mask alone, returning logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def export_onnx(model: Any, tokenizer: Any, folder: Path, tolerance: float) -> float:
    """Write `model.onnx` with free batch and sequence axes, and compare its logits with the model's.

    Args:
        model: a classification model of transformers in fp32, without an adapter.
        tokenizer: says which ids are ordinary.
        folder: of the file; weights beyond 2 GB lie in a file beside it.
        tolerance: allowed difference of a logit, as a share of the largest logit where that is above 1.

    Returns:
        The largest difference of a logit over `SHAPES`.

    Raises:
        ModelError: the exporter cannot do this model, or onnxruntime's logits are others.
    """
    model.eval()
    model.config.use_cache = False
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = ordinary_batch(2, 11, tokenizer)
    chatter = logging.getLogger("torch.onnx")
    before = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Logits(model),
                (),
                kwargs=example,
                dynamic_shapes=dict.fromkeys(example, any_size),
                input_names=list(example),
                output_names=["logits"],
                dynamo=True,
                verbose=False,
            )
            assert program is not None  # noqa: S101 - the dynamo exporter returns one
            program.save(str(folder / FILE))
    except Exception as error:  # the exporter raises whatever its passes do
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"torch.onnx cannot export {type(model).__name__} ({first}); leave --onnx out") from error
    finally:
        chatter.setLevel(before)
    return _compare(model, tokenizer, folder / FILE, tolerance)


def _compare(model: Any, tokenizer: Any, path: Path, tolerance: float) -> float:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        worst = 0.0
        for texts, length in SHAPES:
            batch = ordinary_batch(texts, length, tokenizer)
            (found,) = session.run(["logits"], {name: values.numpy() for name, values in batch.items()})
            with torch.inference_mode():
                expected = model(**batch).logits.numpy()
            difference = np.abs(found - expected)
            if expected.ndim == 3:
                difference = difference * batch["attention_mask"].numpy()[..., None]
            worst = max(worst, float(difference.max()))
            allowed = tolerance * max(1.0, float(np.abs(expected).max()))
            if not difference.max() <= allowed:
                raise ModelError(
                    f"onnxruntime's logits differ from the model's by {difference.max():.2g} (allowed: {allowed:.2g}) "
                    f"on {texts} texts of {length} sub-tokens; nothing was written. Leave --onnx out"
                )
    except ModelError:
        raise
    except Exception as error:  # onnxruntime's own exceptions share no base
        raise ModelError(f"onnxruntime cannot run the exported model: {first_line(error)}") from error
    return worst


def ordinary_batch(texts: int, length: int, tokenizer: Any) -> dict[str, Tensor]:
    """Return a batch of random ordinary tokens, drawn apart from torch's global random state.

    The texts have different lengths, the longest `length` sub-tokens, and are padded on the right.
    """
    draw = torch.Generator().manual_seed(length)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([number for number in range(len(tokenizer)) if number not in special])
    ids = ordinary[torch.randint(len(ordinary), (texts, length), generator=draw)]
    lengths = torch.linspace(length, max(1, length // 8), texts).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, tokenizer.pad_token_id), "attention_mask": mask}


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


def push(run: str | Path, repo_id: str, private: bool = False, *, merged: bool = False, quiet: bool = False) -> str:
    """Push the adapter of a finished run, or the model with it merged in, to the Hugging Face Hub.

    Args:
        run: the run folder.
        repo_id: `user/name` or `organisation/name`.
        private: make the repository private. One that exists and is public is refused.
        merged: push the adapter merged into its backbone, a plain transformers model.
        quiet: print nothing but huggingface_hub's progress bars.

    Returns:
        The address of the repository.

    Raises:
        RunError: the folder is not a run, or the run is not finished.
        ModelError: the model cannot be merged.
        HubError: with what to do. A push that breaks can be repeated.
    """
    if not merged:
        return push_adapter(run, repo_id, private, quiet=quiet)
    check_push(run, repo_id)
    done = open_run(run)
    with tempfile.TemporaryDirectory() as place:
        export = export_merged(done.folder.root, Path(place) / "merged")
        picture = done.folder.adapter / PICTURE
        if drawn := picture.is_file() and not picture.is_symlink():
            shutil.copyfile(picture, export.folder / PICTURE)
        card = merged_card(done.recipe, done.result, notes=export.notes, picture=PICTURE if drawn else None)
        (export.folder / "README.md").write_text(card, encoding="utf-8")
        return push_model(export.folder, done.folder, repo_id, private, notes=export.notes, quiet=quiet)
