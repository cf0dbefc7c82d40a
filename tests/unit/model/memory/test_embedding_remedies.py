"""What is suggested of the embedding: where it lies, in how many bits, and whether a row of it is trained."""

import pytest
import torch
from measured import make_recipe
from tiny_models import build

from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.model.memory.estimate import Estimate, Room, Setting
from tokmask_peft.model.memory.suggestions import Able, remedies
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training import memory as fits
from tokmask_peft.training.memory import forecast, ways_out

GIB = 2**30
HERE = {"offload": 0, "8bit": GIB // 2, "resident": GIB}
TRAINED = {"masking.trainable_mask": False}


def counted(recipe):
    """Stand in for a backbone of 1 GiB besides its embedding of 1 GiB, which a trained row makes three."""
    Recipe.model_validate(recipe.model_dump())  # nothing is suggested that a recipe may not say
    embedding = HERE[recipe.model.embedding] + (2 * GIB if recipe.masking.trainable_mask else 0)
    layers = GIB // 8 if recipe.adapter.layers == "all" else GIB // 16
    return Estimate(GIB, embedding, 0, 0, layers, 0, 0, 0)


def offered(room, able, **sections):
    model = {"gradient_checkpointing": True, **sections.pop("model", {})}
    settings = {"training": {"batch_size": 1, "eval_batch_size": 1}, "data": {"max_length": 16}, **sections}
    return remedies(make_recipe("x", model={"quantization": "nf4", **model}, **settings), counted, room, able)


def test_not_to_train_the_mask_s_row_comes_with_what_it_makes_possible():
    trained, gpu = {"trainable_mask": True}, Able(gpu=True, movable=True, int8=True)
    enough = offered(Room(3 * GIB, "a GPU"), gpu, masking=trained)
    assert [(remedy.changes, remedy.fits) for remedy in enough] == [(TRAINED, True)]
    tight = offered(Room(int(1.3 * GIB), "a GPU"), gpu, masking=trained)
    assert [(remedy.changes, remedy.fits) for remedy in tight] == [
        (TRAINED, False),
        ({**TRAINED, "model.embedding": "offload"}, True),
        ({**TRAINED, "model.embedding": "8bit"}, False),
        ({**TRAINED, "adapter.layers": 0.5}, False),
    ]
    tighter = offered(Room(int(1.07 / 0.95 * GIB), "a GPU"), gpu, masking=trained)
    assert tighter[-1].fits
    assert tighter[-1].changes == {**TRAINED, "model.embedding": "offload", "adapter.layers": 0.5}
    fixed = offered(Room(GIB, "a GPU"), Able(gpu=True, movable=False, int8=True), masking=trained)
    assert not any("model.embedding" in remedy.changes for remedy in fixed)


@pytest.mark.parametrize(
    ("gpu", "int8", "embedding", "places"),
    [
        (True, True, "resident", ["offload", "8bit"]),
        (True, False, "resident", ["offload"]),
        (True, True, "offload", []),
        (False, True, "resident", ["8bit"]),
        (False, False, "resident", []),
        (True, True, "8bit", []),
    ],
)
def test_8_bits_where_bitsandbytes_runs(gpu, int8, embedding, places):
    able = Able(gpu=gpu, movable=True, int8=int8)
    found = offered(Room(GIB, "memory"), able, model={"embedding": embedding})
    assert [r.changes["model.embedding"] for r in found if "model.embedding" in r.changes] == places
    fixed = offered(Room(GIB, "memory"), Able(gpu=gpu, movable=False, int8=int8))
    assert not any("model.embedding" in remedy.changes for remedy in fixed)


def test_upper_layers_may_cost_score():
    found = {remedy.text: remedy.told for remedy in offered(Room(GIB, "RAM"), Able(gpu=False, movable=True))}
    assert found == {"adapter.layers=0.5": "adapter.layers=0.5: 2.1 GiB, still too much (may cost score)"}


@pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="needs bitsandbytes")
@pytest.mark.parametrize("runs", [True, False])
def test_of_a_real_backbone_with_a_trained_row(runs, monkeypatch):
    model, _ = build("bert")
    config = model.config
    config.vocab_size = 200_000
    if not runs:
        monkeypatch.setattr(fits, "bitsandbytes_problem", lambda device_type: "no")
    setting = Setting(config, "cpu", "none", torch.float32)
    training = {"batch_size": 1, "eval_batch_size": 1}
    masking, data = {"trainable_mask": True}, {"max_length": 16}
    recipe = make_recipe("x", masking=masking, data=data, training=training, model={"gradient_checkpointing": False})
    tight = forecast(recipe, setting, "padded", None, Room(GIB // 2, "RAM"))
    ways = ways_out(tight, setting, "padded", None)
    found = {remedy.text: remedy.total for remedy in ways}
    row = 200_000 * 32 * 4
    assert found["masking.trainable_mask=false"] < tight.largest.total - 0.9 * row
    both = "masking.trainable_mask=false model.embedding=8bit"
    assert (both in found) == runs
    if runs:
        assert found[both] < found["masking.trainable_mask=false"] - 0.6 * row
    assert "masking.trainable_mask=false model.embedding=offload" not in found  # the host is the device


def test_a_gpu_that_is_not_here_is_taken_for_one_of_bitsandbytes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fits, "bitsandbytes_problem", lambda device_type: f"not on {device_type}")
    assert fits.quantizes("cuda")
    assert not fits.quantizes("cpu")
    assert not fits.quantizes("mps")
