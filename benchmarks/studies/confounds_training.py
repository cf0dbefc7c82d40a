"""One run of the study of confounds: full fine-tuning, as the authors' code does it except for the switches."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from confounds_learners import CausalLearner, CutVocabulary, EncoderLearner, language_model
from confounds_protocol import SETTINGS, RunSpec, Setting, Texts, encode_texts, read_corpus, runs, stop_epoch
from numpy.typing import NDArray
from torch import nn
from transformers import get_linear_schedule_with_warmup

from tokmask_peft.artifacts import write_json
from tokmask_peft.data.corpus import Corpus, count_labels
from tokmask_peft.tasks import IGNORED, NO_PREDICTION
from tokmask_peft.training.losses import ClassificationLoss, class_weights
from tokmask_peft.training.metrics import scores

Learner = EncoderLearner | CausalLearner
WEIGHT_DECAY = 0.01
GAMMA = 1.0
EVALUATED_AT_ONCE = 64
DIVERGED = 1e6
"""Replaces a loss that is not a number: JSON has none, and early stopping must see no improvement."""


def set_dropout(model: nn.Module, embedding: nn.Module, on: bool) -> None:
    """Put a model in train mode, with dropout or without.

    Without it, every part below the model itself is in eval mode, as after the authors' `model.eval()`, except for the
    embedding, where the masker looks for train mode: the authors' masking goes on.
    """
    model.train()
    if not on:
        for module in model.modules():
            module.training = module is model or module is embedding


def warm_up_schedule(optimizer: torch.optim.Optimizer, steps: int, warm_up: float) -> Any:
    """Return the linear schedule with a warm-up of `warm_up` times the run's `steps`."""
    return get_linear_schedule_with_warmup(optimizer, round(warm_up * steps), steps)


