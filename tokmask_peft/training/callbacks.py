"""Trainer callbacks of a run: log file, stopping on Ctrl-C, early stopping, timing, progress, and a guard."""

import contextlib
import json
import shutil
import time
from datetime import timedelta
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from tokmask_peft.console import stop_signals
from tokmask_peft.errors import RunError, read_log, write_whole
from tokmask_peft.training.environment import peak_memory


class LogFile(TrainerCallback, ExportableState):
    """Write a JSON line per logged step to `log.jsonl`; a resumed run continues after its checkpoint's lines.

    Each checkpoint records how many `processes` saved it, so that a missing random state of one is noticed.
    """

    def __init__(self, path: Path, processes: int = 1) -> None:
        self.path, self.processes, self._start = path, processes, 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {}, "processes": self.processes}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the lines after the checkpoint that the run resumes from, and the summaries of earlier parts."""
        state.stateful_callbacks.setdefault(type(self).__name__, {})  # one of an older version has no entry
        self._start = state.global_step
        if state.is_world_process_zero:
            rows = read_log(self.path)
            kept = [row for row in rows if row["step"] <= state.global_step and "train_runtime" not in row]
            write_whole(self.path, "".join(f"{json.dumps(row)}\n" for row in kept))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Append what was logged, null if not finite; a summary that begins at a resume says so (`since_step`)."""
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "epoch": state.epoch, **logs}
            if self._start and "train_runtime" in logs:
                line["since_step"] = self._start
            bad = {key for key, value in line.items() if isinstance(value, float) and not isfinite(value)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | dict.fromkeys(bad), allow_nan=False) + "\n")


class StopOnSignal(TrainerCallback):
    """Finish the step, save a checkpoint and stop on Ctrl-C (or SIGTERM, SIGHUP); the second time stop at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._handling = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Handle the signals; only the main thread can."""
        self._handling.enter_context(stop_signals(self._ask))
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.close()

    def _ask(self, *_: object) -> None:
        self.stopped = True
        self._handling.close()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask the Trainer for a checkpoint and the end; of several processes, all stop if one was asked to."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            asked = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self.stopped = bool(asked)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the Trainer from scoring an interrupted epoch: that moves the random state and might win."""
        ended = state.global_step >= state.max_steps or state.epoch is None or float(state.epoch).is_integer()
        if self.stopped and not ended:
            control.should_evaluate = control.should_save = False


