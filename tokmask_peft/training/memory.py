"""Will it fit: the estimate of a run against the memory there is, before the run starts or without one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size, parse_flag_from_env
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from tokmask_peft.console import Decision
from tokmask_peft.data.batches import COUNTED_EPOCHS, TokenBudgetSampler, check_budget
from tokmask_peft.errors import ModelError, RecipeError, RunError, TokmaskError
from tokmask_peft.model.decisions import (
    bitsandbytes_problem,
    can_checkpoint,
    check_checkpointing,
    choose_precision,
    choose_quantization,
    in_short,
    instead_of_memory_errors,
    message,
    out_of_memory,
)
from tokmask_peft.model.memory.estimate import Estimate, Room, Setting, device_room, estimate, gpu_room, shown
from tokmask_peft.model.memory.step import Shape, bare_model
from tokmask_peft.model.memory.suggestions import Able, Remedy, changed, remedies, smaller_batch
from tokmask_peft.model.placement import placement_problem
from tokmask_peft.recipe.schema import Batching, Recipe, SourceConfig, TrainingConfig

Found = tuple[Decision, str | None]
"""A decision on gradient checkpointing, and a warning of what will not fit."""


def agreed(decision: Decision, warning: str | None) -> Found:
    """Return what the process with the least memory decided; every process has to call this, where there are several.

    Else a run would have gradient checkpointing on some GPUs only, and tell of the first process's memory alone, which
    is the one that prints.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return decision, warning
    found: list[Found | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (decision, warning))
    return tightest([one for one in found if one is not None])


def tightest(found: list[Found]) -> Found:
    """Return the decision, of one per process, that needs the least memory; of equals, that of the first."""
    number, (decision, warning) = max(enumerate(found), key=lambda one: (one[1][0].choice == "on", bool(one[1][1])))
    if number > 0:
        decision = replace(decision, reason=f"{decision.reason} (process {number})")
    return decision, warning


