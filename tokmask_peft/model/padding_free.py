"""The padding-free forward: a batch as one packed row, attention per text, and the head on each text's own state.

Everything but attention works on single sub-tokens, and on a packed row nothing is spent on padding. Padded batches
still take the model's own forward, so that a model can be trained packed and evaluated padded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokmask_peft.errors import ModelError
from tokmask_peft.masking import TokenMasker
from tokmask_peft.masking.embedding import find_embedding
from tokmask_peft.model import packed_attention
from tokmask_peft.model.decisions import Decision
from tokmask_peft.model.packing import Packing
from tokmask_peft.recipe import Batching


def _bert_head(model: Any, first: Tensor) -> Tensor:
    return model.classifier(model.dropout(model.base_model.pooler(first)))


def _roberta_head(model: Any, first: Tensor) -> Tensor:
    return model.classifier(first)


def _distilbert_head(model: Any, first: Tensor) -> Tensor:
    return model.classifier(model.dropout(F.relu(model.pre_classifier(first[:, 0]))))


def _causal_head(model: Any, last: Tensor) -> Tensor:
    return model.score(last[:, 0])


ENCODER_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Bert": _bert_head,
    "DistilBert": _distilbert_head,
    "Roberta": _roberta_head,
    "XLMRoberta": _roberta_head,
}
CAUSAL = ("Llama", "Mistral", "Qwen2", "Qwen3")

ROUND = 64
"""Sub-tokens that a packed row on a CPU is a multiple of; short rows, of 8.

oneDNN compiles and keeps a kernel per shape, and every batch has another number of sub-tokens.
"""


def _kind(model: nn.Module) -> tuple[str, str]:
    """Return architecture and task as transformers' class names say them, or two empty strings."""
    if not type(model).__module__.startswith("transformers.models."):
        return "", ""
    name, _, task = type(model).__name__.partition("For")
    return name, {"SequenceClassification": "sequence", "TokenClassification": "token"}.get(task, "")


def padding_free_problem(model: nn.Module) -> str | None:
    """Return why a classification model, without an adapter, cannot be run on packed rows, or None if it can."""
    name, task = _kind(model)
    known = (*ENCODER_HEADS, *CAUSAL)
    if name not in known or not task:
        return f"{type(model).__name__} has no padding-free forward; {', '.join(known)} have"
    if name in ENCODER_HEADS and getattr(model.config, "is_decoder", False):
        return f"{type(model).__name__} is set up as a decoder"
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in ("sdpa", packed_attention.NAME):
        return f"its attention is {attention}, not sdpa"
    return None


def choose_batching(wanted: Batching, model: nn.Module, neftune: bool = False) -> Decision:
    """Choose how texts become batches: as the recipe says, or padded where that cannot be packed.

    Args:
        wanted: `training.batching`.
        model: a classification model, without an adapter.
        neftune: whether NEFTune adds noise to the embeddings.
    """
    if wanted == "grouped":
        return Decision(
            "batching",
            wanted,
            "texts of similar length need little padding; where length tells the label, a run may not learn",
        )
    if wanted == "padded":
        return Decision("batching", wanted, "random batches, padded to their longest text")
    problem = padding_free_problem(model)
    if problem is None and neftune:
        problem = "NEFTune scales its noise by the length of the padded batch"
    if problem is not None:
        return Decision("batching", "padded", f"padding_free does not fit: {problem}")
    return Decision("batching", wanted, "a batch is one row, with attention per text")


def enable_padding_free(model: nn.Module) -> None:
    """Let a classification model take packed batches (`data.PackedCollator`) beside padded ones. May be repeated.

    Args:
        model: of transformers, without an adapter; PEFT, DDP and the Trainer may wrap it afterwards.

    Raises:
        ModelError: the model cannot be run packed.
    """
    if isinstance(model.forward, PackedForward):
        return
    if problem := padding_free_problem(model):
        raise ModelError(f"training.batching=padding_free: {problem}; use padded")
    packed_attention.register()
    model.config._attn_implementation = packed_attention.NAME  # type: ignore[union-attr]
    model.forward = PackedForward(model)


