"""Bytes of a run: what is on the device all the time, the shapes of its batches, and what a step of one adds.

The real model classes run a step on fake tensors, and the bytes are counted. Backbones with many layers are counted
with two and three of them, from which the rest follows, because layers are alike.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from tokmask_peft.data.batches import COUNTED_EPOCHS, MULTIPLE, TokenBudgetSampler, check_budget
from tokmask_peft.errors import RecipeError
from tokmask_peft.masking.embedding import find_embedding
from tokmask_peft.model.adapter import adapted_layers
from tokmask_peft.model.backbone import head_modules
from tokmask_peft.model.layers import check_placement
from tokmask_peft.model.memory.step import Setting, Shape, bare_model, count_step
from tokmask_peft.recipe.schema import Batching, Recipe

MARGIN = {"cpu": 0.05, "cuda": 0.15}  # share by which a real step may differ; not yet measured on a GPU (tests/gpu)
USABLE = 0.95  # share of the memory that is counted on; the rest is what the allocator cannot hand out in one piece
CGROUP = Path("/sys/fs/cgroup")  # where a container finds its limits (cgroup v2)
MIB = 2**20
OVERHEAD = {"cpu": 700 * MIB, "cuda": 600 * MIB}  # bytes outside of tensors: Python with its libraries; a CUDA context
CUBLAS = {9: 32 * MIB, 10: 32 * MIB}  # workspace of a cuBLAS handle, by GPU (Hopper, data centre Blackwell)
CUBLAS_USUAL = 4096 * 2048 + 8 * 16384
THREADS = 2  # threads that have a handle: of the forward and of the backward pass
PROBES = (2, 3)  # numbers of layers that are counted if there are more
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # of a weight: code, shares of a scale and of a scale of scales
NEARLY = 0.9  # batches with this share of the most sub-tokens count as equally large


def shown(count: int) -> str:
    """Return bytes for a reader."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / MIB:.0f} MiB"


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory that a run may take: bytes, and what to call it."""

    bytes: int
    name: str

    def fits(self, total: int) -> bool:
        """Return whether this many bytes fit."""
        return total <= USABLE * self.bytes

    def __str__(self) -> str:
        return f"{self.name} has {shown(self.bytes)} free"


def gpu_memory(size: str) -> Memory:
    """Return the memory of a GPU of a size such as 6GB, in units of 2**30 bytes; a RecipeError if it cannot be read."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:Gi?B?)?", size.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        problem = f"--gpu: is {size!r}; expected a size such as 6GB"
        raise RecipeError([problem], source="estimate", code="gpu-size", size=size)
    return Memory(int(float(found[1]) * 2**30), f"a GPU of {found[1]} GiB")


