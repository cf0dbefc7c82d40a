"""Whether a run fits: its estimate compared with the memory that is available, before training or without it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import AutoConfig

from tokmask_peft.console import Decision
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.encoding import Encoder
from tokmask_peft.errors import ModelError, TokmaskError, first_line
from tokmask_peft.model import decisions
from tokmask_peft.model.backbone import attention_dropout_name, lacks_head, load_error, load_tokenizer
from tokmask_peft.model.decisions import rows_problem
from tokmask_peft.model.layers import placement_problem
from tokmask_peft.model.location import backbone_location, check_length, loading_source
from tokmask_peft.model.memory.estimate import (
    MARGIN,
    Estimate,
    Lengths,
    Memory,
    Workload,
    device_memory,
    estimate,
    gpu_memory,
    shown,
    workload,
)
from tokmask_peft.model.memory.step import Setting, bare_model
from tokmask_peft.model.memory.suggestions import Situation, Suggestion, suggestions
from tokmask_peft.model.packed import choose_batching, head_size
from tokmask_peft.recipe.schema import Recipe, changed

CHECKPOINTING = "model.gradient_checkpointing"
BF16_ASSUMED = (
    "Assumed: the GPU computes in bf16, as the RTX 30 series, the A100 and later GPUs do. The GTX 16 series (GTX 1650, "
    "1660), the RTX 20 series (RTX 2060), T4 and V100 do not: add model.precision=fp16 for those, and "
    "model.precision=fp32 for the GTX 10 series."
)


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run's memory compared with what is available."""

    recipe: Recipe  # with gradient checkpointing decided
    setting: Setting
    decision: Decision  # on gradient checkpointing
    shapes: Workload
    largest: Estimate  # with the largest batch
    usual: Estimate | None  # with a usual batch, if asked for and the texts are known
    memory: Memory | None  # what is available, if that is known
    suggestions: list[Suggestion]  # what saves memory, if the run does not fit

    @property
    def fits(self) -> bool:
        """Whether the largest batch fits, as far as that is known."""
        return self.memory is None or self.memory.fits(self.largest.total)

    @property
    def margin(self) -> float:
        """By how much the tensors of a real step may differ, as a share."""
        return MARGIN.get(self.setting.device_type, MARGIN["cuda"])

    def warning(self) -> str | None:
        """Return the warning before a training that does not fit."""
        taken = f"the largest batch would take {shown(self.largest.total)}; {self.memory}"
        lines = [f"Warning: {taken}. It may run out of memory.", *(f"  {one}" for one in self.suggestions)]
        return None if self.fits else "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form; all sizes in bytes."""
        return {
            "backbone": self.recipe.model.backbone,
            "device": self.setting.device_type,
            "precision": str(self.setting.dtype).removeprefix("torch."),
            "quantization": self.setting.quantization,
            "assumed": self.setting.assumed,
            "gradient_checkpointing": self.decision.choice == "on",
            "shapes": {"largest": str(self.shapes.largest), "from_texts": self.shapes.known},
            "largest": self.largest.to_dict(),
            "usual": None if self.usual is None else self.usual.to_dict(),
            "margin": self.margin,
            "available": None if self.memory is None else self.memory.bytes,
            "fits": self.fits,
            "suggestions": [{"changes": one.changes, "total": one.total, "fits": one.fits} for one in self.suggestions],
        }


