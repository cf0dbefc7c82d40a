"""Load a backbone with a new classification head, and its tokenizer."""

import contextlib
import functools
import hashlib
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast

from tokmask_peft.console import Decision, quiet_loading
from tokmask_peft.errors import MaskTokenError, ModelError, first_line
from tokmask_peft.masking.embedding import find_decoder_embedding, find_embedding
from tokmask_peft.model.decisions import DTYPES, choose_precision, choose_quantization, gpu_problem, out_of_memory
from tokmask_peft.model.families import family_of
from tokmask_peft.model.layers import (
    LINEAR,
    Float32Linear,
    is_quantized,
    place_embedding,
    pool_texts,
    reads_forward,
    see_both_ways,
)
from tokmask_peft.model.location import backbone_location, loading_source
from tokmask_peft.model.packed import expand_heads_if_needed
from tokmask_peft.recipe.schema import ModelConfig
from tokmask_peft.tasks import get_task

HEAD_NAMES = ("score", "classifier", "head", "pre_classifier", "classification_head")
"""Names of heads, which must not be quantized: transformers itself overlooks a last module that has a bias."""

_ATTENTION_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob")  # in configs of transformers
_SHORT, _LONG = "la neta", "la neta this weather is too hot for me today"
HASHED = 1024  # values of each parameter that identify a backbone


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen classification model with its tokenizer, before an adapter is added."""

    model: nn.Module
    tokenizer: Any
    new_modules: tuple[str, ...]
    decisions: tuple[Decision, ...]
    dtype: torch.dtype
    quantization: str
    weights: dict[str, str] = field(default_factory=dict)  # see `weight_hashes`


@quiet_loading()
def load_backbone(
    config: ModelConfig,
    task: str,
    labels: tuple[str, ...],
    device: torch.device,
    location: str | None = None,
    pairs: bool = False,
) -> Backbone:
    """Load the frozen backbone with a new head for `labels`; `pairs` says that each text is a pair.

    The head is drawn from torch's global random state: set the seed before. Unlike in PEFT's
    `prepare_model_for_kbit_training`, nothing is upcast, which would double the size of the embedding and of what flows
    through all layers (norms compute in fp32 internally: the last states of MiniLM in bf16 differ by 1.4% from those in
    fp32 with either), and inputs get no gradients, which only reentrant checkpointing needs. A ModelError says that the
    backbone cannot be loaded as the recipe asks, or cannot read pairs, or that its answers depend on padding.
    """
    location, kind = location or backbone_location(config), get_task(task)
    precision, quantization = choose_precision(config, device), choose_quantization(config, device)
    tokenizer = load_tokenizer(config, location)
    dtype = DTYPES[precision.choice]
    source, how = loading_source(config, location)
    load = functools.partial(
        kind.auto_model().from_pretrained,
        source,
        **how,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        dtype=dtype,
        output_loading_info=True,
    )
    extra: dict[str, Any] = {} if kind.problem_type is None else {"problem_type": kind.problem_type}
    try:
        if config.attention_dropout is not None:
            name = attention_dropout_name(location, AutoConfig.from_pretrained(source, **how))
            extra[name] = config.attention_dropout
        if "gguf_file" in how:
            load, extra = _unpacked(functools.partial(load, **extra)), {}
        if quantization.choice != "none":
            # a pooler that the checkpoint lacks must not be quantized either; this finds it without loading any weights
            with torch.random.fork_rng(devices=()):
                missing = _new_modules(*load(device_map="meta"))
            extra["quantization_config"] = quantization_config(quantization.choice, dtype, [*HEAD_NAMES, *missing])
            extra["device_map"] = {"": device}
        model, info = load(**extra)
    except Exception as error:
        if isinstance(error, ModelError) or out_of_memory(error):
            raise
        raise load_error("backbone", location, error) from error
    _fit_tokenizer(tokenizer, model, location)
    model.config.pad_token_id, model.config.use_cache = tokenizer.pad_token_id, False
    if config.attention == "bidirectional":
        see_both_ways(model)
    if find_decoder_embedding(model) is not None:
        if pairs:
            problem = f"{type(model).__name__} answers at the only end token of its text, which also separates a pair"
            remedy = "set model.backbone to an encoder or a decoder alone, such as a BERT or a Qwen"
            raise ModelError(f"{problem}: {remedy}", code="pairs-with-decoder", model=type(model).__name__)
        model.register_forward_pre_hook(functools.partial(_one_end, tokenizer.unk_token_id), with_kwargs=True)
    new_modules = _new_modules(model, info)
    weights = weight_hashes(model, new_modules)
    hold_in_fp32(model, new_modules)
    pooling = "auto" if kind.words_given else config.pooling
    pool_texts(model, pooling)
    keep_gradients_after_eval(model)
    expand_heads_if_needed(model, device, dtype)
    tokenizer.padding_side = padding_side(model, tokenizer, dtype)
    unused = gpu_problem() if device.type == "cpu" else None
    decisions = [Decision("device", str(device), unused or "set by accelerate"), precision, quantization]
    if "gguf_file" in how:
        again = "" if quantization.choice == "none" else f", and rounded once more, to {quantization.choice}"
        decisions.append(Decision("weights", how["gguf_file"], f"unpacked to {precision.choice}{again}"))
    if tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.init_kwargs.get("pad_token") is None:
        reason = "the tokenizer has none: its end token pads, and is not read"
        decisions.append(Decision("pad token", tokenizer.pad_token, reason))
    if tokenizer.padding_side == "left":
        decisions.append(Decision("padding", "left", f"{type(model).__name__} reads its answer at the last position"))
    if config.attention != "causal":
        decisions.append(Decision("attention", config.attention, "set in the recipe; it was trained causally"))
    if pooling != "auto":
        blind = pooling == "ends" and config.attention == "causal" and reads_forward(model)
        sight = "; a decoder's first sub-token sees no other, unless model.attention is bidirectional" if blind else ""
        decisions.append(Decision("pooling", pooling, f"set in the recipe{sight}"))
    decisions += place_embedding(model, config.embedding, device)
    if dtype == torch.float16:
        hold_stream_in_fp32(model)
    return Backbone(model, tokenizer, new_modules, tuple(decisions), dtype, quantization.choice, weights)


def _fit_tokenizer(tokenizer: Any, model: Any, location: str) -> None:
    """Drop token types that a model does not take; a ModelError if it has no row for one of the tokens."""
    rows, largest = math.inf, max(tokenizer.get_vocab().values())
    with contextlib.suppress(NotImplementedError):  # CANINE hashes letters instead
        rows = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    if largest >= rows:
        problem = f"the tokenizer of {location} has ids up to {largest}, but the embedding has {rows} rows"
        remedy = "save the backbone again after model.resize_token_embeddings, or with the tokenizer it came with"
        raise ModelError(f"{problem}: {remedy}", code="tokenizer-too-large", largest=largest, rows=rows)
    types, kinds = "token_type_ids", getattr(model.config, "type_vocab_size", 2)
    takes_types = types in inspect.signature(model.forward).parameters and kinds != 1
    if types in tokenizer.model_input_names and not takes_types:
        names = [name for name in tokenizer.model_input_names if name != types]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names  # the latter are saved


def _unpacked(load: functools.partial[Any]) -> functools.partial[Any]:
    """Return what loads a GGUF file as a model that can be quantized and trained, unlike one that `load` returns."""
    # transformers 5.17, the oldest supported version, lacks it and unpacks everything
    kept_packed = hasattr(transformers, "GgufConfig")
    with torch.random.fork_rng(devices=()):  # the head is drawn when the values are loaded into a model
        model, info = load(**({"quantization_config": transformers.GgufConfig(dequantize=True)} if kept_packed else {}))
    values = {name: value for name, value in model.state_dict().items() if name not in info["missing_keys"]}
    config, dtype = model.config, model.dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return functools.partial(
        type(model).from_pretrained, None, config=config, state_dict=values, dtype=dtype, output_loading_info=True
    )


def _one_end(unknown: int, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keep only a text's last end token, where T5 and BART answer; unigram tokenizers make others of some words."""
    ends = kwargs["input_ids"] == model.config.eos_token_id
    earlier = ends & (ends.flip(1).cumsum(1).flip(1) > 1)
    return args, {**kwargs, "input_ids": kwargs["input_ids"].masked_fill(earlier, unknown)}