def device_memory(device: torch.device) -> Memory | None:
    """Return the memory of a device that this process can have, including what it already has; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        context = OVERHEAD["cuda"] if torch.cuda.is_initialized() else 0  # exists already, and is part of an estimate
        return Memory(free + torch.cuda.memory_reserved(device) + context, torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return None
    import psutil

    available = min([psutil.virtual_memory().available, *_rest_of_container()])
    resident: int = psutil.Process().memory_info().rss
    return Memory(available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + resident, "this machine")


def _rest_of_container() -> list[int]:
    """Return what a container may still take, if it has a limit; page cache that the kernel can drop counts as free."""
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return []
    stat = CGROUP / "memory.stat"
    inactive = re.search(r"^inactive_file (\d+)", stat.read_text() if stat.exists() else "", re.MULTILINE)
    return [limit - max(used - int(inactive[1] if inactive else 0), 0)]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sub-tokens of each text to train on, and of each split that the run evaluates: validation and test."""

    train: Sequence[int]
    evaluated: tuple[Sequence[int], ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Shapes of micro-batches."""

    largest: Shape  # in training; with texts of max_length if they are unknown, or what fills a budget of sub-tokens
    usual: Shape | None  # in training; None if the texts are unknown
    evaluation: Shape  # that no batch of an evaluation exceeds: its texts come by length, the longest together
    known: bool  # whether the shapes come from the texts


def workload(recipe: Recipe, batching: str, lengths: Lengths | None) -> Workload:
    """Return the shapes of a run's batches, `batching` being decided; a RecipeError if a text exceeds the budget."""
    found, views = _workload(recipe, batching, lengths), recipe.training.views
    usual = found.usual and replace(found.usual, lengths=found.usual.lengths * views)
    return replace(found, largest=replace(found.largest, lengths=found.largest.lengths * views), usual=usual)


def _workload(recipe: Recipe, batching: str, lengths: Lengths | None) -> Workload:
    """Return the shapes of batches that hold each text once."""
    training, most, packed = recipe.training, recipe.data.max_length, batching == "padding_free"
    texts, longest = training.eval_batch_size, most
    if lengths is not None:
        texts = min(texts, max(map(len, lengths.evaluated)))
        longest = min(longest, max(max(split) for split in lengths.evaluated if split))
    evaluation = Shape.padded(texts, _rounded(longest))
    if training.tokens_per_batch is not None:
        budget = training.tokens_per_batch // training.views
        largest = _largest_of_budget(recipe, budget, cast("Batching", batching), lengths)
        return Workload(largest, None, evaluation, lengths is not None)
    if lengths is None:
        return Workload(Shape((most,) * training.micro_batch, packed), None, evaluation, False)
    cut = [min(length, most) for length in lengths.train]
    texts, draw = min(training.micro_batch, len(cut)), np.random.default_rng(recipe.seed)
    batches: list[tuple[int, ...]] = []
    while len(batches) <= 5000 and len(batches) < 20 * (len(cut) // texts):  # of 20 epochs at most; full ones only
        order = sorted(cut) if batching == "grouped" else draw.permutation(cut).tolist()
        batches += [tuple(order[at : at + texts]) for at in range(0, len(order) - texts + 1, texts)]
    batches.sort(key=sum if packed else max)
    usual = batches[len(batches) // 2]
    if packed:
        return Workload(Shape(batches[-1], True), Shape(usual, True), evaluation, True)
    largest, usual_shape = (Shape.padded(texts, _rounded(max(found))) for found in (cut, usual))
    return Workload(largest, usual_shape, evaluation, True)


def _largest_of_budget(recipe: Recipe, budget: int, batching: Batching, lengths: Lengths | None) -> Shape:
    most = recipe.data.max_length
    if batching == "padding_free":
        widest: Sequence[int] = ()
        if lengths is not None:
            texts = [min(length, most) for length in lengths.train]
            sampler = TokenBudgetSampler(texts, budget, batching, recipe.seed)
            drawn = [
                [texts[at] for at in batch] for epoch in range(COUNTED_EPOCHS) for batch in sampler.all_batches(epoch)
            ]
            # In attention with dropout a GPU pads them to the longest: most for a long text among many short ones.
            widest = max(drawn, key=lambda batch: (len(batch) * max(batch), sum(batch)))
            budget, most = min(budget, sum(texts)), max(texts)
        missing = budget - sum(widest)  # of a batch that takes the whole budget
        return Shape((*widest, *(min(most, missing - start) for start in range(0, missing, most))), packed=True)
    up_to = dict.fromkeys(range(MULTIPLE, _rounded(most) + 1, MULTIPLE), budget)  # the texts of a length or less
    if lengths is not None:
        texts = sorted(min(length, most) for length in lengths.train)
        check_budget(texts[-1], budget, batching)
        up_to = {_rounded(length): number for number, length in enumerate(texts, 1)}
    shapes = [
        Shape.padded(min(budget // length, number), length) for length, number in up_to.items() if length <= budget
    ]
    most = max(shape.tokens for shape in shapes)
    # of batches of nearly as many sub-tokens the one with the longest texts: its attention takes more
    return max((shape for shape in shapes if shape.tokens >= NEARLY * most), key=lambda shape: shape.lengths[0])


def _rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


PARTS = {
    "weights": "frozen backbone",
    "embedding": "its input embedding",
    "adapter": "adapter and head, fp32",
    "optimizer": "states of AdamW, fp32",
    "activations": "kept for the backward pass",
    "workspace": "gradients and intermediate results on top of that",
    "evaluation": "an evaluation takes more than a step",
    "cublas": "workspaces of cuBLAS for matrix products",
    "overhead": "outside of tensors: CUDA context, or Python and libraries on a CPU",
}
"""What an `Estimate` consists of, for a reader."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a run takes on its device at its peak: `PARTS`, and the embedding on the host of a GPU."""

    weights: int
    embedding: int
    adapter: int
    optimizer: int
    activations: int
    workspace: int
    evaluation: int
    overhead: int
    cublas: int = 0
    host: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """The parts that are taken at once: those of a step, or of an evaluation if that takes more."""
        evaluates = self.evaluation > self.activations + self.workspace
        others = ("activations", "workspace") if evaluates else ("evaluation",)
        return {part: getattr(self, part) for part in PARTS if part not in others}

    @property
    def total(self) -> int:
        """The most that is taken at once."""
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """The most that tensors take at once: what `torch.cuda.max_memory_allocated` returns."""
        return self.total - self.overhead

    def to_dict(self) -> dict[str, int]:
        """Return a JSON-able form, in bytes."""
        return {**asdict(self), "tensors": self.tensors, "total": self.total}


def estimate(recipe: Recipe, setting: Setting, training: Shape, evaluation: Shape) -> Estimate:
    """Count a run with micro-batches of these shapes (checkpointing `auto` is off); ModelError if it does not fit."""
    full: Any = bare_model(setting.config, recipe.data.task, setting.dtype)
    check_placement(full, recipe.model.embedding)
    layers = int(full.config.num_hidden_layers)
    upper = adapted_layers(full, recipe.adapter.layers)
    adapted = layers if upper is None else len(upper)

    def counted(trained_row: bool) -> list[int]:
        probes = (adapted,) if adapted <= PROBES[-1] + 1 else PROBES
        below = adapted < layers
        low, *more = (count_step(recipe, setting, probe, below, trained_row, training, evaluation) for probe in probes)
        if not more:
            return list(low)
        few, step = PROBES[0], PROBES[1] - PROBES[0]  # on the line through the counted ones
        return [a + (b - a) * (adapted - few) // step for a, b in zip(low, more[0], strict=True)]

    trained, forward, kept, peak = counted(True)
    if recipe.masking.trainable_mask:
        # the copy of the embedding comes and goes where the layers keep little: the peak is that of one or the other,
        # and with few layers only one may be seen
        peak = max(peak, counted(False)[-1])
    if recipe.training.gradient_accumulation > 1:
        peak += trained  # gradients of the micro-batches before
    embedding: Any = find_embedding(full)
    rows = _int8_bytes(embedding.weight) if recipe.model.embedding == "8bit" else embedding.weight.nbytes
    offload = recipe.model.embedding == "offload" and setting.device_type != "cpu"
    heads, weights = head_modules(full), 0
    for name, module in full.named_modules():
        head = name.split(".")[0] in heads
        for key, weight in module.named_parameters(recurse=False):
            if weight is embedding.weight:  # or a lookup that is tied to it, in T5 and BART
                continue
            if type(module) is nn.Linear and key == "weight" and not head and setting.quantization != "none":
                nf4 = setting.quantization == "nf4"
                weights += int(NF4_BYTES * weight.numel()) if nf4 else _int8_bytes(weight)
            else:
                weights += 4 * weight.numel() if head else weight.nbytes
        weights += sum(buffer.nbytes for buffer in module.buffers(recurse=False))
    return Estimate(
        weights=weights,
        embedding=0 if offload else rows,
        adapter=trained,
        optimizer=2 * trained,
        activations=kept,
        workspace=max(peak - kept, 0),
        evaluation=forward,
        cublas=_cublas_workspaces(setting.device_type),
        overhead=OVERHEAD.get(setting.device_type, OVERHEAD["cuda"]),
        host=rows if offload else 0,
    )


def _cublas_workspaces(device_type: str) -> int:
    if device_type == "cpu":
        return 0
    generation = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    return THREADS * CUBLAS.get(generation, CUBLAS_USUAL)


def _int8_bytes(weight: torch.Tensor) -> int:
    return weight.numel() + 4 * weight.shape[0]  # a scale for each row
