"""Trainer callbacks of a run: the log file, stopping on Ctrl-C, timing, and a guard against silent failures."""

from __future__ import annotations

import json
import signal
import threading
import time
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokmask_peft.errors import RunError


class LogFile(TrainerCallback):
    """Write a JSON line per logged step to `log.jsonl`; a resumed run goes on where its checkpoint was."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the lines after the checkpoint that the run resumes from."""
        if not state.is_world_process_zero:
            return
        old = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in old if _step(line) <= state.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Append what was logged."""
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "epoch": state.epoch, **logs}
            finite = {
                key: None if isinstance(value, float) and not isfinite(value) else value for key, value in line.items()
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")


def _step(line: str) -> float:
    """Return the step of a line; a line that a killed run left half-written belongs to none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


class StopOnSignal(TrainerCallback):
    """On the first Ctrl-C (or SIGTERM), finish the step, write a checkpoint and stop; on the second, stop at once.

    Attributes:
        stopped: whether the run was asked to stop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        """Take the signals over; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        self._give_back()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask the Trainer for a checkpoint and the end; of several processes all stop where one was told to."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            told = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
            self.stopped = bool(told)
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the Trainer from scoring a broken-off epoch: that moves the random state, and might become the best."""
        if self.stopped and state.epoch is not None and not float(state.epoch).is_integer():
            control.should_evaluate = False
            control.should_save = False


class Patience(EarlyStoppingCallback):
    """Early stopping that a resumed run goes on with where it was: the Trainer begins to count anew."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the count over from the checkpoint."""
        super().on_train_begin(args, state, control)
        stored = state.stateful_callbacks.get(type(self).__name__, {})
        self.early_stopping_patience_counter = stored.get("attributes", {}).get("early_stopping_patience_counter", 0)


class StepClock(TrainerCallback):
    """Add up the time spent in optimizer steps, without evaluation and saving.

    Attributes:
        seconds: in steps so far.
        steps: how many.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._start = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


class AdapterMoves(TrainerCallback):
    """Fail when adapter weights stop moving after an evaluation.

    4-bit layers that repack themselves for inference have cut every gradient to the adapter while the loss still
    fell, because the head went on learning. A run like that must not end as if it had succeeded.
    """

    STEPS = 3

    def __init__(self) -> None:
        self._at_evaluation: dict[str, torch.Tensor] | None = None
        self._steps = 0

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Remember the adapter, unless a comparison is still due."""
        if self._at_evaluation is not None:
            return
        self._at_evaluation = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and "lora_B" in name
        }
        self._steps = 0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """A few steps later, compare.

        Raises:
            RunError: weights that did not move.
        """
        if self._at_evaluation is None or (lr_scheduler is not None and max(lr_scheduler.get_last_lr()) == 0.0):
            return
        self._steps += 1
        if self._steps < self.STEPS:
            return
        before, self._at_evaluation = self._at_evaluation, None
        still = [
            name
            for name, parameter in model.named_parameters()
            if name in before and torch.equal(before[name], parameter.detach())
        ]
        if still:
            raise RunError(
                f"{len(still)} of {len(before)} adapter weights did not move in {self.STEPS} steps after an evaluation "
                f"(first: {still[0]}): no gradient reaches them. The last good state is in the newest checkpoint. "
                "Try model.quantization=none, and please report the backbone and the versions in result.json."
            )


class ProgressDisplay(TrainerCallback):
    """Show loss, masking rate, validation F1 and the remaining time."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar in a terminal."""
        if not state.is_world_process_zero or self.console.quiet or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, shown="")
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Show the newest figures."""
        if not state.is_world_process_zero or not logs or self.console.quiet:
            return
        names = {"loss": "loss", "masking_rate": "p", "eval_loss": "val loss", "eval_f1_macro": "val macro-F1"}
        new = {name: f"{logs[key]:.4f}" for key, name in names.items() if isinstance(logs.get(key), float)}
        self._shown.update(new)
        if self._progress is not None:
            shown = "  ".join(f"{name} {value}" for name, value in self._shown.items())
            self._progress.update(self._task, shown=shown)
        elif new:
            text = "  ".join(f"{name} {value}" for name, value in new.items())
            self.console.print(f"step {state.global_step}/{state.max_steps}  epoch {state.epoch or 0:.2f}  {text}")

    def close(self) -> None:
        """Close the bar, also when training raised."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self.close()
