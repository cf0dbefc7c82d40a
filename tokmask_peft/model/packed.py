"""The padding-free forward: a batch as one packed row, attention per text, and the head on each text's own state.

Padded batches still take the model's own forward, so that a model can be trained packed and evaluated padded. What
differs between architectures is in `families.FAMILIES`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from tokmask_peft.console import Decision
from tokmask_peft.errors import ModelError
from tokmask_peft.examples import IGNORED
from tokmask_peft.masking.embedding import find_embedding, unwrap
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.replacement import REPLACEMENTS
from tokmask_peft.model.decisions import flash_problem, rows_kernel, rows_problem
from tokmask_peft.model.families import NAME, Family, family_of, padding_free_problem
from tokmask_peft.model.layers import dropout as dropped
from tokmask_peft.recipe.schema import Batching, Recipe

Kernel = Callable[..., Tensor]


def choose_batching(
    wanted: Batching,
    model: nn.Module,
    recipe: Recipe | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Decision:
    """Choose how texts become batches: as `training.batching` says, or padded if the model cannot take packed rows.

    The model comes without an adapter; a `recipe`, for training, may ask for what packed rows cannot do. A GPU on which
    the matrix products are of a `dtype` may have no kernel for packed rows; attention then pads them, and nothing else.
    """
    if wanted == "grouped":
        reason = "texts of similar length need little padding; if length gives the label away, a run may not learn"
    elif wanted == "padded":
        reason = "random batches, padded to their longest text"
    else:
        if problem := padding_free_problem(model) or (None if recipe is None else _training_problem(model, recipe)):
            return Decision("batching", "padded", f"padding_free does not fit: {problem}")
        reason = "a batch is one row, with attention per text"
        if device is not None and device.type == "cuda" and (problem := rows_problem(device, dtype, head_size(model))):
            reason += f", padded to the longest ({problem})"
    return Decision("batching", wanted, reason)


def _training_problem(model: nn.Module, recipe: Recipe) -> str | None:
    """Return why a model that takes packed rows cannot be trained on them as a recipe says, or None."""
    if recipe.training.neftune_alpha is not None:
        return "NEFTune scales its noise by the length of the padded batch"
    if not recipe.masking.is_off and REPLACEMENTS[recipe.masking.replace].removes:
        config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        local = getattr(config, "local_attention", None)  # of ModernBERT, half of it on either side
        width = min((size for size in (window, local and local // 2) if size), default=None)
        if width is not None and width < recipe.data.max_length:
            return f"masking.replace: drop would widen the model's attention windows of {width} sub-tokens"
    return None


def enable_padding_free(model: nn.Module) -> None:
    """Let a classification model take packed batches (`data.PackedCollator`) as well as padded ones. May be repeated.

    The model comes without an adapter; PEFT, DDP and the Trainer may wrap it afterwards. A ModelError says why it
    cannot take packed rows.
    """
    if isinstance(model, PackedRows):
        return
    own, problem = type(model), padding_free_problem(model)
    if problem is not None:
        message = f"training.batching=padding_free: {problem}; use padded"
        raise ModelError(message, code="not-packable", model=own.__name__)
    use_packed_attention(model)
    per_token = own.__name__.endswith("TokenClassification")
    members = {"__module__": own.__module__, "family": family_of(model), "per_token": per_token}
    model.__class__ = type(own.__name__, (PackedRows, own), members)


def use_packed_attention(model: nn.Module) -> None:
    """Let the layers of a model call `packed_attention`, which also takes padded batches."""
    AttentionInterface.register(NAME, packed_attention)
    # for padded batches, which go on through `sdpa`; without a mask function transformers would drop their mask
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME  # type: ignore[union-attr]


def expand_heads_if_needed(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Keep groups of heads from the slow kernel of a GPU without flash attention; see `packed_attention`."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = getattr(config, "num_attention_heads", 0)
    grouped = (getattr(config, "num_key_value_heads", None) or heads) < heads
    plain = getattr(model.config, "_attn_implementation", None) == "sdpa"
    if grouped and plain and device.type == "cuda" and flash_problem(device, dtype, head_size(model)):
        use_packed_attention(model)


def takes_packed_rows(model: Any) -> bool:
    """Return whether a model, with an adapter or without, was given to `enable_padding_free`."""
    return isinstance(unwrap(model), PackedRows)


WORTH = 400
"""Squares of sub-tokens that justify one more call of the attention kernel on a CPU.

