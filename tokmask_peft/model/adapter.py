"""The adapter: added to a backbone, saved, loaded, and merged for prediction if that loses nothing.

PEFT is imported where it is needed: it imports bitsandbytes, and that torch's compiler, which takes seconds.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tokmask_peft.console import Decision, quiet_loading
from tokmask_peft.errors import ModelError, boundary, first_line, is_whole, nearest
from tokmask_peft.masking.embedding import find_embedding, is_sharded, whole
from tokmask_peft.model.backbone import Backbone
from tokmask_peft.model.decisions import PRECISIONS
from tokmask_peft.model.layers import LINEAR, is_quantized
from tokmask_peft.model.location import check_files
from tokmask_peft.recipe.schema import AdapterConfig
from tokmask_peft.tasks import get_task

WEIGHTS = "adapter_model.safetensors"  # PEFT's name for the file of an adapter's weights

_PLAIN = (
    *("peft_type", "task_type", "bias", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"),
    *("exclude_modules", "modules_to_save", "init_lora_weights", "base_model_name_or_path", "revision"),
    *("inference_mode", "peft_version", "megatron_core", "qalora_group_size"),
)
"""Keys of an `adapter_config.json` that can be merged without PEFT; if any other is set, PEFT merges."""

MOST_ROUNDED = 0.3
"""Largest share of an adapter's change to a bf16 weight matrix that rounding may take if it is to be merged.

