"""Precision, quantization, checkpointing and memory: what is chosen for this device, and why."""

from __future__ import annotations

import contextlib
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from tokmask_peft.console import Decision
from tokmask_peft.errors import ModelError, first_line
from tokmask_peft.recipe.schema import ModelConfig

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux lists a CPU's features; macOS and Windows have no such file."""


@cache
def cpu_flags() -> frozenset[str] | None:
    """Return the feature flags of an x86 CPU as torch or Linux reports them, or None if neither does."""
    with contextlib.suppress(AttributeError, RuntimeError):
        found = torch.cpu.get_capabilities()
        if "avx512_bf16" in found:  # a torch that cannot inspect the CPU gives its name at most
            return frozenset(name for name, has in found.items() if has is True)
    if CPUINFO.exists():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    # torch 2.6 has no `get_capabilities`; that it knows nothing of AMX does not matter: AMX never comes without AVX512
    with contextlib.suppress(AttributeError, RuntimeError):
        return frozenset({"avx512_bf16"} if torch.cpu._is_avx512_bf16_supported() else ())
    return None


def choose_precision(config: ModelConfig, device: torch.device) -> Decision:
    """Choose between bf16 and fp32 for the frozen backbone and the matrix products; head and loss are in fp32.

    fp16 is not offered: heads lose their loss in it (peft#1522, transformers#24731).
    """
    machine, choice = platform.machine(), "fp32"
    if config.precision != "auto":
        choice, reason = config.precision, "set in the recipe"
    elif device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        choice, reason = "fp32", f"{name} has no bf16"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            choice, reason = "bf16", f"{name} computes in bf16"
    elif device.type != "cpu":
        reason = f"bf16 has not been tested on {device.type}"
    elif machine.lower().startswith(("arm", "aarch")):
        reason = f"bf16 has not been measured on {machine} CPUs; set model.precision=bf16 to use it"
    elif (flags := cpu_flags()) is None:
        reason = f"neither torch nor {platform.system()} reports whether the CPU computes in bf16"
    elif found := sorted(flags & {"avx512_bf16", "amx_bf16"}):
        choice, reason = "bf16", f"the CPU has {', '.join(found)}"
    else:
        reason = "the CPU would emulate bf16 (it has neither avx512_bf16 nor amx_bf16)"
    return Decision("precision", choice, reason)


@cache
def bitsandbytes_problem(device_type: str) -> str | None:
    """Try one tiny 4-bit product; return why bitsandbytes cannot quantize on a device, or None if it can."""
    try:
        import bitsandbytes as bnb

        with torch.random.fork_rng(devices=[]):  # otherwise the first run of a process would draw another head
            layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.to(device_type)(torch.ones(2, 64, device=device_type))
    except ImportError as error:
        return f"bitsandbytes cannot be imported ({error})"
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError) as error:
        return f"bitsandbytes does not run on {device_type} ({first_line(error)})"
    return None


def choose_quantization(config: ModelConfig, device: torch.device) -> Decision:
    """Choose the format of the frozen linear layers: 4-bit NF4 (Dettmers et al. 2023), 8-bit, or not quantized.

    A ModelError says that bitsandbytes cannot do on this device what the recipe asks for.
    """
    wanted = config.quantization
    problem = None if wanted == "none" else bitsandbytes_problem(device.type)
    if wanted == "auto":
        return Decision(
            "quantization", "none" if problem else "nf4", problem or f"bitsandbytes runs on this {device.type}"
        )
    if problem is not None:
        message = f"model.quantization is {wanted}, but {problem}. Set model.quantization=none, or update bitsandbytes."
        raise ModelError(message, code="quantization-unavailable", quantization=wanted, device=device.type)
    return Decision("quantization", wanted, "set in the recipe")


@dataclass(frozen=True, slots=True)
class LoadingPlan:
    """How to load the backbone of a trained adapter on this device."""

    model: ModelConfig
    reasons: dict[str, str]  # of each setting that the user did not choose
    deviations: tuple[str, ...]  # the reasons for settings that differ from training, unasked


def plan_loading(
    trained: ModelConfig, device: torch.device, quantization: str | None = None, precision: str | None = None
) -> LoadingPlan:
    """Choose the settings to load the backbone of a trained adapter with; `trained` are those of training.

    These are the default for `quantization` (`nf4`, `int8` or `none`), if it runs on this device, and for `precision`
    (`bf16` or `fp32`). A ModelError says that there is no such quantization or precision.
    """
    if quantization not in (None, "nf4", "int8", "none") or precision not in (None, "auto", "bf16", "fp32"):
        message = f"quantization {quantization}, precision {precision}: expected nf4, int8 or none, and bf16 or fp32"
        raise ModelError(message, code="unknown-format", quantization=quantization, precision=precision)
    reasons, deviations = {}, {}
    if quantization is None:
        quantization, reasons["quantization"] = trained.quantization, "as in training"
        if quantization != "none" and (problem := bitsandbytes_problem(device.type)):
            quantization = "none"
            deviations["quantization"] = f"trained on {trained.quantization}, but {problem}: results differ slightly"
    embedding = trained.embedding
    if embedding == "offload" and device.type == "cpu":
        embedding = "resident"  # the memory of the host is that of the device: the same lookup
    elif embedding == "8bit" and (problem := bitsandbytes_problem(device.type)):
        embedding = "resident"
        deviations["embedding"] = f"trained on the 8-bit embedding, but {problem}: results differ slightly"
    here = {"quantization": quantization, "precision": precision or trained.precision, "embedding": embedding}
    return LoadingPlan(trained.model_copy(update=here), reasons | deviations, tuple(deviations.values()))


def check_checkpointing(model: Any, wanted: bool | str) -> None:
    """Raise a ModelError if `model.gradient_checkpointing` is true and the model (ALBERT, for one) cannot do it."""
    if wanted is True and not model.supports_gradient_checkpointing:
        problem = f"model.gradient_checkpointing is true, but {type(model).__name__} cannot do that: set it to false"
        raise ModelError(problem, code="no-checkpointing", model=type(model).__name__)


def enable_checkpointing(model: Any) -> None:
    """Compute the activations of each layer again in the backward pass instead of keeping them. May be repeated.

    transformers makes the embedding's output require gradients when it does this, so that the backward pass, and with
    it what is computed again, goes through layers below the first adapter for nothing. Only reentrant checkpointing
    needs that, which is not used here. The model may be wrapped by PEFT.
    """
    # transformers 5.17, the oldest supported version, has only the old name, which goes in transformers 6
    new = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.disable_input_require_grads()


def out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the host refused memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()  # accelerate knows the messages of the allocators, not those of CUDA's own calls
    raw = isinstance(error, RuntimeError) and ("out of memory" in said or "status_alloc_failed" in said)
    return raw or (isinstance(error, Exception) and should_reduce_batch_size(error))


def in_short(error: BaseException) -> str:
    """Return the first sentence of the allocator's message."""
    return first_line(error).split(". ")[0]
