"""Memory in whole runs: `tokmask estimate`, running out, and smaller micro-batches."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import tokmask_peft
from tokmask_peft.cli.adapters import print_forecast
from tokmask_peft.data import hub
from tokmask_peft.errors import DataError, ModelError, RecipeError, RunError, RunInterruptedError, TokmaskError
from tokmask_peft.model import backbone as backbone_module
from tokmask_peft.model.memory.estimate import Memory
from tokmask_peft.recipe.loading import load_recipe
from tokmask_peft.training import memory as fits
from tokmask_peft.training.callbacks import StopOnSignal
from tokmask_peft.training.trainer import OrderedEvalTrainer

SHORT = ["training.max_steps=6", "training.baseline=false", "training.batching=padded"]
LOADING = "while the backbone was loaded"
ALLOCATOR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 4 GiB in all."
KERNEL = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"


def run_out(monkeypatch, above, at_step=0, error=torch.OutOfMemoryError, said=ALLOCATOR):
    """Let steps of more texts than this run out of memory, from a step on."""
    step, seen = OrderedEvalTrainer.training_step, []

    def limited(self, model, inputs, *rest):
        seen.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > above and self.state.global_step >= at_step:
            raise error(said)
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(OrderedEvalTrainer, "training_step", limited)
    return seen


def train(path, name, *overrides):
    recipe = load_recipe(path, [*SHORT, f"name={name}", *overrides])
    return tokmask_peft.train(recipe, quiet=True)


def weights(run):
    return load_file(run.folder.adapter / "adapter_model.safetensors")


def test_running_out_of_memory_names_the_keys_to_change(write_recipe, monkeypatch):
    run_out(monkeypatch, above=4)
    with pytest.raises(RunError) as caught:
        train(write_recipe(), "oom")
    assert str(caught.value).startswith("out of memory in training (CUDA out of memory")
    suggested = caught.value.fields["suggestions"]
    assert suggested[:2] == ["training.batch_size=4 training.gradient_accumulation=2", "training.auto_batch=true"]
    assert not any("on a GPU" in one or "nf4" in one or "offload" in one for one in suggested)  # which a CPU is not


def refuse(*_, **__):
    raise torch.OutOfMemoryError(ALLOCATOR)


@pytest.mark.parametrize(
    ("part", "phase", "key", "auto"),
    [
        ("tokmask_peft.training.train.load_backbone", LOADING, "a smaller model.backbone", "true"),
        ("transformers.Trainer._move_model_to_device", LOADING, "a smaller model.backbone", "false"),
        ("transformers.Trainer.prediction_step", "in evaluation", "training.eval_batch_size=32", "true"),
    ],
)
def test_running_out_of_memory_elsewhere_blames_what_takes_it_and_is_not_retried(
    write_recipe, monkeypatch, part, phase, key, auto
):
    calls = []
    monkeypatch.setattr(part, lambda *_, **__: calls.append(1) or refuse())
    with pytest.raises(RunError) as caught:
        train(write_recipe(), "oom", f"training.auto_batch={auto}")
    assert (caught.value.code, len(calls)) == ("out-of-memory", 1)
    assert f"{phase} (" in str(caught.value)
    assert any(one.startswith(key) for one in caught.value.fields["suggestions"])
    assert phase == "in evaluation" or "batch" not in str(caught.value)


def test_what_evaluate_advises_where_memory_runs_out_can_be_followed(trained, monkeypatch):
    def advice():
        with pytest.raises(RunError, match=r"other programs closed") as caught:
            tokmask_peft.evaluate(run)
        assert "model." not in str(caught.value)  # the command takes no keys of the recipe
        assert "training." not in str(caught.value)
        return str(caught.value)

    run = trained().folder.root
    where = ("load_backbone", "load_adapter", "OrderedEvalTrainer._move_model_to_device")
    for part in where:
        with monkeypatch.context() as patch:
            patch.setattr(f"tokmask_peft.training.evaluate.{part}", refuse)
            assert "while the backbone was loaded" in (said := advice())
            assert "batch" not in said
    seen, step = [], OrderedEvalTrainer.prediction_step

    def limited(self, model, inputs, *rest, **more):
        seen.append(len(inputs["input_ids"]))
        return refuse() if seen[-1] > 10 else step(self, model, inputs, *rest, **more)

    monkeypatch.setattr(OrderedEvalTrainer, "prediction_step", limited)
    assert "--batch-size 10 (batch_size=10)" in advice()  # a quarter of the 40 texts that were one batch
    tokmask_peft.evaluate(run, batch_size=10)
    assert seen == [40, *[10] * 4]
    with pytest.raises(DataError, match="batch_size is 0, expected 1 or more"):
        tokmask_peft.evaluate(run, batch_size=0)


def test_other_errors_are_left_alone(write_recipe, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(OrderedEvalTrainer, "training_step", fail)
    with pytest.raises(TokmaskError, match="shapes do not fit") as caught:
        train(write_recipe(), "other", "training.auto_batch=true")
    assert caught.value.code == "unexpected"
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("at_step", "neftune", "error", "said"),
    [(0, "null", torch.OutOfMemoryError, ALLOCATOR), (3, "null", RuntimeError, KERNEL), (3, "5", MemoryError, "")],
)
def test_auto_batch_is_the_run_with_smaller_batches(write_recipe, monkeypatch, at_step, neftune, error, said):
    path, noise = write_recipe(), f"training.neftune_alpha={neftune}"
    expected = train(path, "small", noise, "training.batch_size=2", "training.gradient_accumulation=4")
    seen = run_out(monkeypatch, 2, at_step, error, said)
    run = train(path, "auto", noise, "training.auto_batch=true")
    assert seen[at_step] == 8  # and there it began again
    assert set(seen[at_step + 1 :]) == {4, 2}
    assert run.result.steps == expected.result.steps == 6
    decision = {"what": "micro-batch", "choice": "2 times 4", "reason": "8 times 1 ran out of memory"}
    assert decision in run.result.decisions
    for name, value in weights(expected).items():
        assert torch.equal(weights(run)[name], value), name
    assert len((run.folder.log).read_text().splitlines()) == len((expected.folder.log).read_text().splitlines())
    assert load_recipe(run.folder.recipe).training.batch_size == 8  # what was asked for stays


def test_auto_batch_ends_with_a_single_text(write_recipe, monkeypatch):
    run_out(monkeypatch, above=0)
    with pytest.raises(RunError, match=r"out of memory with a single text of up to \d+ sub-tokens \(CUDA") as caught:
        train(write_recipe(), "none", "training.auto_batch=true")
    found = " ".join(caught.value.fields["suggestions"])
    assert "gradient_checkpointing=true" in found
    assert "batch" not in found
    monkeypatch.setattr("transformers.BertForSequenceClassification.supports_gradient_checkpointing", False)
    with pytest.raises(RunError) as caught:
        train(write_recipe(), "none-either", "training.auto_batch=true")
    found = " ".join(caught.value.fields["suggestions"])
    assert "adapter.layers=0.5" in found
    assert "checkpointing" not in found
    with pytest.raises(RecipeError, match=r"training.auto_batch changes batch_size"):
        load_recipe(write_recipe(), ["training.auto_batch=true", "training.tokens_per_batch=64"])


def forecast_of_a_run(monkeypatch, recipe):
    """Return the forecast that a run makes before it starts."""
    made, forecast = [], fits.forecast
    monkeypatch.setattr(fits, "forecast", lambda *given, **more: made.append(forecast(*given, **more)) or made[-1])
    monkeypatch.setattr(OrderedEvalTrainer, "train", lambda *_, **__: pytest.fail("starts"))
    with pytest.raises(pytest.fail.Exception, match="starts"):
        tokmask_peft.train(recipe)
    return made[0]


def test_a_run_that_will_not_fit_is_reported_before_it_starts(write_recipe, monkeypatch, capsys):
    monkeypatch.setattr(fits, "device_memory", lambda device: Memory(700 * 2**20, "this machine"))
    forecast_of_a_run(monkeypatch, load_recipe(write_recipe(), SHORT))
    said = capsys.readouterr().out
    assert "Warning: the largest batch would take" in said
    assert "training.batch_size=" in said
    assert "checkpointing" in said


def test_the_estimate_is_the_forecast_of_the_run(write_recipe, data_folder, tmp_path, monkeypatch):
    own = tmp_path / "long-test"
    own.mkdir()
    for file in data_folder.glob("*.tsv"):
        (own / file.name).write_text(file.read_text())
    with (own / "test.tsv").open("a") as file:
        file.writelines(f"{'casa amigo ' * 45}{number}\tpositive\n" for number in range(150))
    settings = [f"data.path={own}", "data.max_length=64", "training.eval_batch_size=128"]
    recipe = load_recipe(write_recipe(), [*SHORT, *settings, "model.attention_dropout=0.3"])
    found = fits.without_training(recipe)
    assert max(found.shapes.largest.lengths) < 64
    assert found.shapes.evaluation.lengths == (64,) * 128  # there are 96 texts to train on
    of_run = forecast_of_a_run(monkeypatch, recipe)
    assert (of_run.shapes, of_run.largest) == (found.shapes, found.largest)
    monkeypatch.setattr(backbone_module, "_ATTENTION_DROPOUT", ("another_name",))
    with pytest.raises(ModelError, match=r"set model.attention_dropout=null") as caught:
        fits.without_training(recipe)
    assert caught.value.code == "no-attention-dropout"


@pytest.mark.parametrize(("noise", "packed"), [("null", True), ("5", False)])
def test_the_estimate_s_batches_are_padded_where_neftune_asks_for_it(write_recipe, noise, packed):
    overrides = ["training.batching=padding_free", f"training.neftune_alpha={noise}"]
    assert fits.without_training(load_recipe(write_recipe(), overrides)).shapes.largest.packed is packed


@pytest.mark.parametrize(
    ("gpu", "precision", "assumed", "fits_in"),
    [
        ("4GB", "auto", True, True),
        ("4GB", "fp32", False, True),
        (None, "auto", False, True),
        ("0.6GB", "auto", True, False),
    ],
)
def test_the_report_says_what_it_assumes_of_a_gpu_and_whether_it_fits(
    write_recipe, capsys, gpu, precision, assumed, fits_in
):
    recipe = load_recipe(write_recipe(), [*SHORT, f"model.precision={precision}"])
    found = fits.without_training(recipe, gpu)
    print_forecast(found)
    said = " ".join(capsys.readouterr().out.split())
    assert ("GTX 1650" in said) == ("model.precision=fp32" in said) == assumed
    assert (found.to_dict()["assumed"] is not None) == assumed
    assert "quantization" in said
    assert f"within {15 if gpu else 5}% of this" in said
    if gpu == "4GB":
        assert "It fits: a GPU of 4 GiB has 4.0 GiB" in said
    if not fits_in:
        assert "It does NOT fit" in said
        assert " training.batch_size=1 training.gradient_accumulation=8" in said
        assert "still too much" in said
        with pytest.raises(RecipeError):
            fits.without_training(recipe, "big")


def test_checkpointing_that_memory_asks_for_changes_no_weight(write_recipe, monkeypatch):
    path = write_recipe("qwen2", extra="")
    settings = ["adapter.dropout=0", "training.eval_batch_size=2"]
    plain = train(path, "plain", *settings)
    sizes = iter([Memory(700 * 2**20 + 2**18, "this machine")])
    monkeypatch.setattr(fits, "device_memory", lambda device: next(sizes))
    tight = train(path, "tight", *settings)
    chosen = {decision["what"]: decision["choice"] for decision in tight.result.decisions}
    assert chosen["checkpointing"] == "on"
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(tight)[name], value, atol=1e-5, rtol=1e-4)


def test_the_command_reads_no_weights(write_recipe, tokmask, tiny_backbone, tmp_path):
    path = write_recipe()
    without = tmp_path / "no-weights"
    without.mkdir()
    for file in tiny_backbone("bert").iterdir():
        if not file.name.endswith(".safetensors"):
            (without / file.name).write_bytes(file.read_bytes())
    found = json.loads(tokmask("estimate", path, f"model.backbone={without}", "--gpu", "0.5GB", "--json").stdout)
    assert found["fits"] is False
    assert found["shapes"]["from_texts"] is True
    parts = ("weights", "embedding", "adapter", "optimizer", "cublas", "overhead")
    largest = found["largest"]
    step = max(largest["activations"] + largest["workspace"], largest["evaluation"])
    assert largest["total"] == sum(largest[part] for part in parts) + step
    assert found["quantization"] == "none"
    assert found["margin"] == 0.15
    assert any(one["changes"].get("training.batch_size") for one in found["suggestions"])


@pytest.mark.parametrize("builtin", [True, False])
def test_the_estimate_downloads_no_texts(write_recipe, monkeypatch, builtin):
    monkeypatch.setattr(hub, "read_hub", lambda *_: pytest.fail("downloads"))
    path, small = write_recipe(), ["data.max_length=64", "training.eval_batch_size=40"]
    plain = fits.without_training(load_recipe(path, small)).shapes
    tested = fits.without_training(load_recipe(path, [*small, "data.test_source.hub=someone/texts"])).shapes
    assert tested.largest == plain.largest
    assert plain.evaluation.tokens < tested.evaluation.tokens
    assert tested.evaluation.lengths == (64,) * 40  # as long and as many as they may be
    trained = [*small, "data.path=null", "data.hub=someone/texts", f"data.builtin={str(builtin).lower()}"]
    assert not fits.without_training(load_recipe(path, trained)).shapes.known


@pytest.mark.parametrize("batching", ["padded", "padding_free"])
def test_a_token_budget_makes_the_batches_and_a_resumed_run_the_same(write_recipe, monkeypatch, batching):
    path, seen = write_recipe(), []
    step = OrderedEvalTrainer.training_step

    def noted(self, model, inputs, *rest):
        seen.append(inputs["input_ids"].numel())
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(OrderedEvalTrainer, "training_step", noted)
    budget = ["training.tokens_per_batch=128", "training.epochs=2", "training.max_steps=null"]
    budget.append(f"training.batching={batching}")
    whole = train(path, "whole", *budget)
    assert max(seen) <= 128
    assert len(set(seen)) > 2
    assert whole.result.steps == len(seen)
    assert whole.result.speed["tokens_per_second"] > 0
    auto = train(path, "auto", *budget, "training.epochs=auto", "training.patience=auto", "training.max_steps=1")
    epochs = math.ceil(400 / (whole.result.steps / 2))
    assert {one["what"]: one["choice"] for one in auto.result.decisions}["patience"] == f"{math.ceil(epochs / 2)}"
    half = whole.result.steps // 2 + 2  # within the second epoch
    stop = StopOnSignal.on_step_end

    def stopping(self, args, state, control, **rest):
        self.stopped = state.global_step == half
        return stop(self, args, state, control, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", stopping)
        with pytest.raises(RunInterruptedError):
            train(path, "broken", *budget)
    recipe = load_recipe(path, [*SHORT, "name=broken", *budget])
    broken = tokmask_peft.train(recipe, resume=True, quiet=True)
    assert broken.result.steps == whole.result.steps
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(broken)[name], value, atol=1e-6, rtol=0)
