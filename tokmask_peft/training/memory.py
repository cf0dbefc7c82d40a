"""Will it fit: the estimate of a run against the memory there is, before the run starts or without one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from rich.markup import escape
from rich.table import Table

from tokmask_peft.console import Decision, make_console
from tokmask_peft.errors import ModelError, RunError, TokmaskError, first_line
from tokmask_peft.model.decisions import (
    bitsandbytes_problem,
    can_checkpoint,
    check_checkpointing,
    choose_precision,
    choose_quantization,
)
from tokmask_peft.model.memory.estimate import (
    MARGIN,
    USABLE,
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
from tokmask_peft.model.memory.suggestions import (
    Phase,
    Situation,
    Suggestion,
    changed,
    memory_error,
    memory_errors,
    suggestions,
)
from tokmask_peft.model.placement import placement_problem
from tokmask_peft.recipe.schema import Recipe, SourceConfig, TrainingConfig

CHECKPOINTING = "model.gradient_checkpointing"


def tokens_per_step(training: TrainingConfig, lengths: Sequence[int], batches: int | None, processes: int) -> float:
    """Return the sub-tokens that an optimizer step takes on average, in all processes together, without padding.

    Args:
        training: the size of a micro-batch and how many make a step.
        lengths: sub-tokens of each text to train on.
        batches: of one process in an epoch, if a budget of sub-tokens makes them; None if `batch_size` does.
        processes: how many train.
    """
    texts = training.batch_size * processes if batches is None else len(lengths) / max(batches, 1)
    return texts * training.gradient_accumulation * sum(lengths) / max(len(lengths), 1)


def explained_memory_errors(
    recipe: Recipe, movable: bool, checkpointable: bool = True, evaluating: bool = False, loading: bool = False
) -> AbstractContextManager[None]:
    """Turn running out of memory into an error that names the keys to change.

    Args:
        recipe: of the run, with gradient checkpointing decided.
        movable: whether the backbone's embedding can be on the host.
        checkpointable: whether the backbone can do gradient checkpointing.
        evaluating: whether an evaluation runs.
        loading: whether the backbone is being loaded, or moved to the device.
    """
    phase: Phase = "loading" if loading else "evaluation" if evaluating else "training"
    return memory_errors(Situation(phase, recipe, movable=movable, checkpointable=checkpointable))


def evaluation_memory_errors(device: torch.device, texts: int | None = None) -> AbstractContextManager[None]:
    """Do the same for `tokmask evaluate`, which takes no keys; `texts` per forward pass, None while loading."""
    phase: Phase = "loading" if texts is None else "evaluation"
    return memory_errors(Situation(phase, gpu=device.type == "cuda", texts=texts or 1))


def single_text_error(recipe: Recipe, movable: bool, checkpointable: bool, said: str) -> RunError:
    """Return the error for micro-batches of one text that take too much; `said` is the allocator's message."""
    single = changed(recipe, {"training.batch_size": 1, "training.auto_batch": True})
    situation = Situation("training", single, movable=movable, checkpointable=checkpointable)
    return memory_error(situation, f"with a single text of up to {recipe.data.max_length} sub-tokens", said, RunError)


