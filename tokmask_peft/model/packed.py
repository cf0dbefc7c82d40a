"""The padding-free forward: a batch as one packed row, attention per text, and the head on each text's own state.

Everything but attention works on single sub-tokens, and on a packed row nothing is spent on padding. Padded batches
still take the model's own forward, so that a model can be trained packed and evaluated padded.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokmask_peft.console import Decision
from tokmask_peft.errors import ModelError
from tokmask_peft.masking.embedding import find_embedding
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.dropout import dropout as dropped
from tokmask_peft.recipe.schema import Batching

WORTH = 400
"""Squares of sub-tokens for which one more call of the kernel is worth while on a CPU.

Measured forward and backward on one core of an EPYC with avx512_bf16 (12 heads of 32, 32 texts of 3 to 35 sub-tokens,
fp32): all texts padded to the longest 12.2 ms; in buckets, for 100, 400 and 1600 squares, 6.4, 5.7 and 6.3 ms; text by
text 7.6 ms; the row as a whole under a mask 28 ms. Longer texts, 14 heads of 64 and causal layers differ by less than a
tenth between 100 and 1600. With dropout, on a busier machine: 14.9; 10.6, 9.3 and 8.5; 12.7 ms (with torch's own kernel
10.1 and 9.5 ms for 400 and 1600).
"""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Texts of similar length, padded to the longest of them.

    Attributes:
        texts: how many.
        length: of the longest.
        mask: which sub-tokens are none, bool [texts, 1, 1, length]; None where there is no padding.
    """

    texts: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the texts of a packed row lie; made once for each batch, used by every layer.

    Attributes:
        cu_seqlens: where each text begins, and the end of the last, int32 [texts + 1].
        max_length: of the longest text.
        rows: index of the text of each sub-token, int64 [1, total].
        positions: position in its text, int64 [1, total].
        buckets: how the row is padded for kernels that need it.
        slots: for each slot of the padded buckets the sub-token that fills it, int64 [slots].
        back: for each sub-token its slot, int64 [total].
    """

    cu_seqlens: Tensor
    max_length: int
    rows: Tensor
    positions: Tensor
    buckets: tuple[Bucket, ...]
    slots: Tensor
    back: Tensor

    @classmethod
    def make(cls, cu_seqlens: Tensor, total: int, max_length: int, one_bucket: bool = False) -> Packing:
        """Lay out a row of `total` sub-tokens; waits for no GPU.

        Args:
            cu_seqlens: where each text begins, and the end of the last.
            total: sub-tokens of the row.
            max_length: of the longest text.
            one_bucket: pad all texts to the longest, as always on a GPU.
        """
        device = cu_seqlens.device
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        texts = torch.arange(len(starts), device=device)
        rows = torch.repeat_interleave(texts, lengths, output_size=total)
        positions = torch.arange(total, device=device) - starts[rows]
        # On a GPU the lengths are not known here without waiting, and calls cost more than padding.
        together = one_bucket or device.type != "cpu"
        groups = [(None, max_length, True)] if together else _buckets(lengths.tolist())
        buckets, slots, first = [], [], torch.empty_like(starts)
        used = 0
        for members, length, padded in groups:
            chosen = texts if members is None else torch.tensor(members)
            columns = torch.arange(length, device=device)
            ends = lengths[chosen].unsqueeze(1)
            slots.append((starts[chosen].unsqueeze(1) + columns.minimum(ends - 1)).reshape(-1))
            buckets.append(Bucket(len(chosen), length, (columns < ends)[:, None, None] if padded else None))
            first[chosen] = used + torch.arange(len(chosen), device=device) * length
            used += len(chosen) * length
        return cls(
            cu_seqlens=cu_seqlens,
            max_length=max_length,
            rows=rows.unsqueeze(0),
            positions=positions.unsqueeze(0),
            buckets=tuple(buckets),
            slots=torch.cat(slots),
            back=first[rows] + positions,
        )


def _buckets(lengths: list[int]) -> list[tuple[list[int] | None, int, bool]]:
    """Put texts of similar length together: members, longest, and whether any is shorter than that."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    found: list[list[int]] = []
    for text in order:
        if found:
            waste = sum(lengths[text] ** 2 - lengths[other] ** 2 for other in found[-1])
            if waste <= WORTH:
                found[-1].append(text)
                continue
        found.append([text])
    return [(group, lengths[group[-1]], lengths[group[0]] < lengths[group[-1]]) for group in found]


NAME = "tokmask_packed"


