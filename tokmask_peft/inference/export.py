"""Merge an adapter into its backbone: a plain transformers model. Checks come before anything heavy is imported."""

from __future__ import annotations

import importlib.util
import logging
import math
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokmask_peft.artifacts import SavedAdapter, find_saved, open_run
from tokmask_peft.errors import DataError, HubError, ModelError, boundary, check_place, first_line, whole, write_whole
from tokmask_peft.spans import NO_SPANS
from tokmask_peft.tasks import get_task

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-4  # allowed difference of a logit, as a share of the largest logit if that is above 1
ONNX_FILE = "model.onnx"
ONNX_SHAPES = ((1, 1), (1, 9), (3, 24), (7, 40))  # texts and sub-tokens of compared batches; the export sees others


def check_output(out: str | Path, source: str | Path | None, force: bool = False) -> Path:
    """Return the file to write to; a DataError if it exists (without `force`), is the input, or cannot be made.

    A link stays one, as it does in a shell: what it points to is written.
    """
    path = check_place(_behind_link(out), DataError, "output-not-writable")
    if path.exists() and source is not None and Path(source).exists() and path.samefile(source):
        raise DataError(f"{out} is the input itself; give another file", code="output-is-input", path=out)
    if path.exists() and not force:
        raise DataError(f"{out} exists; give another file, or --force to replace it", code="output-exists", path=out)
    return path


def check_folder(folder: str | Path) -> Path:
    """Return the folder to make; a ModelError if it is taken or cannot be made."""
    path = check_place(_behind_link(folder), ModelError, "folder-not-writable", folder=True)
    if path.exists() and any(path.iterdir()):
        raise ModelError(f"{folder} exists and is not empty; give another folder", code="folder-taken", path=folder)
    return path


def _behind_link(given: str | Path) -> Path:
    path = Path(given)
    return path.resolve() if path.is_symlink() else path


