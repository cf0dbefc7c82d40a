"""Layers that compute differently from torch's: a head in fp32, a quick dropout, an embedding in 8 bits or on the host.

The frozen input embedding is the largest part of a small multilingual backbone in 4 bits (Qwen2.5-0.5B: 260 of 436
MiB), and a batch needs a few hundred of its rows.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tokmask_peft.console import Decision
from tokmask_peft.errors import MaskTokenError, ModelError
from tokmask_peft.masking.embedding import find_decoder_embedding, find_embedding
from tokmask_peft.model.decisions import bitsandbytes_problem

LINEAR = (nn.Linear, Conv1D)
"""Classes of layers that are a product with a matrix; GPT-2's, `Conv1D`, keeps it transposed, [in, out]."""

_STEPS = 1 << 16  # probabilities that `dropout` can tell apart on a CPU


class Float32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever comes in, with autocast or without."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` of any dtype to fp32 `[..., out_features]`."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


def dropout(x: Tensor, p: float) -> Tensor:
    """Return `x` with each element zero with probability `p`, and otherwise divided by 1 - p; the gradient likewise.

    On a CPU, `p` is rounded to the nearest 65,536th, as is 1 - p, so that the mean is that of `x`. The draws, 16 bits
    per element, come from torch's default generator, but for the same seed the mask differs from torch's: that draws a
    `double` for each element, one at a time (`bernoulli_`, torch 2.13). On one core of an EPYC, for 985 sub-tokens of
    384 dimensions, that takes 2.35 ms and this .59; a packed training step of MiniLM in fp32 takes .92 of the CPU time.
    """
    kept = round((1 - p) * _STEPS)
    if x.device.type != "cpu" or kept == 0:
        return F.dropout(x, p)
    if kept == _STEPS:
        return x
    count = x.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
    noise = torch.empty(count, dtype=x.dtype, device=x.device)
    # written as numbers at once, because converting booleans costs more
    torch.lt(draws.view(torch.int16)[:count], kept - _STEPS // 2, out=noise)
    return x * noise.mul_(_STEPS / kept).view(x.shape)


class QuickDropout(nn.Dropout):
    """`nn.Dropout` that draws as `dropout` does."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements in training mode."""
        return dropout(input, self.p) if self.training else input


@contextlib.contextmanager
def quick_dropout(model: nn.Module) -> Iterator[None]:
    """Let the `nn.Dropout` modules of a model, with an adapter or without, be `QuickDropout` inside the context."""
    modules = [module for module in model.modules() if type(module) is nn.Dropout and not module.inplace]
    for module in modules:
        module.__class__ = QuickDropout
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = nn.Dropout


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a bitsandbytes layer."""
    return type(module).__module__.startswith("bitsandbytes.")


@functools.cache
def int8_embedding() -> Any:
    """Return the class of 8-bit embeddings, made at the first call, since importing bitsandbytes takes seconds."""
    from bitsandbytes.nn import Embedding8bit, Int8Params

    class Int8Embedding(Embedding8bit):
        """bitsandbytes' 8-bit lookup, with what a masker and a Trainer need in addition.

        bitsandbytes quantizes a matrix when it leaves the host, loses its scales when a module that contains it is
        moved, and refuses to be part of a state dict (seen with 0.50.2).
        """

        def __init__(self, weight: Tensor, device: torch.device) -> None:
            """Quantize a matrix, [rows, hidden], and put it on `device`."""
            super().__init__(*weight.shape, device="meta", dtype=weight.dtype)
            on_host = Int8Params(weight.detach().to("cpu"), requires_grad=False, has_fp16_weights=False)
            self.weight: Any = on_host.to(device)

        def read_rows(self, first: int, last: int) -> Tensor:
            """Return the rows from `first` to before `last` as they are looked up, [rows, hidden]."""
            return cast(Tensor, self.forward(torch.arange(first, last, device=self.weight.device)))

        def write_row(self, index: int, row: Tensor) -> None:
            """Quantize a row, [hidden], in place of another."""
            row = row.to(self.weight.device, torch.float32)
            scale = row.abs().max()
            self.weight.SCB[index] = scale
            self.weight.data[index] = (row * (127.0 / scale.clamp(min=1e-12))).round().to(torch.int8)

        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
            before = self.weight
            super()._apply(fn, recurse)
            self.weight.SCB = before.SCB.to(self.weight.device)
            self.weight.CB = self.weight.data
            return self

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    return Int8Embedding


class HostEmbedding(nn.Module):
    """A frozen lookup whose matrix stays in the host's memory; a batch's distinct rows are copied to the device.

    The matrix is not a parameter: `to(device)`, checkpoints, DDP and adapters ignore it. On a GPU a lookup waits for
    the ids, which a masker has just chosen there: once for each micro-batch.
    """

    def __init__(self, weight: Tensor) -> None:
        """Take over the matrix, [rows, hidden]; on a GPU it is copied to the host."""
        super().__init__()
        self._matrix = (weight.detach().to("cpu"),)  # in a tuple, or nn.Module would register it
        self.num_embeddings, self.embedding_dim = weight.shape

    @property
    def weight(self) -> Tensor:
        """The matrix on the host, [rows, hidden], frozen."""
        return self._matrix[0]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up ids of any shape; [..., hidden] on the device of the ids."""
        device = input_ids.device
        if device.type == "cpu":
            return F.embedding(input_ids, self.weight)
        distinct, places = torch.unique(input_ids, return_inverse=True)
        rows = torch.empty(len(distinct), self.embedding_dim, dtype=self.weight.dtype, pin_memory=device.type == "cuda")
        torch.index_select(self.weight, 0, distinct.cpu(), out=rows)
        return F.embedding(places, rows.to(device, non_blocking=True))


def placement_problem(model: Any) -> str | None:
    """Return why the input embedding of a model can only be resident, or None if it can be elsewhere."""
    try:
        embedding = find_embedding(model)
    except MaskTokenError as error:
        return str(error)
    if type(embedding) is not nn.Embedding:
        return f"this one is a {type(embedding).__name__}"
    if find_decoder_embedding(model) is not None:
        return "this one is shared with the decoder"
    return None if model.get_output_embeddings() is None else "this one is shared with the output"


def check_placement(model: Any, wanted: str) -> None:
    """Raise a ModelError if the input embedding of a model can only be resident, and another place is wanted."""
    if wanted != "resident" and (problem := placement_problem(model)):
        message = f"model.embedding={wanted} needs a plain lookup, and {problem}: use resident"
        raise ModelError(message, code="embedding-not-movable", wanted=wanted)


def place_embedding(model: Any, wanted: str, device: torch.device) -> tuple[Decision, ...]:
    """Put the input embedding of a frozen model, without an adapter, in place, where `model.embedding` says."""
    if wanted == "resident":
        return ()
    check_placement(model, wanted)
    embedding: Any = find_embedding(model)
    weight, full = embedding.weight, embedding.weight.nbytes / 2**20
    placed: nn.Module
    if wanted == "offload":
        placed, reason = HostEmbedding(weight), "its device is the host: nothing is saved"
        if device.type != "cpu":
            reason = f"{full:.0f} MiB on the host; a batch's rows are copied to the {device.type}"
    else:
        if problem := bitsandbytes_problem(device.type):
            message = f"model.embedding is 8bit, but {problem}. Set model.embedding=resident, or offload."
            raise ModelError(message, code="quantization-unavailable", quantization="8bit", device=device.type)
        placed = int8_embedding()(weight, device)
        now = (weight.numel() + 4 * weight.shape[0]) / 2**20
        reason = f"{now:.0f} MiB, not {full:.0f}; values are off by up to 0.4% of their row's largest"
    model.set_input_embeddings(placed.train(embedding.training))
    return (Decision("embedding", wanted, reason),)


UNMARKED = ("bloom", "mpt")  # decoders whose attention has no `is_causal`, by `model_type`


def reads_forward(model: nn.Module) -> bool:
    """Return whether a model is a decoder that was trained to read from left to right; `see_both_ways` may follow."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    return kind in UNMARKED or any(getattr(part, "is_causal", False) for part in model.modules())  # as built


def choose_label_on(wanted: str, model: nn.Module) -> Decision:
    """Choose which sub-token of a word carries its label: as `data.label_on` says, or the last in a decoder."""
    if wanted != "auto":
        return Decision("label on", wanted, "set in the recipe")
    if reads_forward(model):
        why = "a decoder was trained to read from left to right, and has seen the whole word there"
        return Decision("label on", "last", why)
    return Decision("label on", "first", "an encoder sees the whole of a word anyway")


def mean_of_words(values: Tensor, words: Tensor) -> Tensor:
    """Return for each sub-token the mean of what its word's sub-tokens have, `[texts, seq, …]`.

    `words` are numbers, `[texts, seq]`, the same for neighbours of one word and at least -1.
    """
    apart = words + (words.shape[1] + 1) * torch.arange(len(words), device=words.device).unsqueeze(1)
    _, number, sizes = apart.flatten().unique_consecutive(return_inverse=True, return_counts=True)
    means = torch.segment_reduce(values.flatten(0, 1).float(), "mean", lengths=sizes, axis=0)
    return means[number].view_as(values)


def whole_words(batch: Mapping[str, Any], masked: Tensor) -> Tensor:
    """Return which sub-tokens, `[texts, seq]`, count as masked: with `words`, all of a word of which one is masked."""
    return masked if "words" not in batch else mean_of_words(masked.unsqueeze(-1), batch["words"]).squeeze(-1) > 0


def average_words(model: nn.Module, label_on: str) -> None:
    """If `label_on` is mean, let a model with an answer for each sub-token give the mean of a word's logits at each.

    Batches then have `words`, as `mean_of_words` takes them. If the head is linear, this is what it makes of the mean
    of the states (subword pooling: Ács et al. 2021, arXiv:2102.10864), but for dropout.
    """
    if label_on != "mean":
        return
    given = threading.local()

    def take(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given.words = kwargs.pop("words", None)
        return args, kwargs

    def average(_: Any, args: Any, output: Any) -> Any:
        if given.words is not None:
            output.logits = mean_of_words(output.logits, given.words)
        return output

    model.register_forward_pre_hook(take, with_kwargs=True)
    model.register_forward_hook(average)


BOTH_WAYS = {"gemma3_text": "Gemma 3", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Decoders that can see the whole text, by `model_type`; each is tested, with sliding windows too."""


def see_both_ways(model: Any) -> None:
    """Let the sub-tokens of a decoder, without an adapter, also see those after them, as far as a sliding window goes.

    `is_causal` in the config is transformers' own switch: masks, attention and packed rows follow it, and it is saved.
    ModelError if the model is none of `BOTH_WAYS`.
    """
    ours = type(model.base_model).__module__.startswith("transformers.models.")
    if not ours or model.config.model_type not in BOTH_WAYS:
        name, known = type(model).__name__, ", ".join(BOTH_WAYS.values())
        problem = f"model.attention=bidirectional is for decoders ({known}), and this backbone is a {name}"
        remedy = "set it to causal, which changes nothing in an encoder"
        raise ModelError(f"{problem}: {remedy}", code="attention", model=name)
    model.config.is_causal = False


def pooled(states: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """Return the mean or maximum of each text's states, or the mean of its first and last one, `[texts, 1, hidden]`.

    `states` are `[texts, seq, hidden]`; `mask`, `[texts, seq]`, is 1 for sub-tokens, None if all are.
    """
    real = torch.ones_like(states[..., :1]).bool() if mask is None else mask.unsqueeze(-1).bool()
    if how == "max":
        return states.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    if how == "ends":
        number = torch.arange(1, real.shape[1] + 1, device=real.device).view(-1, 1)
        ends = torch.cat([real.int().argmax(1, keepdim=True), (real * number).argmax(1, keepdim=True)], 1)
        return states.gather(1, ends.expand(-1, -1, states.shape[-1])).float().mean(1, keepdim=True).to(states.dtype)
    summed = states.masked_fill(~real, 0).sum(1, keepdim=True, dtype=torch.float32)
    return (summed / real.sum(1, keepdim=True)).to(states.dtype)


def pool_texts(model: Any, how: str) -> None:
    """Let the head of a sequence classification model, without an adapter, read a text's states as `how` says.

    That is `pooled`: one state, as wide as the others, so that the head has the shape of a stock one. Every position of
    the last states gets it, and the head's own pooling, of whatever position, finds it there. A BERT's pooler is a part
    of its head. Packed rows are pooled by `packed_logits`.

    Raises:
        ModelError: the model cannot be pooled in this way.
    """
    if how == "auto":
        return
    name, base, why = type(model).__name__, model.base_model, None
    decoder = hasattr(model, "score") or reads_forward(model)  # the former is what transformers calls its head
    if getattr(model.config, "is_encoder_decoder", False):
        why = "which has an encoder and a decoder"
    elif decoder and how == "cls":
        why = "which has no [CLS] of its own"
    elif not decoder and how == "last":
        why = "which is not a decoder"
    elif how != "cls" and isinstance(getattr(base, "pooler", None), nn.Linear):  # ALBERT and BigBird
        why = "whose pooler is given [CLS] alone"
    if why is not None:
        raise ModelError(f"model.pooling={how} does not fit {name}, {why}: set it to auto", code="pooling", model=name)
    if hasattr(model, "classifier_pooling"):  # EuroBERT's own, a copy of what its config said
        model.classifier_pooling = model.config.classifier_pooling = "bos"
    elif hasattr(model.config, "classifier_pooling"):  # ModernBERT's own
        model.config.classifier_pooling = "cls"
    if how in ("cls", "last"):
        return
    mask = threading.local()
    model.text_pooling = how

    def remember(_: Any, args: Any, given: Any) -> None:
        mask.packed, mask.of = given.get("packing") is not None, given.get("attention_mask")

    def expanded(states: Tensor) -> Tensor:
        return states if mask.packed else pooled(states, mask.of, how).expand_as(states)

    def pool_output(_: Any, args: Any, output: Any) -> None:
        output.last_hidden_state = expanded(output.last_hidden_state)

    base.register_forward_pre_hook(remember, with_kwargs=True)
    if (pooler := getattr(base, "pooler", None)) is None:
        base.register_forward_hook(pool_output)
    else:
        pooler.register_forward_pre_hook(lambda _, args: (expanded(args[0]),))
