"""Two processes with different room decide on gradient checkpointing alike: the one with the least decides."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from tiny_models import build

from tokmask_peft.console import Decision
from tokmask_peft.model.memory.estimate import Memory
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training import memory as fits
from tokmask_peft.training.memory import Lengths, tightest

ROOMS = {"plenty": Memory(2**40, "a big GPU"), "none": Memory(1, "a full GPU")}


def decide(room, checkpointing="auto"):
    """Return the recipe's key, the decision and the warning of one process with so much room."""
    model, _ = build("bert", "sequence", 3)
    backbone = SimpleNamespace(model=model, quantization="none", dtype=torch.float32)
    model_section = {"backbone": "x", "gradient_checkpointing": checkpointing}
    recipe = Recipe.model_validate({"name": "x", "model": model_section, "data": {"task": "sequence", "builtin": True}})
    fits.device_memory = lambda _: ROOMS[room]
    lengths = Lengths([40] * 32, ([40] * 32,))
    decided, decision, warning = fits.before_training(recipe, backbone, "padded", lengths, torch.device("cpu"))
    return decided.model.gradient_checkpointing, decision, warning


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    """Put back what `decide` puts in place, and begin without FSDP."""
    monkeypatch.setattr(fits, "device_memory", fits.device_memory)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)


def worker(rank, rooms, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    on, decision, warning = decide(rooms[rank])
    Path(f"{folder}/{rank}.json").write_text(json.dumps([on, decision.choice, decision.reason, warning]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in test_masking_ranks


def test_the_process_with_the_least_room_decides_for_all(tmp_path):
    forked.two(worker, ("plenty", "none"), str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    on, choice, reason, warning = first
    assert (on, choice) == (True, "on")
    assert reason.endswith("a full GPU has 0 MiB free (process 1)")
    assert "It may run out of memory" in warning, "the first process prints what the second finds"


def test_of_equals_the_first_decides():
    off, also, on = (Decision("checkpointing", *told) for told in (("off", "a"), ("off", "b"), ("on", "c")))
    assert tightest([(off, None), (also, None)]) == (off, None)
    assert tightest([(off, None), (also, "full")])[1] == "full"
    decision, _ = tightest([(off, None), (on, None), (on, None)])
    assert (decision.choice, decision.reason) == ("on", "c (process 1)")


@pytest.mark.parametrize(
    ("room", "sharded", "asked", "reason", "warns"),
    [
        ("none", False, "auto", "a full GPU has 0 MiB free", True),
        ("plenty", False, "auto", "a big GPU has 1024.0 GiB free", False),
        ("none", True, "auto", "; shards are not counted", False),
        ("none", True, True, "set in the recipe", False),
    ],
)
def test_one_process_alone_and_its_shards(monkeypatch, room, sharded, asked, reason, warns):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(sharded).lower())
    on, decision, warning = decide(room, asked)
    assert (on, decision.choice == "on") == (room == "none", room == "none")
    assert decision.reason.endswith(reason)
    assert (warning is not None) == warns