Measured forward and backward on one core of an EPYC with avx512_bf16 (12 heads of 32, 32 texts of 3 to 35 sub-tokens,
fp32): all texts padded to the longest 12.2 ms; in buckets, for 100, 400 and 1600 squares, 6.4, 5.7 and 6.3 ms; text by
text 7.6 ms; the row as a whole under a mask 28 ms. Longer texts, 14 heads of 64 and causal layers depend on it less.
"""

ROUND = 64
"""Sub-tokens that a packed row on a CPU is a multiple of (short ones, of 8): oneDNN keeps a kernel for each shape."""


@dataclass(frozen=True, slots=True)
class Packing:
    """The places of the texts in a packed row; made once for each batch, used by every layer.

    A bucket holds texts of similar length for kernels that need padding: how many, the length of the longest, and which
    slots hold a sub-token, bool [texts, 1, 1, length], or None if all do.
    """

    cu_seqlens: Tensor  # the start of each text, and the end of the last, int32 [texts + 1]
    max_length: int
    rows: Tensor  # index of the text of each sub-token, int64 [1, total]
    positions: Tensor  # position in its text, int64 [1, total]
    buckets: tuple[tuple[int, int, Tensor | None], ...]
    slots: Tensor  # for each slot of the padded buckets the sub-token that fills it, int64 [slots]
    back: Tensor  # for each sub-token its slot, int64 [total]

    @classmethod
    def make(cls, cu_seqlens: Tensor, total: int, max_length: int, one_bucket: bool = False) -> Packing:
        """Lay out a row of `total` sub-tokens, without waiting for a GPU, where there is always `one_bucket`."""
        device = cu_seqlens.device
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        texts = torch.arange(len(starts), device=device)
        rows = torch.repeat_interleave(texts, lengths, output_size=total)
        positions = torch.arange(total, device=device) - starts[rows]
        # on a GPU the lengths cannot be read here without waiting, and calls cost more than padding
        together = one_bucket or device.type != "cpu"
        groups = [(None, max_length, True)] if together else _buckets(lengths.tolist())
        buckets, slots, first, used = [], [], torch.empty_like(starts), 0
        for members, length, padded in groups:
            chosen = texts if members is None else torch.tensor(members)
            columns, ends = torch.arange(length, device=device), lengths[chosen].unsqueeze(1)
            slots.append((starts[chosen].unsqueeze(1) + columns.minimum(ends - 1)).reshape(-1))
            buckets.append((len(chosen), length, (columns < ends)[:, None, None] if padded else None))
            first[chosen] = used + torch.arange(len(chosen), device=device) * length
            used += len(chosen) * length
        layout = rows[None], positions[None], tuple(buckets), torch.cat(slots), first[rows] + positions
        return cls(cu_seqlens, max_length, *layout)


def _buckets(lengths: list[int]) -> list[tuple[list[int] | None, int, bool]]:
    """Put texts of similar length together: members, longest, and whether any is shorter than that."""
    found: list[list[int]] = []
    for text in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found and sum(lengths[text] ** 2 - lengths[other] ** 2 for other in found[-1]) <= WORTH:
            found[-1].append(text)
        else:
            found.append([text])
    return [(group, lengths[group[-1]], lengths[group[0]] < lengths[group[-1]]) for group in found]


def filler(total: int, longest: int) -> list[int]:
    """Return lengths of texts of padding that lengthen a row, see `ROUND`, none above the `longest` of the batch."""
    missing = -total % (ROUND if total > ROUND else 8)
    return [min(longest, missing - start) for start in range(0, missing, longest)]


class PackedRows(nn.Module):
    """What `enable_padding_free` adds to a model's class: another forward for batches with `cu_seqlens`."""

    family: Family
    per_token: bool

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return an output of transformers with `logits`, [texts, classes] or [1, total, classes], and maybe `loss`.

        `input_ids` are packed, [1, total], or padded, [batch, seq], and so are `token_type_ids`, and the labels of
        models with an answer per sub-token; other labels are [texts]. `cu_seqlens`, int32 [texts + 1], holds the start
        of each packed text and the end of the last; `max_length` is that of the longest packed text. `attention_mask`
        and `position_ids` are for padded batches: in a packed row they follow from `cu_seqlens`.
        """
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if cu_seqlens is None:
            rest = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
            kwargs |= types | {name: value for name, value in rest.items() if value is not None}
            return super().forward(input_ids=input_ids, **kwargs)
        if input_ids is None or max_length is None:
            raise ModelError("a packed batch needs input_ids, cu_seqlens and max_length", code="incomplete-batch")
        packing = Packing.make(cu_seqlens, input_ids.shape[1], max_length)
        places = {"position_ids": self.family.positions(self, input_ids, packing)} | types
        masker = TokenMasker.of(find_embedding(self))
        removed = None if masker is None else masker.removed(input_ids, packing.rows, packing.positions)
        ids, kept = input_ids, None
        if removed is not None:
            kept = (~removed[0]).nonzero().flatten()
            ids, places = ids[:, kept], {name: row[:, kept] for name, row in places.items()}
            lengths = torch.bincount(packing.rows[0, kept], minlength=len(cu_seqlens) - 1)
            cu_seqlens, max_length = F.pad(lengths.cumsum(0), (1, 0)).to(cu_seqlens.dtype), int(lengths.max())
            packing = Packing.make(cu_seqlens, len(kept), max_length)
            labels = labels.masked_fill(removed, IGNORED) if labels is not None and self.per_token else labels
        longer, longer_ids, total = packing, ids, ids.shape[1]
        if ids.device.type == "cpu" and (extra := filler(total, max_length)):  # what is added is cut off again
            pad_id = self.config.pad_token_id or 0  # type: ignore[union-attr]
            longer_ids = F.pad(ids, (0, sum(extra)), value=pad_id)  # type: ignore[arg-type]
            bounds = torch.cat((cu_seqlens, cu_seqlens.new_tensor([total + end for end in accumulate(extra)])))
            longer = Packing.make(bounds, longer_ids.shape[1], max_length)
            places = {name: F.pad(row, (0, sum(extra))) for name, row in places.items()}
        logits = packed_logits(self, packed_hidden(self, longer_ids, longer, **places)[:, :total], ids, packing)
        if kept is not None and self.per_token:  # back to the places of all sub-tokens
            logits = logits.new_zeros(1, input_ids.shape[1], logits.shape[-1]).index_copy(1, kept, logits)
        loss = None
        if labels is not None and not labels.is_floating_point():  # several a text are left to `ClassificationLoss`
            loss = F.cross_entropy(logits.flatten(0, -2).float(), labels.reshape(-1))
        return (TokenClassifierOutput if logits.dim() == 3 else SequenceClassifierOutput)(loss=loss, logits=logits)


def packed_hidden(model: Any, input_ids: Tensor, packing: Packing, **places: Tensor) -> Tensor:
    """Return the last hidden states of a packed row, [1, total, hidden]; `places` are position ids and token types."""
    places = places or {"position_ids": model.family.positions(model, input_ids, packing)}
    masker = TokenMasker.of(find_embedding(model))
    with contextlib.nullcontext() if masker is None else masker.layout(packing.rows, packing.positions):
        hidden: Tensor = model.base_model(
            input_ids=input_ids,
            # transformers leaves a mask of four dimensions as it is; without one it would build its own
            attention_mask=input_ids.new_zeros(1, 1, 1, 1),
            packing=packing,
            **({"use_cache": False} if model.family.causal else {}),
            **places,
        ).last_hidden_state
    return hidden


def packed_logits(model: Any, hidden: Tensor, input_ids: Tensor, packing: Packing) -> Tensor:
    """Apply the model's head: pooled as for padded batches, [texts, classes], or per sub-token, [1, total, classes]."""
    family: Family = model.family
    if model.per_token:
        return family.token_head(model, hidden)
    # ModernBERT's own pooling is in its config
    if (how := getattr(model, "text_pooling", getattr(model.config, "classifier_pooling", "cls"))) != "cls":
        bounds = packing.cu_seqlens.long()
        if how == "ends":
            states = hidden[0, torch.stack([bounds[:-1], bounds[1:] - 1], 1)].float().mean(1)
        else:
            states = torch.segment_reduce(hidden[0].float(), how, lengths=bounds.diff(), axis=0)
        return family.head(model, states.to(hidden.dtype).unsqueeze(1))
    at = packing.cu_seqlens[:-1].long()
    if family.causal:  # the last sub-token that is not a padding token, in case a text ends in one
        columns = torch.arange(input_ids.shape[1], device=at.device)
        real = torch.where(input_ids[0] != model.config.pad_token_id, columns, 0)
        at = at.scatter_reduce(0, packing.rows[0], real, "amax")
    return family.head(model, hidden[0, at].unsqueeze(1))


