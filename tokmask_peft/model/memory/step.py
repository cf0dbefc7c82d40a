"""Run one training step, or one forward of an evaluation, on fake tensors, and count."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tokmask_peft.masking.embedding import unwrap
from tokmask_peft.model.adapter import add_adapter, inputs_as_they_come
from tokmask_peft.model.backbone import HEAD_NAMES, Backbone, head_modules, hold_in_fp32
from tokmask_peft.model.dropout import quick_dropout
from tokmask_peft.recipe.schema import Recipe, Task


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside it make, real or fake, until each is freed.

    What a kernel takes and gives back within one operation is not seen.

    Attributes:
        now: bytes alive.
        peak: the most bytes that were alive at once since the beginning or `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def exclude(self, *tensors: Tensor) -> None:
        """Do not count tensors that were there before, should an operation hand them on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = storage

    def reset_peak(self) -> None:
        """Begin to look for the peak anew."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if self._known.get(id(storage)) is storage:
            return
        self._known[id(storage)] = storage
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size).atexit = False

    def _forget(self, size: int) -> None:
        self.now -= size


class SavedAttention(torch.autograd.Function):
    """Stands for flash attention: keeps query, key, value, output and a number for each query; no weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Take [..., heads, seq, head] of one kind, give the shape of query with the head size of value."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *(() if mask is None else (mask,)))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Make the gradients' shapes; their sums are in fp32 first."""
        query, key, value = ctx.saved_tensors[:3]
        sums = torch.empty_like(query, dtype=torch.float32)
        found = torch.empty_like(sums, dtype=query.dtype), torch.empty_like(key), torch.empty_like(value)
        return *found, None


class _GpuRules(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.layer_norm and torch.is_autocast_enabled("cuda"):
            return func(args[0].float(), *args[1:], **kwargs)  # in autocast's list of operations in fp32
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
) -> Any:
    if options.get("enable_gqa") and attn_mask is not None:
        times = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(times, -3) for tensor in (key, value))
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    if attn_mask is not None and attn_mask.dtype != query.dtype:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    return SavedAttention.apply(query, key, value, attn_mask)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


@contextlib.contextmanager
def device_rules(device_type: str, autocast: bool) -> Iterator[None]:
    """Let forward and backward on fake tensors of a CPU keep what they would on the device.

    Args:
        device_type: cpu, or any other for the rules of CUDA.
        autocast: whether the forward runs in `autocast_forward`.
    """
    if device_type == "cpu":
        yield
        return
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", autocast)  # PEFT asks for it
    try:
        with _GpuRules():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def checkpointing_options(device_type: str) -> dict[str, Any]:
    """Return gradient checkpointing's options: what it computes again in `backward` is outside of any function mode."""
    again = contextlib.nullcontext if device_type == "cpu" else _GpuRules
    return {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), again())}


