"""Masking in an encoder-decoder model that writes its answer: words in, a language tag for each word out.

    TOKMASK_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/studies/seq2seq.py

LinCE, language identification, Spanish-English: 2,000 posts to train on. No pretrained encoder-decoder model is at hand
offline, so a small T5 is trained from random weights, in full, with sub-tokens of those posts, by `Seq2SeqTrainer` with
`TokenMaskCallback`: the encoder's input is masked at p = 0 and p = 0.1, with the same three seeds. A tag that is
missing or has no word counts as wrong. The result says something about masking in small models that begin from nothing,
and no more.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from tokmask_peft.console import quiet_libraries
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.masking import TokenMaskCallback, TokenMaskConfig
from tokmask_peft.model.location import backbone_location
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.study.statistics import spread
from tokmask_peft.training.environment import environment
from tokmask_peft.training.metrics import scores

RATES, SEEDS, POSTS, SCORED, STEPS, LONGEST, VOCABULARY = (0.0, 0.1), (1, 2, 3), 2000, 300, 400, 30, 2000
SHAPE = {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4}
FILE = Path(__file__).parents[1] / "results" / "seq2seq.json"


def rows(examples: Sequence[Any], tokenizer: Any, tags: Sequence[int]) -> list[dict[str, Any]]:
    """Encode posts of at most `LONGEST` words: words to sub-tokens, labels to one tag each and an end token."""
    found = []
    for example in examples:
        ids = tokenizer(list(example.words), is_split_into_words=True)["input_ids"]
        found.append({"input_ids": ids, "labels": [*(tags[int(tag)] for tag in example.tags), tokenizer.sep_token_id]})
    return found


def f1(made: Any, gold: Sequence[Sequence[int]], tags: Sequence[int]) -> float:
    """Return the macro-F1 of the tags of all words; `made` holds what was generated, after the start token."""
    truth, guess = [], []
    for row, wanted in zip(made.tolist(), gold, strict=True):
        answers = (row[1:] + [-1] * len(wanted))[: len(wanted)]
        truth += [tags.index(tag) for tag in wanted]
        guess += [tags.index(tag) if tag in tags else -1 for tag in answers]
    names = [str(number) for number in range(len(tags))]
    return float(scores(truth, guess, names)["f1_macro"])


def train(p: float, seed: int, parts: dict[str, list[dict[str, Any]]], tokenizer: Any, tags: list[int]) -> float:
    """Train one model and return its score on validation posts that chose nothing."""
    set_seed(seed)
    special = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": tokenizer.sep_token_id}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **SHAPE, **special))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Seq2SeqTrainer(
            model,
            Seq2SeqTrainingArguments(
                folder, max_steps=STEPS, per_device_train_batch_size=32, learning_rate=2e-3, warmup_steps=50, seed=seed,
                predict_with_generate=True, generation_max_length=LONGEST + 2, per_device_eval_batch_size=64,
                report_to="none", save_strategy="no", logging_steps=100, use_cpu=True, disable_tqdm=True,
            ),
            train_dataset=parts["train"],
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model),
            callbacks=[TokenMaskCallback(TokenMaskConfig(p=p), announce=False)],
        )  # fmt: skip
        trainer.train()
        made = trainer.predict(parts["scored"]).predictions
    return f1(torch.as_tensor(made), [row["labels"][:-1] for row in parts["scored"]], tags)


def main() -> None:
    """Train every run, print the scores and write the JSON."""
    quiet_libraries()
    recipe = Recipe.load("lid_spaeng/minilm", [f"data.max_train={POSTS}"])
    corpus = load_corpus(recipe.data.expanded(), seed=0)
    given = AutoTokenizer.from_pretrained(backbone_location(recipe.model))
    tokenizer = given.train_new_from_iterator((" ".join(one.words) for one in corpus.train), VOCABULARY)
    tokenizer.add_tokens([f"<{label}>" for label in corpus.labels], special_tokens=True)
    tags = tokenizer.convert_tokens_to_ids([f"<{label}>" for label in corpus.labels])
    number = {label: str(at) for at, label in enumerate(corpus.labels)}
    parts = {}
    for name, examples in (("train", corpus.train), ("scored", (corpus.test or corpus.validation)[:SCORED])):
        kept = [one for one in examples if len(one.words) <= LONGEST and all(tag in number for tag in one.tags)]
        labelled = [type(one)(one.words, tuple(number[tag] for tag in one.tags), one.where) for one in kept]
        parts[name] = rows(labelled, tokenizer, tags)
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        for p in RATES:
            found.setdefault(f"{p:g}", []).append(train(p, seed, parts, tokenizer, tags))
            sys.stdout.write(f"seed {seed}, p = {p:g}: macro-F1 {found[f'{p:g}'][-1]:.4f}\n")
            sys.stdout.flush()
    plain, masked = found.values()
    result = {
        "f1_macro": found,
        "difference": spread([after - before for before, after in zip(plain, masked, strict=True)]),
        "setting": {
            **SHAPE,
            "steps": STEPS,
            "vocabulary": len(tokenizer),
            "posts": len(parts["train"]),
            "scored": len(parts["scored"]),
        },
        "environment": environment(torch.device("cpu")),
    }
    FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