BF16_ASSUMED = (
    "Assumed: the GPU computes in bf16, as the RTX 30 series, the A100 and later GPUs do. The GTX 10 and 16 series "
    "(GTX 1650, 1660), the RTX 20 series (RTX 2060), T4 and V100 do not: add model.precision=fp32 for those."
)
UNKNOWN_CLASSES = 3
"""Classes that are assumed if the texts are on the Hub."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run's memory compared with what is available.

    Attributes:
        recipe: with gradient checkpointing decided.
        setting: backbone and device.
        decision: on gradient checkpointing.
        shapes: of its batches.
        largest: with the largest batch.
        usual: with a usual batch, if asked for and the texts are known.
        memory: what is available, if that is known.
        suggestions: what saves memory, if it does not fit.
    """

    recipe: Recipe
    setting: Setting
    decision: Decision
    shapes: Workload
    largest: Estimate
    usual: Estimate | None
    memory: Memory | None
    suggestions: list[Suggestion]

    @property
    def fits(self) -> bool:
        """Whether the largest batch fits, as far as that is known."""
        return self.memory is None or self.memory.fits(self.largest.total)

    @property
    def margin(self) -> float:
        """By how much the tensors of a real step may differ, as a share."""
        return MARGIN["cpu" if self.setting.device_type == "cpu" else "cuda"]

    def warning(self) -> str | None:
        """Return the warning before a training that does not fit."""
        if self.memory is None or self.fits:
            return None
        have = f"{self.memory.name} has {shown(self.memory.bytes)}"
        largest = f"the largest batch would take {shown(self.largest.total)}; {have}"
        return "\n".join([f"Warning: {largest}. It may run out of memory.", *(f"  {one}" for one in self.suggestions)])

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
            "suggestions": [
                {name: getattr(one, name) for name in ("changes", "total", "fits")} for one in self.suggestions
            ],
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

    Args:
        recipe: to estimate.
        setting: backbone and device.
        batching: as decided.
        lengths: of the texts, if they are known.
        memory: what is available, if that is known.
        usual: estimate a usual batch, too, which takes as long again.
        suggest: look for changes that save memory if the run does not fit, which takes longer still.

    Raises:
        ModelError: the recipe does not fit the backbone.
    """
    shapes = workload(recipe, batching, lengths)
    asked = recipe.model.gradient_checkpointing
    bare = bare_model(setting.config, recipe.data.task, setting.dtype)
    check_checkpointing(bare, asked)

    def count(recipe: Recipe) -> Estimate:
        wanted = recipe.model.quantization
        there = replace(setting, quantization="nf4") if wanted == "nf4" else setting
        shapes = workload(recipe, batching, lengths)
        return estimate(recipe, there, shapes.largest, shapes.evaluation)

    decided = changed(recipe, {"model.quantization": setting.quantization, CHECKPOINTING: asked is True})
    found, choice = count(decided), "on" if asked is True else "off"
    if asked != "auto":
        reason = "set in the recipe"
    elif memory is None:
        reason = f"the memory of this {setting.device_type} is unknown"
    else:
        have = f"{memory.name} has {shown(memory.bytes)}"
        if memory.fits(found.total):
            reason = f"{shown(found.total)} at the most, without it; {have}"
        elif not can_checkpoint(bare):
            reason = f"{shown(found.total)} without it; {have}, but {type(bare).__name__} cannot do it"
        else:
            less = count(changed(decided, {CHECKPOINTING: True}))
            reason = f"{shown(found.total)} without, {shown(less.total)} with it; {have}"
            if less.total < found.total:
                found, choice, decided = less, "on", changed(decided, {CHECKPOINTING: True})
    ordinary = estimate(decided, setting, shapes.usual, shapes.evaluation) if usual and shapes.usual else None
    saving: list[Suggestion] = []
    if suggest and memory is not None and not memory.fits(found.total):
        device = setting.device_type
        thought_of = device == "cuda" and not torch.cuda.is_available()  # taken for one that bitsandbytes runs on
        situation = Situation(
            "run",
            decided,
            gpu=device != "cpu",
            movable=placement_problem(bare) is None,
            checkpointable=can_checkpoint(bare),
            int8=thought_of or bitsandbytes_problem(device) is None,
        )
        saving = suggestions(situation, count, memory)
    recipe = changed(recipe, {CHECKPOINTING: choice == "on"})
    return Forecast(recipe, setting, Decision("checkpointing", choice, reason), shapes, found, ordinary, memory, saving)


def before_training(
    recipe: Recipe, backbone: Any, batching: str, lengths: Lengths, device: torch.device
) -> tuple[Recipe, Decision, str | None]:
    """Decide on gradient checkpointing, and warn of what will not fit; of several processes the tightest decides.

    Under FSDP it does not warn, because the estimate is of a device that holds everything.

    Returns:
        The recipe with the decision in it, the decision, and a warning or None.

    Raises:
        ModelError: the recipe asks for gradient checkpointing, which the backbone cannot do.
    """
    setting = Setting(backbone.model.config, device.type, backbone.quantization, backbone.dtype)
    asked = recipe.model.gradient_checkpointing
    check_checkpointing(backbone.model, asked)
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
    decision, warning = agreed(decision, warning)
    return changed(recipe, {CHECKPOINTING: decision.choice == "on"}), decision, warning


def agreed(decision: Decision, warning: str | None) -> tuple[Decision, str | None]:
    """Return what the process with the least memory decided; every process has to call this if there are several.

    Otherwise a run would have gradient checkpointing on some GPUs only, and report the memory of the first process
    only, which is the one that prints.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return decision, warning
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (decision, warning))
    return tightest(found)


