"""Callbacks, driven as the Trainer drives them."""

import io
import json
import os
import re
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from tokmask_peft.console import STOP_SIGNALS
from tokmask_peft.errors import RunError
from tokmask_peft.training import callbacks
from tokmask_peft.training.callbacks import (
    AdapterMoves,
    LogFile,
    Patience,
    ProgressDisplay,
    Resuming,
    StepClock,
    StopOnSignal,
)
from tokmask_peft.training.trainer import SeededLengthGrouping


def state(step, main=True):
    return TrainerState(global_step=step, epoch=step / 10, is_world_process_zero=main)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestLogFile:
    def run(self, path, first, last):
        log = LogFile(path)
        log.on_train_begin(None, state(first), TrainerControl())
        for step in range(first + 1, last + 1):
            log.on_log(None, state(step), TrainerControl(), logs={"loss": step / 2})

    def test_a_line_per_logged_step_and_a_resumed_run_drops_those_after_its_checkpoint(self, tmp_path):
        path = tmp_path / "log.jsonl"
        self.run(path, 0, 3)
        assert lines(path) == [{"step": n, "epoch": n / 10, "loss": n / 2} for n in (1, 2, 3)]
        path.write_text(path.read_text() + '{"step": 4, "lo', encoding="utf-8")  # the run is killed
        self.run(path, 2, 5)
        assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5]

    def test_a_loss_that_is_not_a_number_is_still_json(self, tmp_path):
        path = tmp_path / "log.jsonl"
        log = LogFile(path)
        log.on_log(None, state(1), TrainerControl(), logs={"loss": float("nan"), "grad_norm": float("inf"), "p": 0.1})
        assert "NaN" not in path.read_text()
        assert lines(path) == [{"step": 1, "epoch": 0.1, "loss": None, "grad_norm": None, "p": 0.1}]

    def test_only_the_main_process_writes(self, tmp_path):
        log = LogFile(tmp_path / "log.jsonl")
        log.on_train_begin(None, state(0, main=False), TrainerControl())
        log.on_log(None, state(1, main=False), TrainerControl(), logs={"loss": 1.0})
        assert not (tmp_path / "log.jsonl").exists()


def handlers():
    return [signal.getsignal(number) for number in STOP_SIGNALS]


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # let the interpreter run the handler


