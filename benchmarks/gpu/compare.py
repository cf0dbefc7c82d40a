"""Compare what measure.py found with the estimate, on a CPU, exact shapes:
    python compare.py results.json     (the product's environment, TOKMASK_TOKENIZERS set)"""
import json, os, sys
from pathlib import Path
import torch
from transformers import AutoConfig
from tokmask_peft.model.memory.estimate import Setting, estimate
from tokmask_peft.model.memory.step import Shape
from tokmask_peft.recipe.schema import Recipe
FOLDERS = {"qwen": "Qwen2.5-0.5B", "tinyllama": "TinyLlama-1.1B-Chat-v1.0", "mbert": "bert-base-multilingual-cased"}
found = json.loads(Path(sys.argv[1]).read_text())
for part in ("cli", "stock", "memory_cap"):
    for name, run in found.get(part, {}).items():
        if not isinstance(run, dict) or not run.get("largest", {}).get("lengths"):
            continue
        backbone = name.split()[0] if name.split()[0] in FOLDERS else "tinyllama"
        task = "token" if " token" in name else "sequence"
        decided = {key: value[0] for key, value in run.get("decisions", {}).items()}
        config = AutoConfig.from_pretrained(Path(os.environ["TOKMASK_TOKENIZERS"]) / FOLDERS[backbone], num_labels=3)
        keys = dict(one.split("=", 1) for one in run["overrides"])
        model = {"backbone": "x", "embedding": keys.get("model.embedding", "resident"), "gradient_checkpointing": decided.get("checkpointing") == "on"}
        recipe = Recipe.model_validate({"name": "x", "model": model, "data": {"task": task, "builtin": True},
            "masking": {"trainable_mask": keys.get("masking.trainable_mask") == "true"}, "adapter": {"dropout": float(keys.get("adapter.dropout", 0))},
            "training": {"gradient_accumulation": 1 if part != "cli" or backbone == "mbert" else 2}})
        shape = Shape(tuple(run["largest"]["lengths"]), packed=run["largest"]["packed"])
        dtype = torch.bfloat16 if decided.get("precision") == "bf16" else torch.float32
        kind = decided.get("quantization", "nf4")
        told = estimate(recipe, Setting(config, "cuda", kind, dtype), shape, Shape.padded(*run["evaluated"]))
        fixed = told.weights + told.embedding + told.adapter + told.optimizer
        phases = run["phases"]
        for phase, extra in (("training", told.activations + told.workspace), ("evaluation", told.evaluation)):
            measured = phases.get(phase, {}).get("allocated", 0) - run.get("base", 0)
            if measured > 0:
                print(f"{name:48} {phase:10} estimate {(fixed + extra) / 2**20:7.0f} MiB, measured {measured / 2**20:7.0f}, ratio {(fixed + extra) / measured:.3f}, reserved {phases[phase]['reserved'] / 2**20:.0f}")
        print(f"{name:48} loading    peak {phases['loading']['allocated'] / 2**20:.0f} MiB")