Measured with MiniLM on question types and parts of speech, adapters scaled by 1 to .01, against fp32: up to a share of
.31 merged and unmerged logits deviate alike (rms .0054 and .0055; .0068 and .0069), from .53 on the merged ones
deviate more (.0012 and .0005; .0055 and .0029).
"""

SAMPLED = 256
"""Rows of each matrix that are examined: all rows of a large one would take five times as long as merging it."""

_PROBE = "  Mañana I'll go to Zürich… @user #Tag 3,14 ÇA\u0301 ﬁn 今日は"
"""A text that tokenizers with one vocabulary but other rules split differently: case, accents, spaces, Unicode."""


def linear_layers(model: nn.Module, outside: tuple[str, ...]) -> list[str]:
    """Return the full names of the backbone's linear layers, quantized ones too, except those of the modules `outside`.

    PEFT's "all-linear" leaves out one head at most and only in sequence tasks (not the pooler of a BERT that lacks
    one), and writes full names into `adapter_config.json`.
    """
    linear = [name for name, part in model.named_modules() if isinstance(part, LINEAR) or is_quantized(part)]
    return [name for name in linear if not f"{name}.".startswith(tuple(f"{other}." for other in outside))]


def target_names(model: nn.Module, config: AdapterConfig, outside: tuple[str, ...]) -> list[str]:
    """Return the last parts of the names of the layers to adapt; a ModelError if there are none, or not as named."""
    found = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model, outside)})
    if not found:
        problem = f"{type(model).__name__} has no linear layers to adapt"
        raise ModelError(f"{problem}: use another backbone, as in `tokmask recipes`", code="no-linear-layers")
    if config.targets == "auto":
        return found
    if unknown := [name for name in config.targets if name not in found]:
        problem = f"adapter.targets: no linear layer is called {', '.join(unknown)}.{nearest(unknown[0], found)}"
        remedy = f"This backbone has {', '.join(found)}; 'auto' adapts them all."
        raise ModelError(f"{problem} {remedy}", code="unknown-target", unknown=unknown, known=found)
    return list(config.targets)


def adapted_layers(model: nn.Module, wanted: str | int | float) -> list[int] | None:
    """Return the indices of the layers that get an adapter: a number or a share of the upper ones; None for `all`."""
    if isinstance(wanted, str):
        return None
    total = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    count = max(1, round(wanted * total)) if isinstance(wanted, float) else wanted
    if count > total:
        message = f"adapter.layers is {wanted}, but this backbone has {total} layers; 'all' adapts every one of them"
        raise ModelError(message, code="too-few-layers", wanted=wanted, layers=total)
    return list(range(total - count, total))


@quiet_loading()
def add_adapter(
    backbone: Backbone, config: AdapterConfig, task: str, trained_token: int | None = None
) -> tuple[Any, tuple[Decision, ...]]:
    """Wrap a backbone in a PEFT model: LoRA on linear layers; new modules, and row `trained_token`, in full."""
    from peft import LoraConfig, get_peft_model

    new, parts = backbone.new_modules, dict(backbone.model.named_modules())
    targets, layers = target_names(backbone.model, config, new), adapted_layers(backbone.model, config.layers)
    backbone.model.requires_grad_(False)
    rows: dict[str, list[int]] | None = None
    if trained_token is not None:
        embedding = find_embedding(backbone.model)
        rows = {name.rsplit(".", 1)[-1]: [trained_token] for name, part in parts.items() if part is embedding}
    lora = LoraConfig(
        task_type=get_task(task).peft_type,  # without it the head would silently stay frozen
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        exclude_modules=[name for name in new if name.rsplit(".", 1)[-1] in targets] or None,
        # PEFT reads the layer from a module's name; modules with another number in it, or none, get no adapter
        layers_to_transform=layers,
        modules_to_save=list(new),
        trainable_token_indices=rows,
        use_rslora=config.rslora,
        use_dora=config.dora,
        # in 4 or 8 bits GPT-2's layers are not transposed, but the adapter must also fit those that are
        fan_in_fan_out=any(issubclass(getattr(part, "source_cls", type(part)), Conv1D) for part in parts.values()),
    )
    model = get_peft_model(backbone.model, lora, autocast_adapter_dtype=True)
    # PEFT adds its usual head names to modules_to_save; those that this backbone lacks would only confuse a reader
    model.peft_config["default"].modules_to_save = sorted(set(new))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if frozen := [name for name in new if not any(f"{name}.modules_to_save." in entry for entry in trained)]:
        message = f"{', '.join(frozen)} did not become trainable; without a trained head nothing is learned"
        raise ModelError(message, code="frozen-head", modules=frozen)
    if low := [name for name, parameter in trained.items() if parameter.dtype != torch.float32]:
        message = f"{low[0]} would be trained in {trained[low[0]].dtype}; adapters and heads are trained in fp32"
        raise ModelError(message, code="trained-in-low-precision", parameter=low[0])
    count = sum(parameter.numel() for parameter in trained.values())
    where = f" of layers {layers[0]} to {layers[-1]}" if layers else ""
    row = "" if trained_token is None else f"; embedding row {trained_token}"
    reason = f"LoRA r={config.r} on {', '.join(targets)}{where}; in full: {', '.join(new)}{row}"
    return model, (Decision("trained", f"{count:,} parameters", reason),)


@contextlib.contextmanager
def inputs_as_they_come(model: nn.Module, autocast: bool) -> Iterator[None]:
    """Keep PEFT from making an fp32 copy of what enters each adapter, which autocast would convert back to bf16.

    Only time and memory change, and dropout on the input is in bf16, like the backbone's own. The copy stays without
    `autocast`, and for DoRA, which takes the dtype of its norms from the input.
    """
    # PEFT's `disable_input_dtype_casting` fails at layers without the switch (TrainableTokensLayer, peft 0.21.2)
    layers: list[Any] = [part for part in model.modules() if getattr(part, "cast_input_dtype_enabled", False)]
    dora = any(getattr(layer, "lora_variant", None) for layer in layers)
    for layer in layers:
        layer.cast_input_dtype_enabled = dora or not autocast
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def gathered_weights(model: Any) -> dict[str, Tensor] | None:
    """Return what is trained as plain tensors on the host if FSDP shards it, otherwise None; all processes call it."""
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    # not from named_parameters: after a forward pass some are still gathered, in memory that FSDP will reclaim
    state = {name: value for name, value in model.state_dict().items() if name in trained}
    if not any(is_sharded(value) for value in state.values()):
        return None
    return {name: whole(value.detach()).cpu() for name, value in state.items()}


def save_adapter(model: Any, folder: Path, backbone_id: str, weights: dict[str, Tensor] | None = None) -> None:
    """Save what is trained (`gathered_weights`), never the embedding matrix; `backbone_id` names the base to others."""
    config = model.peft_config["default"]
    loaded_from = config.base_model_name_or_path
    config.base_model_name_or_path = backbone_id
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
    finally:
        config.base_model_name_or_path = loaded_from


@quiet_loading()
def load_adapter(
    backbone: Backbone, folder: Path, weights: Mapping[str, str] | None = None, scaling: float | None = None
) -> Any:
    """Add a saved adapter to a freshly loaded backbone, for prediction; a ModelError if `folder` has none that fits.

    `weights`, from `weight_hashes`, and `scaling` are those of the training; they are compared if they are known.
    """
    check_files_of_adapter(folder)
    doing = f"using the adapter in {folder} with this backbone and these labels"
    with boundary(doing, ModelError, "adapter-does-not-fit", folder=folder):
        from peft import PeftConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        config: Any = PeftConfig.from_pretrained(str(folder))
        config.inference_mode, config.base_model_name_or_path = True, None  # PEFT warns if the backbone's name differs
        with safe_open(folder / WEIGHTS, "pt") as file:
            saved = max((max(file.get_slice(name).get_shape(), default=0) for name in file.keys()), default=0)  # noqa: SIM118
        if (rank := max([config.r, *config.rank_pattern.values()])) > max(saved, 1024):  # before it takes memory
            message = f"adapter_config.json in {folder} says rank {rank}, which its weights do not have"
            raise ModelError(message, code="adapter-does-not-fit", folder=folder, rank=rank)
        model = get_peft_model(backbone.model, config)
        check_fit(model, backbone.tokenizer, folder)
        found = {scale for part in model.modules() if isinstance(part, LoraLayer) for scale in part.scaling.values()}
        _check_trained_on(backbone, folder, weights, found, scaling)
        model.load_adapter(str(folder), "default")
    return model.eval()


def check_files_of_adapter(folder: Path) -> None:
    """Raise a ModelError if a folder has no adapter, or something that is neither a file nor a folder."""
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no adapter ({name} is missing)", code="no-adapter", folder=folder)
    check_files(folder)
    if not is_whole(folder / WEIGHTS):
        message = f"{folder / WEIGHTS} is damaged, or was not written to its end; copy or download it again"
        raise ModelError(message, code="damaged-adapter", folder=folder)


def _check_trained_on(
    backbone: Backbone, folder: Path, weights: Mapping[str, str] | None, found: set[float], scaling: float | None
) -> None:
    """Raise a ModelError if the backbone's weights, or the scaling that was `found`, differ from those of training."""
    if other := [kind for kind, seen in (weights or {}).items() if backbone.weights.get(kind, seen) != seen]:
        message = f"the backbone's weights are not those that the adapter in {folder} was trained on. Use that "
        message += "backbone; if its repository has changed since, its earlier revision"
        raise ModelError(message, code="another-backbone", folder=folder, weights=other)
    if scaling is not None and any(not math.isclose(scale, scaling) for scale in found):
        message = f"adapter_config.json in {folder} scales the adapter by {sorted(found)}, but it was trained with "
        message += f"{scaling:g}: restore lora_alpha, r, use_rslora and alpha_pattern"
        raise ModelError(message, code="another-scaling", folder=folder, scaling=sorted(found))