def packed_attention(
    module: nn.Module,
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
    """Attend within each text: [1, total, heads, head] and no weights. Without `packing` this is transformers' `sdpa`.

    That leaves groups of heads to torch if there is no mask. Without flash attention, torch's only kernel for them
    keeps all attention weights; given a mask that hides nothing more, transformers gives each head its own keys.

    `query`, `key` and `value` are [1, heads, total, head], the latter two maybe with fewer heads. `attention_mask` is
    ignored if there is a `packing`. `sliding_window` is the number of sub-tokens that a layer sees on its left, itself
    included, and if it is not causal, on its right as well. By default the `module` says whether it is causal.
    """
    if packing is None:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        grouped = query.device.type == "cuda" and attention_mask is None and key.shape[1] < query.shape[1]
        if grouped and flash_problem(query.device, _computed_in(query), query.shape[-1]):
            whole = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool)
            attention_mask = whole.tril() if seen(module, is_causal, None, 0)[0] else whole
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    causal, window = seen(module, is_causal, sliding_window, packing.max_length)
    rows = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    device, size = query.device.type, query.shape[-1]
    if device == "cpu":  # whose kernels are slow in bf16: four buckets take 26.6 ms, and 6.8 in fp32 (see `WORTH`)
        kernel: Kernel = _dropped_attention if dropout > 0 else F.scaled_dot_product_attention
        with torch.autocast("cpu", enabled=False):
            rows = [tensor.float() for tensor in rows]
            found = attend_in_buckets(rows, packing, causal, window, dropout, scaling, kernel)
        return found.to(value.dtype).unsqueeze(0), None
    if device == "cuda":
        rows = [tensor.to(_computed_in(query)) for tensor in rows]
        if missing := -size % 8:  # kernels of GPUs take multiples of 8; zeros add nothing to a product
            rows = [F.pad(tensor, (0, missing)) for tensor in rows]
            scaling = size**-0.5 if scaling is None else scaling
    if device == "cuda" and dropout == 0.0 and rows_problem(query.device, rows[0].dtype, rows[0].shape[-1]) is None:
        found = _varlen_attention(cast(Kernel, rows_kernel()), rows, packing, causal, window, scaling)
    else:
        found = attend_in_buckets(rows, packing, causal, window, dropout, scaling, F.scaled_dot_product_attention)
    return found.narrow(-1, 0, size).to(value.dtype).unsqueeze(0), None


