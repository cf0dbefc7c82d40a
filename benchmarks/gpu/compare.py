"""Compare the memory that `measure.py` measured with the estimate, on a CPU, from the exact shapes.

TOKMASK_TOKENIZERS=FOLDER PYTHONPATH=benchmarks python benchmarks/gpu/compare.py OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from instruments import BACKBONES, recipe_of
from transformers import AutoConfig

from tokmask_peft.model.decisions import DTYPES
from tokmask_peft.model.memory.estimate import Setting, estimate
from tokmask_peft.model.memory.step import Shape
from tokmask_peft.recipe.schema import Recipe

MIB = 2**20


def lines(name: str, run: dict[str, Any]) -> list[str]:
    """Return the phases of a training, measured and estimated."""
    backbone = name.split()[0] if name.split()[0] in BACKBONES else "tinyllama"
    decided = {key: value[0] for key, value in run.get("decisions", {}).items()}
    again = f"model.gradient_checkpointing={'true' if decided.get('checkpointing') == 'on' else 'false'}"
    file, *data = recipe_of(backbone, "token" if " token" in name else "sequence")
    recipe = Recipe.load(file, [*data, *run["overrides"], again])
    config = AutoConfig.from_pretrained(Path(os.environ["TOKMASK_TOKENIZERS"]) / BACKBONES[backbone][0], num_labels=3)
    dtype = DTYPES[decided.get("precision", "fp32")]
    setting = Setting(config, "cuda", decided.get("quantization", "nf4"), dtype)
    largest = Shape(tuple(run["largest"]["lengths"]), run["largest"]["packed"])
    guess = estimate(recipe, setting, largest, Shape.padded(*run["evaluated"]))
    fixed = guess.weights + guess.embedding + guess.adapter + guess.optimizer + guess.cublas
    found = []
    for phase, extra in (("training", guess.activations + guess.workspace), ("evaluation", guess.evaluation)):
        peak = run["phases"].get(phase, {"allocated": 0})
        measured = peak["allocated"] - run.get("base", 0)
        if measured > 0:
            ratio = (fixed + extra) / measured
            sizes = f"estimate {(fixed + extra) / MIB:7.0f} MiB, measured {measured / MIB:7.0f}, ratio {ratio:.3f}"
            found.append(f"{name:48} {phase:10} {sizes}, reserved {peak['reserved'] / MIB:.0f}")
    return [*found, f"{name:48} loading    peak {run['phases']['loading']['allocated'] / MIB:.0f} MiB"]


if __name__ == "__main__":
    results = json.loads((Path(sys.argv[1]) / "results.json").read_text(encoding="utf-8"))
    for part in ("cli", "stock", "memory_cap"):
        for name, run in results.get(part, {}).items():
            if isinstance(run, dict) and "overrides" in run and run.get("largest", {}).get("lengths"):
                print("\n".join(lines(name, run)))
