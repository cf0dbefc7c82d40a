"""Optimizer steps to the same score: the authors' protocol and the shipped recipe, same backbone and texts.

    TOKMASK_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/same_score.py      # six minutes; not in `make bench`
    ... python benchmarks/same_score.py --no-patience --factor 10 --seeds 1    # as long again: a lower bound of 10

TREC with MiniLM, `TEXTS` training texts, 32 a step. Ours is trec/minilm as it ships, scored on validation every `EVERY`
steps until it reaches `TARGET` macro-F1, within its own six epochs. Theirs (Sean652039/Token-Masking on GitHub, commit
fad3fc1) trains all weights in fp32 with AdamW at 2e-5, weight decay 0.01 and the focal loss, masks with p = 0.1, and
takes up to 2,000 epochs; its warm-up is ten times the run (`steps // 0.1`), dropout stays off after the first epoch,
and it stops after ten epochs in which the loss on validation has not fallen by 0.001. If it ends before it reaches the
score, the ratio of steps is a lower bound. `--no-patience` removes that stop, up to `--factor` times our steps. Both
take packed rows, which change nothing but the time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import f1_score
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy
from workload import CPU, report

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.encoding import encode
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.embedding import find_embedding
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training.losses import ClassificationLoss, class_weights
from tokmask_peft.training.train import train_only

TEXTS, EVERY, TARGET = 640, 10, 0.65
EPOCHS, RATE, PATIENCE, LESS = 2000, 2e-5, 10, 1e-3


@dataclass
class Course:
    """Steps until the target or the end, the best validation macro-F1, CPU seconds of the steps, and the last rate."""

    steps: int = 0
    reached: bool = False
    best: float = 0.0
    cpu_seconds: float = 0.0
    rate: float = 0.0
    ended: str = "the run was over"

    def score(self, macro_f1: float) -> bool:
        """Note a score; return whether that is enough."""
        self.best = max(self.best, macro_f1)
        self.reached = macro_f1 >= TARGET
        if self.reached:
            self.ended = "target"
        return self.reached


class Watch(TrainerCallback):
    """Times the steps of a Trainer, and stops it at the target."""

    def __init__(self, course: Course) -> None:
        self.course, self.start = course, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        self.course.cpu_seconds += time.process_time() - self.start
        self.course.steps = state.global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Stop the training at the target."""
        control.should_training_stop = self.course.score(metrics["eval_f1_macro"])


def ours(recipe: Recipe) -> Course:
    """Train by the recipe until the target is reached."""
    course = Course()

    def watch(trainer: Any, mask: Any) -> list[TrainerCallback]:
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, EVERY
        return [Watch(course)]

    with tempfile.TemporaryDirectory() as folder:
        train_only(recipe, Path(folder), watch, quiet=True)
    return course


