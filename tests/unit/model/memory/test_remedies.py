"""What is suggested where a run does not fit, and for which memory."""

import pytest
import torch
from measured import make_recipe
from tiny_models import build

from tokmask_peft.data.batches import TokenBudgetSampler
from tokmask_peft.errors import ModelError, RecipeError, RunError
from tokmask_peft.model.memory import estimate as room_module
from tokmask_peft.model.memory.estimate import Estimate, Room, Setting, device_room, gpu_room
from tokmask_peft.model.memory.step import Shape
from tokmask_peft.model.memory.suggestions import Able, changed, remedies, smaller_batch
from tokmask_peft.training.memory import Lengths, explained_memory_errors, forecast, ways_out, workload

GIB = 2**30


def test_a_smaller_batch_makes_the_same_step():
    assert smaller_batch(32, 1) == (16, 2)
    assert smaller_batch(5, 1) == (1, 5)
    assert smaller_batch(6, 2) == (3, 4)
    assert smaller_batch(9, 4) == (4, 9)
    assert smaller_batch(1, 8) is None


def counted(recipe):
    """Stand in for a backbone of 1 GiB whose activations are a GiB for each 8 texts."""
    activations = recipe.training.batch_size * GIB // 8
    if recipe.model.gradient_checkpointing is True:
        activations //= 4
    embedding = 0 if recipe.model.embedding == "offload" else GIB // 2
    return Estimate(GIB // 2, embedding, 0, 0, activations, 0, 0, 0)


def test_single_changes_come_first_and_then_what_fits_together():
    recipe = make_recipe("x", model={"quantization": "nf4", "gradient_checkpointing": False})
    found = remedies(recipe, counted, Room(3 * GIB, "a GPU"), Able(gpu=True, movable=True))
    assert [remedy.text for remedy in found if remedy.fits] == [
        "training.batch_size=8 training.gradient_accumulation=4 training.eval_batch_size=32",
        "model.gradient_checkpointing=true",
    ]
    tight = remedies(recipe, counted, Room(int(0.9 * GIB), "a GPU"), Able(gpu=True, movable=True))
    assert [remedy.fits for remedy in tight] == [False] * (len(tight) - 1) + [True]
    assert {"training.batch_size", "model.embedding"} <= set(tight[-1].changes)
    assert counted(changed(recipe, tight[-1].changes)).total == tight[-1].total
    assert not any(
        remedy.fits for remedy in remedies(recipe, counted, Room(GIB // 4, "a GPU"), Able(gpu=True, movable=True))
    )
    on_cpu = remedies(recipe, counted, Room(GIB // 4, "RAM"), Able(gpu=False, movable=True))
    assert not any("embedding" in remedy.text or "quantization" in remedy.text for remedy in on_cpu)


def test_changes_that_fit_together_keep_the_smaller_value():
    def count(recipe):
        kept = recipe.training.batch_size * GIB // (4 if recipe.model.gradient_checkpointing is True else 1)
        return Estimate(0, 0, 0, 0, kept, 8 * recipe.training.eval_batch_size * GIB, 0, 0)

    training, model = {"batch_size": 32, "eval_batch_size": 64}, {"gradient_checkpointing": False}
    recipe = make_recipe("x", training=training, adapter={"layers": 2}, model=model, data={"max_length": 16})
    *single, together = remedies(recipe, count, Room(int(32.5 / 0.95 * GIB), "RAM"), Able(gpu=False, movable=False))
    assert [remedy.changes.get("training.eval_batch_size") for remedy in single] == [4, None, 32]
    assert not any(remedy.fits for remedy in single)
    assert together.fits
    assert together.changes == {
        "training.batch_size": 1,
        "training.gradient_accumulation": 32,
        "training.eval_batch_size": 4,
        "model.gradient_checkpointing": True,
    }


@pytest.mark.parametrize(("family", "moves"), [("qwen2", True), ("gemma3", False)])
def test_the_embedding_is_moved_only_where_that_works(family, moves):
    model, _ = build(family)
    setting = Setting(model.config, "cuda", "none", torch.float32)
    recipe = make_recipe("x", model={"gradient_checkpointing": False}, training={"batch_size": 2})
    tight = forecast(recipe, setting, "padded", None, Room(GIB // 2, "a GPU"))
    offered = [remedy.text for remedy in ways_out(tight, setting, "padded", None)]
    assert ("model.embedding=offload" in " ".join(offered)) == moves
    offload = changed(recipe, {"model.embedding": "offload"})
    if moves:
        assert forecast(offload, setting, "padded", None, None).largest.embedding == 0
    else:
        with pytest.raises(ModelError, match=r"model.embedding=offload needs a plain lookup.*ScaledWordEmbedding"):
            forecast(offload, setting, "padded", None, None)


@pytest.mark.parametrize("evaluating", [True, False])
def test_running_out_offers_only_what_works(evaluating):
    def told(movable, **sections):
        recipe = make_recipe("x", **sections)
        with pytest.raises(RunError) as caught, explained_memory_errors(recipe, movable, evaluating=evaluating):
            raise MemoryError
        return str(caught.value)

    assert "model.embedding=offload (on a GPU)" in told(movable=True)
    assert "model.embedding" not in told(movable=False)
    with_row = told(movable=True, masking={"trainable_mask": True})
    assert "model.embedding" not in with_row
    assert "adapter.layers" not in with_row


@pytest.mark.parametrize(("size", "offered"), [(16, "training.eval_batch_size=4;"), (3, "size=1;"), (1, None)])
def test_an_evaluation_of_single_texts_is_offered_no_smaller_batch(size, offered):
    recipe = make_recipe("x", training={"eval_batch_size": size})
    with pytest.raises(RunError) as caught, explained_memory_errors(recipe, movable=False, evaluating=True):
        raise MemoryError
    assert "a smaller data.max_length" in str(caught.value)
    assert offered in str(caught.value) if offered else "eval_batch_size" not in str(caught.value)


@pytest.mark.parametrize(("text", "size"), [("6GB", 6), ("4 GiB", 4), ("7.5", 7.5), ("8gb", 8), ("80G", 80)])
def test_sizes_of_gpus(text, size):
    assert gpu_room(text).bytes == size * GIB


@pytest.mark.parametrize("text", ["", "big", "0GB", "-4GB", "4MB"])
def test_what_is_no_size(text):
    with pytest.raises(RecipeError, match="expected a size such as 6GB"):
        gpu_room(text)


def test_a_container_s_limit_and_other_processes_count(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(room_module, "_cgroup_rest", lambda: [GIB])
    limited = device_room(cpu).bytes
    assert GIB < limited < 2 * GIB + GIB // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device_room(cpu).bytes == pytest.approx(limited - GIB // 2, abs=GIB // 20)
    assert device_room(torch.device("meta")) is None


def test_a_container_s_cached_files_are_free_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(room_module, "CGROUP", tmp_path)
    assert room_module._cgroup_rest() == []
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{7 * GIB}\n")
    assert room_module._cgroup_rest() == [GIB]
    (tmp_path / "memory.stat").write_text(f"anon {2 * GIB}\nfile {5 * GIB}\ninactive_file {4 * GIB}\nslab 7\n")
    assert room_module._cgroup_rest() == [5 * GIB]
    (tmp_path / "memory.max").write_text("max\n")
    assert room_module._cgroup_rest() == []


def test_checkpointing_is_switched_on_where_the_rest_does_not_fit():
    model, _ = build("qwen2")
    setting = Setting(model.config, "cpu", "none", torch.float32)
    recipe = make_recipe("x", data={"max_length": 64}, training={"batching": "padded"})
    mixed = Lengths([10, 20, 64] * 20, ([10, 20, 64] * 20,))
    easy = forecast(recipe, setting, "padded", mixed, Room(10 * GIB, "RAM"))
    assert (easy.decision.choice, easy.recipe.model.gradient_checkpointing, easy.fits) == ("off", False, True)
    assert easy.usual.total <= easy.largest.total
    less = easy.largest.total - easy.largest.step // 4
    tight = forecast(recipe, setting, "padded", mixed, Room(int(less / 0.95), "RAM"))
    assert (tight.decision.choice, tight.recipe.model.gradient_checkpointing) == ("on", True)
    assert "without" in tight.decision.reason
    asked = changed(recipe, {"model.gradient_checkpointing": False})
    long = Lengths([64] * 40, ([64] * 40,))
    refused = forecast(asked, setting, "padded", long, Room(int(less / 0.95), "RAM"))
    assert (refused.decision.choice, refused.fits) == ("off", False)
    assert any(remedy.fits for remedy in ways_out(refused, setting, "padded", long))


def test_shapes_of_batches():
    recipe = make_recipe("x", training={"batch_size": 4, "eval_batch_size": 6}, data={"max_length": 50})
    texts = [3, 9, 9, 9, 12, 12, 17, 80] * 4
    lengths = Lengths(texts, (texts,))
    padded = workload(recipe, "padded", lengths)
    assert padded.largest.lengths == (56,) * 4  # cut at 50, padded to a multiple of 8
    assert padded.evaluation.lengths == (56,) * 6
    assert padded.usual.tokens < padded.largest.tokens
    packed = workload(recipe, "padding_free", lengths)
    assert packed.largest.packed
    assert len(packed.largest.lengths) == 4
    assert packed.usual.tokens < packed.largest.tokens <= 4 * 50
    assert workload(recipe, "padded", None).largest.lengths == (50,) * 4
    assert workload(recipe, "padding_free", None).largest.tokens == 200
    few = workload(recipe, "padded", Lengths([5, 6], ([5, 6],)))
    assert len(few.largest.lengths) == 2
    assert few.evaluation.lengths == (8,) * 2


def budgeted(budget, batching, max_length=600):
    training = {"tokens_per_batch": budget, "batching": batching}
    return make_recipe("x", training=training, data={"max_length": max_length})


@pytest.mark.parametrize("batching", ["padded", "grouped", "padding_free"])
def test_no_batch_of_a_budget_exceeds_the_largest_by_much(batching):
    texts = [520, *[128] * 30, *[3, 9, 17, 40] * 50]
    lengths, recipe = Lengths(texts, (texts,)), budgeted(1024, batching)
    largest = workload(recipe, batching, lengths).largest
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
    lengths = Lengths(texts, (texts,))
    assert workload(budgeted(1024, "padded"), "padded", lengths).largest == Shape.padded(8, 128)
    assert workload(budgeted(1152, "padded"), "padded", lengths).largest == Shape.padded(2, 520)  # of 9 x 128
    assert workload(budgeted(1024, "padded"), "padded", None).largest == Shape.padded(2, 512)
    few = Lengths([60, 20], ([60, 20],))
    assert workload(budgeted(1024, "padded"), "padded", few).largest == Shape.padded(2, 64)
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

    def suggested(budget):
        found = remedies(budgeted(budget, batching), count, Room(GIB, "RAM"), Able(gpu=False, movable=False))
        return [r.changes["training.tokens_per_batch"] for r in found if "training.tokens_per_batch" in r.changes]

    assert suggested(400) == [200]
    assert suggested(150) == []


def test_running_out_suggests_budgets_that_may_be_set():
    def told(budget):
        recipe = make_recipe("x", training={"tokens_per_batch": budget}, data={"max_length": 128})
        with pytest.raises(RunError) as caught, explained_memory_errors(recipe, movable=False):
            raise MemoryError
        return str(caught.value)

    assert "training.tokens_per_batch=512 training.gradient_accumulation=2;" in told(1024)
    assert "training.tokens_per_batch=100 training.gradient_accumulation=2, if no text takes more;" in told(200)
    assert "training.tokens_per_batch=16 training.gradient_accumulation=2, if no text takes more;" in told(24)
    assert "tokens_per_batch" not in told(16)


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
