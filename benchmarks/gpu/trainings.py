"""Parts of the GPU measurement that train by the command line, next to a stock Trainer and on emulated small cards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import instruments as gpu
import torch
import transformers
from safetensors.torch import load_file
from small_copy import SCORED
from transformers.trainer import DEFAULT_CALLBACKS
from workload import stock_qlora

from tokmask_peft.artifacts import open_run
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.encoding import Encoder
from tokmask_peft.recipe.schema import Recipe

NF4, PADDED, NO_TEST = "model.quantization=nf4", "training.batching=padded", "data.test=null"
FEW = f"data.max_train={512 if gpu.DRY else 2000}"
"""More than the trainings of a few steps take."""
TEXTS = ["me encanta this phone", "qué mal servicio", "ok"]
ON_A_CPU = ["model.precision=bf16"] if gpu.DRY else []
"""So that a dry run takes the code paths of a GPU."""


def part_prepare() -> None:
    """Save random backbones of real shapes in bf16."""
    record = gpu.Record("prepare")
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    for name in gpu.BACKBONES:
        record.attempt(name, lambda name=name: _save_backbone(name))


def _save_backbone(name: str) -> dict[str, Any]:
    start, source = time.time(), Path(os.environ["TOKMASK_TOKENIZERS"]) / gpu.BACKBONES[name][0]
    config = gpu.small(transformers.AutoConfig.from_pretrained(source))
    torch.manual_seed(0)
    auto = transformers.AutoModel if name == "mbert" else transformers.AutoModelForCausalLM
    with gpu.DEVICE:  # a CPU takes half a minute to draw 1.1e9 weights
        model = auto.from_config(config, dtype=torch.bfloat16)
    model.to("cpu").save_pretrained(gpu.backbone_folder(name))
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(gpu.backbone_folder(name))
    return {"seconds": round(time.time() - start, 1), "weights": sum(w.numel() for w in model.parameters())}


def part_cli() -> None:
    """Run `tokmask estimate`, `train`, `evaluate` and `predict` as a user types them."""
    record, watch = _part("cli")
    common = [f"training.max_steps={4 if gpu.DRY else 24}", "training.epochs=1", "training.eval_batch_size=64",
              "training.logging_steps=1", FEW, *ON_A_CPU]  # fmt: skip
    plans = [
        ("qwen", "sequence", "nf4 packed", [NF4]),
        ("tinyllama", "token", "nf4 packed", [NF4]),
        ("qwen", "token", "nf4 padded checkpointed", [NF4, PADDED, "model.gradient_checkpointing=true"]),
        ("tinyllama", "sequence", "nf4 padded", [NF4, PADDED]),
        ("qwen", "sequence", "nf4 packed offload", [NF4, "model.embedding=offload"]),
        ("qwen", "sequence", "nf4 packed 8bit embedding", [NF4, "model.embedding=8bit"]),
        ("mbert", "token", "auto", []),
        ("mbert", "sequence", "nf4 padded checkpointed offload",
         [NF4, PADDED, "model.gradient_checkpointing=true", "model.embedding=offload"]),
        ("qwen", "sequence", "nf4 fp16 as on a T4", [NF4, f"model.precision={'fp32' if gpu.DRY else 'fp16'}"]),
        ("mbert", "sequence", "int8", ["model.quantization=int8"]),
        ("qwen", "sequence", "bf16 unquantized", ["model.quantization=none"]),
        ("qwen", "sequence", "nf4 trained mask row", [NF4, "masking.trainable_mask=true"]),
        ("qwen", "sequence", "nf4 lora dropout, budget",
         [NF4, "adapter.dropout=0.05", "training.tokens_per_batch=1024"]),
    ]  # fmt: skip
    for backbone, task, label, overrides in plans:
        name, whole = f"{backbone} {task} {label}", label == "nf4 packed"
        if not re.search(gpu.ONLY, name):
            continue
        settings = [*common, *([] if whole else [NO_TEST]), *overrides]  # whole test sets take too long each time
        recipe, folder = gpu.recipe_of(backbone, task), gpu.backbone_folder(backbone)
        run = f"runs/{name.replace(' ', '-')}"
        gpu.short_training(record, watch, name, recipe, folder, *settings)
        if not whole:
            continue
        commands = {
            "evaluate": ["evaluate", run, "--json"],
            "predict": ["predict", run, *TEXTS],
            "predict on the cpu": ["predict", run, *TEXTS, "--device", "cpu"],
        }
        if backbone == "qwen":
            commands["estimate"] = ["estimate", *recipe, f"model.backbone_path={folder}"]
        for command, arguments in commands.items():
            record.attempt(f"{name}: {command}", lambda arguments=arguments: gpu.command_line(arguments))
    if re.search(gpu.ONLY, "qwen resume"):
        settings = [*common, NO_TEST, NF4, "training.max_steps=8"]
        record.attempt("qwen resume", lambda: _resumed(settings))


class _CtrlC(transformers.TrainerCallback):
    """Interrupts a training after four steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Send the signal."""
        if state.global_step == 4:
            signal.raise_signal(signal.SIGINT)


def _resumed(settings: list[str]) -> dict[str, Any]:
    """Train once in one go, and once interrupted and resumed; return the largest gap between the trained weights."""
    paths = [f"model.backbone_path={gpu.backbone_folder('qwen')}", "training.baseline=false"]
    start = ["train", *gpu.recipe_of("qwen", "sequence"), *paths, *settings]
    codes, stop = [gpu.command_line([*start, "name=whole"])[0]], _CtrlC()
    DEFAULT_CALLBACKS.append(stop)  # type: ignore[arg-type]
    try:
        codes.append(gpu.command_line([*start, "name=interrupted"])[0])
    finally:
        DEFAULT_CALLBACKS.remove(stop)  # type: ignore[arg-type]
    codes.append(gpu.command_line(["train", "runs/interrupted/recipe.yaml", "--resume"])[0])
    whole, resumed = (load_file(f"runs/{name}/adapter/adapter_model.safetensors") for name in ("whole", "interrupted"))
    gap = max(float((whole[name].float() - resumed[name].float()).abs().max()) for name in whole)
    return {"exits": codes, "largest_gap": gap, "largest": max(float(one.abs().max()) for one in whole.values())}


def part_stock() -> None:
    """Train with each batching, and as PEFT's guides do with a Trainer."""
    record, watch = _part("stock")
    steps = 8 if gpu.DRY else 40
    common = ["training.epochs=1", "training.eval_batch_size=64", "training.batch_size=32", NO_TEST, NF4,
              "training.gradient_accumulation=1", f"training.max_steps={steps}", FEW, *ON_A_CPU]  # fmt: skip
    stock = {  # padded to 128, checkpointed, dropout
        "padded to 128, checkpointed": (True, True, 0.05),
        "padded, checkpointed": (False, True, 0.05),
        "padded": (False, False, 0.0),
    }
    for name in ("qwen", "tinyllama", "mbert"):
        recipe, folder = gpu.recipe_of(name, "sequence"), gpu.backbone_folder(name)
        for batching in ("padding_free", "grouped", "padded"):
            if re.search(gpu.ONLY, f"{name} {batching}"):
                settings = [*common, f"training.batching={batching}"]
                gpu.short_training(record, watch, f"{name} {batching}", recipe, folder, *settings)
        for label, settings in stock.items():
            if re.search(gpu.ONLY, f"{name} stock {label}"):
                record.attempt(f"{name} stock {label}", lambda n=name, s=settings: _stock(watch, n, steps, *s))


