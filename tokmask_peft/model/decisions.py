"""Device, precision, quantization, checkpointing: chosen by properties, or by a trial, as builds of torch differ."""

import contextlib
import inspect
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import parse_flag_from_env
from accelerate.utils.memory import should_reduce_batch_size
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokmask_peft.console import Decision
from tokmask_peft.errors import ModelError, first_line
from tokmask_peft.recipe.schema import ModelConfig

CPUINFO = Path("/proc/cpuinfo")  # where Linux lists a CPU's features; macOS and Windows have no such file
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # what recipes call the precisions
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}
PRE_TURING = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
"""Wheels for CUDA 12.6 have kernels for compute capabilities 5.0 to 9.0; they end with torch 2.14 (pytorch#190385)."""


def failure(attempt: Callable[[], object]) -> str | None:
    """Try something that this device or this torch may not have; return the first line of why not, or None."""
    try:
        attempt()
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError, TypeError, ValueError) as error:
        return first_line(error)
    return None


def _product(device: torch.device, dtype: torch.dtype) -> float:
    return float(torch.ones(8, 8, device=device, dtype=dtype).mm(torch.ones(8, 8, device=device, dtype=dtype)).sum())


@cache
def kernels_problem(device: torch.device) -> str | None:
    """Try a product on a GPU; return why none runs there and what to install, or None."""
    said = failure(lambda: _product(device, torch.float32))
    if said is None or "out of memory" in said:  # the latter is reported where memory is asked for
        return None
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    version = ".".join(map(str, capability))
    if capability >= (7, 5):
        return f"nothing runs on {name} ({said}): update the NVIDIA driver, or reinstall torch"
    built = f"torch {torch.__version__} has no kernels for {name} (compute capability {version})"
    return f"{built}. A torch for CUDA 12.6 has: {PRE_TURING}"


