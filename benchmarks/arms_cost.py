"""What each regularizer adds to the CPU time of an optimizer step.

    TOKMASK_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/arms_cost.py      # ten minutes

The arms are those of `tokmask sweep --arms`, trained as its runs are, on 500 TREC questions, in interleaved rounds of
one process; without TOKMASK_DATA on the built-in posts, and then nothing is written. Times are CPU times, so that other
work on the machine matters little; the first steps of a round are left out. NEFTune's arms pad the batches that the
others pack; a row shows what padding alone costs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

from workload import StepTimes, interleaved, ratio, report

from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.study.plan import MASK, NONE, REGULARIZERS, Arm, regularizer_arms
from tokmask_peft.study.results import Row
from tokmask_peft.training.train import observe_training

STEPS, FIRST, ROUNDS = 30, 6, 3
PADDED = f"{NONE}, padded"


def step_seconds(arm: Arm, *changes: str) -> float:
    """Train an arm, with changes to its recipe, for some steps and return the median CPU seconds of one."""
    real = bool(os.environ.get("TOKMASK_DATA"))
    data = ["data.max_train=500"] if real else ["data.task=sequence"]
    recipe = Recipe.load(
        "trec/minilm" if real else "quickstart", [*arm.overrides, *data, f"training.max_steps={STEPS}", *changes]
    )
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        observe_training(recipe, Path(folder), lambda *_: [times], quiet=True)
    return statistics.median(times.seconds[FIRST:])


def main() -> None:
    """Measure, print the table and write the JSON."""
    names = [NONE, *REGULARIZERS, MASK, *(f"{MASK}+{name}" for name in REGULARIZERS)]
    arms = {
        Row((), arm.regularizers, float(arm.p)).label: arm
        for arm in regularizer_arms(names, ["0.1"], "padding_free", [])
    }
    runs = {label: partial(step_seconds, arm) for label, arm in arms.items()}
    runs[PADDED] = partial(step_seconds, arms[NONE], "training.batching=padded")
    found = interleaved(runs, ROUNDS)
    rows = {label: (ratio(found, label, NONE), "") for label in found if label != NONE}
    result = {"steps": STEPS - FIRST, "cpu_seconds_per_step": found}
    report("arms_cost", result, rows, write=bool(os.environ.get("TOKMASK_DATA")))


if __name__ == "__main__":
    main()
