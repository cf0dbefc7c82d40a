"""What the parts of the GPU measurement share: their records, the card's memory and clock, and watched trainings."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS
from workload import matrix_rate

from tokmask_peft.artifacts import open_run
from tokmask_peft.errors import RunError

DRY = os.environ.get("DRY") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
ON_GPU = DEVICE.type == "cuda"
OUT = Path(os.environ.get("OUT", "gpu-out")).resolve()
WORK = Path(os.environ.get("GPU_WORK", tempfile.gettempdir()))
REPO = Path(os.environ.get("REPO", ".")).resolve()
ONLY = os.environ.get("ONLY", "")
"""A regular expression: of the trainings of a part, run those whose names match."""
BACKBONES = {
    "qwen": ("Qwen2.5-0.5B", "qwen2.5-0.5b"),
    "tinyllama": ("TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
    "mbert": ("bert-base-multilingual-cased", "mbert"),
}
"""Of each shape the folder below TOKMASK_TOKENIZERS and the recipe of the backbone."""


class Record:
    """The results of a part, in a file that is rewritten after every step."""

    def __init__(self, part: str) -> None:
        self.path, self.found = OUT / f"{part}.json", {}

    def put(self, key: str, value: object) -> None:
        """Keep a result."""
        self.found[key] = value
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.found, indent=1, default=str))
        partial.replace(self.path)
        print(f"{key}: {json.dumps(value, default=str)[:600]}", flush=True)

    def attempt(self, key: str, work: Callable[[], object]) -> None:
        """Keep what `work` returns, or its error; never stop."""
        try:
            self.put(key, work())
        except BaseException as error:
            lines = traceback.format_exc().strip().splitlines()
            self.put(key, {"error": f"{type(error).__name__}: {error}"[:1500], "where": lines[-8:]})
            if isinstance(error, KeyboardInterrupt):
                raise


def fresh_peak() -> None:
    """Forget the peak so far."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, int]:
    """Return the most bytes allocated and reserved since `fresh_peak`; zeros on a CPU."""
    if not ON_GPU:
        return {"allocated": 0, "reserved": 0}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def allocated() -> int:
    """Return the bytes of tensors on the card once garbage is collected; 0 on a CPU."""
    gc.collect()
    if not ON_GPU:
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def clock() -> float:
    """Return seconds, once the card has done all it was given."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def smi() -> int | None:
    """Return the MiB in use on the card by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()[0])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


def bf16_rate() -> float:
    """Return the FLOPs a second of a large bf16 product."""
    size = 8192 if ON_GPU else 256
    return matrix_rate(torch.bfloat16, size, size, size, products=20 if ON_GPU else 2, device=DEVICE, clock=clock)


def recipe_of(name: str, task: str) -> list[str]:
    """Return the recipe of a backbone and its texts: real tweets if TOKMASK_DATA is set, otherwise built-in posts."""
    data = {"builtin": "true"}
    if folder := os.environ.get("TOKMASK_DATA"):
        data = {"path": f"{folder}/mesent_mar_eng_sentiment", "validation": "0.03"}
        if task == "token":
            data = {"path": f"{folder}/lince_lid_spaeng", "validation": "0.01", "test": "validation"}
            data["label_map"] = '{lang1: lang1, lang2: lang2, "*": other}'
    data |= {"task": task, "max_length": "128"}
    file = REPO / "recipes" / "_backbones" / f"{BACKBONES[name][1]}.yaml"
    return [str(file), f"name={name}-{task}", *(f"data.{key}={value}" for key, value in data.items())]


