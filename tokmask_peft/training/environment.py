"""What a run runs on, processes, versions and hardware, and what it takes of them: peak memory, sub-tokens a step."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

import tokmask_peft
from tokmask_peft.errors import RunError
from tokmask_peft.model.decisions import gpu_problem
from tokmask_peft.recipe.schema import TrainingConfig

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "scikit-learn")


def processes() -> PartialState:
    """Join the processes that torchrun or `accelerate launch` started, and choose each one's device.

    On CPUs accelerate joins them only if asked to compute there; otherwise each would be a run, all in one folder.
    RunError if nothing runs on the GPU of one of several processes; a single one takes the CPU.
    """
    unusable = gpu_problem() if torch.cuda.is_available() else None
    if unusable and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(f"{unusable}. Or use the CPUs: ACCELERATE_USE_CPU=1", code="gpu-unusable")
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu or unusable is not None)


def check_sharding() -> None:
    """Refuse, with a RunError, DeepSpeed and FSDP 1, after which the adapter could not be saved whole."""
    chosen = "DeepSpeed" if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else None
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") == "1":
        chosen = "FSDP 1"
    if chosen is not None:
        problem = f"{chosen} was chosen, and the adapter could not be saved whole: use the second version of FSDP"
        remedy = "(fsdp_version: 2, as in recipes/_accelerate/fsdp_qlora.yaml), or torchrun without sharding"
        raise RunError(f"{problem} {remedy}", code="sharding", chosen=chosen)


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the libraries that decide a result."""
    found = {"tokmask-peft": tokmask_peft.__version__, "python": platform.python_version()}
    found |= dict.fromkeys(PACKAGES, "not installed")
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware, JSON-able."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def peak_memory(device: torch.device, loading: int | None = None) -> dict[str, Any]:
    """Return the peak memory so far in bytes: of the GPU's allocator, or the resident set of this process.

    Given that of `loading`, the peak since then is added: on a GPU always (it was reset), on a CPU if it is higher.
    """
    if device.type == "cuda":
        peak, of = torch.cuda.max_memory_allocated(device), "GPU, allocated"
    elif sys.platform == "win32":
        return {"bytes": None, "of": "not measured on Windows"}
    else:
        import resource

        peak, of = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process, resident"
        peak *= 1 if sys.platform == "darwin" else 1024
    if loading is None:
        return {"bytes": peak, "of": of}
    training = peak if device.type == "cuda" or peak > loading else None
    return {"bytes": max(peak, loading), "of": of, "loading": loading, "training": training}


def tokens_per_step(training: TrainingConfig, lengths: Sequence[int], batches: int | None, processes: int) -> float:
    """Return the sub-tokens of an optimizer step on average, of all processes, without padding.

    `batches` counts one process's batches in an epoch, if a budget of sub-tokens makes them.
    """
    passes = batches or -(-len(lengths) // (training.micro_batch * processes))
    return training.views * sum(lengths) / -(-passes // training.gradient_accumulation)
