"""Run a training step, or a forward of an evaluation, on fake tensors, and count the bytes.

They are tensors of a CPU: torch without CUDA has no autograd for fake CUDA ones. For a GPU, the two rules that matter
are imitated: attention keeps no weights, and layer norms under autocast take fp32. The rest is in `estimate.MARGIN`.
"""

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from tokmask_peft.masking.embedding import unwrap
from tokmask_peft.model.adapter import add_adapter, inputs_as_they_come
from tokmask_peft.model.backbone import HEAD_NAMES, Backbone, head_modules, hold_in_fp32, hold_stream_in_fp32
from tokmask_peft.model.decisions import enable_checkpointing
from tokmask_peft.model.layers import quick_dropout, see_both_ways
from tokmask_peft.model.packed import (
    Packing,
    attend_in_buckets,
    enable_padding_free,
    filler,
    packed_hidden,
    packed_logits,
    seen,
)
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.tasks import get_task


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside it make, real or fake: bytes alive `now`, and their `peak`.

    What a kernel takes and gives back within one operation is not seen. torch's `MemTracker` (2.13) cannot serve: it
    puts gradient hooks on frozen parameters, which raises, and refuses modules that packed batches call alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def exclude(self, *tensors: Tensor) -> None:
        """Do not count tensors that existed before, in case an operation returns them."""
        self._known.update({id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and self._known.get(id(storage)) is not storage:
                self._known[id(storage)] = storage
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes()).atexit = False
        return out

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a micro-batch: the sub-tokens of each text, and whether they are packed into one row."""

    lengths: tuple[int, ...]
    packed: bool = False

    @classmethod
    def padded(cls, texts: int, length: int) -> Self:
        """Return the shape of texts that are all padded to one length."""
        return cls((length,) * texts)

    @property
    def tokens(self) -> int:
        """Positions that are computed, padding included."""
        return sum(self.lengths) if self.packed else len(self.lengths) * max(self.lengths)

    def __str__(self) -> str:
        size = f"packed into {self.tokens:,}" if self.packed else f"padded to {max(self.lengths)}"
        return f"{len(self.lengths)} texts {size} sub-tokens"


@dataclass(frozen=True, slots=True)
class Setting:
    """What an estimate depends on besides the recipe."""

    config: Any  # of the backbone, of transformers, with its number of labels
    device_type: str  # cpu or cuda
    quantization: str  # nf4, int8 or none, as decided
    dtype: torch.dtype  # of the backbone, as decided
    assumed: str | None = None  # what a reader should know about a device that is not this machine's
    rows: bool = True  # whether a GPU has the kernel for packed rows


def bare_model(config: Any, task: str, dtype: torch.dtype) -> nn.Module:
    """Return the classification model of a config with `num_labels` on the meta device, with weights of a dtype."""
    config = copy.deepcopy(config)
    config.use_cache = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the loaded backbone
    if config.pad_token_id is None:
        config.pad_token_id = 0
    with torch.device("meta"):
        model: nn.Module = get_task(task).auto_model().from_config(config, dtype=dtype)
        for name, part in list(model.named_modules()):
            if isinstance(part, Conv1D):  # the same product, of GPT-2
                model.set_submodule(name, nn.Linear(part.nx, part.nf, dtype=dtype))
    return model


def with_layers(config: Any, layers: int) -> Any:
    """Return a copy of a config with this many layers."""
    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers
    return config


OUTLIERS = 100  # one in this many columns of an int8 product counts as an outlier's; LLM.int8() found up to 0.1%


class _Product(torch.autograd.Function):
    """A frozen quantized product: unpacks the weights in each pass; in 8 bits it keeps its input.

    For int8 on a GPU bitsandbytes (0.50.2, `MatMul8bitLt`) unpacks in the backward pass only. It rounds the input to
    int8 by way of fp16, sums in int32, gives fp16, and adds the columns with outliers, which it keeps as they came.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, kind: str) -> Tensor:
        ctx.shape, ctx.features, ctx.kept = x.shape, out_features, None if kind == "nf4" else (x,)
        shape = (*x.shape[:-1], out_features)
        if kind != "int8 on a GPU":
            _unpacked = x.new_empty(out_features, x.shape[-1])
            return x.new_empty(shape)
        _codes = _in_8_bits(x)
        outliers = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // OUTLIERS))
        ctx.kept = x, outliers
        found = _from_int32(x, shape)
        return torch.empty_like(found).add_(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        _unpacked = gradients[0].new_empty(ctx.features, ctx.shape[-1])
        found = gradients[0].new_empty(ctx.shape)
        ctx.kept = None
        return found, None, None


def _in_8_bits(x: Tensor) -> Tensor:
    half = x.to(torch.float16)
    _above = half.abs() >= 6.0
    return torch.empty_like(half, dtype=torch.int8)


def _from_int32(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    sums = x.new_empty(shape, dtype=torch.int32)
    return torch.empty_like(sums, dtype=torch.float16).to(x.dtype)


class QuantizedLinear(nn.Linear):
    """Stands for a layer of bitsandbytes; one in 4 bits computes in the type of the other weights."""

    kind: str  # nf4, int8, or "int8 on a GPU"

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        x = input.to(self.weight.dtype) if self.kind == "nf4" else input
        out: Tensor = _Product.apply(x, self.out_features, self.kind)
        return out.to(input.dtype).clone() if self.kind == "nf4" else out  # PEFT clones what comes out of 4-bit layers


class _KeptByFlashAttention(torch.autograd.Function):
    """Keeps query, key, value, output and a number for each query; no attention weights.

    The gradient of the query is summed in fp32. The kernel for `rows` of this many packed texts makes room for 128
    sub-tokens more of each, in heads of a multiple of 32 (above 128, of 64).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rows: int = 0) -> Tensor:
        ctx.rows = rows
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *(() if mask is None else (mask,)))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        sums = torch.empty_like(query, dtype=torch.float32)
        if ctx.rows:
            _, total, heads, size = query.shape
            size = -(-size // (step := 32 if size <= 128 else 64)) * step
            sums = query.new_empty(total + 128 * ctx.rows, heads, size + 1, dtype=torch.float32)
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del sums
        return *found, None, None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> Any:
    if mask is not None and mask.dtype != query.dtype:
        mask = torch.empty_like(mask, dtype=query.dtype)
    return _KeptByFlashAttention.apply(query, key, value, mask)


def _gpu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    no_kernel: bool,
    **options: Any,
) -> tuple[Tensor, None]:
    """Stand for `sdpa` or `packed_attention` on a GPU; with dropout, fp32 or `no_kernel`, packed texts are padded."""
    packing, dropout, kind = options.get("packing"), options.get("dropout", 0.0), value.dtype
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    size = query.shape[-1]
    if packing is not None and size % 8:
        query, key, value = (F.pad(tensor, (0, -size % 8)) for tensor in (query, key, value))
    if packing is not None and (dropout > 0 or no_kernel or query.dtype == torch.float32):
        sight = seen(module, options.get("is_causal"), options.get("sliding_window"), packing.max_length)
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        padded = attend_in_buckets(rows, packing, *sight, dropout, None, _attend)
        return padded[..., :size].to(kind).unsqueeze(0), None
    times = query.shape[1] // key.shape[1]
    if times > 1 and (packing is not None or attention_mask is not None):
        key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    if packing is None:
        return _attend(query, key, value, attention_mask).transpose(1, 2).contiguous(), None
    whole = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
    return _KeptByFlashAttention.apply(*whole, None, len(packing.cu_seqlens) - 1)[..., :size], None


GPU_ATTENTION = "tokmask_counted"  # name of `_gpu_attention` in transformers


def count_step(
    recipe: Recipe, setting: Setting, layers: int, below: bool, trained_row: bool, training: Shape, evaluation: Shape
) -> tuple[int, int, int, int]:
    """Count a forward of an evaluation, and a step on a micro-batch, of the model with its adapter on fake tensors.

    `layers` get an adapter; `below` them there may be one more, without. If the recipe trains a mask row and
    `trained_row`, PEFT copies the whole embedding in each forward and makes a gradient of it; otherwise the gradient
    only reaches the embedding. Returns bytes: of what is trained, in fp32; the peak of the forward; what the step keeps
    between its forward and its backward; and its peak, gradients of the parameters included.
    """
    gpu, low = setting.device_type != "cpu", setting.dtype != torch.float32
    bare: Any = bare_model(with_layers(setting.config, layers + below), recipe.data.task, setting.dtype)
    if recipe.model.attention == "bidirectional":
        see_both_ways(bare)
    new_modules = head_modules(bare)
    kept_whole = tuple(f"{name}." for name in (*HEAD_NAMES, *new_modules))
    for name, module in bare.named_modules() if setting.quantization != "none" else ():
        if type(module) is nn.Linear and not f"{name}.".startswith(kept_whole):
            kind = "int8 on a GPU" if gpu and setting.quantization == "int8" else setting.quantization
            module.__class__, module.kind = QuantizedLinear, kind  # type: ignore[assignment]
    hold_in_fp32(bare, new_modules)
    if setting.dtype == torch.float16:
        hold_stream_in_fp32(bare)
    backbone = Backbone(bare, None, new_modules, (), setting.dtype, setting.quantization)
    adapter = recipe.adapter.model_copy(update={"layers": layers if below else "all"})
    trains_row = recipe.masking.trainable_mask
    with torch.device("meta"):
        model, _ = add_adapter(backbone, adapter, recipe.data.task, 0 if trains_row and trained_row else None)
    if trains_row and not trained_row:
        bare.enable_input_require_grads()
    if gpu and bare.config._attn_implementation == "sdpa":
        AttentionInterface.register(GPU_ATTENTION, functools.partial(_gpu_attention, no_kernel=not setting.rows))
        AttentionMaskInterface.register(GPU_ATTENTION, sdpa_mask)
        bare.config._attn_implementation = GPU_ATTENTION
    for module in model.modules() if gpu and low else ():
        if isinstance(module, nn.LayerNorm):  # in autocast's list of operations in fp32
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device="cpu")  # autocast has no meta device
    if recipe.model.gradient_checkpointing is True:
        enable_checkpointing(model)

    autocast = functools.partial(torch.autocast, "cpu", setting.dtype, enabled=low)
    with _counting(model, mode, evaluation, gpu, low) as (forward, logits_of), torch.no_grad(), autocast():
        model.eval()
        logits_of()
    model.train()
    quick = contextlib.nullcontext() if gpu else quick_dropout(model)
    with _counting(model, mode, training, gpu, low) as (step, logits_of), quick:
        with autocast():
            logits = logits_of()
            labels = torch.zeros(logits.shape[:-1].numel(), dtype=torch.long)
            loss = F.cross_entropy(logits.flatten(0, -2).float(), labels)
        del logits
        kept = step.now
        loss.backward()
    trained = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, forward.peak, kept, step.peak


@contextlib.contextmanager
def _counting(
    model: Any, mode: FakeTensorMode, shape: Shape, gpu: bool, low: bool
) -> Iterator[tuple[LiveBytes, Callable[[], Any]]]:
    """Count what is made inside, and give a function that returns the logits of a batch of a shape."""
    if shape.packed:  # a layout depends on values: outside of the mode
        base: Any = unwrap(model)
        if gpu:  # `enable_padding_free` expects sdpa
            base.config._attn_implementation = "sdpa"
        enable_padding_free(base)
        if gpu:
            base.config._attn_implementation = GPU_ATTENTION
        longest = max(shape.lengths)
        lengths = [*shape.lengths, *([] if gpu else filler(shape.tokens, longest))]  # a CPU lengthens the row
        bounds = (torch.tensor([0, *accumulate(texts)], dtype=torch.int32) for texts in (lengths, shape.lengths))
        whole, texts = (Packing.make(ends, int(ends[-1]), longest, one_bucket=gpu) for ends in bounds)
        ids = torch.ones(1, sum(lengths), dtype=torch.long)

    def logits() -> Any:
        if not shape.packed:
            return model(input_ids=ids, attention_mask=mask).logits
        return packed_logits(base, packed_hidden(base, ids, whole)[:, : shape.tokens], ids[:, : shape.tokens], texts)

    with mode, inputs_as_they_come(model, low):
        if not shape.packed:
            ids = torch.ones(len(shape.lengths), max(shape.lengths), dtype=torch.long)
            mask = torch.ones_like(ids)
        with LiveBytes() as live:
            live.exclude(*model.parameters(), *model.buffers(), ids)
            yield live, logits
