"""Compare the memory that `measure.py` measured with the estimate, on a CPU, from the exact shapes.

TOKMASK_TOKENIZERS=FOLDER python benchmarks/gpu/compare.py results.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from insides import estimated
from instruments import BACKBONES
from transformers import AutoConfig

MIB = 2**20


def lines(part: str, name: str, run: dict[str, Any]) -> list[str]:
    """Return the phases of a training, measured and estimated."""
    backbone = name.split()[0] if name.split()[0] in BACKBONES else "tinyllama"
    decided = {key: value[0] for key, value in run.get("decisions", {}).items()}
    settings = dict(one.split("=", 1) for one in run["overrides"])
    folder = Path(os.environ["TOKMASK_TOKENIZERS"]) / BACKBONES[backbone][0]
    recipe = {
        "model": {
            "backbone": "x",
            "embedding": settings.get("model.embedding", "resident"),
            "gradient_checkpointing": decided.get("checkpointing") == "on",
        },
        "data": {"task": "token" if " token" in name else "sequence", "builtin": True},
        "masking": {"trainable_mask": settings.get("masking.trainable_mask") == "true"},
        "adapter": {"dropout": float(settings.get("adapter.dropout", 0))},
        "training": {"gradient_accumulation": 1 if part != "cli" or backbone == "mbert" else 2},
    }
    packed, lengths = run["largest"]["packed"], run["largest"]["lengths"]
    guess = estimated(
        AutoConfig.from_pretrained(folder, num_labels=3),
        recipe,
        torch.bfloat16 if decided.get("precision") == "bf16" else torch.float32,
        lengths if packed else (len(lengths), lengths[0]),
        tuple(run["evaluated"]),
        packed_rows=packed,
        quantization=decided.get("quantization", "nf4"),
    )
    fixed = guess.weights + guess.embedding + guess.adapter + guess.optimizer
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
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for part in ("cli", "stock", "memory_cap"):
        for name, run in results.get(part, {}).items():
            if isinstance(run, dict) and "overrides" in run and run.get("largest", {}).get("lengths"):
                print("\n".join(lines(part, name, run)))