def check_fit(model: Any, tokenizer: Any, folder: Path) -> None:
    """Compare a saved adapter or checkpoint with the PEFT model and the tokenizer, if it has one, to be used with.

    PEFT only warns of missing weights, and ignores others that it does not know; here these, another shape, whole
    numbers and another tokenizer are a ModelError.
    """
    from peft import get_peft_model_state_dict

    check_files(folder)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: list(value.shape) for name, value in weights.items()}
    with safe_open(folder / WEIGHTS, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        saved = {name: part.get_shape() for name, part in slices.items()}
        integers = sorted(name for name, part in slices.items() if name in wanted and "F" not in part.get_dtype())
    found = {
        "missing": sorted(wanted.keys() - saved.keys()),
        # the Trainer's checkpoints may also hold the embedding matrix
        "unexpected": sorted(saved.keys() - wanted.keys() - model.state_dict().keys()),
        "shapes": sorted(name for name in wanted.keys() & saved.keys() if saved[name] != wanted[name]),
        "integers": integers,
    }
    if any(found.values()):
        said = {"shapes": "of another shape", "integers": "that are whole numbers"}
        problems = [f"{len(names)} {said.get(kind, kind)} ({_some(names)})" for kind, names in found.items() if names]
        problem = f"the adapter in {folder} does not fit the backbone or the labels. Of its weights, "
        problem += "; ".join(problems)
        remedy = "Use it with the backbone that it was trained on, and with the files that it was saved with."
        raise ModelError(f"{problem}. {remedy}", code="adapter-does-not-fit", folder=folder, **found)
    check_tokenizer(tokenizer, folder)


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raise a ModelError if the tokenizer in a folder, if it has one, is another than `tokenizer`."""
    if not (folder / "tokenizer_config.json").is_file():
        return
    try:
        trained = type(tokenizer).from_pretrained(str(folder))
    except Exception as error:  # of whatever kind
        problem = f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {first_line(error)})"
        message = f"{problem}; copy or download its files again"
        raise ModelError(message, code="damaged-adapter", folder=folder) from error
    theirs, ours = trained.get_vocab(), tokenizer.get_vocab()
    tokens = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    if tokens or trained(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"]:
        how = f"{len(tokens)} tokens have another id ({_some(tokens)})" if tokens else "it splits a text differently"
        message = f"the backbone's tokenizer is not the one in {folder}, which the adapter was trained with: {how}. "
        remedy = "Use the backbone that the adapter was trained on."
        raise ModelError(message + remedy, code="another-tokenizer", folder=folder, tokens=tokens)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def load_merged(
    backbone: Backbone, folder: Path, weights: Mapping[str, str] | None = None, scaling: float | None = None
) -> tuple[Any, Decision]:
    """Load a saved adapter for prediction and merge it into its unquantized backbone, unless rounding would spoil it.

    Merging saves the products of the adapter. But bf16 weights hold three digits, fp16 ones four: a change that is
    small compared with them would be lost, so that such an adapter is kept apart. Plain LoRA is merged here, without
    waiting for PEFT to be imported; anything else, and what does not fit, is left to PEFT. Returns the model, merged or
    not, and which it is; arguments as of `load_adapter`.
    """
    check_files_of_adapter(folder)
    changes = _plain_changes(backbone, folder)
    if changes is None:
        return merge_if_harmless(load_adapter(backbone, folder, weights, scaling))
    check_tokenizer(backbone.tokenizer, folder)
    _check_trained_on(backbone, folder, weights, {changes.scaling}, scaling)
    decision = _decide_merging(
        (part.weight, [(upper, lower, changes.scaling)]) for part, (upper, lower) in changes.linear
    )
    if decision.choice != "merged":
        return load_adapter(backbone, folder, weights, scaling), decision
    with torch.no_grad():
        for part, (upper, lower) in changes.linear:
            part.weight += (upper @ lower) * changes.scaling
        for parameter, value in changes.whole:
            parameter.copy_(value)
    return backbone.model.requires_grad_(False).eval(), decision


@dataclass(frozen=True, slots=True)
class _PlainChanges:
    """What a plain LoRA adapter changes: linear layers by products, [out, r] and [r, in], and whole parameters."""

    scaling: float
    linear: list[tuple[nn.Linear, tuple[Tensor, Tensor]]]
    whole: list[tuple[Tensor, Tensor]]


def _plain_changes(backbone: Backbone, folder: Path) -> _PlainChanges | None:
    """Read an adapter that is plain LoRA and fits in every name and shape; None if PEFT is needed."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]
        new, excluded = config.get("modules_to_save") or [], config.get("exclude_modules") or []
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        plain = config["peft_type"] == "LORA" and config.get("bias", "none") == "none"
        plain &= not any(value for key, value in config.items() if key not in _PLAIN)
        plain &= config.get("init_lora_weights", True) in (True, False, "gaussian")  # others change the backbone
        plain &= all(isinstance(names, list) for names in (targets, new, excluded))
        with safe_open(folder / WEIGHTS, "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:  # PEFT says what is wrong with it
        return None
    linear, whole, device = [], [], backbone.model.device
    for name, part in backbone.model.named_modules() if plain else ():
        at = f"base_model.model.{name}"
        if _ends_in(name, new):
            whole += [(value, saved.pop(f"{at}.{key}", None)) for key, value in part.state_dict(keep_vars=True).items()]
        elif any(_ends_in(name[:dot], new) for dot in range(len(name)) if name[dot] == "."):
            continue  # part of such a module
        elif _ends_in(name, targets) and not _ends_in(name, excluded):
            upper, lower = (saved.pop(f"{at}.{factor}.weight", None) for factor in ("lora_B", "lora_A"))
            if type(part) is not nn.Linear or upper is None or lower is None:
                return None
            if (upper.shape, lower.shape) != ((part.out_features, rank), (rank, part.in_features)):
                return None
            linear.append((part, (upper.to(device).float(), lower.to(device).float())))
    if not linear or saved or any(value is None or value.shape != parameter.shape for parameter, value in whole):
        return None
    return _PlainChanges(scaling, linear, whole)


def _ends_in(name: str, endings: list[str]) -> bool:
    return name in endings or name.endswith(tuple(f".{ending}" for ending in endings))


def merge_if_harmless(model: Any) -> tuple[Any, Decision]:
    """Do what `load_merged` does for an adapter that PEFT has loaded."""
    from peft.tuners.lora import Linear, LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    low: list[Any] = [layer for layer in layers if layer.get_base_layer().weight.dtype != torch.float32]
    if not all(type(layer) is Linear and not layer.lora_variant for layer in low):
        return model, Decision("adapter", "kept apart", "the effect of rounding is known for plain LoRA only")
    matrices = []
    for layer in low:
        weight, names = layer.get_base_layer().weight, layer.active_adapters
        parts = [(layer.lora_B[name].weight, layer.lora_A[name].weight, layer.scaling[name]) for name in names]
        matrices.append((weight.T if layer.fan_in_fan_out else weight, parts))
    decision = _decide_merging(matrices)
    return (model.merge_and_unload() if decision.choice == "merged" else model), decision


_Products = list[tuple[Tensor, Tensor, float]]
"""A change of a matrix: a sum of products, [out, r] and [r, in], each with its scaling."""


def _decide_merging(matrices: Iterable[tuple[Tensor, _Products]]) -> Decision:
    """Decide by the matrix from whose change rounding would take the largest share; fp32 ones lose nothing."""
    rounded, dtype = 0.0, torch.float32
    for weight, change in matrices:
        if weight.dtype != torch.float32:
            rounded, dtype = max(rounded, _rounded_share(weight, change)), weight.dtype
    if rounded > MOST_ROUNDED:
        reason = f"rounding to {PRECISIONS[dtype]} would take up to {rounded:.0%} of its change to a matrix"
        return Decision("adapter", "kept apart", reason)
    taken = f"; rounding to {PRECISIONS[dtype]} takes up to {rounded:.1%} of its change to a matrix"
    loss = "" if dtype == torch.float32 else taken
    return Decision("adapter", "merged", f"the same function with fewer products{loss}")


@torch.no_grad()
def _rounded_share(weight: Tensor, parts: _Products) -> float:
    """Return the norm of what rounding takes from a matrix's change, as a share of the change's, over some rows."""
    some = slice(None, None, -(-weight.shape[0] // SAMPLED))
    change = torch.zeros_like(weight[some], dtype=torch.float32)
    for upper, lower, scaling in parts:
        change.addmm_(upper[some].float(), lower.float(), alpha=scaling)
    exact = weight[some].float() + change
    taken = (exact.to(weight.dtype).float() - exact).norm()
    return float(taken / change.norm().clamp_min(torch.finfo(torch.float32).tiny))