class TestStopOnSignal:
    @pytest.fixture(autouse=True)
    def _python_handlers(self):
        before = handlers()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)

    @pytest.mark.usefixtures("in_terminal")
    @pytest.mark.parametrize("number", STOP_SIGNALS)
    def test_the_first_signal_asks_for_a_checkpoint_and_the_end(self, number):
        before = handlers()
        with StopOnSignal() as stop:
            assert handlers() != before
            control = TrainerControl()
            stop.on_step_end(None, state(1), control)
            assert (stop.stopped, control.should_save, control.should_training_stop) == (False, False, False)
            send(number)
            assert stop.stopped
            assert handlers() == before  # so that the second signal stops at once
            stop.on_step_end(None, state(2), control)
            assert (control.should_save, control.should_training_stop) == (True, True)
        assert handlers() == before

    def test_the_second_signal_stops_at_once(self):
        with StopOnSignal() as stop:
            send(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
        assert stop.stopped

    def test_under_nohup_the_end_of_the_terminal_stops_nothing(self):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopOnSignal() as stop:
            send(signal.SIGHUP)
            assert not stop.stopped
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    def test_in_another_thread_it_leaves_the_signals_alone(self):
        before, seen = handlers(), []

        def train():
            with StopOnSignal() as stop:
                seen.append((handlers() == before, stop.stopped))

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        assert seen == [(True, False)]


class Adapted(torch.nn.Module):
    """A frozen layer with a LoRA pair, and a head that learns whatever happens."""

    def __init__(self):
        super().__init__()
        self.lora_A = torch.nn.Parameter(torch.ones(2, 3))
        self.lora_B = torch.nn.Parameter(torch.zeros(3, 2))
        self.head = torch.nn.Parameter(torch.zeros(3))
        self.frozen_lora_B = torch.nn.Parameter(torch.zeros(3), requires_grad=False)

    def step(self, adapter):
        with torch.no_grad():
            self.head += 1
            if adapter:
                self.lora_B += 0.1


def schedule(rate):
    return SimpleNamespace(get_last_lr=lambda: [rate])


class TestAdapterMoves:
    def drive(self, moves, steps, evaluate_every=None, rate=1e-3):
        guard, model = AdapterMoves(), Adapted()
        guard.on_evaluate(None, state(0), TrainerControl(), model=model)
        for step in range(1, steps + 1):
            model.step(moves(step))
            guard.on_step_end(None, state(step), TrainerControl(), model=model, lr_scheduler=schedule(rate))
            if evaluate_every and step % evaluate_every == 0:
                guard.on_evaluate(None, state(step), TrainerControl(), model=model)

    def test_an_adapter_that_moves_passes(self):
        self.drive(lambda step: True, 20, evaluate_every=4)
        self.drive(lambda step: step % 3 == 0, 20)  # a single step without a move is harmless

    def test_an_adapter_that_stands_still_fails(self):
        with pytest.raises(RunError, match=r"model\.quantization=none") as caught:
            self.drive(lambda step: False, AdapterMoves.STEPS)
        assert (caught.value.code, caught.value.fields["weights"]) == ("adapter-stands-still", ["lora_B"])

    def test_steps_that_overflow_in_fp16_do_not_count_until_they_are_too_many(self):
        guard, model = AdapterMoves(), Adapted()
        given = {"model": model, "lr_scheduler": schedule(1e-3)}
        skipped, taken = SimpleNamespace(step_was_skipped=True), SimpleNamespace(step_was_skipped=False)
        guard.on_evaluate(None, state(0), TrainerControl(), model=model)
        for optimizer in [*[skipped] * 20, taken, *[skipped] * 24]:
            guard.on_step_end(None, state(1), TrainerControl(), optimizer=optimizer, **given)
        with pytest.raises(RunError, match="precision=fp32") as caught:
            guard.on_step_end(None, state(1), TrainerControl(), optimizer=skipped, **given)
        assert (caught.value.code, caught.value.fields["steps"]) == ("fp16-overflows", AdapterMoves.OVERFLOWS)

    @pytest.mark.parametrize(("last_move", "every"), [(0, 1), (8, 8)])
    def test_neither_frequent_nor_later_evaluations_hide_it(self, last_move, every):
        with pytest.raises(RunError):
            self.drive(lambda step: step <= last_move, 20, evaluate_every=every)

    def test_at_a_learning_rate_of_zero_nothing_need_move(self):
        self.drive(lambda step: False, 10, rate=0.0)


def test_the_clock_counts_steps_and_their_time_only(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = StepClock()
    for step in (1, 2):
        clock.on_step_begin(None, state(step), TrainerControl())
        clock.on_step_end(None, state(step), TrainerControl())
    assert (clock.seconds, clock.steps) == (5.0, 2)


def test_patience_goes_on_where_the_checkpoint_was(tmp_path):
    args = TrainingArguments(
        str(tmp_path), eval_strategy="epoch", save_strategy="epoch", metric_for_best_model="f1", use_cpu=True,
        load_best_model_at_end=True, greater_is_better=True, report_to="none",
    )  # fmt: skip
    first, then, control = Patience(2), state(10), TrainerControl()
    first.on_train_begin(args, then, control)
    then.best_metric = 0.5
    first.on_evaluate(args, then, control, metrics={"eval_f1": 0.4})
    assert not control.should_training_stop
    then.stateful_callbacks["Patience"] = first.state()
    then.save_to_json(tmp_path / "state.json")  # as checkpoints do

    resumed, later = Patience(2), TrainerState.load_from_json(tmp_path / "state.json")
    resumed.on_train_begin(args, later, control)
    assert not control.should_training_stop
    resumed.on_evaluate(args, later, control, metrics={"eval_f1": 0.4})
    assert control.should_training_stop, "the second evaluation without a better score"


def test_a_damaged_checkpoint_is_not_kept_in_place_of_later_ones(tmp_path):
    for name in ("checkpoint-10", "checkpoint-20", "checkpoint-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").touch()
    then = TrainerState(global_step=10, max_steps=40, best_global_step=10)
    Resuming().on_train_begin(SimpleNamespace(output_dir=tmp_path), then, TrainerControl())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-old"]
    assert then.best_model_checkpoint == str(tmp_path / "checkpoint-10")


def test_what_is_left_of_an_epoch_of_two_processes_has_its_own_order():
    def loader():
        sampler = SeededLengthGrouping(LengthGroupedSampler(2, lengths=list(range(1, 25))), seed=1)
        rows = DataLoader(list(range(24)), batch_size=2, sampler=sampler)
        return prepare_data_loader(rows, num_processes=2, process_index=1)

    whole, resumed = loader(), loader()
    whole.set_epoch(3)
    wanted = [batch.tolist() for batch in whole]
    Resuming().on_epoch_begin(None, TrainerState(epoch=3 + 2 / 6), TrainerControl(), train_dataloader=resumed)
    rest = skip_first_batches(resumed, 2)
    rest.set_epoch(3)  # as the Trainer does it
    assert [batch.tolist() for batch in rest] == wanted[2:]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_step_and_time_left_are_always_on_one_line(width, monkeypatch):
    clock = iter(range(0, 10**9, 7))
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out, force_terminal=True, width=width, color_system=None))
    state = TrainerState(max_steps=40_000, global_step=20_000)
    display.on_train_begin(None, state, None)
    logs = {"loss": 0.5321, "masking_rate": 0.1, "eval_loss": 1.25, "eval_f1_macro": 0.61234}
    for step in (20_001, 20_002, 30_000):
        state.global_step = step
        display.on_step_end(None, state, None)
        display.on_log(None, state, None, logs=logs)
        display._progress.refresh()
    display.close()
    lines = [line.rstrip() for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", out.getvalue()) if line.strip()]
    assert max(map(len, lines)) <= width
    assert all("left" in line and "/40000" in line for line in lines), lines
    last = next(line for line in reversed(lines) if "step 30000/40000" in line)
    assert re.search(r"\d+:\d\d:\d\d left", last)
    assert ("loss 0.5321" in last, "val loss" in last) == (True, width == 200)
    assert ("val F1 0.6123" in last) == (width >= 80)


def test_without_a_terminal_a_line_has_step_and_time_left():
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out, width=120))
    state = TrainerState(max_steps=10, global_step=0, epoch=0.5)
    display.on_train_begin(None, state, None)
    state.global_step = 5
    display.on_log(None, state, None, logs={"loss": 0.5})
    assert re.fullmatch(r"step 5/10  0:00:00 left  epoch 0.50  loss 0.5000\n", out.getvalue())