def forecast(
    recipe: Recipe,
    setting: Setting,
    batching: str,
    lengths: Lengths | None,
    memory: Memory | None,
    *,
    usual: bool = True,
    suggest: bool = True,
) -> Forecast:
    """Estimate a run, and decide on gradient checkpointing if the recipe leaves it open.

    `lengths` of the texts and `memory` are None if unknown. A `usual` batch takes as long again, and looking for what
    to `suggest` if the run does not fit takes longer still. A ModelError says why the recipe does not fit the backbone.
    """
    shapes, asked = workload(recipe, batching, lengths), recipe.model.gradient_checkpointing
    bare: Any = bare_model(setting.config, recipe.data.task, setting.dtype)
    decisions.check_checkpointing(bare, asked)

    counted: dict[str, Estimate] = {}

    def count(recipe: Recipe) -> Estimate:
        if (key := recipe.model_dump_json()) not in counted:  # counting takes seconds
            there = replace(setting, quantization="nf4") if recipe.model.quantization == "nf4" else setting
            shapes = workload(recipe, batching, lengths)
            counted[key] = estimate(recipe, there, shapes.largest, shapes.evaluation)
        return counted[key]

    decided = changed(recipe, {"model.quantization": setting.quantization, CHECKPOINTING: asked is True})
    found, choice = count(decided), "on" if asked is True else "off"
    if asked != "auto":
        reason = "set in the recipe"
    elif memory is None:
        reason = f"the memory of this {setting.device_type} is unknown"
    elif memory.fits(found.total):
        reason = f"at most {shown(found.total)} without it; {memory}"
    elif not bare.supports_gradient_checkpointing:
        reason = f"{shown(found.total)} without it; {memory}, but {type(bare).__name__} cannot do it"
    else:
        less = count(changed(decided, {CHECKPOINTING: True}))
        reason = f"{shown(found.total)} without, {shown(less.total)} with it; {memory}"
        if less.total < found.total:
            found, choice, decided = less, "on", changed(decided, {CHECKPOINTING: True})
    ordinary = estimate(decided, setting, shapes.usual, shapes.evaluation) if usual and shapes.usual else None
    saving: list[Suggestion] = []
    if suggest and memory is not None and not memory.fits(found.total):
        kind, movable = setting.device_type, placement_problem(bare) is None
        imagined = kind == "cuda" and not torch.cuda.is_available()  # one that bitsandbytes runs on
        int8 = imagined or decisions.bitsandbytes_problem(kind) is None
        situation = Situation("run", decided, movable, bare.supports_gradient_checkpointing, int8, gpu=kind != "cpu")
        saving = suggestions(situation, count, memory)
    recipe = changed(recipe, {CHECKPOINTING: choice == "on"})
    return Forecast(recipe, setting, Decision("checkpointing", choice, reason), shapes, found, ordinary, memory, saving)


def before_training(
    recipe: Recipe, backbone: Any, batching: str, lengths: Lengths, device: torch.device
) -> tuple[Recipe, Decision, str | None]:
    """Decide on gradient checkpointing, and warn of what will not fit; of several processes the tightest decides.

    Under FSDP it does not warn, because the estimate is of a device that holds everything. Returns the recipe with the
    decision in it, the decision, and a warning or None. A ModelError says that the backbone cannot do what is asked.
    """
    model, dtype = backbone.model, backbone.dtype
    rows = device.type != "cuda" or batching != "padding_free" or not rows_problem(device, dtype, head_size(model))
    setting = Setting(model.config, device.type, backbone.quantization, dtype, rows=rows)
    asked = recipe.model.gradient_checkpointing
    decisions.check_checkpointing(backbone.model, asked)
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    try:
        with torch.random.fork_rng(devices=()):
            memory = device_memory(device)
            found = forecast(recipe, setting, batching, lengths, memory, usual=False, suggest=not sharded)
    except Exception as error:  # an architecture that cannot be counted can still be trained
        reason = f"memory cannot be estimated here: {first_line(error)}"
        decision, warning = Decision("checkpointing", "on" if asked is True else "off", reason), None
    else:
        decision, warning = found.decision, None if sharded else found.warning()
        if sharded and asked == "auto":
            decision = replace(decision, reason=f"{decision.reason}; shards are not counted")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        every: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, (decision, warning))
        decision, warning = tightest(every)
    return changed(recipe, {CHECKPOINTING: decision.choice == "on"}), decision, warning


