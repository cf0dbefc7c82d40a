"""Load a backbone with a new classification head, and its tokenizer; layers that compute otherwise than torch's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

from tokmask_peft.console import Decision
from tokmask_peft.errors import ModelError, first_line
from tokmask_peft.model.decisions import choose_precision, choose_quantization, out_of_memory
from tokmask_peft.model.location import backbone_location
from tokmask_peft.model.placement import place_embedding
from tokmask_peft.recipe.schema import ModelConfig
from tokmask_peft.tasks import get_task

HEAD_NAMES = ("score", "classifier", "head", "pre_classifier", "classification_head")
"""Top-level names of the classification heads in transformers, which quantized loading must be given.

transformers strips only `.weight` when it looks for the last module, so that a head with a bias would be quantized.
"""

_ATTENTION_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob")
"""What the configs of transformers call the dropout on attention weights."""

_STEPS = 1 << 16
"""Probabilities that `dropout` can tell apart on a CPU."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen classification model with its tokenizer, before an adapter is added."""

    model: nn.Module
    tokenizer: Any
    new_modules: tuple[str, ...]
    decisions: tuple[Decision, ...]
    dtype: torch.dtype
    quantization: str


class Float32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever comes in, with autocast or without."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` of any dtype to fp32 `[..., out_features]`."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


