"""MiniLM for the confound study: all weights trained, texts packed, masked by the package's masker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from confounds_protocol import RunSpec
from torch import Tensor

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.embedding import read_rows, write_row
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.replacement import MaskToken
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe.schema import ModelConfig, Recipe, Task

UNUSED = "[unused993]"


def mask_token(tokenizer: Any, wanted: str) -> MaskToken:
    """Return what stands for a masked token, also where the package would refuse it (id 0 is BERT's padding)."""
    if wanted == "mask":
        return MaskToken(tokenizer.mask_token_id, "mask", "the tokenizer's mask token")
    if wanted == "id0":
        return MaskToken(0, "id", "id 0, as the authors' code takes where there is no mask and no unknown token")
    if wanted == "unk":
        return MaskToken(tokenizer.unk_token_id, "unk", "the unknown token")
    return MaskToken(tokenizer.convert_tokens_to_ids(UNUSED), "spare", f"{UNUSED}, set to the mean embedding")


class EncoderLearner:
    """MiniLM under a protocol.

    The batch is one packed row; bf16 autocast where the CPU has it, weights and optimizer in fp32.
    """

    def __init__(self, run: RunSpec, task: Task, labels: tuple[str, ...], bf16: bool) -> None:
        config: ModelConfig = Recipe.load("trec/minilm").model.model_copy(update={"precision": "fp32"})
        torch.manual_seed(run.seed)
        backbone = load_backbone(config, task, labels, torch.device("cpu"))
        self.model, self.tokenizer, self._bf16 = backbone.model, backbone.tokenizer, bf16
        self.model.requires_grad_(True)
        enable_padding_free(self.model)
        self._collate = PackedCollator(task)
        self._token = mask_token(self.tokenizer, run.protocol.masked_by)
        self._masker = TokenMasker.attach(
            self.model, self.tokenizer, TokenMaskConfig(p=run.p), mask_token=self._token, seed=run.seed
        )
        self._embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        row = read_rows(self._embedding, self._token.id, self._token.id + 1)[0]
        self._held = row.detach().clone() if run.protocol.masked_by == "spare" else None
        torch.manual_seed(run.seed)  # one dropout stream for all arms, whatever loading drew

    def outputs(self, rows: Sequence[dict[str, Any]], training: bool) -> tuple[Any, Tensor]:
        """Run a packed batch; the masker masks in training alone."""
        batch = self._collate(rows)
        labels: Tensor = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            return self.model(**batch), labels

    def after_step(self) -> None:
        """Put a row that is held fixed back: weight decay and the optimizer move it."""
        if self._held is not None:
            write_row(self._embedding, self._token.id, self._held)

    def seen(self) -> dict[str, float]:
        """Return the share of sub-tokens that was masked."""
        return {"masked_share": self._masker.observed_rate}
