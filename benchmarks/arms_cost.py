"""What each arm of a sweep adds to the CPU time of an optimizer step, and to the memory of the process.

    TOKMASK_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/arms_cost.py         # regularizers: ten minutes
    TOKMASK_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/arms_cost.py ways    # ways to mask, and two views

The arms are those of `tokmask sweep --arms`, trained as its runs are, on 500 TREC questions, in interleaved rounds of
one process; without TOKMASK_DATA on the built-in posts, and then nothing is written. Times are CPU times, so that other
work on the machine matters little; the first steps of a round are left out. Memory is the most that the process held
during the training (Linux), without what it held before. NEFTune's arms pad the batches that the others pack; a row
shows what padding alone costs.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from workload import StepTimes, interleaved, ratio, report

from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.study.plan import MASK, MASKED, NONE, REGULARIZERS, Arm, regularizer_arms
from tokmask_peft.study.results import Row
from tokmask_peft.training.train import observe_training

STEPS, FIRST, ROUNDS = 30, 6, 3
PADDED = f"{NONE}, padded"


class Peak(StepTimes):
    """Keeps the resident memory of the process when training begins and its peak until training ends, in bytes."""

    held = most = 0

    @staticmethod
    def read(name: str) -> int:
        """Return a figure of /proc/self/status."""
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Give back what is free, and reset the peak."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.held = self.read("VmRSS")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Read the peak."""
        self.most = self.read("VmHWM")


def step_seconds(peaks: list[float], arm: Arm, *changes: str) -> float:
    """Train an arm, with changes to its recipe, for some steps and return the median CPU seconds of one.

    `peaks` takes the bytes that the training held at most.
    """
    real = bool(os.environ.get("TOKMASK_DATA"))
    data = ["data.max_train=500"] if real else ["data.task=sequence"]
    recipe = Recipe.load(
        "trec/minilm" if real else "quickstart", [*arm.overrides, *data, f"training.max_steps={STEPS}", *changes]
    )
    times = Peak()
    with tempfile.TemporaryDirectory() as folder:
        observe_training(recipe, Path(folder), lambda *_: [times], quiet=True)
    peaks.append(float(times.most - times.held))
    return statistics.median(times.seconds[FIRST:])


def main() -> None:
    """Measure, print the table and write the JSON."""
    names = [NONE, *REGULARIZERS, MASK, *(f"{MASK}+{name}" for name in REGULARIZERS)]
    if ways := sys.argv[1:] == ["ways"]:
        names = [NONE, MASK, *MASKED, "views", f"{MASK}+views"]
    arms = {
        Row((), arm.regularizers, float(arm.p)).label: arm
        for arm in regularizer_arms(names, ["0.1"], "padding_free", [])
    }
    peaks: dict[str, list[float]] = {label: [] for label in (*arms, PADDED)}
    runs = {label: partial(step_seconds, peaks[label], arm) for label, arm in arms.items()}
    runs[PADDED] = partial(step_seconds, peaks[PADDED], arms[NONE], "training.batching=padded")
    found = interleaved(runs, ROUNDS)
    rows = {label: (ratio(found, label, NONE), "") for label in found if label != NONE}
    rows |= {f"{label}: memory": (ratio(peaks, label, NONE), "") for label in found if label != NONE}
    result: dict[str, Any] = {"load_average": os.getloadavg()}  # of other work too: a shared machine gives wide ranges
    result |= {"steps": STEPS - FIRST, "cpu_seconds_per_step": found, "bytes_of_training": peaks}
    report("ways_cost" if ways else "arms_cost", result, rows, write=bool(os.environ.get("TOKMASK_DATA")))


if __name__ == "__main__":
    main()
