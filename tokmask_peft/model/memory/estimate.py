"""Bytes of a run: what lies on the device all the time, and what a step adds to it.

A step is not guessed at: the real model classes run one on fake tensors, and the bytes are counted. Backbones with many
layers are counted with two and three of them, from which the rest follows, since layers are alike.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokmask_peft.errors import RecipeError
from tokmask_peft.masking.embedding import find_embedding
from tokmask_peft.model.adapter import adapted_layers
from tokmask_peft.model.backbone import head_modules
from tokmask_peft.model.decisions import enable_checkpointing
from tokmask_peft.model.memory.step import (
    Shape,
    bare_model,
    checkpointing_options,
    count_forward,
    count_step,
    skeleton,
    with_layers,
)
from tokmask_peft.model.placement import check_placement
from tokmask_peft.recipe.schema import Recipe

USABLE = 0.95
"""Share of the memory that is counted on: what the allocator cannot hand out in one piece is left over."""

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its limits (cgroup v2)."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that a run may take.

    Attributes:
        bytes: in all.
        name: what to call it.
    """

    bytes: int
    name: str

    def fits(self, total: int) -> bool:
        """Say whether so many bytes fit."""
        return total <= USABLE * self.bytes


def gpu_room(size: str) -> Room:
    """Return the memory of a GPU named by its size, as 6GB; a GB of a GPU is 2**30 bytes.

    Raises:
        RecipeError: this is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:Gi?B?)?", size.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise RecipeError([f"--gpu: is {size!r}; expected a size such as 6GB"], source="estimate")
    return Room(int(float(found[1]) * 2**30), f"a GPU of {found[1]} GiB")


def device_room(device: torch.device) -> Room | None:
    """Return the memory of a device that this process can have in all, what it already holds included.

    Returns:
        None where nobody tells.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        context = 600 * 2**20 if torch.cuda.is_initialized() else 0  # made already, and part of an estimate
        return Room(free + torch.cuda.memory_reserved(device) + context, torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return None
    import psutil

    available = min([psutil.virtual_memory().available, *_cgroup_rest()])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mine: int = psutil.Process().memory_info().rss
    return Room(available // processes + mine, "this machine's free memory")


def _cgroup_rest() -> list[int]:
    """Return what a container may still take, where it has a limit: all but its working set.

    `memory.current` holds the page cache, too, of which the kernel drops the inactive part before it refuses memory.
    """
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return []
    return [limit - max(used - _inactive_file(), 0)]


def _inactive_file() -> int:
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split(" ", 1) for line in lines)
    return int(found.get("inactive_file", 0))


def shown(count: int) -> str:
    """Return bytes for a reader."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


MIB = 2**20
OVERHEAD = {"cpu": 700 * MIB, "cuda": 600 * MIB}
"""Bytes that no tensor holds: Python with its libraries; a CUDA context with the workspaces of its libraries."""

PROBES = (2, 3)
"""Layers that are counted where there are more."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a run takes on its device at its peak.

    Attributes:
        weights: the frozen backbone, without the embedding.
        embedding: the input embedding, where it lies on the device.
        adapter: what is trained, in fp32.
        optimizer: the two states of AdamW, in fp32.
        activations: kept between forward and backward of a micro-batch.
        workspace: what comes on top of them at the peak of a step: gradients and results on their way.
        evaluation: the peak of a forward in evaluation, which takes the place of the two above where it is larger.
        overhead: what no tensor holds.
        host: of the embedding, where it lies in the memory of the host of a GPU.
    """

    weights: int
    embedding: int
    adapter: int
    optimizer: int
    activations: int
    workspace: int
    evaluation: int
    overhead: int
    host: int = 0

    @property
    def step(self) -> int:
        """The most that comes and goes."""
        return max(self.activations + self.workspace, self.evaluation)

    @property
    def tensors(self) -> int:
        """The most that tensors take at once: what `torch.cuda.max_memory_allocated` tells."""
        return self.weights + self.embedding + self.adapter + self.optimizer + self.step

    @property
    def total(self) -> int:
        """The most that is taken at once."""
        return self.tensors + self.overhead

    def to_dict(self) -> dict[str, int]:
        """Return a JSON-able form, in bytes."""
        return {**asdict(self), "tensors": self.tensors, "total": self.total}


@dataclass(frozen=True, slots=True)
class Setting:
    """What an estimate depends on besides the recipe.

    Attributes:
        config: of the backbone, of transformers, with its number of labels.
        device_type: cpu or cuda.
        quantization: nf4, int8 or none, as decided.
        dtype: of the backbone, as decided.
        assumed: what a reader should know of a device that is not here.
    """

    config: Any
    device_type: str
    quantization: str
    dtype: torch.dtype
    assumed: str | None = None


def estimate(recipe: Recipe, setting: Setting, training: Shape, evaluation: Shape) -> Estimate:
    """Count a run.

    Args:
        recipe: with gradient checkpointing decided: `auto` counts as off.
        setting: backbone and device.
        training: shape of a micro-batch.
        evaluation: shape of a batch in evaluation.

    Raises:
        ModelError: the recipe does not fit the backbone.
    """
    full = bare_model(setting.config, recipe.data.task, setting.dtype)
    check_placement(full, recipe.model.embedding)
    layers = int(full.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    upper = adapted_layers(full, recipe.adapter.layers)
    adapted = layers if upper is None else len(upper)

    def counted(trained_row: bool) -> tuple[int, ...]:
        shapes = training, evaluation
        found = {n: _probe(recipe, setting, n, adapted < layers, *shapes, trained_row) for n in _counts(adapted)}
        return tuple(_extend({n: found[n][i] for n in found}, adapted) for i in range(4))

    trained, saved, peak, forward = counted(True)
    if recipe.masking.trainable_mask:
        # the copy of the embedding comes and goes where the layers hold little: the peak is that of the one or the
        # other, and with few layers only the one may be seen
        peak = max(peak, counted(False)[2])
    if recipe.training.gradient_accumulation > 1:
        peak += trained  # gradients of the micro-batches before
    device, host = _embedding_bytes(full, recipe, setting.device_type)
    return Estimate(
        weights=_weight_bytes(full, setting),
        embedding=device,
        adapter=trained,
        optimizer=2 * trained,
        activations=saved,
        workspace=max(peak - saved, 0),
        evaluation=forward,
        overhead=OVERHEAD["cpu" if setting.device_type == "cpu" else "cuda"],
        host=host,
    )


def _counts(adapted: int) -> tuple[int, ...]:
    return (adapted,) if adapted <= PROBES[-1] + 1 else PROBES


def _extend(at: dict[int, int], layers: int) -> int:
    """Return the value for so many layers, on the line through the counted ones."""
    if layers in at:
        return at[layers]
    (few, low), (more, high) = at.items()
    return low + (high - low) * (layers - few) // (more - few)


def _probe(
    recipe: Recipe,
    setting: Setting,
    adapted: int,
    more_below: bool,
    training: Shape,
    evaluation: Shape,
    trained_row: bool,
) -> tuple[int, int, int, int]:
    """Count bytes trained, saved, at the peak of a step, and at that of an evaluation, with few layers."""
    config = with_layers(setting.config, adapted + more_below)
    upper = adapted if more_below else None
    model, mode = skeleton(config, recipe, setting.quantization, setting.dtype, upper, trained_row)
    if recipe.model.gradient_checkpointing is True:
        enable_checkpointing(model, checkpointing_options(setting.device_type))
    trained = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rest = recipe.data.task, setting.device_type, setting.dtype == torch.bfloat16
    forward = count_forward(model, mode, evaluation, *rest)
    step = count_step(model, mode, training, *rest)
    return trained, step.saved, step.peak, forward


def _weight_bytes(model: nn.Module, setting: Setting) -> int:
    heads = tuple(head_modules(model))
    embedding = find_embedding(model)
    total = 0
    for name, module in model.named_modules():
        if module is embedding:
            continue
        inside_head = name.split(".")[0] in heads
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if type(module) is nn.Linear and key == "weight" and not inside_head and setting.quantization != "none":
                total += _quantized_bytes(setting.quantization, *parameter.shape)
            else:
                total += parameter.numel() * (4 if inside_head else parameter.element_size())
        total += sum(
            buffer.numel() * buffer.element_size() for buffer in module._buffers.values() if buffer is not None
        )
    return total


def _quantized_bytes(kind: str, out_features: int, in_features: int) -> int:
    from tokmask_peft.model.memory.step import int8_bytes, nf4_bytes

    return nf4_bytes(out_features * in_features) if kind == "nf4" else int8_bytes(out_features, in_features)


def _embedding_bytes(model: nn.Module, recipe: Recipe, device_type: str) -> tuple[int, int]:
    """Return the bytes of the input embedding on the device, and on a host that is another than the device."""
    weight: Any = find_embedding(model).weight
    whole = weight.numel() * weight.element_size()
    if recipe.model.embedding == "offload" and device_type != "cpu":
        return 0, whole
    if recipe.model.embedding == "8bit":
        return weight.numel() + 4 * weight.shape[0], 0
    return whole, 0