def dropout(x: Tensor, p: float) -> Tensor:
    """Return `x` with each element zero with probability `p`, and otherwise divided by 1 - p; the gradient likewise.

    On a CPU, `p` is rounded to the nearest 65,536th, and what stays is divided by the rounded 1 - p, so that the mean
    is that of `x`. The draws, 16 bits per element, come from torch's default generator in an order of their own: for
    the same seed, the mask differs from torch's. On other devices this is torch's dropout.

    torch draws a random number and a `double` for each element, one at a time (`bernoulli_`, torch 2.13). On one core
    of an EPYC, for 985 sub-tokens of 384 dimensions, that takes 2.35 ms and this .59. A packed training step of MiniLM
    in fp32 takes .92 of the CPU time (.89 to .97 in seven interleaved rounds on a Xeon).
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
    """Turn the `nn.Dropout` modules of a model, with an adapter or without, into `QuickDropout` for the time being."""
    modules = [module for module in model.modules() if type(module) is nn.Dropout and not module.inplace]
    for module in modules:
        module.__class__ = QuickDropout
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = nn.Dropout


def load_backbone(
    config: ModelConfig, task: str, labels: tuple[str, ...], device: torch.device, location: str | None = None
) -> Backbone:
    """Load the frozen backbone with a new head for `labels`.

    The head is drawn from torch's global random state: set the seed before. Unlike in PEFT's
    `prepare_model_for_kbit_training`, nothing is upcast, which would double the size of the embedding and of what flows
    through all layers (norms compute in fp32 internally: the last states of MiniLM in bf16 differ by 1.4% from those in
    fp32 with either), and inputs get no gradients, which only reentrant checkpointing needs.

    Raises:
        ModelError: the backbone cannot be loaded, or not as the recipe asks.
    """
    location = location or backbone_location(config)
    precision, quantization = choose_precision(config, device), choose_quantization(config, device)
    tokenizer = load_tokenizer(config, location)
    dtype = torch.bfloat16 if precision.choice == "bf16" else torch.float32
    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    load = functools.partial(
        get_task(task).auto_model().from_pretrained,
        location,
        **source,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        dtype=dtype,
        output_loading_info=True,
    )
    extra: dict[str, Any] = {}
    try:
        if config.attention_dropout is not None:
            found = AutoConfig.from_pretrained(location, **source)
            extra[attention_dropout_name(location, found)] = config.attention_dropout
        if quantization.choice != "none":
            # a pooler that the checkpoint lacks must not be quantized either; this finds it without loading any weights
            with torch.random.fork_rng():
                missing = _new_modules(*load(device_map="meta"))
            extra["quantization_config"] = quantization_config(quantization.choice, dtype, [*HEAD_NAMES, *missing])
            extra["device_map"] = {"": device}
        model, info = load(**extra)
    except Exception as error:
        if isinstance(error, ModelError) or out_of_memory(error):
            raise
        message = load_problem("backbone", location, error)
        raise ModelError(message, code="backbone-not-loaded", location=location) from error
    rows, largest = getattr(model.get_input_embeddings(), "num_embeddings", None), max(tokenizer.get_vocab().values())
    if rows is not None and largest >= rows:
        problem = f"the tokenizer of {location} has ids up to {largest}, but the embedding has {rows} rows"
        remedy = "save the backbone again after model.resize_token_embeddings, or with the tokenizer it came with"
        raise ModelError(f"{problem}: {remedy}", code="tokenizer-too-large", largest=largest, rows=rows)
    model.config.pad_token_id, model.config.use_cache = tokenizer.pad_token_id, False
    new_modules = _new_modules(model, info)
    hold_in_fp32(model, new_modules)
    keep_gradients_after_eval(model)
    placed = place_embedding(model, config.embedding, device)
    decisions = (Decision("device", str(device), "set by accelerate"), precision, quantization, *placed)
    return Backbone(model, tokenizer, new_modules, decisions, dtype, quantization.choice)


def load_tokenizer(config: ModelConfig, location: str | None = None) -> Any:
    """Load the backbone's tokenizer, with a pad token, padding and truncating on the right.

    Raises:
        ModelError: the tokenizer cannot be loaded, or has neither a pad nor an end token.
    """
    location = location or backbone_location(config)
    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **source)
    except Exception as error:  # tokenizers raises just that
        message = load_problem("tokenizer", location, error)
        raise ModelError(message, code="tokenizer-not-loaded", location=location) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            message = f"the tokenizer of {location} has neither a pad nor an end token; use another backbone"
            raise ModelError(message, code="no-pad-token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def load_problem(what: str, location: str, error: Exception) -> str:
    """Explain in one message why a part of a backbone cannot be loaded, and what to check."""
    return (
        f"the {what} cannot be loaded from {location}: {first_line(error)} "
        "Check model.backbone (a Hub id or a folder), the network, and `hf auth login` for gated models."
    )


def attention_dropout_name(location: str, found: Any) -> str:
    """Return what a config, `found` at `location`, calls its attention dropout; a ModelError if it has none."""
    if names := [name for name in _ATTENTION_DROPOUT if hasattr(found, name)]:
        return names[0]
    problem = f"model.attention_dropout is set, but {type(found).__name__} of {location} has no attention dropout"
    raise ModelError(f"{problem}; set model.attention_dropout=null", code="no-attention-dropout")


def quantization_config(kind: str, compute_dtype: torch.dtype, keep: list[str]) -> Any:
    """Return the transformers configuration for `kind` (nf4 or int8), which leaves the modules in `keep` alone."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        # FSDP shards floating-point weights only, and would keep a whole backbone of integers on every GPU
        bnb_4bit_quant_storage=compute_dtype if parse_flag_from_env("ACCELERATE_USE_FSDP") else torch.uint8,
        llm_int8_skip_modules=keep,
    )


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a bitsandbytes layer."""
    return type(module).__module__.startswith("bitsandbytes.")


def keep_gradients_after_eval(model: nn.Module) -> None:
    """Stop 4-bit layers from repacking their weights for inference.

    On CPUs with avx512_bf16, bitsandbytes' `Linear4bit` repacks its weights at the first forward pass in eval mode and
    never unpacks them. From then on no gradient passes through, while the loss still falls because the head learns.
    Seen with 0.50.2. Remove this when `test_gradients_survive_an_evaluation` passes without it on such a CPU.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the head by name: the children, other than its backbone, of a model without an adapter."""
    children = {name: module for name, module in model.named_children() if module is not model.base_model}
    return {name: module for name, module in children.items() if any(True for _ in module.parameters())}


def _new_modules(model: nn.Module, info: dict[str, Any]) -> tuple[str, ...]:
    """Name the modules to train in full: the head, and whatever else the checkpoint lacks (a BERT pooler)."""
    names = list(head_modules(model))
    for key in sorted([*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]):
        if not key.startswith(tuple(f"{name}." for name in names)):
            names.append(key.rsplit(".", 1)[0])
    return tuple(names)


def hold_in_fp32(model: nn.Module, new_modules: tuple[str, ...]) -> None:
    """Convert the new modules to fp32, in place, and make their linear layers compute in fp32.

    Raises:
        ModelError: one is quantized; training it would fail, or silently not happen.
    """
    for name in new_modules:
        module = model.get_submodule(name)
        if quantized := [type(part).__name__ for part in module.modules() if is_quantized(part)]:
            raise ModelError(
                f"the new module '{name}' is quantized ({quantized[0]}), but is trained and must be in full precision. "
                "The checkpoint comes already quantized: use the unquantized backbone with model.quantization=nf4.",
                code="quantized-head",
                module=name,
            )
        module.float()
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = Float32Linear
