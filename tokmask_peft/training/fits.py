"""Will it fit: the estimate of a run against the memory there is, before the run starts or without one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from tokmask_peft.errors import ModelError, TokmaskError
from tokmask_peft.model.checkpointing import can_checkpoint, check_checkpointing
from tokmask_peft.model.decisions import Decision, bitsandbytes_problem, choose_precision, choose_quantization
from tokmask_peft.model.memory.estimate import Estimate, Setting, estimate
from tokmask_peft.model.memory.remedies import Able, Remedy, changed, remedies
from tokmask_peft.model.memory.room import Room, device_room, gpu_room, shown
from tokmask_peft.model.memory.skeleton import bare_model
from tokmask_peft.model.placement import placement_problem
from tokmask_peft.recipe import Recipe, SourceConfig
from tokmask_peft.training.agreement import agreed
from tokmask_peft.training.workload import Lengths, Workload, workload

USUAL_CLASSES = 3
BF16_ASSUMED = (
    "Assumed: the GPU computes in bf16, as from the RTX 30 series and the A100 on. The GTX 10 and 16 series (GTX 1650, "
    "1660), the RTX 20 series (RTX 2060), T4 and V100 do not: add model.precision=fp32 for those."
)
CHECKPOINTING = "model.gradient_checkpointing"


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run's memory against what there is.

    Attributes:
        recipe: with gradient checkpointing decided.
        decision: on gradient checkpointing.
        shapes: of its batches.
        largest: with the largest batch.
        usual: with a usual batch, where asked for and the texts are known.
        room: what there is, if that is known.
    """

    recipe: Recipe
    decision: Decision
    shapes: Workload
    largest: Estimate
    usual: Estimate | None
    room: Room | None

    @property
    def fits(self) -> bool:
        """Whether the largest batch fits, as far as one can tell."""
        return self.room is None or self.room.fits(self.largest.total)


def forecast(
    recipe: Recipe,
    setting: Setting,
    batching: str,
    lengths: Lengths | None,
    room: Room | None,
    *,
    usual: bool = True,
) -> Forecast:
    """Estimate a run, and decide on gradient checkpointing where the recipe leaves it open.

    Args:
        recipe: to estimate.
        setting: backbone and device.
        batching: as decided.
        lengths: of the texts, where they are at hand.
        room: what there is, if that is known.
        usual: estimate a usual batch, too, which takes as long again.

    Raises:
        ModelError: the recipe does not fit the backbone.
    """
    shapes = workload(recipe, batching, lengths)
    asked = recipe.model.gradient_checkpointing
    bare = bare_model(setting.config, recipe.data.task, setting.dtype)
    check_checkpointing(bare, asked)
    plain = changed(recipe, {CHECKPOINTING: asked is True})
    found = estimate(plain, setting, shapes.largest, shapes.evaluation)
    what = "checkpointing"
    if asked != "auto":
        decision = Decision(what, "on" if asked else "off", "set in the recipe")
    elif room is None:
        decision = Decision(what, "off", f"nobody tells how much memory this {setting.device_type} has")
    elif room.fits(found.total):
        reason = f"{shown(found.total)} at the most, without it; {room.name} has {shown(room.bytes)}"
        decision = Decision(what, "off", reason)
    elif not can_checkpoint(bare):
        have = f"{shown(found.total)} without it; {room.name} has {shown(room.bytes)}"
        decision = Decision(what, "off", f"{have}, but {type(bare).__name__} cannot do it")
    else:
        with_it = changed(recipe, {CHECKPOINTING: True})
        less = estimate(with_it, setting, shapes.largest, shapes.evaluation)
        saves = less.total < found.total
        reason = f"{shown(found.total)} without, {shown(less.total)} with it; {room.name} has {shown(room.bytes)}"
        decision = Decision(what, "on" if saves else "off", reason)
        if saves:
            plain, found = with_it, less
    ordinary = estimate(plain, setting, shapes.usual, shapes.evaluation) if usual and shapes.usual else None
    return Forecast(plain, decision, shapes, found, ordinary, room)


def ways_out(cast: Forecast, setting: Setting, batching: str, lengths: Lengths | None) -> list[Remedy]:
    """Return what could be changed where a run does not fit."""
    if cast.room is None:
        return []

    def count(recipe: Recipe) -> Estimate:
        shapes = workload(recipe, batching, lengths)
        quantization = recipe.model.quantization if recipe.model.quantization == "nf4" else setting.quantization
        there = Setting(setting.config, setting.device_type, quantization, setting.dtype)
        return estimate(recipe, there, shapes.largest, shapes.evaluation)

    decided = changed(cast.recipe, {"model.quantization": setting.quantization})
    bare = bare_model(setting.config, cast.recipe.data.task, setting.dtype)
    movable, int8 = placement_problem(bare) is None, quantizes(setting.device_type)
    able = Able(setting.device_type != "cpu", movable, can_checkpoint(bare), int8)
    return remedies(decided, count, cast.room, able)


def quantizes(device_type: str) -> bool:
    """Return whether bitsandbytes runs on a device; a GPU that is not here is taken for one that it runs on."""
    thought_of = device_type == "cuda" and not torch.cuda.is_available()
    return thought_of or bitsandbytes_problem(device_type) is None


