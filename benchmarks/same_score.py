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
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from workload import StepTimes, report

from tokmask_peft.data.corpus import count_labels, load_corpus
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training.losses import class_weights
from tokmask_peft.training.train import observe_training

sys.path.append(str(Path(__file__).parent / "studies"))  # the authors' protocol is that of the study of confounds
from confounds_training import EncoderLearner, Protocol, RunSpec, Setting, encode_texts, stop_epoch, train

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
        self.best, self.reached = max(self.best, macro_f1), macro_f1 >= TARGET
        if self.reached:
            self.ended = "target"
        return self.reached


class Watch(StepTimes):
    """Scores on validation every few steps, and stops at the target."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self.course = course

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Stop the training at the target."""
        self.course.steps, self.course.cpu_seconds = state.global_step, sum(self.seconds)
        control.should_training_stop = self.course.score(metrics["eval_f1_macro"])


def ours(recipe: Recipe) -> Course:
    """Train by the recipe until the target is reached."""
    course = Course()

    def watch(trainer: Any, mask: Any) -> list[TrainerCallback]:
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, EVERY
        return [Watch(course)]

    with tempfile.TemporaryDirectory() as folder:
        observe_training(recipe, Path(folder), watch, quiet=True)
    return course


def theirs(recipe: Recipe, limit: int | None) -> Course:
    """Train by the authors' protocol until the target is reached, or patience or else `limit` steps end it."""
    setting = Setting("minilm", "trec", TEXTS, 0, None, EPOCHS, RATE, recipe.training.batch_size, PATIENCE, LESS)
    run = RunSpec("encoder", "authors", 0.1, recipe.seed, Protocol(max_length=recipe.data.max_length), setting)
    corpus, course = load_corpus(recipe.data.expanded(), recipe.seed), Course()
    learner = EncoderLearner(run, "sequence", corpus.labels, bf16=False)  # in bf16 updates this small would be lost
    parts = {
        name: encode_texts(texts, learner.tokenizer, "sequence", corpus.labels, run.protocol)
        for name, texts in {"train": corpus.train, "validation": corpus.validation}.items()
    }
    weights = class_weights("sqrt_inverse", count_labels(corpus.train))

    def stopped(epochs: list[dict[str, Any]]) -> bool:
        course.steps += -(-len(corpus.train) // setting.batch_size)
        course.cpu_seconds += epochs[-1]["seconds"][0]
        course.rate = epochs[-1]["learning_rate"]
        if course.score(epochs[-1]["validation"]["f1_macro"]):
            return True
        over = limit is not None and course.steps >= limit
        if limit is None:
            over = stop_epoch([epoch["validation"]["loss"] for epoch in epochs], setting) is not None
        course.ended = ("patience" if limit is None else "limit") if over else course.ended
        return over

    train(learner, run, parts, weights, corpus.labels, stopped)
    return course


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
        pairs.append((own, theirs(recipe, arguments.factor * own.steps if arguments.no_patience else None)))
        print(f"seed {seed}: {pairs[-1]}", flush=True)
    runs = [
        {"seed": seed, "ours": asdict(own), "theirs": asdict(other)}
        for seed, (own, other) in zip(arguments.seeds, pairs, strict=True)
    ]
    missed = sum(not other.reached for _, other in pairs)
    bound = f" (a lower bound: in {missed} of {len(pairs)} runs they do not get there)" if missed else ""
    ends = ", ".join(sorted({other.ended for _, other in pairs}))
    table: dict[str, list[float]] = {
        f"steps of the recipe to {TARGET:.2f} validation macro-F1": [own.steps for own, _ in pairs],
        f"steps of the authors' protocol until its end ({ends})": [other.steps for _, other in pairs],
        "validation macro-F1 that they reach": [other.best for _, other in pairs],
        f"their steps to the recipe's{bound}": [other.steps / own.steps for own, other in pairs],
        "their learning rate at the end": [other.rate for _, other in pairs],
        "CPU seconds of the recipe's steps": [own.cpu_seconds for own, _ in pairs],
        "CPU seconds of theirs": [other.cpu_seconds for _, other in pairs],
    }
    rows = {what: (values, "10" if what.startswith("their steps") else "") for what, values in table.items()}
    result = {"target": TARGET, "training_texts": TEXTS, "patience": not arguments.no_patience, "runs": runs}
    report("same_score_bound" if arguments.no_patience else "same_score", result, rows)


if __name__ == "__main__":
    main()
