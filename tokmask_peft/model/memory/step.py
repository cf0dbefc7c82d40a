"""Run one training step, or one forward of an evaluation, on fake tensors, and count."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from tokmask_peft.masking.embedding import unwrap
from tokmask_peft.model.adapter import inputs_as_they_come
from tokmask_peft.model.dropout import quick_dropout
from tokmask_peft.model.memory.gpu_rules import SavedAttention, autocast_forward, device_rules
from tokmask_peft.model.memory.live import LiveBytes
from tokmask_peft.recipe import Task

PACKED = "tokmask_counted"
"""Name of the attention for packed rows on a GPU.

Its kernel for such rows keeps nothing but its inputs and outputs; with dropout and in fp32, which the kernel does not
take, texts are padded to the longest.
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a micro-batch: the sub-tokens of each text, and whether they are packed into one row."""

    lengths: tuple[int, ...]
    packed: bool = False

    @classmethod
    def padded(cls, texts: int, length: int) -> Shape:
        """Return the shape of so many texts, all padded to a length."""
        return cls((length,) * texts)

    @property
    def tokens(self) -> int:
        """Positions that are computed, padding included."""
        return sum(self.lengths) if self.packed else len(self.lengths) * max(self.lengths)


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What a micro-batch takes besides the model.

    Attributes:
        saved: kept between forward and backward.
        peak: the most at once, gradients of the parameters included.
    """

    saved: int
    peak: int


def count_step(
    model: Any, mode: FakeTensorMode, shape: Shape, task: Task, device_type: str, autocast: bool
) -> StepBytes:
    """Count a forward and a backward on a skeleton; it is left without gradients.

    Args:
        model: of `skeleton`, with gradient checkpointing switched on or off.
        mode: the mode of its tensors.
        shape: of the micro-batch.
        task: decides the labels.
        device_type: cpu, or any other for CUDA.
        autocast: whether the forward runs in bf16 autocast.
    """
    model.train()
    with _counting(model, mode, shape, task, device_type) as (live, batch):
        drawn = quick_dropout(model) if device_type == "cpu" else contextlib.nullcontext()
        with device_rules(device_type, autocast), inputs_as_they_come(model, autocast), drawn:
            with autocast_forward(autocast):
                logits = _forward(model, batch, device_type)
                loss = F.cross_entropy(logits.flatten(0, -2).float(), batch["labels"].flatten())
            del logits
            saved = live.now
            loss.backward()
        peak = live.peak
        model.zero_grad(set_to_none=True)
        del loss
    return StepBytes(saved, peak)


def count_forward(model: Any, mode: FakeTensorMode, shape: Shape, task: Task, device_type: str, autocast: bool) -> int:
    """Return the peak bytes of a forward of an evaluation; arguments as for `count_step`."""
    model.eval()
    with _counting(model, mode, shape, task, device_type) as (live, batch):
        computed = autocast_forward(autocast), inputs_as_they_come(model, autocast)
        with torch.no_grad(), device_rules(device_type, autocast), computed[0], computed[1]:
            _forward(model, batch, device_type)
        return live.peak


@contextlib.contextmanager
def _counting(
    model: nn.Module, mode: FakeTensorMode, shape: Shape, task: Task, device_type: str
) -> Iterator[tuple[LiveBytes, dict[str, Any]]]:
    batch = _packed_batch(shape, device_type) if shape.packed else None
    with mode:
        if batch is None:
            ids = torch.ones(len(shape.lengths), max(shape.lengths), dtype=torch.long)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            batch = {name: _faked(value, mode) for name, value in batch.items()}
        size = (len(shape.lengths),) if task == "sequence" else batch.get("texts", batch["input_ids"]).shape
        batch["labels"] = torch.zeros(size, dtype=torch.long)
        with LiveBytes() as live:
            live.exclude(*model.parameters(), *model.buffers(), batch["labels"], batch["input_ids"])
            yield live, batch


def _packed_batch(shape: Shape, device_type: str) -> dict[str, Any]:
    """Return the row of a packed batch and how it is laid out, on real tensors: the layout depends on their values.

    The row is as the body of the model takes it, lengthened on a CPU; `texts` and `layout` are of its texts alone.
    """
    from tokmask_peft.model.packing import Packing
    from tokmask_peft.model.padding_free import filler

    longest = max(shape.lengths)
    extra = filler(shape.tokens, longest) if device_type == "cpu" else []

    def packing(lengths: Sequence[int]) -> Packing:
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return Packing.make(bounds, sum(lengths), longest, one_bucket=device_type != "cpu")

    with unset_fake_temporarily():
        row = torch.ones(1, shape.tokens + sum(extra), dtype=torch.long)
        layouts = {"packing": packing([*shape.lengths, *extra]), "layout": packing(shape.lengths)}
        return {"input_ids": row, "texts": row[:, : shape.tokens], **layouts}


def _faked(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: _faked(getattr(value, name), mode) for name in names})
    return tuple(_faked(part, mode) for part in value) if isinstance(value, tuple) else value


def _forward(model: Any, batch: dict[str, Any], device_type: str) -> Tensor:
    if "packing" not in batch:
        return _logits(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))
    from tokmask_peft.model.padding_free import enable_padding_free

    base: Any = unwrap(model)
    enable_padding_free(base)
    if device_type != "cpu":
        _register()
        base.config._attn_implementation = PACKED
    forward = base.forward
    hidden = forward._hidden(batch["input_ids"], batch["packing"])[:, : batch["texts"].shape[1]]
    if forward.task == "token":
        return _logits(forward._token_logits(hidden))
    return _logits(forward._text_logits(hidden, batch["texts"], batch["layout"]))


def _logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def _counted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    packing: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Stand for `packed_attention` on a GPU."""
    from tokmask_peft.model.packed_attention import attend_in_buckets, seen

    kind = value.dtype
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    if dropout > 0 or query.dtype == torch.float32:
        causal, window = seen(module, is_causal, sliding_window, packing.max_length)
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        return attend_in_buckets(rows, packing, causal, window, dropout, None).to(kind).unsqueeze(0), None
    times = query.shape[1] // key.shape[1]
    if times > 1:
        key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    rows = [tensor.transpose(1, 2).contiguous() for tensor in (query, key, value)]
    return SavedAttention.apply(*rows, None), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED, _counted_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