def _stock(watch: gpu.Watch, name: str, steps: int, to_128: bool, checkpointed: bool, dropout: float) -> dict[str, Any]:
    base, tokenizer = gpu.allocated(), transformers.AutoTokenizer.from_pretrained(gpu.backbone_folder(name))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    recipe, *data = gpu.recipe_of(name, "sequence")
    corpus = load_corpus(Recipe.load(recipe, [*data, FEW]).data.expanded(), 0)
    rows = Encoder(tokenizer, "sequence", 128).cut(corpus.train, corpus.labels).dataset
    watch.clear()
    classes, reentrant = len(corpus.labels), {"use_reentrant": False}
    model = stock_qlora(gpu.backbone_folder(name), gpu.DEVICE, checkpointed, dropout, classes, **reentrant)
    model.config.pad_token_id, model.config.use_cache = tokenizer.pad_token_id, False
    arguments = transformers.TrainingArguments(
        output_dir="stock", max_steps=steps, per_device_train_batch_size=32, learning_rate=2e-4, bf16=True,
        logging_steps=20, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=gpu.DRY,
        dataloader_pin_memory=not gpu.DRY,
    )  # fmt: skip
    padding: dict[str, Any] = {"padding": "max_length", "max_length": 128} if to_128 else {}
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows.select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer, **padding),
        callbacks=[watch],
    )
    start = time.time()
    trainer.train()
    watch.next_phase("after")
    seconds = round(time.time() - start, 1)
    return {"speed": watch.speed(), "base": base, "phases": watch.phases, "seconds": seconds}


