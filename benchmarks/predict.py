"""How fast `predict` is compared with `transformers.pipeline`, and how long its first answer takes.

    OMP_NUM_THREADS=1 python benchmarks/predict.py [RUN]           both
    OMP_NUM_THREADS=1 python benchmarks/predict.py --first [RUN]   the first answer

RUN is a run of a sequence task; the texts are those it was trained on, in random order. Without it MiniLM is trained
for a minute, on TREC if TOKMASK_DATA is set, otherwise on the built-in posts, so that its adapter is large enough to be
merged in bf16 as well, as those of real runs are; whether it was is in the JSON. Classifier and pipeline have the same
adapter, the pipeline merged into the backbone, each in fp32 and, if the run was trained in it, in bf16; the pipeline at
the best batch size of several, found first. They take turns in every round.

The first answer is that of a new process, `tokmask predict RUN TEXT`, in CPU seconds. It takes turns with processes
that only import torch and the class of the backbone, without which no answer is possible, and with a pipeline's first
answer.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline
from workload import interleaved, matrix_rate, ratio, report

from tokmask_peft import load, train
from tokmask_peft.artifacts import find_saved
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.inference.export import export_merged
from tokmask_peft.recipe.schema import Recipe

BATCH_SIZES = (1, 4, 8, 16, 32, 64)
TEXTS, FEW, ROUNDS, STEPS = 400, 100, 5, 96
"""`FEW` texts find the best batch size; `STEPS` train the run if none is given."""
Ways = dict[str, Callable[..., Any]]


def short_run(folder: str) -> str:
    """Train MiniLM for some steps and return the run."""
    recipe = "trec/minilm" if os.environ.get("TOKMASK_DATA") else "quickstart"
    options = ["data.task=sequence", "data.max_train=512", f"training.max_steps={STEPS}", "training.baseline=false"]
    return str(train(Recipe.load(recipe, [*options, f"output_dir={folder}"]), quiet=True).folder.root)


def texts_of(run: str) -> list[str]:
    """Return texts of the run's train split in random order, repeated until there are enough."""
    recipe = Recipe.load(str(Path(run) / "recipe.yaml"))
    texts = [example.string for example in load_corpus(recipe.data.expanded(), recipe.seed).train]
    random.Random(0).shuffle(texts)
    return list(islice(cycle(texts), TEXTS))


def rate(classify: Callable[[list[str]], Any], texts: list[str]) -> float:
    """Return texts per CPU second."""
    start = time.process_time()
    classify(texts)
    return len(texts) / (time.process_time() - start)


def rivals(run: str, folder: str, few: list[str]) -> tuple[Ways, dict[str, Any], dict[str, str]]:
    """Return what is compared, the rates of the pipelines at each batch size, and what was done with the adapter."""
    merged = export_merged(run, Path(folder) / "merged").folder
    found: Ways = {}
    tried, adapter = {}, {}
    precisions = {"fp32": torch.float32}
    if find_saved(run).model.precision != "fp32":
        precisions["bf16"] = torch.bfloat16
    for name, dtype in precisions.items():
        classifier = load(run, "cpu", precision=name)
        found[f"classifier {name}"] = classifier.predict
        adapter[name] = next(one.choice for one in classifier.decisions if one.what == "adapter")
        pipe = pipeline("text-classification", model=str(merged), device="cpu", dtype=dtype)
        sized = {size: partial(pipe, batch_size=size) for size in BATCH_SIZES}
        rates = {size: statistics.median(rate(way, few) for _ in range(3)) for size, way in sized.items()}
        tried[name] = {str(size): round(value, 1) for size, value in rates.items()}
        found[f"pipeline {name}"] = sized[max(rates, key=rates.__getitem__)]
    return found, tried, adapter


def batch_effect(classify: Callable[..., Any], texts: list[str]) -> float:
    """Return the largest change of a probability between texts one by one and in batches."""
    pairs = zip(classify(texts), classify(texts, batch_size=1), strict=True)
    changes = [(a.probabilities[label], b.probabilities[label]) for a, b in pairs for label in a.probabilities]
    return max(abs(one - other) for one, other in changes)