def tightest(found: list[tuple[Decision, str | None]]) -> tuple[Decision, str | None]:
    """Return the decision, of one per process, that needs the least memory; of equals, that of the first."""
    number, (decision, warning) = max(enumerate(found), key=lambda one: (one[1][0].choice == "on", bool(one[1][1])))
    if number > 0:
        decision = replace(decision, reason=f"{decision.reason} (process {number})")
    return decision, warning


def without_training(recipe: Recipe, gpu: str | None = None) -> Forecast:
    """Estimate a recipe on this machine, or on a GPU of a size; no weights are read.

    Args:
        recipe: to estimate.
        gpu: memory of the GPU to estimate for, such as 6GB; default: this machine's CUDA GPU, or its CPU.

    Raises:
        RecipeError, DataError, ModelError: with what to do.
    """
    from transformers import AutoConfig

    from tokmask_peft.model.backbone import attention_dropout_name, backbone_location, load_problem
    from tokmask_peft.model.packed import choose_batching

    wanted, room = recipe.model, None if gpu is None else gpu_memory(gpu)
    device = torch.device("cuda" if gpu or torch.cuda.is_available() else "cpu")
    labels, lengths = _texts(recipe)
    location = backbone_location(wanted)
    loading = {"revision": wanted.revision, "trust_remote_code": wanted.trust_remote_code, "num_labels": labels}
    try:
        config = AutoConfig.from_pretrained(location, **loading)
    except (OSError, ValueError) as error:
        raise ModelError(load_problem("backbone's config", location, error)) from error
    if wanted.attention_dropout is not None:
        setattr(config, attention_dropout_name(location, config), wanted.attention_dropout)
    assumed = None
    if gpu is None:
        precision, quantization = choose_precision(wanted, device).choice, choose_quantization(wanted, device).choice
    else:  # one that bitsandbytes and bf16 run on
        precision = "bf16" if wanted.precision == "auto" else wanted.precision
        quantization = "nf4" if wanted.quantization == "auto" else wanted.quantization
        assumed = BF16_ASSUMED if wanted.precision == "auto" else None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    setting = Setting(config, device.type, quantization, dtype, assumed)
    try:
        bare = bare_model(config, recipe.data.task, dtype)
        noisy = recipe.training.neftune_alpha is not None
        batching = choose_batching(recipe.training.batching, bare, neftune=noisy).choice
        return forecast(recipe, setting, batching, lengths, room or device_memory(device))
    except TokmaskError:
        raise
    except Exception as error:
        problem = f"a step of {config.model_type} cannot be counted without running it: {first_line(error)}"
        raise ModelError(problem, code="not-countable", model=config.model_type) from error


