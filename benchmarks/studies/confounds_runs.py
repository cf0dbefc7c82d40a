"""Do one run of the confound study and keep its record."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from confounds_causal import CausalLearner
from confounds_encoder import EncoderLearner
from confounds_language_model import CutVocabulary, pretrain, qwen_tokenizer
from confounds_protocol import SETTINGS, RunSpec, runs
from confounds_texts import Texts, encode_texts, labelled, read_corpus, whole_corpus
from confounds_training import Learner, train

from tokmask_peft.artifacts import write_json
from tokmask_peft.data.corpus import Corpus, count_labels
from tokmask_peft.training.losses import class_weights

LANGUAGE_MODEL = "language_model"


def missing(folder: Path, seeds: tuple[int, ...]) -> list[RunSpec]:
    """Return the runs that have no record yet.

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
    examples = {"train": labelled(corpus, run.setting, run.seed), "validation": corpus.validation, "test": corpus.test}
    weights = class_weights("sqrt_inverse", count_labels(examples["train"]))
    learner: Learner
    if run.setting.backbone == "minilm":
        learner = EncoderLearner(run, corpus.task, corpus.labels, bf16)
        tokenizer, vocabulary = learner.tokenizer, None
    else:
        tokenizer, vocabulary, pretrained = language_model(folder)
        learner = CausalLearner(run, pretrained, vocabulary, len(corpus.labels))
    parts = {
        name: encode_texts(part, tokenizer, corpus.task, corpus.labels, run.protocol) for name, part in examples.items()
    }
    if vocabulary is not None:
        parts = {name: _cut(part, vocabulary) for name, part in parts.items()}
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


@functools.lru_cache(maxsize=1)
def language_model(folder: Path) -> tuple[Any, CutVocabulary, dict[str, torch.Tensor]]:
    """Return Qwen2.5's tokenizer, the rows of it that are used, and the pretrained weights; trained if not there."""
    tokenizer = qwen_tokenizer()
    corpus = whole_corpus(SETTINGS["causal"], 0)
    texts = [example.string for part in (corpus.train, corpus.validation, corpus.test) for example in part]
    vocabulary = CutVocabulary.of(tokenizer(texts)["input_ids"], tokenizer.pad_token_id)
    weights = folder / f"{LANGUAGE_MODEL}.pt"
    if not weights.is_file():
        found, record = pretrain([*corpus.train, *corpus.validation], tokenizer, vocabulary)
        torch.save(found, weights)
        record["id_0"] = tokenizer.convert_ids_to_tokens(0)
        record["texts_with_id_0"] = sum(0 in row for row in tokenizer(texts)["input_ids"])
        write_json(folder / f"{LANGUAGE_MODEL}.json", record)
    return tokenizer, vocabulary, torch.load(weights, weights_only=True)


def read_records(folder: Path, seeds: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Return the records that are there, by the name of their run."""
    files = {run.name: folder / f"{run.name}.json" for run in runs(seeds)}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


@functools.lru_cache(maxsize=4)
def _corpus(group: str, seed: int) -> Corpus:
    return read_corpus(SETTINGS[group], seed)


def _cut(texts: Texts, vocabulary: CutVocabulary) -> Texts:
    rows = [{**row, "input_ids": vocabulary.cut(row["input_ids"])} for row in texts.rows]
    return replace(texts, rows=rows)