def batches(rows: Sequence[Any], size: int, generator: torch.Generator) -> Iterator[list[Any]]:
    """Shuffle and cut into batches."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    for start in range(0, len(rows), size):
        yield [rows[index] for index in order[start : start + size]]


def train(
    learner: Learner,
    run: RunSpec,
    parts: dict[str, Texts],
    weights: Sequence[float],
    labels: Sequence[str],
    stopped: Callable[[list[dict[str, Any]]], bool] | None = None,
) -> list[dict[str, Any]]:
    """Train one run on `train` of `parts` with class weights, score it on the others, and return a record per epoch.

    Unless `stopped` ends it by the records so far, training goes on until early stopping would have ended it by the
    loss of validation and by that of test, so that either rule can be read off the same run.
    """
    setting, rows = run.setting, parts["train"].rows
    model, criterion = learner.model, ClassificationLoss(weights, GAMMA)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    rate = setting.learning_rate * run.protocol.peak
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
    steps = setting.epochs * -(-len(rows) // setting.batch_size)
    schedule = warm_up_schedule(optimizer, steps, run.protocol.warm_up)
    generator = torch.Generator().manual_seed(run.seed)
    epochs: list[dict[str, Any]] = []
    for number in range(setting.epochs):
        start = time.process_time()
        set_dropout(model, embedding, on=number == 0 or run.protocol.dropout_kept)
        losses = []
        for batch in batches(rows, setting.batch_size, generator):
            loss = criterion(*learner.outputs(batch, training=True))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            learner.after_step()
            losses.append(loss.item())
        epochs.append({"learning_rate": schedule.get_last_lr()[0], "train_loss": _finite(np.mean(losses))})
        trained = time.process_time()
        for name in [name for name in parts if name != "train"]:
            epochs[-1][name] = evaluate(learner, parts[name], criterion, labels, keep=name == "test")
        epochs[-1]["seconds"] = [trained - start, time.process_time() - trained]
        if has_stopped(epochs, setting) if stopped is None else stopped(epochs):
            break
    return epochs


def has_stopped(epochs: Sequence[dict[str, Any]], setting: Setting) -> bool:
    """Return whether early stopping would have ended the run by the loss of validation and by that of test."""
    splits = ("validation", "test")
    return all(stop_epoch([epoch[split]["loss"] for epoch in epochs], setting) is not None for split in splits)


@torch.no_grad()
def evaluate(
    learner: Learner, texts: Texts, criterion: ClassificationLoss, labels: Sequence[str], keep: bool
) -> dict[str, Any]:
    """Return loss and scores, over what the model sees and over all, and the predictions if they are to be kept."""
    learner.model.eval()
    found: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)] * len(texts.rows)
    order = sorted(range(len(texts.rows)), key=lambda index: len(texts.rows[index]["input_ids"]))
    loss = items = 0.0
    for start in range(0, len(order), EVALUATED_AT_ONCE):
        chosen = order[start : start + EVALUATED_AT_ONCE]
        outputs, given = learner.outputs([texts.rows[index] for index in chosen], training=False)
        count = int((given != IGNORED).sum())
        loss, items = loss + float(criterion(outputs, given)) * count, items + count
        predicted = outputs.logits.argmax(-1)[given != IGNORED].numpy()
        lengths = [len(texts.slots[index]) for index in chosen]
        for index, part in zip(chosen, np.split(predicted, np.cumsum(lengths)[:-1]), strict=True):
            found[index] = part
    by_text = texts.predictions(found)
    gold = np.concatenate([np.asarray(row, dtype=np.int64) for row in texts.gold])
    predicted = np.concatenate([np.asarray(row, dtype=np.int64) for row in by_text])
    seen, whole = predicted != NO_PREDICTION, scores(gold, predicted, labels)
    record = {
        "loss": _finite(loss / items),
        "f1_macro": scores(gold[seen], predicted[seen], labels)["f1_macro"],
        "f1_macro_all": whole["f1_macro"],
    }
    return {**record, "predictions": by_text} if keep else record


def _finite(loss: float | np.floating[Any]) -> float:
    return float(loss) if np.isfinite(loss) else DIVERGED


def missing(folder: Path, seeds: tuple[int, ...]) -> list[RunSpec]:
    """Return the runs without a record.

    Raises:
        SystemExit: a record was made with other settings, so that its scores belong to another study.
    """
    left = []
    for run in runs(seeds):
        file = folder / f"{run.name}.json"
        if not file.is_file():
            left.append(run)
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        if any(record[key] != value for key, value in asdict(run).items()):
            raise SystemExit(f"{file} was run with other settings: remove it, or name another folder with --runs")
    return left


def do(run: RunSpec, folder: Path, bf16: bool) -> dict[str, Any]:
    """Train a run, write its record to `folder` and return it."""
    start = time.process_time()
    corpus = _corpus(run.group, run.seed)
    weights = class_weights("sqrt_inverse", count_labels(corpus.train))
    learner: Learner
    vocabulary = None
    if run.setting.backbone == "minilm":
        learner = EncoderLearner(run, corpus.task, corpus.labels, bf16)
        tokenizer = learner.tokenizer
    else:
        tokenizer, vocabulary, pretrained = language_model(folder)
        learner = CausalLearner(run, pretrained, vocabulary, len(corpus.labels))
    parts = {}
    for name, texts in {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}.items():
        parts[name] = encode_texts(texts, tokenizer, corpus.task, corpus.labels, run.protocol)
        if vocabulary is not None:
            parts[name] = _cut(parts[name], vocabulary)
    epochs = train(learner, run, parts, weights or [1.0] * len(corpus.labels), corpus.labels)
    record = {
        **asdict(run),
        "labels": list(corpus.labels),
        "texts": {name: len(part.gold) for name, part in parts.items()},
        "scored_share": parts["test"].scored_share,
        "gold": parts["test"].gold,
        "epochs": epochs,
        "seconds": time.process_time() - start,
        **learner.seen(),
    }
    write_json(folder / f"{run.name}.json", record, indent=None)
    return record


@functools.lru_cache(maxsize=4)
def _corpus(group: str, seed: int) -> Corpus:
    return read_corpus(SETTINGS[group], seed)


def _cut(texts: Texts, vocabulary: CutVocabulary) -> Texts:
    return replace(texts, rows=[{**row, "input_ids": vocabulary.cut(row["input_ids"])} for row in texts.rows])