def load_tokenizer(config: ModelConfig, location: str | None = None) -> Any:
    """Load the backbone's tokenizer, which must be a fast one, with a pad token; it pads and truncates on the right."""
    location = location or backbone_location(config)
    source, how = loading_source(config, location)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **how)
        if "gguf_file" in how:  # its class would not read back from tokenizer.json what it has made of the file
            backend = tokenizer.backend_tokenizer
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map)
    except Exception as error:  # tokenizers raises just that
        raise load_error("tokenizer", location, error) from error
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        problem = f"{name} of {location} is not a fast tokenizer (one with a tokenizer.json), which is needed"
        message = f"{problem} to find the words of sub-tokens; use another backbone"
        raise ModelError(message, code="slow-tokenizer", tokenizer=name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            message = f"the tokenizer of {location} has neither a pad nor an end token; use another backbone"
            raise ModelError(message, code="no-pad-token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def lacks_head(error: Exception) -> bool:
    """Return whether transformers says that it has no model of a kind for a configuration."""
    return "for this kind of AutoModel" in str(error)


def load_error(what: str, location: str, error: Exception) -> ModelError:
    """Return the error that explains why a part of a backbone cannot be loaded, and what to check."""
    if "trust_remote_code" in str(error):
        problem = f"the {what} from {location} runs code of its own. Read it; if you trust it"
        remedy = "give --trust-remote-code to use a run, or set model.trust_remote_code=true to train"
        return ModelError(f"{problem}, {remedy}.", code="backbone-not-loaded", location=location)
    if lacks_head(error):
        head = first_line(error).rpartition(" ")[2].rstrip(".")
        message = f"transformers has no {head} for the {what} from {location}: use another one, or another data.task"
        return ModelError(message, code=f"{what}-not-loaded", location=location)
    message = (
        f"the {what} cannot be loaded from {location}: {first_line(error).rstrip('.,:')}. "
        "Check model.backbone (a Hub id or a folder), the network, and `hf auth login` for gated models."
    )
    return ModelError(message, code=f"{what}-not-loaded", location=location)


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


@torch.no_grad()
def padding_side(model: Any, tokenizer: Any, dtype: torch.dtype) -> str:
    """Return the side to pad on so that a text's answer is the one that it gets alone; a ModelError if there is none.

    That is right if possible, left for a model that pools the last position (XLNet), and neither for FNet, YOSO, CANINE
    and others. Families that take packed rows are padded right without a test, which takes two or three forward passes.
    """
    if family_of(model) is not None:
        return "right"
    low, name = dtype != torch.float32, type(model).__name__
    rounded = low or any(is_quantized(part) for part in model.modules())
    tolerance = 0.1 if rounded else 1e-4  # tiny random models: 1e-6 of the logits' norm, .01 in bf16; padding .2 to 1

    def logits(*texts: str, side: str = "right") -> Any:
        options = {"padding": True, "padding_side": side, "return_tensors": "pt", "return_token_type_ids": False}
        try:
            with torch.autocast(model.device.type, dtype, enabled=low):
                return model(**tokenizer(list(texts), **options).to(model.device)).logits.float()
        except Exception as error:  # of whatever kind: Nystromformer, for one, takes texts of some lengths only
            if out_of_memory(error):
                raise
            problem = f"{name} cannot read a short text: {type(error).__name__}: {first_line(error)}"
            remedy = "if its config.json is right, use another backbone, as in `tokmask recipes`"
            raise ModelError(f"{problem}; {remedy}", code="cannot-read", model=name) from error

    with torch.random.fork_rng(devices=()):  # YOSO draws
        alone = logits(_SHORT)
        for side in ("right", "left") if alone.dim() == 2 else ("right",):
            padded = logits(_SHORT, _LONG, side=side)[:1]
            padded = padded if alone.dim() == 2 else padded[:, : alone.shape[1]]
            if not (padded - alone).norm() > tolerance * alone.norm():
                return side
    problem = f"{name} reads its padding: a text's answer depends on the longest text in its batch"
    raise ModelError(f"{problem}; use another backbone, as in `tokmask recipes`", code="reads-padding", model=name)


def weight_hashes(model: nn.Module, new_modules: tuple[str, ...]) -> dict[str, str]:
    """Return hashes of some weights, in bf16, whatever the file or precision; linear ones, unless quantized, apart."""
    hashes = {"linear": hashlib.sha256(), "others": hashlib.sha256()}
    for name, part in model.named_modules():
        if f"{name}.".startswith(tuple(f"{new}." for new in new_modules)):
            continue
        for key, value in part.named_parameters(recurse=False):
            kind = "linear" if isinstance(part, LINEAR) and key == "weight" else "others"
            if value.is_meta or (kind == "linear" and is_quantized(part)):
                hashes.pop(kind, None)
            elif kind in hashes:
                some = value.detach().flatten()[:: max(1, value.numel() // HASHED)]
                hashes[kind].update(some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return {kind: found.hexdigest()[:16] for kind, found in hashes.items()}


def keep_gradients_after_eval(model: nn.Module) -> None:
    """Stop 4-bit layers from repacking their weights for inference, which on CPUs with avx512_bf16 ends all gradients.

    bitsandbytes does so at the first forward in eval mode, for good, and only the head learns (seen with 0.50.2).
    Remove this when `test_gradients_survive_an_evaluation` passes without it on such a CPU.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Name the modules of the head: the children, other than its backbone, of a model without an adapter."""
    children = [(name, module) for name, module in model.named_children() if module is not model.base_model]
    return tuple(name for name, module in children if any(True for _ in module.parameters()))


def _new_modules(model: nn.Module, info: dict[str, Any]) -> tuple[str, ...]:
    """Name the modules to train in full: the head, and whatever else the checkpoint lacks (a BERT pooler)."""
    names = list(head_modules(model))
    for key in sorted([*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]):
        if not key.startswith(tuple(f"{name}." for name in names)):
            names.append(key.rsplit(".", 1)[0])
    return tuple(names)


def hold_stream_in_fp32(model: nn.Module) -> None:
    """Keep norms and what flows between layers in fp32, in place: sums over layers exceed fp16's 65,504 (Gemma 3)."""
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.float()
    with contextlib.suppress(MaskTokenError):  # CANINE has none to hook, and sums in fp32 from its first norm on
        for embedding in {find_embedding(model), find_decoder_embedding(model)}:
            if embedding is not None:
                embedding.register_forward_hook(lambda module, inputs, output: output.float())


def hold_in_fp32(model: nn.Module, new_modules: tuple[str, ...]) -> None:
    """Convert new modules, and what their linear layers compute, to fp32, in place; ModelError if one is quantized."""
    for name in new_modules:
        module = model.get_submodule(name)
        if quantized := [type(part).__name__ for part in module.modules() if is_quantized(part)]:
            problem = f"the new module '{name}' is quantized ({quantized[0]}), but is trained and must be in full"
            remedy = "The checkpoint comes already quantized: use the unquantized backbone with model.quantization=nf4."
            raise ModelError(f"{problem} precision. {remedy}", code="quantized-head", module=name)
        module.float()
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = Float32Linear
