"""A merged model as ONNX, for runtimes without torch; compared with the model before anyone uses it."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokmask_peft.errors import ModelError, first_line

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