def autocast_forward(enabled: bool) -> torch.autocast:
    """Return the context of a forward in bf16; fake tensors are those of a CPU."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


BLOCK, NESTED_BLOCK = 64, 256
"""Weights for each scale, and scales for each scale of scales (Dettmers et al. 2023, double quantization)."""


def nf4_bytes(weights: int) -> int:
    """Return the bytes of a layer's weights in NF4 with double quantization: codes, scales and their tables."""
    blocks = -(-weights // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4
    return -(-weights // 2) + scales + 4 * (16 + 256)


def int8_bytes(out_features: int, in_features: int) -> int:
    """Return the bytes of a layer's weights in 8 bits with a scale for each row."""
    return out_features * in_features + 4 * out_features


class _Product(torch.autograd.Function):
    """A frozen quantized product: unpacks the weights for each pass; in 8 bits it keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, keeps_input: bool) -> Tensor:
        ctx.shape, ctx.features = x.shape, out_features
        ctx.kept = x if keeps_input else None
        unpacked = x.new_empty(out_features, x.shape[-1])
        out = x.new_empty(*x.shape[:-1], out_features)
        del unpacked
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        unpacked = gradients[0].new_empty(ctx.features, ctx.shape[-1])
        found = gradients[0].new_empty(ctx.shape)
        del unpacked
        ctx.kept = None
        return found, None, None


class Simulated4bit(Linear4bit):
    """Stands for a 4-bit layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        out: Tensor = _Product.apply(x.to(self.compute_dtype), self.out_features, False)
        return out.to(x.dtype)


class Simulated8bit(Linear8bitLt):
    """Stands for an 8-bit layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        out: Tensor = _Product.apply(x, self.out_features, True)
        return out


def simulate_quantized(model: Any, kind: str, dtype: torch.dtype, keep: tuple[str, ...]) -> None:
    """Replace the linear layers of a model on the meta device, as loading it quantized would.

    Args:
        model: of transformers, without an adapter.
        kind: nf4 or int8.
        dtype: that 4-bit layers compute in.
        keep: modules that are left alone, by full name.
    """
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or any(name == other or name.startswith(f"{other}.") for other in keep):
            continue
        bias = module.bias is not None
        made: Any
        if kind == "nf4":
            made = Linear4bit(
                module.in_features,
                module.out_features,
                bias,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            made.__class__ = Simulated4bit
        else:
            made = Linear8bitLt(module.in_features, module.out_features, bias, has_fp16_weights=False, device="meta")
            made.__class__ = Simulated8bit
        made.requires_grad_(False)
        if bias:
            made.bias = nn.Parameter(module.bias.detach().clone(), False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"


def bare_model(config: Any, task: Task, dtype: torch.dtype) -> nn.Module:
    """Return the classification model of a config of transformers on the meta device.

    Args:
        config: of the backbone, with `num_labels` set.
        task: sequence or token.
        dtype: of its weights.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    auto = AutoModelForSequenceClassification if task == "sequence" else AutoModelForTokenClassification
    config = copy.deepcopy(config)
    config.use_cache = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the loaded backbone
    if config.pad_token_id is None:
        config.pad_token_id = 0
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, dtype=dtype)
    return model


def with_layers(config: Any, layers: int) -> Any:
    """Return a copy of a config with so many layers."""
    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers
    return config


def skeleton(
    config: Any,
    recipe: Recipe,
    quantization: str,
    dtype: torch.dtype,
    adapted: int | None = None,
    trained_row: bool = True,
) -> tuple[Any, FakeTensorMode]:
    """Return the model with its adapter, ready for a step, and the mode in which its tensors live.

    Args:
        config: of the backbone, with as many layers as wanted.
        recipe: adapter and task.
        quantization: nf4, int8 or none.
        dtype: of what is not quantized.
        adapted: how many upper layers get an adapter; all of them by default.
        trained_row: whether a mask row that the recipe trains is part of the adapter, for which PEFT copies the whole
            embedding in each forward and makes a gradient of it; else the gradient only flows down to the embedding.
    """
    model: Any = bare_model(config, recipe.data.task, dtype)
    new_modules = tuple(head_modules(model))
    if quantization != "none":
        simulate_quantized(model, quantization, dtype, (*HEAD_NAMES, *new_modules))
    hold_in_fp32(model, new_modules)
    backbone = Backbone(model, None, new_modules, (), dtype, quantization)
    adapter = recipe.adapter.model_copy(update={"layers": adapted or "all"})
    trained = recipe.masking.trainable_mask
    with torch.device("meta"):
        wrapped, _ = add_adapter(backbone, adapter, recipe.data.task, 0 if trained and trained_row else None)
    if trained and not trained_row:
        model.enable_input_require_grads()
    return wrapped.train(), make_fake(wrapped)


def make_fake(model: nn.Module) -> FakeTensorMode:
    """Turn meta tensors into fake ones of a CPU, in place, and return their mode: autocast has no meta device."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    fresh = made.setdefault(id(value), nn.Parameter(_empty(value), value.requires_grad))
                    module._parameters[name] = _like(fresh, value)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _empty(buffer)
    return mode


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _like(fresh: Any, value: Any) -> Any:
    """Keep what PEFT reads off the weights of bitsandbytes."""
    for name in ("quant_type", "compress_statistics", "quant_state", "has_fp16_weights", "CB", "SCB"):
        if hasattr(value, name):
            setattr(fresh, name, getattr(value, name))
    return fresh


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
    from tokmask_peft.model.packed import Packing, filler

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
    from tokmask_peft.model.packed import enable_padding_free, packed_hidden, packed_logits

    base: Any = unwrap(model)
    enable_padding_free(base)
    if device_type != "cpu":
        _register()
        base.config._attn_implementation = PACKED
    hidden = packed_hidden(base, batch["input_ids"], batch["packing"])[:, : batch["texts"].shape[1]]
    return packed_logits(base, hidden, batch["texts"], batch["layout"])


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
    from tokmask_peft.model.packed import attend_in_buckets, seen

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
