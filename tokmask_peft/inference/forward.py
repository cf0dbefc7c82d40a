"""Windows of sub-tokens through a model in batches: on packed rows, or padded."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.data.encoding import Window
from tokmask_peft.errors import DataError, ModelError
from tokmask_peft.masking.embedding import Occlusion
from tokmask_peft.model.memory.suggestions import Situation, memory_errors
from tokmask_peft.model.packed import takes_packed_rows

Hidden = NDArray[np.bool_]  # which sub-tokens of a window are masked, bool [ids]


class Forward:
    """Runs windows through a classification model: on packed rows if it takes them, otherwise padded.

    What else is in a batch changes answers by rounding only: below 1e-5 of a probability in fp32. In bf16, where matrix
    products round differently in rows of another length, by up to 2e-3 (MiniLM, 150 questions of TREC, batches of 8).
    The model is in eval mode; a `dtype` other than float32 means autocast.
    """

    def __init__(self, model: nn.Module, pad_id: int, task: str, dtype: torch.dtype, side: str = "right") -> None:
        self._model, self._pad_id, self._side = model, pad_id, side
        self._device = next(model.parameters()).device
        self._dtype = dtype
        self._pack = PackedCollator(task) if takes_packed_rows(model) else None

    def logits(
        self,
        windows: Sequence[Window],
        batch_size: int,
        occlusion: Occlusion | None = None,
        hidden: Sequence[Hidden] = (),
    ) -> list[NDArray[np.float32]]:
        """Return per window logits `[1, classes]`, or `[words, classes]` in token tasks, in the order of `windows`.

        Windows of similar length go together, `batch_size` per forward pass. With an `occlusion`, the sub-tokens in
        `hidden` are masked. DataError if `batch_size` is below 1; ModelError if a logit is not finite, or memory runs
        out.
        """
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, expected 1 or more", code="batch-size", batch_size=batch_size)
        order = sorted(range(len(windows)), key=lambda number: len(windows[number].ids))
        found: list[Any] = [None] * len(windows)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            situation = Situation("prediction", gpu=self._device.type != "cpu", texts=len(chosen))
            with memory_errors(situation, ModelError):
                at = None if occlusion is None else self._laid_out([hidden[n] for n in chosen])
                with nullcontext() if occlusion is None or at is None else occlusion.at(at):
                    values = self._batch([windows[n] for n in chosen])
            for number, rows in zip(chosen, values, strict=True):
                found[number] = rows
        return found

    @torch.inference_mode()
    def _batch(self, batch: list[Window]) -> list[NDArray[np.float32]]:
        inputs: dict[str, Any]
        if self._pack is not None:
            rows = [{"input_ids": one.ids, "token_type_ids": one.types, "words": one.numbers} for one in batch]
            inputs = self._pack([{name: part for name, part in row.items() if part is not None} for row in rows])
        else:
            ids = [torch.tensor(window.ids) for window in batch]
            inputs = {
                "input_ids": pad_sequence(ids, True, self._pad_id, self._side),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0, self._side),
            }
            if batch[0].types:
                types = [torch.tensor(window.types) for window in batch]
                inputs["token_type_ids"] = pad_sequence(types, True, 0, self._side)
            if batch[0].numbers:
                numbers = [torch.tensor(window.numbers) for window in batch]
                inputs["words"] = pad_sequence(numbers, True, -1, self._side)
        device = self._device
        inputs = {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in inputs.items()}
        with torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits = self._model(**inputs).logits
        sizes = [1] * len(batch)
        if logits.dim() == 3:  # an answer per sub-token, of which the words' first ones are wanted
            sizes = [len(window.positions) for window in batch]
            starts = np.arange(len(batch)) * logits.shape[1]  # of each text, in the row of all
            if self._pack is not None:
                starts = inputs["cu_seqlens"][:-1].cpu().numpy()
            places = np.concatenate([window.positions for window in batch]) + np.repeat(starts, sizes)
            logits = logits.flatten(0, 1)[torch.as_tensor(places)]
        picked = logits.float().cpu().numpy()
        if not np.isfinite(picked).all():
            message = "the model gives logits that are not finite; load it with precision='fp32'"
            raise ModelError(message, code="logits-not-finite")
        return np.split(picked, np.cumsum(sizes)[:-1])

    def _laid_out(self, rows: Sequence[Hidden]) -> torch.Tensor:
        """Lay out what is hidden in each window like the ids, with nothing hidden in the padding."""
        if self._pack is not None:
            return torch.from_numpy(np.concatenate(rows)).unsqueeze(0)
        return pad_sequence([torch.from_numpy(row) for row in rows], True, 0, self._side)


def loading_memory_errors(
    device: torch.device, what: str = "while the model was loaded"
) -> AbstractContextManager[None]:
    """Turn running out of memory on a device into a ModelError that says when it happened."""
    return memory_errors(Situation("loading", gpu=device.type != "cpu"), ModelError, what)