def takes_packed_rows(model: Any) -> bool:
    """Return whether a model, with an adapter or without, was given to `enable_padding_free`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return isinstance(inner.forward, PackedForward)


def filler(total: int, longest: int) -> list[int]:
    """Return the lengths of the texts of padding that lengthen a row of `total` sub-tokens, see `ROUND`.

    None is longer than the `longest` text of the batch: the model may have no more positions.
    """
    missing = -total % (ROUND if total > ROUND else 8)
    return [min(longest, missing - start) for start in range(0, missing, longest)]


class PackedForward:
    """Takes the place of a model's `forward`: packed where a batch has `cu_seqlens`, else as before."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.padded = model.forward
        self.name, self.task = _kind(model)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            input_ids: packed [1, total], or padded [batch, seq].
            attention_mask: of padded batches.
            position_ids: likewise; in a packed row they follow from `cu_seqlens`.
            labels: [texts] or [1, total]; padded [batch] or [batch, seq].
            cu_seqlens: where each packed text begins, and the end of the last, int32 [texts + 1].
            max_length: sub-tokens of the longest packed text.
            kwargs: for the model's own forward.

        Returns:
            An output of transformers with `logits` of [texts, classes] or [1, total, classes], and `loss` if there
            are labels.
        """
        if cu_seqlens is None:
            rest = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
            given = {name: value for name, value in rest.items() if value is not None}
            return self.padded(input_ids=input_ids, **given, **kwargs)
        if input_ids is None or max_length is None:
            raise ModelError("a packed batch needs input_ids, cu_seqlens and max_length")
        total = input_ids.shape[1]
        packing = Packing.make(cu_seqlens, total, max_length)
        hidden = self._hidden(*self._filled(input_ids, cu_seqlens, packing))[:, :total]
        logits = self._token_logits(hidden) if self.task == "token" else self._text_logits(hidden, input_ids, packing)
        return self._output(logits, labels)

    def _filled(self, input_ids: Tensor, cu_seqlens: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
        """Lengthen a row on a CPU with texts of padding to a multiple of `ROUND`; the result is cut off again."""
        total = input_ids.shape[1]
        extra = filler(total, packing.max_length) if input_ids.device.type == "cpu" else []
        if not extra:
            return input_ids, packing
        ids = F.pad(input_ids, (0, sum(extra)), value=self.model.config.pad_token_id or 0)
        bounds = torch.cat((cu_seqlens, cu_seqlens.new_tensor([total + end for end in accumulate(extra)])))
        return ids, Packing.make(bounds, ids.shape[1], packing.max_length)

    def _hidden(self, input_ids: Tensor, packing: Packing) -> Tensor:
        """Return the last hidden states, [1, total, hidden]."""
        masker = TokenMasker.of(find_embedding(self.model))
        told = contextlib.nullcontext() if masker is None else masker.layout(packing.rows, packing.positions)
        options: dict[str, Any] = {"use_cache": False} if self.name in CAUSAL else {}
        with told:
            body = self.model.base_model(
                input_ids=input_ids,
                # transformers leaves a mask of four dimensions as it is; none would make it build one
                attention_mask=input_ids.new_zeros(1, 1, 1, 1),
                position_ids=self._position_ids(input_ids, packing),
                packing=packing,
                **options,
            )
        hidden: Tensor = body.last_hidden_state
        return hidden

    def _position_ids(self, input_ids: Tensor, packing: Packing) -> Tensor:
        if "Roberta" not in self.name:
            return packing.positions
        # counted as transformers does: from the padding token's id on, and not at padding tokens inside a text
        pad_id = self.model.config.pad_token_id
        real = (input_ids != pad_id).long()
        counted = real.cumsum(dim=1)
        before = (counted - real)[0, packing.cu_seqlens[:-1].long()][packing.rows]
        return (counted - before) * real + pad_id

    def _text_logits(self, hidden: Tensor, input_ids: Tensor, packing: Packing) -> Tensor:
        """Pool as the model does for padded batches, and apply its head; [texts, classes]."""
        at = packing.cu_seqlens[:-1].long()
        if self.name not in CAUSAL:
            return ENCODER_HEADS[self.name](self.model, hidden[0, at].unsqueeze(1))
        # the last sub-token that is no padding token, should a text end in one
        columns = torch.arange(input_ids.shape[1], device=at.device)
        real = torch.where(input_ids[0] != self.model.config.pad_token_id, columns, 0)
        at = at.scatter_reduce(0, packing.rows[0], real, "amax")
        return _causal_head(self.model, hidden[0, at].unsqueeze(1))

    def _token_logits(self, hidden: Tensor) -> Tensor:
        head = self.model.score if self.name in CAUSAL else self.model.classifier
        logits: Tensor = head(self.model.dropout(hidden))
        return logits

    def _output(self, logits: Tensor, labels: Tensor | None) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

        loss = None if labels is None else F.cross_entropy(logits.flatten(0, -2).float(), labels.reshape(-1))
        kind = TokenClassifierOutput if self.task == "token" else SequenceClassifierOutput
        return kind(loss=loss, logits=logits)