def small(config: Any) -> Any:
    """Return a config, in a dry run with few and narrow layers but the whole vocabulary."""
    if not DRY:
        return config
    found = {**config.to_dict(), "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    found["num_attention_heads"] = 4
    if found.get("num_key_value_heads"):
        found |= {"num_key_value_heads": 2, "head_dim": 16}
    if found.get("layer_types"):
        found["layer_types"] = found["layer_types"][:2]
    return type(config)(**found)


def backbone_folder(name: str) -> Path:
    """Return the checkpoint that the part `prepare` makes."""
    return WORK / "backbones" / name


def command_line(arguments: list[str]) -> tuple[int, float]:
    """Run the package's command line in this process; return its exit code and the seconds."""
    from tokmask_peft.cli import main

    start, code = time.time(), 0
    print("$ tokmask", *arguments, flush=True)
    with mock.patch.object(sys, "argv", ["tokmask", *arguments]):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, round(time.time() - start, 1)


class Watch(TrainerCallback):
    """Observes trainings: memory by phase, the largest shapes, and the real sub-tokens and times of micro-batches."""

    def __init__(self) -> None:
        self._handle: Any = None
        self.clear()

    def clear(self) -> None:
        """Forget everything before a further training."""
        self.phases: dict[str, dict[str, int]] = {}
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.largest: dict[str, Any] = {"lengths": [], "packed": False}
        self.evaluated, self._phase = [0, 0], "loading"
        fresh_peak()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at what goes into the model from here on."""
        self.next_phase("training")
        if self._handle is not None:  # of an attempt that ran out of memory
            self._handle.remove()
        self._handle = given["model"].register_forward_pre_hook(self._see, with_kwargs=True)

    def next_phase(self, name: str) -> None:
        """Note the peak of the phase that ends."""
        if name != self._phase:
            before = self.phases.get(self._phase, {})
            self.phases[self._phase] = {key: max(value, before.get(key, 0)) for key, value in peak().items()}
            self._phase = name
            fresh_peak()

    def _see(self, model: Any, _: Any, inputs: dict[str, Any]) -> None:
        ids, mask, starts = (inputs.get(name) for name in ("input_ids", "attention_mask", "cu_seqlens"))
        self.next_phase("training" if model.training else "evaluation")
        if not model.training:
            self.evaluated = max(self.evaluated, list(ids.shape), key=math.prod)
            return
        self.times.append(clock())
        self.tokens.append(int(ids.numel() if mask is None else mask.sum()))
        lengths = [ids.shape[1]] * ids.shape[0] if starts is None else starts.diff().tolist()
        if sum(lengths) > sum(self.largest["lengths"]):
            self.largest = {"lengths": lengths, "packed": starts is not None}

    def speed(self, skip: int = 6) -> dict[str, Any]:
        """Return real sub-tokens a second after the first micro-batches, without those that an evaluation follows."""
        if len(self.times) < skip + 3:
            return {"micro_batches": len(self.times)}
        spans = [after - before for before, after in zip(self.times, self.times[1:], strict=False)][skip:]
        median = statistics.median(spans)
        kept = [(count, span) for count, span in zip(self.tokens[skip:], spans, strict=False) if span < 5 * median]
        tokens = sum(count for count, _ in kept)
        return {
            "micro_batches": len(self.times),
            "real_tokens_per_second": round(tokens / sum(span for _, span in kept), 1),
            "median_seconds": median,
            "mean_tokens": round(tokens / len(kept), 1),
        }


def short_training(record: Record, watch: Watch, label: str, recipe: list[str], folder: Path, *overrides: str) -> None:
    """Run `tokmask train` for a few steps, watched, and record what came of it."""

    def run() -> dict[str, Any]:
        base, name = allocated(), label.replace(" ", "-")
        watch.clear()
        settings = [f"name={name}", f"model.backbone_path={folder}", "training.baseline=false", *overrides]
        DEFAULT_CALLBACKS.append(watch)
        try:
            code, seconds = command_line(["train", *recipe, *settings])
        finally:
            DEFAULT_CALLBACKS.remove(watch)
        watch.next_phase("after")
        found = {"exit": code, "seconds": seconds, "base": base, "phases": watch.phases, "largest": watch.largest}
        found |= {"evaluated": watch.evaluated, "speed": watch.speed(), "overrides": list(overrides)}
        with contextlib.suppress(RunError):
            done = open_run(Path("runs") / name)
            found |= {
                "decisions": {one["what"]: [one["choice"], one["reason"]] for one in done.result.decisions},
                "reported_speed": done.result.speed,
                "validation": done.result.validation["f1_macro"],
                "losses": [line["loss"] for line in done.log if "loss" in line],
                "gradient_norms": [line["grad_norm"] for line in done.log if "grad_norm" in line],
            }
        return found

    record.attempt(label, run)