class Patience(EarlyStoppingCallback):
    """Early stopping whose count survives a resume: the Trainer's own starts again at 0."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_train_begin(args, state, control)
        stored = state.stateful_callbacks.get(type(self).__name__, {})
        self.early_stopping_patience_counter = stored.get("attributes", {}).get("early_stopping_patience_counter", 0)
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience


class Resuming(TrainerCallback):
    """What the Trainer leaves undone if a run is resumed, so that it goes on and ends as one that was not interrupted.

    A run that had ended makes no further step, which `OrderedEvalTrainer` sees to, and is not scored twice.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look for the best checkpoint in the run's own folder: a saved path may be wrong. Clear later ones."""
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")
        # one that is damaged would count as the newest, and be kept in place of those that follow
        for path in Path(args.output_dir).glob("checkpoint-*") if state.is_world_process_zero else ():
            if path.name[11:].isdecimal() and int(path.name[11:]) > state.global_step:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        control.should_training_stop |= state.global_step >= state.max_steps

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Choose the order of an epoch: in several processes accelerate 1.15 does not, if it begins within one."""
        train_dataloader.set_epoch(int(state.epoch or 0))

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if any(row["step"] == state.global_step and "eval_loss" in row for row in state.log_history):
            control.should_evaluate = control.should_save = False


class StepClock(TrainerCallback):
    """Add up the `seconds` spent in optimizer `steps`; `loading` is the peak of memory before the first, in bytes."""

    def __init__(self) -> None:
        self.seconds, self.steps, self._start = 0.0, 0, 0.0
        self.loading: int | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.loading is None:
            self.loading = peak_memory(args.device)["bytes"]
            if args.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


class AdapterMoves(TrainerCallback):
    """Fail if adapter weights stop moving after an evaluation, or if every step in fp16 overflows.

    4-bit layers that repack themselves for inference have cut off every gradient to the adapter while the loss still
    fell, because the head learned. In fp16, a step that overflows is skipped, and the next scales the loss by half,
    which ends soon unless the backbone itself overflows.
    """

    STEPS = 3
    OVERFLOWS = 25  # in a row; the scale has come down from 2**16

    def __init__(self) -> None:
        self._at_evaluation: dict[str, torch.Tensor] | None = None
        self._steps = self._overflows = 0

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        """Remember the adapter, unless a comparison is still due."""
        if self._at_evaluation is None:
            trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
            self._at_evaluation = {name: value.detach().clone() for name, value in trained if "lora_B" in name}
            self._steps = 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """A few steps later, compare; RunError if weights did not move."""
        if getattr(given.get("optimizer"), "step_was_skipped", False):
            self._overflows += 1
            if self._overflows >= self.OVERFLOWS:
                problem = f"the gradients of {self._overflows} steps in a row overflow in fp16, and nothing is learned"
                raise RunError(f"{problem}. Set model.precision=fp32.", code="fp16-overflows", steps=self._overflows)
            return
        self._overflows = 0
        rates = given["lr_scheduler"].get_last_lr() if given.get("lr_scheduler") else [1.0]
        if self._at_evaluation is None or max(rates) == 0.0:
            return
        self._steps += 1
        if self._steps < self.STEPS:
            return
        before, self._at_evaluation = self._at_evaluation, None
        now = dict(given["model"].named_parameters())
        if still := [name for name, value in before.items() if torch.equal(value, now[name].detach())]:
            problem = f"{len(still)} of {len(before)} adapter weights did not move in {self.STEPS} steps after an "
            problem += f"evaluation (first: {still[0]}): no gradient reaches them"
            remedy = "Try model.quantization=none, and please report the backbone and the versions in result.json."
            state = "The last good state is in the newest checkpoint"
            raise RunError(f"{problem}. {state}. {remedy}", code="adapter-stands-still", weights=still)


class ProgressDisplay(TrainerCallback):
    """Show the step, the time left, and as many of loss, validation F1 and masking rate as fit on the line."""

    NAMES: ClassVar = {
        "loss": "loss",
        "eval_f1_macro": "val F1",
        "eval_f1_entities": "entity F1",
        "masking_rate": "p",
        "eval_loss": "val loss",
    }

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: Any = None
        self._shown: dict[str, str] = {}
        self._began, self._first, self._bar = 0.0, 0, max(4, min(40, console.width - 70))

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began, self._first = time.monotonic(), state.global_step
        if not state.is_world_process_zero or self.console.quiet or not self.console.is_terminal:
            return
        bar = BarColumn(bar_width=self._bar)
        self._progress = Progress(TextColumn("{task.description}"), bar, TextColumn("{task.fields[shown]}"),
                                  console=self.console)  # fmt: skip
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, shown="")
        self._update(state)
        self._progress.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._update(state)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or self.console.quiet:
            return
        new = {name: f"{logs[key]:.4f}" for key, name in self.NAMES.items() if isinstance(logs.get(key), float)}
        self._shown.update(new)
        if self._progress is not None:
            self._update(state)
        elif new:
            figures = "  ".join(f"{name} {value}" for name, value in new.items())
            self.console.print(f"{self._place(state)}  epoch {state.epoch or 0:.2f}  {figures}")

    def _place(self, state: TrainerState) -> str:
        """Return the step, and the time that the rest takes if it goes on as before, evaluations included."""
        done, left = state.global_step - self._first, "?"
        if done > 0:
            seconds = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)
            left = str(timedelta(seconds=round(seconds)))
        return f"step {state.global_step}/{state.max_steps}  {left} left"

    def _update(self, state: TrainerState) -> None:
        if self._progress is None:
            return
        place, figures = self._place(state), ""
        room = self.console.width - len(place) - self._bar - 2
        for part in (f"{name} {self._shown[name]}" for name in self.NAMES.values() if name in self._shown):
            figures += f" {part} " if len(figures) + len(part) + 2 <= room else ""
        self._progress.update(self._task, completed=state.global_step, description=place, shown=figures.strip())

    def close(self) -> None:
        """Close the bar, also after an exception."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