def tightest(found: list[tuple[Decision, str | None]]) -> tuple[Decision, str | None]:
    """Return the decision, of one per process, that needs the least memory; of equals, that of the first."""
    number, (decision, warning) = max(enumerate(found), key=lambda one: (one[1][0].choice == "on", bool(one[1][1])))
    if number > 0:
        decision = replace(decision, reason=f"{decision.reason} (process {number})")
    return decision, warning


def without_training(recipe: Recipe, gpu: str | None = None) -> Forecast:
    """Estimate a recipe on this machine's CUDA GPU or CPU, or on a GPU of a size such as 6GB; no weights are read."""
    wanted, memory = recipe.model, None if gpu is None else gpu_memory(gpu)
    here = torch.cuda.is_available() and decisions.gpu_problem() is None
    device = torch.device("cuda" if gpu or here else "cpu")
    labels, lengths = _texts(recipe)
    if lengths is not None:
        numbers = recipe.training.decided(len(lengths.train))
        recipe = changed(recipe, {f"training.{key}": value for key, value in numbers.items()})
    location = backbone_location(wanted)
    source, how = loading_source(wanted, location)
    try:
        config = AutoConfig.from_pretrained(source, **how, num_labels=labels)
    except (OSError, ValueError) as error:
        raise load_error("backbone", location, error) from error
    check_length(recipe, config.to_dict())
    if wanted.attention_dropout is not None:
        setattr(config, attention_dropout_name(location, config), wanted.attention_dropout)
    if gpu is None:
        precision = decisions.choose_precision(wanted, device).choice
        quantization = decisions.choose_quantization(wanted, device).choice
    else:  # one that bitsandbytes and bf16 run on
        precision = "bf16" if wanted.precision == "auto" else wanted.precision
        quantization = "nf4" if wanted.quantization == "auto" else wanted.quantization
    dtype = decisions.DTYPES[precision]
    assumed = BF16_ASSUMED if gpu is not None and wanted.precision == "auto" else None
    try:
        bare = bare_model(config, recipe.data.task, dtype)
        batching = choose_batching(recipe.training.batching, bare, recipe).choice
        rows = batching != "padding_free" or device.type != "cuda"
        if not rows:  # GPUs that compute in fp16 only have no kernel for packed rows
            size = head_size(bare)
            rows = (
                not rows_problem(device, dtype, size) if here and gpu is None else precision == "bf16" and size <= 256
            )
        setting = Setting(config, device.type, quantization, dtype, assumed, rows)
        return forecast(recipe, setting, batching, lengths, memory or device_memory(device))
    except TokmaskError:
        raise
    except Exception as error:
        if lacks_head(error):
            raise load_error("backbone", location, error) from error
        problem = f"a step of {config.model_type} cannot be counted without running it: {first_line(error)}"
        raise ModelError(problem, code="not-countable", model=config.model_type) from error


def _texts(recipe: Recipe) -> tuple[int, Lengths | None]:
    """Return the number of classes and the lengths of the texts, if these need no download from the Hub.

    A test set there counts as texts of max_length.
    """
    data, unread = recipe.data, list[tuple[int, ...]]()
    if data.path is None and data.hub is not None:
        return 3, None  # classes, which are not known either
    if data.test is not None and (test := data.test_source) is not None and test.path is None and test.hub is not None:
        data = data.model_copy(update={"test": None, "test_source": None})
        unread = [(data.max_length,) * recipe.training.eval_batch_size]
    corpus = load_corpus(data.expanded(), recipe.seed)
    encoder = Encoder(load_tokenizer(recipe.model), data.task, data.max_length)
    train, *evaluated = (
        list(encoder.cut(split, corpus.all_labels).dataset["length"])
        for split in (corpus.train, corpus.validation, corpus.test)
        if split
    )
    return len(corpus.labels), Lengths(train, (*evaluated, *unread))