def child_seconds(*command: str) -> float:
    """Return the CPU seconds of a Python process, which may keep bytecode, as pip does when it installs a package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-W", "ignore", *command], env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_answer(run: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the CPU seconds to the first answer and of what it is compared with, and the rows of the table."""
    text = texts_of(run)[0]
    with tempfile.TemporaryDirectory() as folder:
        merged = str(export_merged(run, Path(folder) / "merged").folder)
        backbone = type(pipeline("text-classification", model=merged, device="cpu").model).__name__
        answer = f"pipeline('text-classification', model={merged!r}, device='cpu')({text!r})"
        ways = {
            "tokmask predict": ("-m", "tokmask_peft", "predict", run, text),
            "pipeline": ("-c", f"from transformers import pipeline; {answer}"),
            "imports alone": ("-c", f"import torch; from transformers import AutoTokenizer, {backbone}"),
        }
        once = {name: partial(child_seconds, *way) for name, way in ways.items()}
        interleaved(once, 1)  # writes bytecode
        found = interleaved(once, ROUNDS)
    rows: dict[str, Any] = {f"{name}, CPU seconds": (values, "") for name, values in found.items()}
    rows["tokmask predict, CPU seconds"] = (found["tokmask predict"], "4")
    for other in ("pipeline", "imports alone"):
        rows[f"tokmask predict to {other}"] = (ratio(found, "tokmask predict", other), "")
    return {"cpu_seconds": found}, rows


def measure(run: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rates of all in every round and how many labels agree, and the rows of the table."""
    texts = texts_of(run)
    with tempfile.TemporaryDirectory() as folder:
        found, tried, adapter = rivals(run, folder, texts[:FEW])
    rates = interleaved({name: partial(rate, way, texts) for name, way in found.items()}, ROUNDS)
    own, agreeing, classifier = "bf16" if "bf16" in tried else "fp32", {}, load(run, "cpu")
    inside = sum(part.numel() for name, part in classifier.model.named_parameters() if "embeddings" not in name)
    ids = classifier.tokenizer(texts)["input_ids"]
    flops = 2 * inside * sum(map(len, ids)) / len(ids)  # of a text's forward pass, on average
    rows: dict[str, Any] = {f"{name}, texts per CPU second": (values, "") for name, values in rates.items()}
    both = ratio(rates, f"classifier {own}", "pipeline fp32")
    rows[f"as each comes: classifier {own} to pipeline fp32"] = (both, "3")
    for precision in tried:
        limit = matrix_rate(torch.bfloat16 if precision == "bf16" else torch.float32)
        share = [value * flops / limit for value in rates[f"classifier {precision}"]]
        rows[f"classifier {precision}, share of the matrix rate"] = (share, "")
    for precision in tried:
        mine, theirs = (found[f"{who} {precision}"] for who in ("classifier", "pipeline"))
        pairs = zip(mine(texts), theirs(texts), strict=True)
        agreeing[precision] = sum(one.label == other["label"] for one, other in pairs)
        both = ratio(rates, f"classifier {precision}", f"pipeline {precision}")
        rows[f"classifier to pipeline, both in {precision}"] = (both, "")
        rows[f"labels that agree, both in {precision} (share)"] = ([agreeing[precision] / TEXTS], "")
        rows[f"{precision}: largest change of a probability with the batch"] = ([batch_effect(mine, texts[:FEW])], "")
    result = {"texts": TEXTS, "adapter": adapter, "pipeline_batch_sizes": tried, "texts_per_second": rates}
    return {**result, "labels_agreeing": agreeing}, rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        only_first, given = "--first" in sys.argv, [name for name in sys.argv[1:] if name != "--first"]
        run = given[0] if given else short_run(folder)
        found = {"first_answer": first_answer(run), **({} if only_first else {"predict": measure(run)})}
    for name, (result, rows) in found.items():
        report(name, {"run": Path(run).name, **result}, rows)