def without_training(recipe: Recipe, gpu: str | None = None) -> tuple[Forecast, Setting, list[Remedy]]:
    """Estimate a recipe on this machine, or on a GPU of a size; no weights are read.

    Args:
        recipe: to estimate.
        gpu: memory of the GPU to estimate for, as 6GB; default: this machine's GPU of CUDA, or its CPU if it has none.

    Returns:
        The forecast, what it rests on, and the changes that would save memory, where it does not fit.

    Raises:
        RecipeError, DataError, ModelError: with what to do.
    """
    from transformers import AutoConfig

    from tokmask_peft.model.backbone import attention_dropout_name, backbone_location, load_problem
    from tokmask_peft.model.padding_free import choose_batching

    room = None if gpu is None else gpu_room(gpu)
    device = torch.device("cuda" if gpu or torch.cuda.is_available() else "cpu")
    labels, lengths = _texts(recipe)
    location = backbone_location(recipe.model)
    try:
        config = AutoConfig.from_pretrained(
            location,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
            num_labels=labels,
        )
    except (OSError, ValueError) as error:
        raise ModelError(load_problem("backbone's config", location, error)) from error
    if (dropout := recipe.model.attention_dropout) is not None:
        setattr(config, attention_dropout_name(recipe.model, location, config), dropout)
    if gpu is None:
        precision, quantization = choose_precision(recipe.model, device), choose_quantization(recipe.model, device)
        chosen = precision.choice, quantization.choice
    else:  # one that bitsandbytes and bf16 run on
        wanted = {"precision": recipe.model.precision, "quantization": recipe.model.quantization}
        chosen = (
            "bf16" if wanted["precision"] == "auto" else wanted["precision"],
            "nf4" if wanted["quantization"] == "auto" else wanted["quantization"],
        )
    dtype = torch.bfloat16 if chosen[0] == "bf16" else torch.float32
    assumed = BF16_ASSUMED if gpu is not None and recipe.model.precision == "auto" else None
    setting = Setting(config, device.type, chosen[1], dtype, assumed)
    try:
        bare = bare_model(config, recipe.data.task, dtype)
        noisy = recipe.training.neftune_alpha is not None
        batching = choose_batching(recipe.training.batching, bare, neftune=noisy).choice
        cast = forecast(recipe, setting, batching, lengths, room or device_room(device))
        ways = [] if cast.fits else ways_out(cast, setting, batching, lengths)
    except TokmaskError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"a step of {config.model_type} cannot be counted without running it: {first}") from error
    return cast, setting, ways


def _texts(recipe: Recipe) -> tuple[int, Lengths | None]:
    """Return the number of classes and the lengths of the texts, where these are at hand.

    Those of the Hub are not, since they may have to be downloaded; a test set there counts as many texts of max_length.
    """
    from tokmask_peft.data import load_corpus
    from tokmask_peft.data.encode import encode
    from tokmask_peft.model.backbone import load_tokenizer

    data, unread = recipe.data, list[tuple[int, ...]]()
    if _on_hub(data):
        return USUAL_CLASSES, None
    if data.test is not None and data.test_source is not None and _on_hub(data.test_source):
        data = data.model_copy(update={"test": None, "test_source": None})
        unread = [(data.max_length,) * recipe.training.eval_batch_size]
    corpus, tokenizer = load_corpus(data.expanded(), recipe.seed), load_tokenizer(recipe.model)
    train, *evaluated = (
        list(encode(split, tokenizer, recipe.data.task, corpus.labels, recipe.data.max_length).dataset["length"])
        for split in (corpus.train, corpus.validation, corpus.test)
        if split
    )
    return len(corpus.labels), Lengths(train, (*evaluated, *unread))


def _on_hub(source: SourceConfig) -> bool:
    return source.path is None and source.hub is not None


def before_training(
    recipe: Recipe, backbone: Any, batching: str, lengths: Lengths, device: torch.device
) -> tuple[Recipe, Decision, str | None]:
    """Decide on gradient checkpointing, and warn of what will not fit; of several processes the tightest decides.

    Under FSDP it does not warn, since the estimate is of a device that holds everything.

    Returns:
        The recipe with the decision in it, the decision, and a warning or none.

    Raises:
        ModelError: the recipe asks for gradient checkpointing, which the backbone cannot do.
    """
    setting = Setting(backbone.model.config, device.type, backbone.quantization, backbone.dtype)
    check_checkpointing(backbone.model, recipe.model.gradient_checkpointing)
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    try:
        with torch.random.fork_rng(devices=()):
            cast = forecast(recipe, setting, batching, lengths, device_room(device), usual=False)
            warning = None if cast.fits or sharded else _warning(cast, ways_out(cast, setting, batching, lengths))
    except Exception as error:  # an architecture that cannot be counted can still be trained
        asked = recipe.model.gradient_checkpointing is True
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = f"memory cannot be estimated here: {first}"
        decision, warning = Decision("checkpointing", "on" if asked else "off", reason), None
    else:
        decision = cast.decision
        if sharded and recipe.model.gradient_checkpointing == "auto":
            decision = replace(decision, reason=f"{decision.reason}; shards are not counted")
    decision, warning = agreed(decision, warning)
    return changed(recipe, {CHECKPOINTING: decision.choice == "on"}), decision, warning


def _warning(cast: Forecast, ways: list[Remedy]) -> str:
    room = cast.room
    have = "" if room is None else f"; {room.name} has {shown(room.bytes)}"
    lines = [f"Warning: the largest batch would take {shown(cast.largest.total)}{have}. It may run out of memory."]
    lines += [f"  {remedy.told}" for remedy in ways]
    return "\n".join(lines)