def check_onnx_installed() -> None:
    """Raise a ModelError if a package of the extra `onnx` is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        message = f"--onnx needs {', '.join(missing)}: pip install 'tokmask-peft[onnx]'"
        raise ModelError(message, code="onnx-not-installed", missing=missing)


@dataclass(frozen=True, slots=True)
class Export:
    """A merged model with its tokenizer."""

    folder: Path
    difference: float  # largest, between its logits and the adapter's, in fp32, on the same backbone
    rounding: float  # the same for the model as saved: the effect of rounding to bf16 or fp16, if asked for
    notes: tuple[str, ...]  # what a user of the model should know
    onnx: float | None = None  # largest difference between onnxruntime's logits and the saved model's


def export_merged(
    model: str | Path | SavedAdapter,
    folder: str | Path,
    *,
    precision: str = "fp32",
    backbone: str | None = None,
    onnx: bool = False,
    trust_remote_code: bool = False,
) -> Export:
    """Merge an adapter into its backbone and save the result, with the head and the label names.

    The saved model is loaded again and its logits compared with the adapter's, before `folder` appears.

    Args:
        model: a run folder, an adapter folder, or a Hub id.
        folder: to make; must not exist, or be empty.
        precision: `fp32`, `bf16` or `fp16`, of the saved weights.
        backbone: a Hub id or a folder to load the backbone from, instead of what the adapter names.
        onnx: write `model.onnx`, too, and compare it (extra `onnx`; fp32 only).
        trust_remote_code: as in `load`.

    Raises:
        ModelError: adapter or backbone is missing, `folder` is taken, logits differ, ONNX or memory fails.
    """
    if onnx:
        check_onnx_installed()
        if precision != "fp32":
            message = "onnx is written in fp32 only, because onnxruntime computes little in bf16 on CPUs"
            raise ModelError(message, code="onnx-precision")
    if precision not in ("fp32", "bf16", "fp16"):
        message = f"precision is {precision}, expected fp32, bf16 or fp16"
        raise ModelError(message, code="unknown-format", precision=precision)
    target = check_folder(folder)
    saved = find_saved(model, backbone, trust_remote_code=trust_remote_code)
    if (how := saved.model.pooling) in ("mean", "max", "ends"):
        problem = f"the head reads the {'mean of both ends' if how == 'ends' else how} of a text's states, which no "
        problem += "stock model does"
        raise ModelError(f"{problem}: use the adapter, or train with model.pooling=auto", code="pooling-not-exportable")

    import torch

    from tokmask_peft.inference.forward import loading_memory_errors
    from tokmask_peft.model.adapter import load_adapter
    from tokmask_peft.model.backbone import load_backbone
    from tokmask_peft.model.decisions import DTYPES

    plain = saved.model.model_copy(update={"quantization": "none", "precision": "fp32", "embedding": "resident"})
    device, measured = torch.device("cpu"), None
    with loading_memory_errors(device, "while the model was merged"):
        loaded = load_backbone(plain, saved.info.task, saved.info.labels, device)
        probes = ordinary_batch(8, 24, loaded.tokenizer, saved.info.pair is not None)
        adapted = load_adapter(loaded, saved.folder, **saved.loading.trained)
        expected = _logits(adapted, probes)
        allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
        merged = adapted.merge_and_unload(safe_merge=True)
        difference = float((_logits(merged, probes) - expected).abs().max())
        _check_equal("the logits of the merged model and the adapter", difference, allowed)
        merged.config.use_cache = True  # as the backbone came; training switched it off
        if precision != "fp32":
            merged.to(DTYPES[precision])
        with whole(target) as temporary:
            merged.save_pretrained(str(temporary))
            loaded.tokenizer.save_pretrained(str(temporary))
            again = _reloaded(temporary, saved, merged)
            rounding = float((_logits(again, probes) - expected).abs().max())
            if not math.isfinite(rounding):
                message = f"in {precision} the model gives logits that are not finite: export it in fp32 or bf16"
                raise ModelError(message, code="logits-not-finite", precision=precision)
            if precision == "fp32":
                _check_equal("the logits of the saved model and the adapter", rounding, allowed)
            if onnx:
                measured = export_onnx(again, loaded.tokenizer, temporary, saved.info.pair is not None)
    kind, placement = saved.model.quantization, saved.model.embedding
    inexact = [f"{kind} backbone"] if kind not in ("none", "auto") else []
    inexact += ["8-bit embedding"] if placement == "8bit" else []
    notes = [
        f"the adapter was trained on the {what} and is merged into the unquantized one: the logits are those of the "
        "adapter on that, not those of the run"
        for what in inexact
    ]
    if precision != "fp32":
        notes.append(f"the weights are rounded to {precision}, which moves logits by up to {rounding:.2g}")
    if saved.model.attention == "bidirectional":
        other = "other programs may read the text from left to right only, and answer otherwise"
        notes.append(f"its config says is_causal: false, which transformers obeys; {other}")
    if saved.info.calibration.temperature != 1.0:
        effect = "is not part of the model: its probabilities are uncalibrated, its labels the same"
        notes.append(f"the temperature of the calibration ({saved.info.calibration.temperature:.3f}) {effect}")
    carriers = {"last": "the logits of its last sub-token", "mean": "the mean of its sub-tokens' logits"}
    if get_task(saved.info.task).words_given and (carrier := carriers.get(saved.loading.label_on)):
        notes.append(f"the label of a word is chosen by {carrier}; this model gives those of all sub-tokens")
    if saved.loading.spans != NO_SPANS:
        effect = f"may break the rules of {saved.loading.spans}, which `tokmask predict` repairs"
        notes.append(f"its labels are the likeliest of each word, and {effect}")
    if cuts := get_task(saved.info.task).cuts_of(saved.info.labels, saved.info.calibration.model_dump()):
        chances = zip(saved.info.labels, (1 / (1 + math.exp(-cut)) for cut in cuts), strict=True)
        listed = ", ".join(f"{label} {chance:.4f}" for label, chance in chances)
        notes.append(
            f"the thresholds of the labels are not part of the model: of its own probabilities they are {listed}"
        )
    return Export(target, difference, rounding, tuple(notes), measured)


def _logits(model: Any, probes: dict[str, Tensor]) -> Tensor:
    """Return the logits of the probes, 0 at padding."""
    import torch

    with torch.inference_mode():
        logits: Tensor = model.eval()(**probes).logits.float()
        return logits * probes["attention_mask"][..., None] if logits.dim() == 3 else logits


def _check_equal(what: str, difference: float, allowed: float, code: str = "merged-logits-differ") -> None:
    if not difference <= allowed:
        raise ModelError(
            f"{what} differ by {difference:.2g} (allowed: {allowed:.2g}), so nothing was written. Please report the "
            "backbone and the versions of torch, transformers, peft and, with --onnx, onnxruntime.",
            code=code,
            difference=difference,
        )


def _reloaded(folder: Path, saved: SavedAdapter, merged: Any) -> Any:
    """Load what was saved as a user would, and raise a ModelError if weights or label names were lost."""
    import torch

    model: Any = get_task(saved.info.task).auto_model().from_pretrained(str(folder))
    kept, wanted = model.state_dict(), merged.state_dict()

    def equal(name: str) -> bool:
        one, other = wanted.get(name), kept.get(name)
        return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)

    if lost := sorted(name for name in wanted.keys() | kept.keys() if not equal(name)):
        message = f"the saved model lost or changed {', '.join(lost[:5])}; nothing was written"
        raise ModelError(message, code="merged-weights-lost", lost=lost)
    if [model.config.id2label[number] for number in range(len(saved.info.labels))] != list(saved.info.labels):
        raise ModelError("the saved model lost its label names; nothing was written", code="merged-labels-lost")
    return model


def ordinary_batch(texts: int, length: int, tokenizer: Any, pairs: bool = False) -> dict[str, Tensor]:
    """Return a batch of random ordinary tokens, of texts of different lengths up to `length`, padded on the right."""
    import torch

    draw = torch.Generator().manual_seed(length)  # the global random state stays as it is
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([number for number in range(len(tokenizer)) if number not in special])
    ids = ordinary[torch.randint(len(ordinary), (texts, length), generator=draw)]
    lengths = torch.linspace(length, max(1, length // 8), texts).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    typed = pairs and "token_type_ids" in tokenizer.model_input_names
    types = {"token_type_ids": (torch.arange(length) >= lengths[:, None] // 2) * mask} if typed else {}
    return {"input_ids": ids.masked_fill(mask == 0, tokenizer.pad_token_id), "attention_mask": mask, **types}


def export_onnx(model: Any, tokenizer: Any, folder: Path, pairs: bool = False) -> float:
    """Write `model.onnx` with free batch and sequence axes, and return the largest difference to the model's logits.

    The model is a classification model of transformers in fp32, without an adapter. Weights beyond 2 GB are saved in a
    second file. A model of `pairs` also takes token types, if its tokenizer gives them. ModelError if the exporter does
    not support the model, or onnxruntime's logits differ over `ONNX_SHAPES`.
    """
    import torch

    class Logits(torch.nn.Module):
        """The model as a function of ids, mask and maybe token types, returning logits only."""

        inner: Any

        def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, **types).logits

    model.eval().config.use_cache = False
    wrapped = Logits()
    wrapped.inner = model
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = ordinary_batch(2, 11, tokenizer, pairs)
    chatter = logging.getLogger("torch.onnx")
    before = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                wrapped,
                (),
                kwargs=example,
                dynamic_shapes=dict.fromkeys(example, any_size),
                input_names=list(example),
                output_names=["logits"],
                dynamo=True,
                verbose=False,
            )
            assert program is not None  # noqa: S101 - the dynamo exporter returns one
            program.save(str(folder / ONNX_FILE))
    except Exception as error:  # the exporter raises whatever its passes do
        message = f"torch.onnx cannot export {type(model).__name__} ({first_line(error)}); leave --onnx out"
        raise ModelError(message, code="onnx-export-failed", model=type(model).__name__) from error
    finally:
        chatter.setLevel(before)
    return compare_onnx(model, tokenizer, folder / ONNX_FILE, pairs)


def compare_onnx(model: Any, tokenizer: Any, path: Path, pairs: bool = False) -> float:
    """Return the largest difference between the logits of a file and of its model; see `export_onnx`."""
    import numpy as np
    import onnxruntime
    import torch

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        worst = 0.0
        for texts, length in ONNX_SHAPES:
            batch = ordinary_batch(texts, length, tokenizer, pairs)
            (found,) = session.run(["logits"], {name: values.numpy() for name, values in batch.items()})
            with torch.inference_mode():
                expected = model(**batch).logits.numpy()
            real = batch["attention_mask"].numpy()[..., None] if expected.ndim == 3 else 1
            difference = float((np.abs(found - expected) * real).max())
            worst = max(worst, difference)
            allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
            what = f"the logits of onnxruntime and the model, for {texts} texts of {length} sub-tokens,"
            _check_equal(what, difference, allowed, "onnx-logits-differ")
    except ModelError:
        raise
    except Exception as error:  # onnxruntime's own exceptions share no base
        message = f"onnxruntime cannot run the exported model: {first_line(error)}"
        raise ModelError(message, code="onnx-run-failed") from error
    return worst


@boundary("the push")
def push(
    run: str | Path,
    repo_id: str,
    private: bool = False,
    *,
    merged: bool = False,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Push the adapter of a finished run, or the model with it merged in, to the Hub; return the address.

    Args:
        run: the run folder.
        repo_id: `user/name` or `organisation/name`.
        private: make the repository private. One that exists and is public is refused.
        merged: push the adapter merged into its backbone, a plain transformers model.
        quiet: print nothing but huggingface_hub's progress bars.
        trust_remote_code: as in `load`, to merge.

    Raises:
        RunError: the folder is not a run, or the run is not finished.
        ModelError: the model cannot be merged.
        HubError: with what to do. A push that breaks can be repeated.
    """
    from tokmask_peft.hub.card import PICTURE, Card
    from tokmask_peft.hub.push import check_push, push_adapter, push_model

    if not merged:
        return push_adapter(run, repo_id, private, quiet=quiet)
    check_push(run, repo_id)  # before the merging, which takes time
    done = open_run(run)
    picture = done.folder.adapter / PICTURE
    if picture.is_symlink():
        raise HubError(f"{picture} is a link; links are not pushed", code="link", path=picture)
    with tempfile.TemporaryDirectory() as place:
        export = export_merged(done.folder.root, Path(place) / "merged", trust_remote_code=trust_remote_code)
        if drawn := picture.is_file():
            shutil.copyfile(picture, export.folder / PICTURE)
        card = Card(done.recipe, done.result, merged=True, notes=export.notes, picture=PICTURE if drawn else None)
        write_whole(export.folder / "README.md", card.render())
        return push_model(export.folder, done.folder, repo_id, private, notes=export.notes, quiet=quiet)