def theirs(recipe: Recipe, patience: int | None, limit: int | None) -> Course:
    """Train by the authors' protocol until the target is reached, patience ends, or `limit` steps are taken."""
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    set_seed(recipe.seed)
    # in bf16 weights, or products with such, updates as small as these would be lost
    backbone = load_backbone(recipe.model.model_copy(update={"precision": "fp32"}), "sequence", corpus.labels, CPU)
    model: Any = backbone.model
    enable_padding_free(model)
    columns, longest = ["input_ids", "labels"], recipe.data.max_length
    train, validation = (
        encode(part, backbone.tokenizer, "sequence", corpus.labels, longest).dataset.sort("length")
        for part in (corpus.train, corpus.validation)
    )
    collate = PackedCollator("sequence")
    batches = DataLoader(train.select_columns(columns), recipe.training.batch_size, shuffle=True, collate_fn=collate)
    validation_batches = DataLoader(validation.select_columns(columns), 128, collate_fn=collate)
    counts = Counter(example.label for example in corpus.train)
    weights = class_weights("sqrt_inverse", {label: counts[label] for label in corpus.labels})
    loss = ClassificationLoss(weights, gamma=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    warm_up = EPOCHS * len(batches) // 0.1
    course, lowest, waited = Course(), float("inf"), 0
    model.train()
    with TokenMasker.attach(model, backbone.tokenizer, TokenMaskConfig(p=0.1), seed=recipe.seed):
        for _ in range(EPOCHS):
            for batch in batches:
                start = time.process_time()
                optimizer.param_groups[0]["lr"] = course.rate = RATE * course.steps / warm_up
                labels = batch.pop("labels")
                loss(model(**batch), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                course.steps += 1
                course.cpu_seconds += time.process_time() - start
                if course.steps == limit:
                    break
            found, macro_f1 = validate(model, validation_batches, loss)
            # dropout stays off from here on; masking, and packed rows as in training, do not
            model.training = find_embedding(model).training = True
            if course.score(macro_f1):
                break
            lowest, waited = (found, 0) if found < lowest - LESS else (lowest, waited + 1)
            if waited == patience or course.steps == limit:
                course.ended = "limit" if course.steps == limit else "patience"
                break
    return course


@torch.inference_mode()
def validate(model: Any, batches: DataLoader, loss: ClassificationLoss) -> tuple[float, float]:
    """Return loss and macro-F1."""
    model.eval()
    gold, found, total = [], [], 0.0
    for batch in batches:
        labels = batch.pop("labels")
        output = model(**batch)
        total += float(loss(output, labels)) * len(labels)
        gold += labels.tolist()
        found += output.logits.argmax(-1).tolist()
    return total / len(gold), float(f1_score(gold, found, average="macro"))


def table(pairs: Sequence[tuple[Course, Course]]) -> dict[str, tuple[list[float], str]]:
    """Return the rows for `workload.report`."""
    missed = sum(not other.reached for _, other in pairs)
    bound = f" (a lower bound: in {missed} of {len(pairs)} runs they do not get there)" if missed else ""
    ends = ", ".join(sorted({other.ended for _, other in pairs}))
    return {
        f"steps of the recipe to {TARGET:.2f} validation macro-F1": ([float(own.steps) for own, _ in pairs], ""),
        f"steps of the authors' protocol until its end ({ends})": ([float(other.steps) for _, other in pairs], ""),
        "validation macro-F1 that they reach": ([other.best for _, other in pairs], ""),
        f"their steps to the recipe's{bound}": ([other.steps / own.steps for own, other in pairs], "10"),
        "their learning rate at the end": ([other.rate for _, other in pairs], ""),
        "CPU seconds of the recipe's steps": ([own.cpu_seconds for own, _ in pairs], ""),
        "CPU seconds of theirs": ([other.cpu_seconds for _, other in pairs], ""),
    }


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--no-patience", action="store_true", help="let theirs go on, up to --factor times our steps")
    parser.add_argument("--factor", type=int, default=10)
    arguments = parser.parse_args()
    if not os.environ.get("TOKMASK_DATA"):
        parser.error("TOKMASK_DATA, the folder that holds trec6/, is not set")
    pairs = []
    for seed in arguments.seeds:
        recipe = Recipe.load("trec/minilm", [f"data.max_train={TEXTS}", f"seed={seed}"])
        own = ours(recipe)
        if not own.reached:
            raise SystemExit(f"the recipe itself stays at {own.best:.3f} with seed {seed}, below {TARGET}")
        patience, limit = (None, arguments.factor * own.steps) if arguments.no_patience else (PATIENCE, None)
        pairs.append((own, theirs(recipe, patience, limit)))
        print(f"seed {seed}: {pairs[-1]}", flush=True)
    runs = [{"ours": asdict(own), "theirs": asdict(other)} for own, other in pairs]
    runs = [{"seed": seed, **run} for seed, run in zip(arguments.seeds, runs, strict=True)]
    result = {"target": TARGET, "training_texts": TEXTS, "patience": not arguments.no_patience, "runs": runs}
    report("same_score_bound" if arguments.no_patience else "same_score", result, table(pairs))


if __name__ == "__main__":
    main()