@cache
def gpu_problem() -> str | None:
    """Return why this process cannot use this machine's NVIDIA GPU, and the remedy; None if it can, or need not."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if hidden or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return None
    if torch.cuda.is_available():
        return kernels_problem(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    command, found = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], ""
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
        found = run.stdout.partition("\n")[0].strip()
    if not found:
        return None
    if torch.version.cuda is None:
        remedy = f"{PRE_TURING} (RTX 50 series: cu128 instead of cu126)"
        return f"this torch ({torch.__version__}) was built without CUDA, and cannot use the {found}: {remedy}"
    wants = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no usable driver"
    return f"{wants} for the {found}: update the NVIDIA driver, or {PRE_TURING}"


@cache
def cpu_flags() -> frozenset[str] | None:
    """Return the feature flags of an x86 CPU as torch or Linux reports them, or None if neither does."""
    with contextlib.suppress(AttributeError, RuntimeError):
        found = torch.cpu.get_capabilities()
        if "avx512_bf16" in found:  # a torch that cannot inspect the CPU gives its name at most
            return frozenset(name for name, has in found.items() if has is True)
    cpuinfo = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""
    if flags := re.search(r"^flags.*?:(.*)", cpuinfo, re.MULTILINE):
        return frozenset(flags[1].split())
    # torch 2.6 has no `get_capabilities`, and does not know AMX, which never comes without AVX512
    with contextlib.suppress(AttributeError, RuntimeError):
        return frozenset({"avx512_bf16"} if torch.cpu._is_avx512_bf16_supported() else ())
    return None


def choose_precision(config: ModelConfig, device: torch.device) -> Decision:
    """Choose the precision of the frozen backbone and the matrix products; head, adapter and loss are in fp32.

    In fp16 the norms and what flows between the layers are in fp32, too (`backbone.hold_stream_in_fp32`), and the
    Trainer scales the loss: heads would lose their loss in fp16 (peft#1522, transformers#24731). A ModelError says that
    accelerate does not do so on this device.
    """
    machine, choice = platform.machine(), "fp32"
    if config.precision == "fp16" and device.type != "cuda":
        problem = f"model.precision is fp16, which is for NVIDIA GPUs; the device here is {device.type}"
        message = f"{problem}. Set model.precision=auto (--precision fp32 for a command that takes an adapter)."
        raise ModelError(message, code="no-fp16", device=device.type)
    if config.precision != "auto":
        choice, reason = config.precision, "set in the recipe"
    elif device.type == "cuda":
        choice, reason = _precision_of_gpu(device)
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


def _precision_of_gpu(device: torch.device) -> tuple[str, str]:
    """Return the fastest precision that a GPU has units for and that runs on it, and why it is that one."""
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    reasons = []
    for choice, first, lacks, computes in (
        ("bf16", (8, 0), "has no bf16", "computes in bf16"),
        ("fp16", (7, 0), "has no fast fp16", "computes in fp16, with norms in fp32 and scaled loss"),
    ):
        if capability < first and torch.version.hip is None:  # bf16 is emulated below, and fp16 slower than fp32
            reasons.append(f"{name} {lacks}")
        elif said := failure(partial(_product, device, DTYPES[choice])):
            reasons.append(f"{choice} does not run on {name} ({said})")
        else:
            return choice, "; ".join([*reasons, f"{'it' if reasons else name} {computes}"])
    return "fp32", "; ".join([*reasons, "fp32 takes twice the memory for weights that are not quantized"])


@cache
def rows_kernel() -> Callable[..., Any] | None:
    """Return torch's attention over packed rows, or None if this torch has none that takes a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters) else None


@cache
def rows_problem(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Return why flash attention over packed rows fails with heads of a `size` (it needs RTX 30 or later), or None."""
    if dtype == torch.float32:
        return "there is no kernel for packed rows in fp32"
    kernel = rows_kernel()
    if kernel is None:
        return f"torch {torch.__version__} has no attention over packed rows that takes a scale and a window"

    def attempt() -> None:
        row = torch.ones(8, 1, size, device=device, dtype=dtype, requires_grad=True)
        bounds = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
        kernel(row, row, row, bounds, bounds, 5, 5, scale=1.0, window_size=(-1, 0)).sum().backward()
        torch.cuda.synchronize(device)

    return _kernel_failure(attempt)


@cache
def flash_problem(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Try flash attention on groups of heads of a `size`, and its gradient; return why it fails, or None."""

    def attempt() -> None:
        query, key = (torch.ones(1, heads, 8, size, device=device, dtype=dtype, requires_grad=True) for heads in (2, 1))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True).sum().backward()
        torch.cuda.synchronize(device)

    return _kernel_failure(attempt)


def _kernel_failure(attempt: Callable[[], None]) -> str | None:
    """Return why a kernel fails, tried in a thread of its own, apart from the caller's autocast, modes and hooks."""
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(1) as thread:  # torch warns of each kernel
        return thread.submit(failure, attempt).result()


@cache
def bitsandbytes_problem(device_type: str) -> str | None:
    """Try one tiny 4-bit product; return why bitsandbytes cannot quantize on a device, or None if it can."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        return f"bitsandbytes cannot be imported ({error})"

    def attempt() -> None:
        with torch.random.fork_rng(devices=[]):  # otherwise the first run of a process would draw another head
            layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.to(device_type)(torch.ones(2, 64, device=device_type))

    said = failure(attempt)
    return said and f"bitsandbytes does not run on {device_type} ({said})"


def choose_quantization(config: ModelConfig, device: torch.device) -> Decision:
    """Choose the format of frozen linear layers: NF4 (Dettmers et al. 2023), 8-bit or none; ModelError if it fails."""
    wanted = config.quantization
    problem = None if wanted == "none" else bitsandbytes_problem(device.type)
    if wanted == "auto":
        reason = problem or f"bitsandbytes runs on this {device.type}"
        return Decision("quantization", "none" if problem else "nf4", reason)
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
    """Choose how to load the backbone of a trained adapter: as in training (`trained`), if possible, or as asked.

    `quantization` may be `nf4`, `int8` or `none`, `precision` `bf16`, `fp16` or `fp32`; ModelError for others.
    """
    if quantization not in (None, "nf4", "int8", "none") or precision not in (None, "auto", *DTYPES):
        expected = "expected nf4, int8 or none, and bf16, fp16 or fp32"
        message = f"quantization {quantization}, precision {precision}: {expected}"
        raise ModelError(message, code="unknown-format", quantization=quantization, precision=precision)
    reasons, deviations, embedding = {}, {}, trained.embedding
    if quantization is None:
        quantization, reasons["quantization"] = trained.quantization, "as in training"
        if quantization != "none" and (problem := bitsandbytes_problem(device.type)):
            quantization, deviations["quantization"] = "none", f"trained on {trained.quantization}, but {problem}"
    if precision is None and trained.precision == "fp16" and device.type != "cuda":
        precision, deviations["precision"] = "fp32", f"trained in fp16, which {device.type} does not compute in"
    if embedding == "offload" and device.type == "cpu":
        embedding = "resident"  # the memory of the host is that of the device: the same lookup
    elif embedding == "8bit" and (problem := bitsandbytes_problem(device.type)):
        embedding, deviations["embedding"] = "resident", f"trained on the 8-bit embedding, but {problem}"
    deviations = {what: f"{reason}: results differ slightly" for what, reason in deviations.items()}
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