def seen(module: nn.Module, is_causal: bool | None, window: int | None, longest: int) -> tuple[bool, int | None]:
    """Return whether a layer is causal, and its window, if it is narrower than the longest text."""
    if is_causal is False and window is not None:  # by `is_causal` in the config, where masks count the bound in
        window += 1
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return causal, None if window is not None and window >= longest else window


def head_size(model: nn.Module) -> int:
    """Return the size of a model's attention heads, as kernels of a GPU see it: a multiple of 8."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return -(-int(size) // 8) * 8


def _computed_in(tensor: Tensor) -> torch.dtype:
    low = tensor.dtype == torch.float32 and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if low else tensor.dtype


def _varlen_attention(
    kernel: Kernel, rows: list[Tensor], packing: Packing, causal: bool, window: int | None, scaling: float | None
) -> Tensor:
    """Attend with a kernel for packed rows; query, key and value as [total, heads, head], and so the result."""
    # the kernel counts the sub-tokens before the current one, transformers counts that one too
    side = -1 if window is None else window - 1
    sides = (side, 0 if causal else side)
    bounds = (packing.cu_seqlens, packing.cu_seqlens, packing.max_length, packing.max_length)
    return kernel(*(tensor.contiguous() for tensor in _equal_heads(rows)), *bounds, scale=scaling, window_size=sides)


def attend_in_buckets(
    rows: list[Tensor], packing: Packing, causal: bool, window: int | None, p: float, scale: float | None, using: Kernel
) -> Tensor:
    """Attend in padded buckets; query, key and value as [total, heads, head], and so the result, in their precision."""
    sizes = [texts * length for texts, length, _ in packing.buckets]
    padded = [_Take.apply(tensor, packing.slots, packing.back).split(sizes) for tensor in _equal_heads(rows)]
    outputs = []
    for (texts, length, within), *parts in zip(packing.buckets, *padded, strict=True):
        query, key, value = (part.unflatten(0, (texts, length)).transpose(1, 2) for part in parts)
        # the padding is on the right, where no real sub-token of a causal layer sees it
        mask = None if causal else within
        if window is not None:
            near = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1 - window)
            near = near.tril(0 if causal else window - 1)
            # padding sees itself: a row that sees nothing would be NaN
            mask = near if mask is None else near & (mask | torch.eye(length, dtype=torch.bool, device=query.device))
        found = using(query, key, value, mask, p, is_causal=causal and mask is None, scale=scale)
        outputs.append(found.transpose(1, 2).flatten(0, 1))
    return cast(Tensor, _Take.apply(torch.cat(outputs), packing.back))


def _dropped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, *, is_causal: bool, scale: float | None
) -> Tensor:
    """Attend with dropout on a CPU, where torch's kernel is slow; every row sees at least one sub-token."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf"))
    return dropped(scores.softmax(-1), p) @ value


def _equal_heads(rows: list[Tensor]) -> list[Tensor]:
    """Give each query head its key and value head; query, key and value as [total, heads, head]."""
    times = [rows[0].shape[1] // tensor.shape[1] for tensor in rows]
    return [tensor.repeat_interleave(n, dim=1) if n > 1 else tensor for tensor, n in zip(rows, times, strict=True)]


class _Take(torch.autograd.Function):
    """Take rows by index; the gradient is copied, not summed: by `back`, or, without it, to rows taken once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(index, back)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        index, back = ctx.saved_tensors
        if back is not None:
            return gradients[0].index_select(0, back), None, None
        empty = gradients[0].new_zeros(ctx.rows, *gradients[0].shape[1:])
        return empty.index_copy_(0, index, gradients[0]), None, None
