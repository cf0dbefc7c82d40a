"""What the parts of the GPU measurement share: their records, the card's memory and clock, and watched trainings."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

DRY = os.environ.get("DRY") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
ON_GPU = DEVICE.type == "cuda"
WORK = Path(os.environ.get("GPU_WORK", str(Path(tempfile.gettempdir()) / "gpu-work")))
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
    """The results of a part, in a file that is rewritten after every step; the driver joins these files."""

    def __init__(self, part: str) -> None:
        self.path, self.found = WORK / f"{part}.json", {}

    def put(self, key: str, value: object) -> None:
        """Keep a result."""
        self.found[key] = value
        self.path.write_text(json.dumps(self.found, indent=1, default=str))
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


def matrix_rate() -> float:
    """Return the FLOPs a second of a large bf16 product, the median of 5 rounds."""
    size, products = (8192, 20) if ON_GPU else (256, 2)
    left, rates = torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE), []
    for _ in range(6):
        start = clock()
        for _ in range(products):
            left @ left
        rates.append(products * 2 * size**3 / (clock() - start))
    return statistics.median(rates[1:])


def recipe_file(name: str, task: str) -> Path:
    """Write the recipe of a backbone: on real tweets if TOKMASK_DATA is set, otherwise on the built-in posts."""
    data = os.environ.get("TOKMASK_DATA")
    lines = [f"base: {REPO}/recipes/_backbones/{BACKBONES[name][1]}.yaml", f"name: {name}-{task}", "data:"]
    lines += [f"  task: {task}", "  max_length: 128"]
    if data and task == "sequence":
        lines += [f"  path: {data}/mesent_mar_eng_sentiment", "  validation: 0.03", "  test: test"]
    elif data:
        lines += [f"  path: {data}/lince_lid_spaeng", "  validation: 0.01", "  test: validation"]
        lines += ['  label_map: {lang1: lang1, lang2: lang2, "*": other}']
    else:
        lines += ["  builtin: true", "  validation: validation", "  test: test"]
    path = WORK / f"{name}-{task}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def backbone_folder(name: str) -> Path:
    """Return the checkpoint that the part `prepare` makes."""
    return WORK / "backbones" / name


def command_line(arguments: list[str]) -> tuple[int, float]:
    """Run the package's command line in this process; return its exit code and the seconds."""
    from tokmask_peft.cli import main

    start, before = time.time(), sys.argv
    sys.argv = ["tokmask", *arguments]
    print("$ tokmask", *arguments, flush=True)
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
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

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch every Trainer that is made inside."""
        DEFAULT_CALLBACKS.append(self)
        try:
            yield
        finally:
            DEFAULT_CALLBACKS.remove(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at what goes into the model from here on."""
        self.next_phase("training")
        if self._handle is not None:  # of an attempt that ran out of memory
            self._handle.remove()
        self._handle = given["model"].register_forward_pre_hook(self._see, with_kwargs=True)

    def next_phase(self, name: str) -> None:
        """Note the peak of the phase that ends."""
        if name != self._phase:
            now, before = peak(), self.phases.get(self._phase, {})
            self.phases[self._phase] = {key: max(value, before.get(key, 0)) for key, value in now.items()}
            self._phase = name
            fresh_peak()

    def _see(self, model: Any, _: Any, inputs: dict[str, Any]) -> None:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.next_phase("training" if model.training else "evaluation")
        if not model.training:
            self.evaluated = max(self.evaluated, list(ids.shape), key=lambda shape: shape[0] * shape[1])
            return
        self.times.append(clock())
        self.tokens.append(int(ids.numel() if mask is None else mask.sum()))
        packed = "cu_seqlens" in inputs
        lengths = inputs["cu_seqlens"].diff().tolist() if packed else [ids.shape[1]] * ids.shape[0]
        if sum(lengths) > sum(self.largest["lengths"]):
            self.largest = {"lengths": lengths, "packed": packed}

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


def short_training(record: Record, watch: Watch, label: str, recipe: Path, folder: Path, *overrides: str) -> None:
    """Run `tokmask train` for a few steps, watched, and record what came of it."""

    def run() -> dict[str, Any]:
        base, name = allocated(), label.replace(" ", "-")
        watch.clear()
        settings = [f"name={name}", f"model.backbone_path={folder}", "training.baseline=false", *overrides]
        with watch.installed():
            code, seconds = command_line(["train", str(recipe), *settings])
        watch.next_phase("after")
        found = {"exit": code, "seconds": seconds, "base": base, "phases": watch.phases, "largest": watch.largest}
        found |= {"evaluated": watch.evaluated, "speed": watch.speed(), "overrides": list(overrides)}
        root = Path("runs") / name
        if (root / "result.json").is_file():
            result = json.loads((root / "result.json").read_text())
            lines = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
            found |= {
                "decisions": {one["what"]: [one["choice"], one["reason"]] for one in result["decisions"]},
                "reported_speed": result["speed"],
                "validation": result["validation"]["f1_macro"],
                "losses": [line["loss"] for line in lines if "loss" in line],
                "gradient_norms": [line["grad_norm"] for line in lines if "grad_norm" in line],
            }
        return found

    record.attempt(label, run)