class _Pad(torch.autograd.Function):
    """Copy sub-tokens to their slots; the gradient comes back from them alone, without adding anything up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradients[0].index_select(0, back), None, None


class _Unpad(torch.autograd.Function):
    """Take sub-tokens out of their slots; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.slots = padded.shape[0]
        return padded.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (back,) = ctx.saved_tensors
        empty = gradients[0].new_zeros(ctx.slots, *gradients[0].shape[1:])
        return empty.index_copy_(0, back, gradients[0]), None


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each text; without `packing` this is the `sdpa` of transformers.

    Args:
        module: the attention layer.
        query: [1, heads, total, head].
        key: [1, key heads, total, head].
        value: like `key`.
        attention_mask: not looked at where there is a packing.
        dropout: on the attention weights.
        scaling: of the scores.
        is_causal: default: what the layer says.
        sliding_window: sub-tokens that a causal layer sees, itself included.
        packing: where the texts lie.
        kwargs: for `sdpa`.

    Returns:
        [1, total, heads, head], and no weights.
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    causal, sliding_window = seen(module, is_causal, sliding_window, packing.max_length)
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    device = query.device.type
    if device == "cuda" and query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        rows = [tensor.to(torch.get_autocast_dtype("cuda")) for tensor in rows]
    if device == "cuda" and rows[0].dtype != torch.float32 and dropout == 0.0 and (kernel := _varlen_kernel()):
        found = _varlen_attention(kernel, rows, packing, causal, sliding_window, scaling)
    else:
        found = _padded_attention(rows, packing, causal, sliding_window, dropout, scaling)
    return found.to(value.dtype).unsqueeze(0), None


def seen(module: torch.nn.Module, is_causal: bool | None, window: int | None, longest: int) -> tuple[bool, int | None]:
    """Return whether a layer is causal, and its window, if it is narrower than the longest text."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return causal, None if window is not None and window >= longest else window


def _varlen_attention(
    kernel: Callable[..., Tensor],
    rows: list[Tensor],
    packing: Packing,
    causal: bool,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """Attend with a kernel for packed rows; query, key and value as [total, heads, head], and so the result."""
    rows = [rows[0], *(_repeat_heads(tensor, rows[0]) for tensor in rows[1:])]
    # the kernel counts the sub-tokens before the present one, transformers counts that one too
    sides = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
    bounds = (packing.cu_seqlens, packing.cu_seqlens, packing.max_length, packing.max_length)
    return kernel(*(tensor.contiguous() for tensor in rows), *bounds, scale=scaling, window_size=sides)


def _padded_attention(
    rows: list[Tensor], packing: Packing, causal: bool, window: int | None, dropout: float, scaling: float | None
) -> Tensor:
    """Attend in padded buckets; query, key and value as [total, heads, head], and so the result."""
    device = rows[0].device.type
    # The kernels of CPUs are slow in bf16: 26.6 ms in four buckets where fp32 takes 6.8 (see `packing.WORTH`).
    with torch.autocast(device, enabled=False if device == "cpu" else torch.is_autocast_enabled(device)):
        if device == "cpu":
            rows = [tensor.float() for tensor in rows]
        kernel = _dropped_attention if device == "cpu" and dropout > 0 else F.scaled_dot_product_attention
        return attend_in_buckets(rows, packing, causal, window, dropout, scaling, kernel)


def attend_in_buckets(
    rows: list[Tensor],
    packing: Packing,
    causal: bool,
    window: int | None,
    dropout: float,
    scaling: float | None,
    kernel: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """Attend in padded buckets, in the precision that query, key and value come in."""
    rows = [rows[0], *(_repeat_heads(tensor, rows[0]) for tensor in rows[1:])]
    sizes = [bucket.texts * bucket.length for bucket in packing.buckets]
    padded = [_Pad.apply(tensor, packing.slots, packing.back).split(sizes) for tensor in rows]
    outputs = []
    for bucket, *parts in zip(packing.buckets, *padded, strict=True):
        query, key, value = (part.unflatten(0, (bucket.texts, bucket.length)).transpose(1, 2) for part in parts)
        # The padding is on the right, so that no real sub-token of a causal layer sees it.
        mask = None if causal else bucket.mask
        if causal and window is not None:
            mask = torch.ones(bucket.length, bucket.length, dtype=torch.bool, device=query.device)
            mask = mask.tril().triu(1 - window)
        found = kernel(query, key, value, mask, dropout, is_causal=causal and mask is None, scale=scaling)
        outputs.append(found.transpose(1, 2).flatten(0, 1))
    unpadded: Tensor = _Unpad.apply(torch.cat(outputs), packing.back)
    return unpadded


def _dropped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, *, is_causal: bool, scale: float | None
) -> Tensor:
    """Attend with dropout on a CPU, where torch's kernel takes its slow path; every row sees something."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf"))
    return dropped(scores.softmax(-1), p) @ value


def _repeat_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """Give each query head its key or value head; [total, heads, head]."""
    times = query.shape[1] // tensor.shape[1]
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=1)


@functools.cache
def _varlen_kernel() -> Callable[..., Tensor] | None:
    """Return torch's flash attention over packed rows, or None where this torch or this GPU has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)
    kernel: Any = varlen_attn
    return kernel if known and torch.cuda.get_device_capability() >= (8, 0) else None


@functools.cache
def register() -> None:
    """Make the attention function known to transformers under `NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    # for padded batches, which go on through `sdpa`; without a mask function transformers would drop their mask
    AttentionMaskInterface.register(NAME, sdpa_mask)


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
    if attention not in ("sdpa", NAME):
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
    register()
    model.config._attn_implementation = NAME  # type: ignore[union-attr]
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
