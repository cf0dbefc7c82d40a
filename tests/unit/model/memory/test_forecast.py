"""A run against the memory there is: shapes of its batches, gradient checkpointing, suggestions."""

from types import SimpleNamespace

import pytest
import torch
from measured import make_recipe
from tiny_models import build
from transformers import AlbertConfig, MPNetConfig

from tokmask_peft.data.batches import TokenBudgetSampler
from tokmask_peft.errors import ModelError, RecipeError
from tokmask_peft.model import decisions
from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.model.memory import estimate as estimate_module
from tokmask_peft.model.memory.estimate import Estimate, Memory, device_memory, gpu_memory
from tokmask_peft.model.memory.step import Setting, Shape, bare_model
from tokmask_peft.model.memory.suggestions import Situation, suggestions
from tokmask_peft.recipe.schema import changed
from tokmask_peft.training import memory as forecasting
from tokmask_peft.training.memory import Lengths, before_training, forecast, workload

GIB = 2**30
CPU = torch.device("cpu")
KEY = "training.tokens_per_batch"


def setting_of(config, device="cpu"):
    return Setting(config, device, "none", torch.float32)


@pytest.fixture
def quick(monkeypatch):
    """Let a step take a MiB per sub-token, a quarter of it with checkpointing, and an embedding 1 GiB on the device."""

    def count(recipe, setting, training, evaluation):
        activations = training.tokens * 2**20 // (4 if recipe.model.gradient_checkpointing is True else 1)
        embedding = {"resident": GIB, "8bit": GIB // 4, "offload": 0}[recipe.model.embedding]
        return Estimate(0, embedding, 0, 0, activations, 0, 0, 0)

    monkeypatch.setattr(forecasting, "estimate", count)


@pytest.mark.parametrize(("family", "moves"), [("qwen2", True), ("gemma3", False)])
def test_moving_the_embedding_is_suggested_only_if_that_works(family, moves, quick):
    setting = setting_of(build(family)[0].config, "cuda")
    tight = forecast(make_recipe("x"), setting, "padded", None, Memory(GIB // 2, "a GPU"))
    assert any("model.embedding" in one.changes for one in tight.suggestions) == moves


def test_an_embedding_that_cannot_be_moved_is_refused():
    recipe = make_recipe("x", model={"embedding": "offload"})
    with pytest.raises(ModelError) as caught:
        forecast(recipe, setting_of(build("gemma3")[0].config, "cuda"), "padded", None, None)
    assert caught.value.code == "embedding-not-movable"


def test_sizes_of_gpus():
    for text, size in (("6GB", 6), ("4 GiB", 4), ("7.5", 7.5), ("8gb", 8), ("80G", 80)):
        assert gpu_memory(text).bytes == size * GIB
    for text in ("", "big", "0GB", "-4GB", "4MB"):
        with pytest.raises(RecipeError, match="expected a size such as 6GB") as caught:
            gpu_memory(text)
        assert caught.value.code == "gpu-size"


def test_a_container_s_limit_other_processes_and_cached_files_count(tmp_path, monkeypatch):
    def rest(**files):
        for name, text in files.items():
            (tmp_path / f"memory.{name}").write_text(text)
        return estimate_module._rest_of_container()

    monkeypatch.setattr(estimate_module, "CGROUP", tmp_path)
    assert rest() == []
    assert rest(max=f"{8 * GIB}\n", current=f"{7 * GIB}\n") == [GIB]
    limited = device_memory(CPU).bytes
    assert GIB < limited < 2 * GIB + GIB // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device_memory(CPU).bytes == pytest.approx(limited - GIB // 2, abs=GIB // 20)
    assert device_memory(torch.device("meta")) is None
    assert rest(stat=f"anon {2 * GIB}\nfile {5 * GIB}\ninactive_file {4 * GIB}\nslab 7\n") == [5 * GIB]
    assert rest(max="max\n") == []


def test_checkpointing_is_switched_on_if_the_rest_does_not_fit(quick):
    setting = setting_of(build("qwen2")[0].config)
    recipe = make_recipe("x", data={"max_length": 64}, training={"batching": "padded", "batch_size": 32})
    mixed = Lengths([10, 20, 64] * 20, ([10, 20, 64] * 20,))  # the largest batch takes 2 GiB, and half a GiB with it
    easy = forecast(recipe, setting, "padded", mixed, Memory(10 * GIB, "RAM"))
    assert (easy.decision.choice, easy.recipe.model.gradient_checkpointing, easy.fits) == ("off", False, True)
    assert easy.usual.total <= easy.largest.total == 3 * GIB
    tight = forecast(recipe, setting, "padded", mixed, Memory(2 * GIB, "RAM"))
    assert (tight.decision.choice, tight.recipe.model.gradient_checkpointing, tight.fits) == ("on", True, True)
    assert "without" in tight.decision.reason
    asked = changed(recipe, {"model.gradient_checkpointing": False})
    refused = forecast(asked, setting, "padded", mixed, Memory(2 * GIB, "RAM"))
    assert (refused.decision.choice, refused.fits) == ("off", False)
    assert any(one.fits for one in refused.suggestions)


def test_shapes_of_batches():
    recipe = make_recipe("x", training={"batch_size": 4, "eval_batch_size": 6}, data={"max_length": 50})
    texts = [3, 9, 9, 9, 12, 12, 17, 80] * 4
    padded, packed = (workload(recipe, how, Lengths(texts, (texts,))) for how in ("padded", "padding_free"))
    assert padded.largest.lengths == (56,) * 4  # cut at 50, padded to a multiple of 8
    assert padded.evaluation.lengths == (56,) * 6
    assert padded.usual.tokens < padded.largest.tokens
    assert (packed.largest.packed, len(packed.largest.lengths)) == (True, 4)
    assert packed.usual.tokens < packed.largest.tokens <= 4 * 50
    assert workload(recipe, "padded", None).largest.lengths == (50,) * 4
    assert workload(recipe, "padding_free", None).largest.tokens == 200
    twice = recipe.model_copy(update={"training": recipe.training.model_copy(update={"views": 2})})
    assert workload(twice, "padded", None).largest.lengths == (50,) * 8
    assert workload(twice, "padding_free", Lengths(texts, (texts,))).usual.tokens == 2 * packed.usual.tokens
    few = workload(recipe, "padded", Lengths([5, 6], ([5, 6],)))
    assert len(few.largest.lengths) == 2
    assert few.evaluation.lengths == (8,) * 2


def budgeted(budget, batching, max_length=600):
    training = {"tokens_per_batch": budget, "batching": batching}
    return make_recipe("x", training=training, data={"max_length": max_length})


@pytest.mark.parametrize("batching", ["padded", "grouped", "padding_free"])
def test_no_batch_of_a_budget_exceeds_the_largest_by_much(batching):
    texts = [520, *[128] * 30, *[3, 9, 17, 40] * 50]
    recipe = budgeted(1024, batching)
    largest = workload(recipe, batching, Lengths(texts, (texts,))).largest
    assert 0.9 * 1024 < largest.tokens <= 1024
    sampler = TokenBudgetSampler(texts, 1024, batching, recipe.seed)
    drawn = [[texts[at] for at in batch] for epoch in range(5) for batch in sampler.all_batches(epoch)]
    shapes = [Shape(tuple(batch), packed=batching == "padding_free") for batch in drawn]
    assert max(shape.tokens for shape in shapes) < 1.1 * largest.tokens
    if batching == "padding_free":  # a GPU pads them in attention with dropout
        slots = [len(shape.lengths) * max(shape.lengths) for shape in (largest, *shapes)]
        assert slots[0] >= max(slots)


def test_the_largest_batch_of_a_budget():
    texts = [520, *[128] * 30]
    lengths, few = Lengths(texts, (texts,)), Lengths([60, 20], ([60, 20],))
    for budget, of, expected in (
        (1024, lengths, Shape.padded(8, 128)),
        (1152, lengths, Shape.padded(2, 520)),  # of 9 x 128
        (1024, None, Shape.padded(2, 512)),
        (1024, few, Shape.padded(2, 64)),
    ):
        assert workload(budgeted(budget, "padded"), "padded", of).largest == expected
    packed = workload(budgeted(1024, "padding_free"), "padding_free", few).largest
    assert (sorted(packed.lengths), packed.packed) == ([20, 60], True)
    assert workload(budgeted(1024, "padding_free"), "padding_free", None).largest.tokens == 1024


@pytest.mark.parametrize("batching", ["padded", "padding_free"])
def test_a_budget_below_the_longest_text_is_neither_counted_nor_suggested(batching):
    lengths = Lengths([100, 20] * 9, ([100, 20],))
    with pytest.raises(RecipeError, match=r"training.tokens_per_batch: the longest text takes .* set it higher"):
        workload(budgeted(96, batching), batching, lengths)

    def count(recipe):
        return Estimate(0, 0, 0, 0, workload(recipe, batching, lengths).largest.tokens * GIB, 0, 0, 0)

    for budget, suggested in ((400, [200]), (150, [])):
        found = suggestions(Situation("run", budgeted(budget, batching), gpu=False), count, Memory(GIB, "RAM"))
        assert [one.changes[KEY] for one in found if KEY in one.changes] == suggested


@pytest.mark.parametrize("budget", [None, 128])
def test_the_batch_of_an_evaluation_is_of_the_texts_that_are_evaluated(budget):
    training = {"batch_size": 4, "eval_batch_size": 32, "tokens_per_batch": budget, "batching": "padded"}
    recipe = make_recipe("x", training=training, data={"max_length": 100})
    more_and_longer = workload(recipe, "padded", Lengths([8] * 10, ([20] * 12, [9, 70] * 40)))
    assert more_and_longer.largest.lengths[0] == 8
    assert more_and_longer.evaluation.lengths == (72,) * 32
    fewer_and_shorter = workload(recipe, "padded", Lengths([90] * 50, ([20] * 12, [9, 30] * 3)))
    assert fewer_and_shorter.evaluation.lengths == (32,) * 12
    assert workload(recipe, "padded", None).evaluation.lengths == (104,) * 32


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"vocab_size": 100, "max_position_embeddings": 140, "num_labels": 3}
CONFIGS = [AlbertConfig(embedding_size=16, **SMALL), MPNetConfig(**SMALL)]
TIGHT = Memory(700 * 2**20, "this machine")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_what_cannot_be_checkpointed_is_estimated_and_helped_without(config, monkeypatch):
    few = {"training": {"batch_size": 2, "eval_batch_size": 1}, "data": {"max_length": 16}}
    setting, recipe = setting_of(config), make_recipe("x", **few)
    with pytest.raises(ModelError, match="cannot do that: set it to false") as caught:
        forecast(changed(recipe, {"model.gradient_checkpointing": True}), setting, "padded", None, None)
    assert caught.value.code == "no-checkpointing"
    tight = forecast(recipe, setting, "padded", None, TIGHT)
    assert (tight.fits, tight.decision.choice, tight.recipe.model.gradient_checkpointing) == (False, "off", False)
    assert "ForSequenceClassification cannot do it" in tight.decision.reason
    offered = " ".join(one.text for one in tight.suggestions)
    assert "training.batch_size=" in offered
    assert "checkpointing" not in offered
    assert ("adapter.layers" in offered) == (config.model_type != "albert")  # whose layers share their weights
    monkeypatch.setattr(forecasting, "forecast", lambda *_, **__: tight)
    bare = bare_model(config, "sequence", torch.float32)
    loaded = SimpleNamespace(model=bare, quantization="none", dtype=torch.float32)
    decided, decision, warning = before_training(recipe, loaded, "padded", None, CPU)
    assert (decided.model.gradient_checkpointing, decision.choice) == (False, "off")
    assert "the largest batch would take" in warning


@pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="needs bitsandbytes")
def test_of_a_real_backbone_with_a_trained_row():
    config = build("bert", num_hidden_layers=1)[0].config
    config.vocab_size = 200_000
    sections = {"training": {"batch_size": 1, "eval_batch_size": 1}, "data": {"max_length": 16}}
    recipe = make_recipe("x", **sections, masking={"trainable_mask": True}, model={"gradient_checkpointing": True})
    tight = forecast(recipe, setting_of(config), "padded", None, Memory(GIB // 2, "RAM"))
    found = {one.text: one.total for one in tight.suggestions}
    row = 200_000 * 32 * 4
    assert found["masking.trainable_mask=false"] < tight.largest.total - 0.9 * row
    both = "masking.trainable_mask=false model.embedding=8bit"
    assert found[both] < found["masking.trainable_mask=false"] - 0.6 * row
    assert "masking.trainable_mask=false model.embedding=offload" not in found  # the host is the device


@pytest.mark.parametrize("problem", [None, "no"])
def test_8_bits_are_suggested_if_bitsandbytes_runs(problem, quick, monkeypatch):
    monkeypatch.setattr(decisions, "bitsandbytes_problem", lambda device_type: problem)
    tight = forecast(make_recipe("x"), setting_of(build("bert")[0].config), "padded", None, Memory(GIB, "RAM"))
    assert any(one.changes.get("model.embedding") == "8bit" for one in tight.suggestions) is (problem is None)
