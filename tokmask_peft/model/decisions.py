"""Gradient checkpointing that starts where the adapter does."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from tokmask_peft.console import Decision
from tokmask_peft.errors import ModelError, first_line
from tokmask_peft.recipe.schema import ModelConfig

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux tells a CPU's features; macOS and Windows have no such file."""

_BF16 = frozenset({"avx512_bf16", "amx_bf16"})


@cache
def cpu_flags() -> frozenset[str] | None:
    """Return the feature flags of an x86 CPU that torch or Linux knows of, or None where neither tells."""
    return _told_by_torch() or _told_by_linux() or _told_by_old_torch()


def _told_by_torch() -> frozenset[str] | None:
    told = _ask_torch("get_capabilities")
    if told is None or "avx512_bf16" not in told:  # a build of torch that cannot look names the architecture at most
        return None
    return frozenset(name for name, has in told.items() if has is True)


def _told_by_linux() -> frozenset[str] | None:
    if not CPUINFO.exists():
        return None
    for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return None


def _told_by_old_torch() -> frozenset[str] | None:
    """Ask what torch 2.6 has, before `get_capabilities`: it knows nothing of AMX's bf16, which no CPU has alone."""
    has = _ask_torch("_is_avx512_bf16_supported")
    return None if has is None else frozenset({"avx512_bf16"} if has else ())


def _ask_torch(name: str) -> Any:
    """Call a function of `torch.cpu` that older versions do not have; None where it cannot answer."""
    try:
        return getattr(torch.cpu, name)()
    except (AttributeError, RuntimeError):
        return None


def _cpu_precision() -> Decision:
    machine = platform.machine()
    if machine.lower().startswith(("arm", "aarch")):
        reason = f"bf16 was not measured on {machine} CPUs; model.precision=bf16 takes it"
        return Decision("precision", "fp32", reason)
    flags = cpu_flags()
    if flags is None:
        reason = f"neither torch nor {platform.system()} tells whether the CPU computes in bf16"
        return Decision("precision", "fp32", reason)
    if found := sorted(flags & _BF16):
        return Decision("precision", "bf16", f"the CPU has {', '.join(found)}")
    return Decision("precision", "fp32", "the CPU would emulate bf16 (neither avx512_bf16 nor amx_bf16)")


def choose_precision(config: ModelConfig, device: torch.device) -> Decision:
    """Choose between bf16 and fp32 for the frozen backbone and the matrix products.

    The head and the loss are computed in fp32 either way. fp16 is not offered: heads lose their loss in it
    (peft#1522, transformers#24731).
    """
    if config.precision != "auto":
        return Decision("precision", config.precision, "set in the recipe")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Decision("precision", "bf16", f"{torch.cuda.get_device_name(device)} computes in bf16")
        return Decision("precision", "fp32", f"{torch.cuda.get_device_name(device)} has no bf16")
    if device.type == "cpu":
        return _cpu_precision()
    return Decision("precision", "fp32", f"bf16 is not tested on {device.type}")


@cache
def bitsandbytes_problem(device_type: str) -> str | None:
    """Return why bitsandbytes cannot quantize on a device, or None if it can: one tiny 4-bit product is tried."""
    try:
        import bitsandbytes as bnb

        with torch.random.fork_rng(devices=[]):  # else the first run of a process has another head
            layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.to(device_type)(torch.ones(2, 64, device=device_type))
    except ImportError as error:
        return f"bitsandbytes cannot be imported ({error})"
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError) as error:
        return f"bitsandbytes does not run on {device_type} ({first_line(error)})"
    return None


def choose_quantization(config: ModelConfig, device: torch.device) -> Decision:
    """Choose how the frozen linear layers are held: 4-bit NF4 (Dettmers et al. 2023), 8-bit, or not quantized.

    Raises:
        ModelError: the recipe asks for a quantization that bitsandbytes cannot do on this device.
    """
    if config.quantization == "none":
        return Decision("quantization", "none", "set in the recipe")
    problem = bitsandbytes_problem(device.type)
    if config.quantization == "auto":
        if problem is None:
            return Decision("quantization", "nf4", f"bitsandbytes runs on this {device.type}")
        return Decision("quantization", "none", problem)
    if problem is not None:
        raise ModelError(
            f"model.quantization is {config.quantization}, but {problem}. "
            "Set model.quantization=none, or install a bitsandbytes that serves this device."
        )
    return Decision("quantization", config.quantization, "set in the recipe")


def can_checkpoint(model: Any) -> bool:
    """Return whether the class of a model of transformers, bare or wrapped by PEFT, can checkpoint its layers.

    ALBERT, MPNet, SqueezeBERT, Funnel and XLM cannot.
    """
    return bool(model.supports_gradient_checkpointing)


def check_checkpointing(model: Any, wanted: bool | str) -> None:
    """Refuse `model.gradient_checkpointing: true` for a model that cannot do it.

    Raises:
        ModelError: it cannot.
    """
    if wanted is True and not can_checkpoint(model):
        what = type(model).__name__
        problem = f"model.gradient_checkpointing is true, but {what} cannot do that: set it to false"
        raise ModelError(problem, code="no-checkpointing", model=what)


def enable_checkpointing(model: Any) -> None:
    """Compute the activations of each layer again in the backward pass instead of keeping them. May be repeated.

    transformers makes the embedding's output require gradients when it does this, so that the backward pass, and with
    it what is computed again, goes through layers below the first adapter for nothing. Only reentrant checkpointing
    needs that, which is not used here.

    Args:
        model: of transformers, bare or wrapped by PEFT.
    """
    # transformers 5.17, the oldest supported version, has only the old name, which goes in transformers 6
    new = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


def out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the host refused memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # accelerate knows the messages of the allocators, not those of CUDA's own calls
    said = str(error).lower()
    raw = isinstance(error, RuntimeError) and ("out of memory" in said or "status_alloc_failed" in said)
    return raw or (isinstance(error, Exception) and should_reduce_batch_size(error))


def in_short(error: BaseException) -> str:
    """Return the first sentence of the allocator's message."""
    return first_line(error).split(". ")[0]
