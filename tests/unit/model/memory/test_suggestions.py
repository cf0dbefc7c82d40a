"""What is suggested if memory is short: for a run that does not fit, and wherever memory runs out."""

import pytest
import torch
from measured import make_recipe

from tokmask_peft.errors import ModelError, RunError
from tokmask_peft.model.memory.estimate import Estimate, Memory
from tokmask_peft.model.memory.suggestions import Situation, memory_errors, smaller_batch, suggestions
from tokmask_peft.recipe.schema import Recipe, changed

GIB = 2**30
EMBEDDING = {"offload": 0, "8bit": GIB // 2, "resident": GIB}
FROZEN = {"masking.trainable_mask": False}


def test_a_smaller_batch_makes_the_same_step():
    assert smaller_batch(32, 1) == (16, 2)
    assert smaller_batch(5, 1) == (1, 5)
    assert smaller_batch(6, 2) == (3, 4)
    assert smaller_batch(9, 4) == (4, 9)
    assert smaller_batch(1, 8) is None


def run(recipe, gpu=True, movable=True, **more):
    return Situation("run", recipe, gpu=gpu, movable=movable, **more)


def by_batch(recipe):
    """Stand in for a backbone of 1 GiB whose activations are a GiB for each 8 texts."""
    activations = recipe.training.batch_size * GIB // 8
    if recipe.model.gradient_checkpointing is True:
        activations //= 4
    embedding = 0 if recipe.model.embedding == "offload" else GIB // 2
    return Estimate(GIB // 2, embedding, 0, 0, activations, 0, 0, 0)


def test_single_changes_come_first_and_then_what_fits_together():
    model = {"quantization": "nf4", "gradient_checkpointing": False}
    recipe = make_recipe("x", model=model, training={"batch_size": 32})
    found = suggestions(run(recipe), by_batch, Memory(3 * GIB, "a GPU"))
    assert [one.text for one in found if one.fits] == [
        "training.batch_size=8 training.gradient_accumulation=4 training.eval_batch_size=32",
        "model.gradient_checkpointing=true",
    ]
    tight = suggestions(run(recipe), by_batch, Memory(int(0.9 * GIB), "a GPU"))
    assert [one.fits for one in tight] == [False] * (len(tight) - 1) + [True]
    assert {"training.batch_size", "model.embedding"} <= set(tight[-1].changes)
    assert by_batch(changed(recipe, tight[-1].changes)).total == tight[-1].total
    assert not any(one.fits for one in suggestions(run(recipe), by_batch, Memory(GIB // 4, "a GPU")))
    on_cpu = suggestions(run(recipe, gpu=False), by_batch, Memory(GIB // 4, "RAM"))
    assert not any("embedding" in one.text or "quantization" in one.text for one in on_cpu)


def test_changes_that_fit_together_keep_the_smaller_value():
    def count(recipe):
        kept = recipe.training.batch_size * GIB // (4 if recipe.model.gradient_checkpointing is True else 1)
        return Estimate(0, 0, 0, 0, kept, 8 * recipe.training.eval_batch_size * GIB, 0, 0)

    training, model = {"batch_size": 32, "eval_batch_size": 64}, {"gradient_checkpointing": False}
    recipe = make_recipe("x", training=training, adapter={"layers": 2}, model=model, data={"max_length": 16})
    memory = Memory(int(32.5 / 0.95 * GIB), "RAM")
    *single, together = suggestions(run(recipe, gpu=False, movable=False), count, memory)
    assert [one.changes.get("training.eval_batch_size") for one in single] == [4, None, 32]
    assert not any(one.fits for one in single)
    assert together.fits
    assert together.changes == {
        "training.batch_size": 1,
        "training.gradient_accumulation": 32,
        "training.eval_batch_size": 4,
        "model.gradient_checkpointing": True,
    }


def by_embedding(recipe):
    """Stand in for a backbone of 1 GiB besides its embedding of 1 GiB, which a trained row triples."""
    Recipe.model_validate(recipe.model_dump())  # nothing is suggested that a recipe may not say
    embedding = EMBEDDING[recipe.model.embedding] + (2 * GIB if recipe.masking.trainable_mask else 0)
    layers = GIB // 8 if recipe.adapter.layers == "all" else GIB // 16
    return Estimate(GIB, embedding, 0, 0, layers, 0, 0, 0)


def for_embedding(size, masking=None, embedding="resident", **situation):
    model = {"gradient_checkpointing": True, "quantization": "nf4", "embedding": embedding}
    training = {"batch_size": 1, "eval_batch_size": 1}
    recipe = make_recipe("x", model=model, training=training, data={"max_length": 16}, masking=masking or {})
    return suggestions(run(recipe, **situation), by_embedding, Memory(int(size * GIB), "memory"))


def test_freezing_the_mask_s_row_comes_with_what_it_makes_possible():
    trained = {"trainable_mask": True}
    assert [(one.changes, one.fits) for one in for_embedding(3, trained, int8=True)] == [(FROZEN, True)]
    assert [(one.changes, one.fits) for one in for_embedding(1.3, trained, int8=True)] == [
        (FROZEN, False),
        ({**FROZEN, "model.embedding": "offload"}, True),
        ({**FROZEN, "model.embedding": "8bit"}, False),
        ({**FROZEN, "adapter.layers": 0.5}, False),
    ]
    tighter = for_embedding(1.07 / 0.95, trained, int8=True)[-1]
    assert (tighter.changes, tighter.fits) == ({**FROZEN, "model.embedding": "offload", "adapter.layers": 0.5}, True)


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
    found = for_embedding(1, embedding=embedding, gpu=gpu, int8=int8)
    assert [one.changes["model.embedding"] for one in found if "model.embedding" in one.changes] == places
    whole = suggestions(run(make_recipe("x", model={"quantization": "none"}), gpu=gpu, int8=int8))
    assert any("model.quantization=nf4" in one.text for one in whole) is (gpu and int8)
    fixed = for_embedding(1, gpu=gpu, int8=int8, movable=False)
    assert not any("model.embedding" in one.changes for one in fixed)


def run_out(phase="training", kind=RunError, said="CUDA out of memory. Tried to allocate 2 GiB", **options):
    """Return the suggestions of the error that takes the place of running out of memory."""
    sections = {name: options.pop(name) for name in ("model", "training", "masking", "data") if name in options}
    recipe = make_recipe("x", **sections)
    situation = Situation(phase, **{"recipe": recipe, "gpu": True, "movable": True, **options})
    with pytest.raises(kind) as caught, memory_errors(situation, kind):
        raise torch.OutOfMemoryError(said)
    assert caught.value.code == "out-of-memory"
    assert caught.value.fields["phase"] == phase
    return caught.value.fields["suggestions"]


def test_the_message_names_what_helps():
    with pytest.raises(RunError) as caught, memory_errors(Situation("training", make_recipe("x"), gpu=False)):
        raise MemoryError
    message = str(caught.value)
    assert message.startswith("out of memory in training (MemoryError). Any of these may help: training.batch_size=16 ")
    assert "training.auto_batch=true; model.gradient_checkpointing=true;" in message
    assert "tokmask estimate" in message


@pytest.mark.parametrize(
    ("budget", "suggested"),
    [
        (1024, "training.tokens_per_batch=512 training.gradient_accumulation=6"),
        (200, "training.tokens_per_batch=100 training.gradient_accumulation=6 (if no text takes more)"),
        (24, "training.tokens_per_batch=16 training.gradient_accumulation=6 (if no text takes more)"),
        (16, None),
    ],
)
def test_a_smaller_budget_makes_the_same_optimizer_step(budget, suggested):
    training = {"tokens_per_batch": budget, "gradient_accumulation": 3}
    found = run_out(training=training, data={"max_length": 128})
    assert [one for one in found if "tokens_per_batch" in one] == ([suggested] if suggested else [])
    assert "training.auto_batch=true" not in found


@pytest.mark.parametrize(
    ("phase", "options", "there", "not_there"),
    [
        ("evaluation", {"masking": {"trainable_mask": True}}, ["masking.trainable_mask=false"], []),
        ("training", {}, ["model.gradient_checkpointing=true", "adapter.layers=0.5 (may cost"], ["masking."]),
        ("training", {"checkpointable": False}, [], ["gradient_checkpointing"]),
        ("loading", {}, ["model.embedding=offload"], ["batch"]),
        ("loading", {"movable": False}, ["other programs closed", "a smaller model.backbone"], ["model.embedding"]),
        *(("loading", {"model": {"quantization": now}}, ["quantization=nf4"], []) for now in ("none", "int8")),
        ("loading", {"gpu": False, "model": {"quantization": "none"}}, [], ["nf4", "embedding"]),
        *(("training", {"model": {"quantization": now}}, [], ["nf4"]) for now in ("nf4", "auto")),
    ],
)
def test_only_what_can_be_done_and_helps_is_suggested(phase, options, there, not_there):
    found = "; ".join(run_out(phase, **options))
    assert all(one in found for one in there)
    assert not any(one in found for one in not_there)


@pytest.mark.parametrize(("texts", "fewer"), [(128, 32), (3, 1), (1, None)])
@pytest.mark.parametrize("gpu", [True, False])
def test_a_command_without_keys_gets_options_of_its_own(texts, fewer, gpu):
    found = run_out("prediction", ModelError, recipe=None, texts=texts, gpu=gpu)
    option = f"--batch-size {fewer} (batch_size={fewer}) (if the command has it)"
    assert [one for one in found if "batch" in one] == ([option] if fewer else [])
    assert "other programs closed" in found
    assert any("--device cpu" in one and "CUDA_VISIBLE_DEVICES=" in one for one in found) is gpu


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes do not fit"), memory_errors(Situation("training", gpu=False)):
        raise RuntimeError("shapes do not fit")