def part_memory_cap() -> None:
    """Train on emulated small cards: the allocator is capped, and the package sees no more memory than that."""
    record, watch = _part("memory_cap")
    size = 16 if gpu.DRY else 256
    common = ["training.epochs=1", "training.eval_batch_size=32", NF4, PADDED, "training.logging_steps=1", NO_TEST,
              f"training.max_steps={2 if gpu.DRY else 6}", FEW, *ON_A_CPU]  # fmt: skip
    big = [f"training.batch_size={size}", "training.gradient_accumulation=1"]
    kept = [*big, "model.gradient_checkpointing=false"]
    plans: list[tuple[float, str, str, list[str]]] = [  # a default run that fits in 4 GiB fits in 6 and 8
        (4, "tinyllama", "default", []),
        (4, "qwen", "default", []),
        (4, "tinyllama", "checkpointing auto", big),
        (4, "tinyllama", "no checkpointing, runs out", kept),
        (4, "tinyllama", "no checkpointing, auto_batch", [*kept, "training.auto_batch=true"]),
        (2, "tinyllama", "default", []),
        (2, "qwen", "default", []),
        (0.8, "tinyllama", "runs out while loading", []),
    ]
    for gib, name, label, settings in plans:
        recipe, folder = gpu.recipe_of(name, "sequence"), gpu.backbone_folder(name)
        with _capped(gib):
            gpu.short_training(record, watch, f"{name} {gib} GiB {label}", recipe, folder, *common, *settings)


@contextmanager
def _capped(gib: float) -> Iterator[None]:
    if not gpu.ON_GPU:
        yield
        return
    size, whole = int(gib * 2**30), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(size / whole, 1.0))

    def left(device: Any = None) -> tuple[int, int]:
        return max(size - torch.cuda.memory_reserved(), 0), size

    with mock.patch.object(torch.cuda, "mem_get_info", left):
        yield


def part_minilm() -> None:
    """Train the quickstart on the one real encoder that can be carried, to compare its score with a CPU's."""
    record, watch = _part("minilm")
    folder = Path(os.environ.get("MINILM", "missing"))
    if not folder.is_dir():
        record.put("skipped", "MINILM names no folder")
        return
    recipe = [str(gpu.REPO / "recipes" / "quickstart.yaml")]
    gpu.short_training(record, watch, "quickstart", recipe, folder, *(["training.max_steps=4"] if gpu.DRY else []))
    commands = {"explain": ["explain"], "predict": ["predict"], "predict, cpu": ["predict", "--device", "cpu"]}
    for label, (command, *options) in commands.items():
        arguments = [command, "runs/quickstart", TEXTS[0], *options]
        record.attempt(label, lambda arguments=arguments: gpu.command_line(arguments))


def part_scores() -> None:
    """Train MiniLM, and e5-small if it was carried, on real texts without and with masking, a seed in each process."""
    record, _ = _part("scores")
    folders = {"minilm": os.environ.get("MINILM", ""), "e5-small": os.environ.get("E5", "")}
    if "TOKMASK_DATA" not in os.environ:
        record.put("skipped", "TOKMASK_DATA is not set")
        return
    arms = ["masking.p=0", os.environ.get("ARM", "masking.p=0.1")]
    seeds = 1 if gpu.DRY else 8
    runs = [
        (name, task, arm, seed)
        for name, folder in folders.items()
        for task in SCORED[: 1 if gpu.DRY else None]
        for arm in arms
        for seed in range(1, seeds + 1)
        if Path(folder or "missing").is_dir()
    ]
    with ThreadPoolExecutor(seeds) as pool:
        waiting = {pool.submit(_scored, folders[one[0]], *one): " ".join(map(str, one)) for one in runs}
        for done in as_completed(waiting):
            record.attempt(waiting[done], done.result)


def _scored(folder: str, name: str, task: str, arm: str, seed: int) -> dict[str, Any]:
    """Train on 500 texts for 160 steps, as the study did on a CPU, and return the scores on test."""
    run = f"{name}-{task}-{arm}-{seed}"
    few = f"data.max_train={100 if gpu.DRY else 500}"
    settings = [f"name={run}", f"seed={seed}", f"model.backbone_path={folder}", arm, few, "training.epochs=10",
                "training.batch_size=32", "training.baseline=false"]  # fmt: skip
    settings += ["training.max_steps=2"] if gpu.DRY else []
    recipe, start = str(gpu.REPO / "recipes" / task / f"{name}.yaml"), time.time()
    command = [sys.executable, "-m", "tokmask_peft", "train", recipe, *settings, "--quiet"]
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    result = open_run(Path("runs") / run).result
    scores = {key: result.test[key] for key in ("f1_macro", "f1_weighted", "accuracy")}
    precision = next(one["choice"] for one in result.decisions if one["what"] == "precision")
    return {**scores, "precision": precision, "steps": result.speed["steps"], "seconds": round(time.time() - start, 1)}


def _part(name: str) -> tuple[gpu.Record, gpu.Watch]:
    """Return record and watch of a part, in a working folder of its own."""
    os.chdir(tempfile.mkdtemp(dir=gpu.WORK))
    gpu.fresh_peak()
    return gpu.Record(name), gpu.Watch()


PARTS = {"prepare": part_prepare, "cli": part_cli, "stock": part_stock, "memory_cap": part_memory_cap,
         "minilm": part_minilm, "scores": part_scores}  # fmt: skip
