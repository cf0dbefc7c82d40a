from types import SimpleNamespace

import pytest
import torch

from tokmask_peft.errors import RunError
from tokmask_peft.training.callbacks import StepClock
from tokmask_peft.training.environment import check_sharding, peak_memory


def refused():
    with pytest.raises(RunError, match="fsdp_version: 2") as caught:
        check_sharding()
    return caught.value.code, caught.value.fields["chosen"]


def test_only_the_second_fsdp_is_taken(monkeypatch):
    check_sharding()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert refused() == ("sharding", "FSDP 1")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharding()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert refused() == ("sharding", "DeepSpeed")


def test_the_peaks_of_loading_and_of_training_are_both_reported(monkeypatch):
    gpu, forgotten = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 100 if forgotten else 900)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    clock = StepClock()
    for _ in range(2):  # a second time after memory ran out
        clock.on_train_begin(SimpleNamespace(device=gpu), None, None)
    assert forgotten == [gpu]
    found = peak_memory(gpu, clock.loading)
    assert (found["bytes"], found["loading"], found["training"]) == (900, 900, 100)


def test_a_cpu_reports_the_peak_of_training_if_it_is_the_higher_one():
    cpu = torch.device("cpu")
    now = peak_memory(cpu)["bytes"]
    lower, higher = peak_memory(cpu, 1), peak_memory(cpu, 2**50)
    assert lower["training"] == lower["bytes"] >= now
    assert (higher["training"], higher["bytes"]) == (None, 2**50)
