"""A small causal model for the confound study, and masking in the ids that the model sees, as the authors' code does.

Hugging Face's causal sequence classifiers pool at the right-most id that is not padding. A masked padding id is no
padding any more, so it moves that position off the text, while the attention mask still shows the text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from confounds_language_model import CutVocabulary
from confounds_protocol import RunSpec
from torch import Tensor, nn
from transformers import Qwen2ForSequenceClassification

from tokmask_peft.masking.embedding import write_row
from tokmask_peft.masking.pattern import masked_positions


def padded(rows: Sequence[dict[str, Any]], pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `attention_mask`, [batch, length], padded on the right; default: to the longest."""
    length = length or max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        count = len(row["input_ids"])
        ids[number, :count] = torch.tensor(row["input_ids"])
        mask[number, :count] = 1
    return ids, mask


def pooled_position(input_ids: Tensor, pad_id: int) -> Tensor:
    """Return the column that transformers pools at, [batch]: the right-most id that is not padding."""
    columns = torch.arange(input_ids.shape[1])
    return (columns * (input_ids != pad_id)).argmax(-1)


class CausalLearner:
    """A Qwen2 classifier on the study's own language model, padded to a fixed length as the authors' texts are."""

    def __init__(self, run: RunSpec, pretrained: dict[str, Tensor], vocabulary: CutVocabulary, classes: int) -> None:
        torch.manual_seed(run.seed)
        self.model: nn.Module = Qwen2ForSequenceClassification(vocabulary.config(num_labels=classes))
        self.model.load_state_dict(pretrained, strict=False)
        self._pad, self._length = vocabulary.pad_id, run.protocol.max_length
        self._pads_masked, self._p, self._seed = run.protocol.pads_masked, run.p, run.seed
        self._mask_id = 0
        if run.protocol.masked_by == "trained":
            self._mask_id = vocabulary.spare_id
            embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
            write_row(embedding, self._mask_id, embedding.weight[: vocabulary.spare_id].detach().mean(0))
        self._step = self._moved = self._rows = self._masked = self._real = 0
        torch.manual_seed(run.seed)

    def mask(self, input_ids: Tensor) -> Tensor:
        """Return ids with each position masked with probability p, padding too where the protocol says so."""
        real = input_ids != self._pad
        maskable = torch.ones_like(real) if self._pads_masked else real
        chosen = masked_positions(input_ids, self._p, self._seed, self._step, 0, maskable)
        masked = input_ids.masked_fill(chosen, self._mask_id)
        self._step += 1
        self._rows += len(input_ids)
        moved = pooled_position(masked, self._pad) != pooled_position(input_ids, self._pad)
        self._moved += int(moved.sum())
        self._masked += int((chosen & real).sum())
        self._real += int(real.sum())
        return masked

    def outputs(self, rows: Sequence[dict[str, Any]], training: bool) -> tuple[Any, Tensor]:
        """Run a padded batch; in training the masked ids are what the model gets, and pools by."""
        ids, attention = padded(rows, self._pad, self._length if training else None)
        given = self.mask(ids) if training else ids
        labels = torch.tensor([row["labels"] for row in rows])
        return self.model(input_ids=given, attention_mask=attention, use_cache=False), labels

    def after_step(self) -> None:
        """Do nothing: every row is trained."""

    def seen(self) -> dict[str, float]:
        """Return the share of text that was masked, and of rows whose pooled position moved."""
        return {"masked_share": self._masked / max(self._real, 1), "moved_share": self._moved / max(self._rows, 1)}