def _texts(recipe: Recipe) -> tuple[int, Lengths | None]:
    """Return the number of classes and the lengths of the texts, if these are at hand.

    Those of the Hub are not, because they may have to be downloaded; a test set there counts as texts of max_length.
    """
    from tokmask_peft.data.corpus import load_corpus
    from tokmask_peft.data.encoding import Encoder
    from tokmask_peft.model.backbone import load_tokenizer

    data, unread = recipe.data, list[tuple[int, ...]]()
    if _on_hub(data):
        return UNKNOWN_CLASSES, None
    if data.test is not None and data.test_source is not None and _on_hub(data.test_source):
        data = data.model_copy(update={"test": None, "test_source": None})
        unread = [(data.max_length,) * recipe.training.eval_batch_size]
    corpus = load_corpus(data.expanded(), recipe.seed)
    encoder = Encoder(load_tokenizer(recipe.model), data.task, data.max_length)
    train, *evaluated = (
        list(encoder.cut(split, corpus.labels).dataset["length"])
        for split in (corpus.train, corpus.validation, corpus.test)
        if split
    )
    return len(corpus.labels), Lengths(train, (*evaluated, *unread))


def _on_hub(source: SourceConfig) -> bool:
    return source.path is None and source.hub is not None


PARTS = {
    "weights": "frozen backbone",
    "embedding": "its input embedding",
    "adapter": "adapter and head, fp32",
    "optimizer": "states of AdamW, fp32",
    "activations": "kept for the backward pass",
    "workspace": "gradients and intermediate results on top of that",
    "evaluation": "an evaluation takes more than a step",
    "overhead": "Python, libraries, CUDA context",
}


def print_forecast(found: Forecast) -> None:
    """Print the bytes, whether they fit, and what would save some."""
    console, setting = make_console(), found.setting
    precision = "bf16" if setting.dtype == torch.bfloat16 else "fp32"
    known = "of your texts" if found.shapes.known else "every text as long as data.max_length"
    lines = [
        f"{found.recipe.model.backbone} on {setting.device_type}, {precision}, quantization {setting.quantization}, "
        f"embedding {found.recipe.model.embedding}",
        *([setting.assumed] if setting.assumed else []),
        f"gradient checkpointing {found.decision.choice}: {found.decision.reason}",
        f"largest batch: {found.shapes.largest} ({known})\n",
    ]
    console.print("\n".join(lines), markup=False)
    columns = {"largest batch": found.largest, **({"usual batch": found.usual} if found.usual else {})}
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("what")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("")
    for part, about in PARTS.items():
        cells = [_cell(column, part) for column in columns.values()]
        if any(cells):
            table.add_row(part, *(cell or "-" for cell in cells), about)
    table.add_row("[bold]total[/bold]", *(f"[bold]{shown(column.total)}[/bold]" for column in columns.values()), "")
    console.print(table)
    if found.largest.host:
        console.print(f"and {shown(found.largest.host)} of the host's memory, for the embedding", markup=False)
    checked = "" if setting.device_type == "cpu" else ", which has not been checked on a GPU yet"
    console.print(f"The tensors of a real step should be within {found.margin:.0%} of this{checked}.\n", markup=False)
    if found.memory is None:
        console.print(f"The memory of this {setting.device_type} is unknown.", markup=False)
        return
    verdict = "It fits" if found.fits else "It does NOT fit"
    have = f"{escape(found.memory.name)} has {shown(found.memory.bytes)}, of which {USABLE:.0%} are counted on"
    console.print(f"[bold]{verdict}[/bold]: {have}.")
    if found.suggestions:
        console.print("What would take less, with its total:")
    for one in found.suggestions:
        console.print(f"  {one}", markup=False)
    if not found.fits and not any(one.fits for one in found.suggestions):
        console.print("Nothing here makes it fit: take a smaller backbone.")


def _cell(column: Estimate, name: str) -> str:
    """Leave out what does not count: the smaller of a step and an evaluation."""
    larger = column.evaluation > column.activations + column.workspace
    if (name == "evaluation" and not larger) or (name in ("activations", "workspace") and larger):
        return ""
    size: int = getattr(column, name)
    return shown(size) if size else ""