SHUFFLES = 20
MULTIPLE = 8
"""Padding goes up to a multiple of it (`trainer.collator`)."""
NEARLY = 0.9
"""Share of the most sub-tokens in a batch that passes for as many."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sub-tokens of each text.

    Attributes:
        train: of the texts to train on.
        evaluated: of each split that the run evaluates, validation and test, whose texts may be longer and more.
    """

    train: Sequence[int]
    evaluated: tuple[Sequence[int], ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Shapes of micro-batches.

    Attributes:
        largest: in training; of the longest texts there are, or of max_length where the texts are not known, or what
            fills a budget of sub-tokens.
        usual: in training; none where the texts are not known.
        evaluation: the largest in evaluation.
        known: whether the shapes come from the texts.
    """

    largest: Shape
    usual: Shape | None
    evaluation: Shape
    known: bool


def workload(recipe: Recipe, batching: str, lengths: Lengths | None) -> Workload:
    """Return the shapes of a run's batches.

    Args:
        recipe: of the run.
        batching: as decided: padded, grouped or padding_free.
        lengths: of the texts, if they are known.

    Raises:
        RecipeError: a text alone exceeds the budget of sub-tokens.
    """
    texts, evaluation = recipe.training.batch_size, _evaluation(recipe, lengths)
    if recipe.training.tokens_per_batch is not None:
        return Workload(_largest_of_budget(recipe, batching, lengths), None, evaluation, lengths is not None)
    if lengths is None:
        largest = Shape((recipe.data.max_length,) * texts, packed=batching == "padding_free")
        return Workload(largest, None, evaluation, False)
    cut = [min(length, recipe.data.max_length) for length in lengths.train]
    texts = min(texts, len(cut))
    batches = _batches(cut, texts, batching == "grouped", recipe.seed)
    if batching == "padding_free":
        by_size = sorted(batches, key=sum)
        return Workload(Shape(by_size[-1], True), Shape(by_size[len(by_size) // 2], True), evaluation, True)
    by_size = sorted(batches, key=max)
    usual = Shape.padded(texts, _rounded(max(by_size[len(by_size) // 2])))
    return Workload(Shape.padded(texts, _rounded(max(cut))), usual, evaluation, True)


def _largest_of_budget(recipe: Recipe, batching: str, lengths: Lengths | None) -> Shape:
    budget, cut = recipe.training.tokens_per_batch or 0, recipe.data.max_length
    if lengths is None:
        if batching == "padding_free":
            return _filled((), budget, cut)
        return _fullest(budget, dict.fromkeys(range(MULTIPLE, _rounded(cut) + 1, MULTIPLE), budget))
    texts, kind = [min(length, cut) for length in lengths.train], cast("Batching", batching)
    try:
        check_budget(max(texts), budget, kind)
    except ValueError as error:
        problem = f"training.tokens_per_batch: {error}; set it higher, or data.max_length lower"
        raise RecipeError([problem], source=recipe.name) from error
    if batching != "padding_free":
        return _fullest(budget, {_rounded(length): number for number, length in enumerate(sorted(texts), 1)})
    sampler = TokenBudgetSampler(texts, budget, kind, recipe.seed)
    drawn = [[texts[at] for at in batch] for epoch in range(COUNTED_EPOCHS) for batch in sampler.all_batches(epoch)]
    # In attention with dropout a GPU pads them to the longest: most for a long text among many short ones.
    widest = max(drawn, key=lambda batch: (len(batch) * max(batch), sum(batch)))
    return _filled(widest, min(budget, sum(texts)), max(texts))


def _fullest(budget: int, up_to: dict[int, int]) -> Shape:
    """Return the padded batch of the most sub-tokens, or one of nearly as many and longer texts: attention takes more.

    Args:
        budget: sub-tokens, padding included.
        up_to: how many texts there are of a padded length or less.
    """
    fitting = ((length, min(budget // length, number)) for length, number in up_to.items() if length <= budget)
    shapes = [Shape.padded(number, length) for length, number in fitting]
    most = max(shape.tokens for shape in shapes)
    return max((shape for shape in shapes if shape.tokens >= NEARLY * most), key=lambda shape: shape.lengths[0])


def _filled(texts: Sequence[int], budget: int, longest: int) -> Shape:
    """Return a packed batch with texts added until it takes the whole budget."""
    missing = budget - sum(texts)
    more = (min(longest, missing - start) for start in range(0, missing, longest))
    return Shape((*texts, *more), packed=True)


def _evaluation(recipe: Recipe, lengths: Lengths | None) -> Shape:
    """Return a shape that no batch of an evaluation exceeds: its texts come by length, the longest together."""
    texts, longest = recipe.training.eval_batch_size, recipe.data.max_length
    if lengths is not None:
        texts = min(texts, max(map(len, lengths.evaluated)))
        longest = min(longest, max(max(split) for split in lengths.evaluated if split))
    return Shape.padded(texts, _rounded(longest))


def _batches(lengths: list[int], texts: int, grouped: bool, seed: int) -> list[tuple[int, ...]]:
    """Draw the batches of some epochs; full ones only."""
    draw, found = np.random.default_rng(seed), list[tuple[int, ...]]()
    for _ in range(SHUFFLES):
        order = sorted(lengths) if grouped else draw.permutation(lengths).tolist()
        found += [tuple(order[at : at + texts]) for at in range(0, len(order) - texts + 1, texts)]
        if grouped or len(found) > 5000:
            break
    return found


def _rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def tokens_per_step(training: TrainingConfig, lengths: Sequence[int], batches: int | None, processes: int) -> float:
    """Return the sub-tokens that an optimizer step takes on average, in all processes together; padding is none.

    Args:
        training: the size of a micro-batch and how many make a step.
        lengths: sub-tokens of each text to train on.
        batches: of one process in an epoch, where a budget of sub-tokens makes them, each with as many as there are
            processes at the same time; None where `batch_size` does.
        processes: how many train.
    """
    texts = training.batch_size * processes if batches is None else len(lengths) / max(batches, 1)
    return texts * training.gradient_accumulation * sum(lengths) / max(len(lengths), 1)


LOADING = "while the backbone was loaded"


@contextlib.contextmanager
def explained_memory_errors(
    recipe: Recipe, movable: bool, checkpointable: bool = True, evaluating: bool = False, loading: bool = False
) -> Iterator[None]:
    """Turn running out of memory into an error that names the keys to change.

    Args:
        recipe: of the run, with gradient checkpointing decided.
        movable: whether the backbone's embedding can lie on the host.
        checkpointable: whether the backbone can do gradient checkpointing.
        evaluating: whether it is an evaluation that runs.
        loading: whether the backbone is being loaded, or moved to the device.

    Raises:
        RunError: out of memory.
    """

    def explained(said: str) -> RunError:
        if loading:
            return _while_loading(recipe, said, movable)
        if evaluating:
            return _takes_less("in evaluation", said, [*_evaluation_batch(recipe), *_weights(recipe, movable)])
        ways = [*_batch(recipe), *_training(recipe, movable, checkpointable)]
        return _takes_less("in training", said, ways)

    with instead_of_memory_errors(explained):
        yield


@contextlib.contextmanager
def evaluation_memory_errors(device: torch.device, texts: int | None = None) -> Iterator[None]:
    """Turn running out of memory in `tokmask evaluate`, which takes no keys, into an error that says what helps there.

    Args:
        device: that computes.
        texts: per forward pass; none while the backbone is loaded.

    Raises:
        RunError: out of memory.
    """

    def explained(said: str) -> RunError:
        fewer = max((texts or 1) // 4, 1)
        ways = [f"--batch-size {fewer} (batch_size={fewer})"] if texts is not None and texts > 1 else []
        ways.append("other programs closed")
        if device.type == "cuda":
            ways.append("CUDA_VISIBLE_DEVICES= before the command, which then computes on the CPU")
        return RunError(message(LOADING if texts is None else "in evaluation", said, ways))

    with instead_of_memory_errors(explained):
        yield


def single_text_error(recipe: Recipe, movable: bool, checkpointable: bool, said: str) -> RunError:
    """Return the error for a training that runs out of memory with micro-batches of one text.

    Args:
        recipe: as for `explained_memory_errors`.
        movable: as there.
        checkpointable: as there.
        said: the allocator's words.
    """
    what = f"with a single text of up to {recipe.data.max_length} sub-tokens"
    return _takes_less(what, said, _training(recipe, movable, checkpointable))


def _takes_less(what: str, said: str, ways: list[str]) -> RunError:
    return RunError(
        f"out of memory {what} ({said}). Any of these takes less: {'; '.join([*ways, 'a smaller data.max_length'])}. "
        "`tokmask estimate` with the same recipe says how much."
    )


def _while_loading(recipe: Recipe, said: str, movable: bool) -> RunError:
    """Say what takes less before the first batch: fewer texts at a time do not."""
    ways = [*_quantization(recipe), *_placement(recipe, movable), "a smaller model.backbone", "other programs closed"]
    said = message(LOADING, said, ways)
    return RunError(f"{said} `tokmask estimate` with the same recipe says how much it takes.")


def _batch(recipe: Recipe) -> list[str]:
    """Offer smaller micro-batches that make the same optimizer step."""
    training = recipe.training
    if training.tokens_per_batch is not None:
        half = max(training.tokens_per_batch // 2, 16)
        if half >= training.tokens_per_batch:
            return []
        caveat = ", if no text takes more" if half < recipe.data.max_length else ""
        twice = 2 * training.gradient_accumulation
        return [f"training.tokens_per_batch={half} training.gradient_accumulation={twice}{caveat}"]
    smaller = smaller_batch(training.batch_size, training.gradient_accumulation)
    ways = [f"training.batch_size={smaller[0]} training.gradient_accumulation={smaller[1]}"] if smaller else []
    if not training.auto_batch:
        ways.append("training.auto_batch=true, which does that by itself")
    return ways


def _evaluation_batch(recipe: Recipe) -> list[str]:
    texts = recipe.training.eval_batch_size
    return [f"training.eval_batch_size={max(texts // 4, 1)}"] if texts > 1 else []


def _training(recipe: Recipe, movable: bool, checkpointable: bool) -> list[str]:
    """Offer what makes a step of training smaller, whatever its batch."""
    ways = []
    if checkpointable and recipe.model.gradient_checkpointing is not True:
        ways.append("model.gradient_checkpointing=true")
    ways += _weights(recipe, movable)
    if recipe.adapter.layers == "all" and not recipe.masking.trainable_mask:
        ways.append("adapter.layers=0.5 (may cost score)")
    return ways


def _weights(recipe: Recipe, movable: bool) -> list[str]:
    """Offer what makes every forward pass smaller; the copy of the embedding that a trained mask row takes first."""
    row = ["masking.trainable_mask=false"] if recipe.masking.trainable_mask else []
    return [*row, *_quantization(recipe), *_placement(recipe, movable)]


def _quantization(recipe: Recipe) -> list[str]:
    return ["model.quantization=nf4 (on a GPU)"] if recipe.model.quantization in ("none", "int8") else []


def _placement(recipe: Recipe, movable: bool) -> list[str]:
    free = movable and recipe.model.embedding == "resident" and not recipe.masking.trainable_mask
    return ["model.embedding=offload (on a GPU)"] if free else []


T = TypeVar("T")


def with_smaller_batches(
    model: nn.Module,
    recipe: Recipe,
    attempt: Callable[[], T],
    retry: Callable[[int, int], T],
    alone: Callable[[str], RunError],
) -> T:
    """Train; where memory runs out, go on with a smaller micro-batch and the same optimizer step.

    The Trainer's own `auto_find_batch_size` makes the optimizer step smaller, too, and keeps half-trained weights.

    Args:
        model: its trained weights are set back before every retry.
        recipe: says what is tried first.
        attempt: trains as the recipe says.
        retry: trains with other texts per forward pass and forward passes per optimizer step.
        alone: makes the error for a single text that takes too much, from the allocator's words.

    Returns:
        What the attempt returned that had enough memory.

    Raises:
        RunError: memory runs out with a single text.
    """
    start = {name: value.detach().cpu().clone() for name, value in _trained(model)}
    training = recipe.training
    sizes = [(training.batch_size, training.gradient_accumulation)]
    while smaller := smaller_batch(*sizes[-1]):
        sizes.append(smaller)
    left, said = iter(sizes[1:]), ""

    def run(batch_size: int) -> T:
        nonlocal said
        try:
            return begin(batch_size)
        except (RuntimeError, MemoryError) as error:
            said = in_short(error)  # not the error itself, which would hold the tensors of the step
            if out_of_memory(error) and not should_reduce_batch_size(error):
                raise torch.OutOfMemoryError("CUDA out of memory.") from error  # in words that accelerate knows
            raise

    def begin(batch_size: int) -> T:
        if batch_size == training.batch_size:
            return attempt()
        with torch.no_grad():
            for name, value in _trained(model):
                value.grad = None
                value.copy_(start[name])
        return retry(batch_size, dict(sizes)[batch_size])

    def smaller_size() -> int:
        size = next(left, None)
        if size is None:
            raise alone(said)
        return size[0]

    found: T = find_executable_batch_size(run, sizes[0][0], reduce_batch_size_fn=smaller_size)()
    return found


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


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
    from tokmask_peft.model.packed import choose_batching

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
    from tokmask_peft.data.corpus import load_corpus
    from tokmask_peft.data.encoding import Encoder
    from tokmask_peft.model.backbone import load_tokenizer

    data, unread = recipe.data, list[tuple[int, ...]]()
    if _on_hub(data):
        return USUAL_CLASSES, None
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
