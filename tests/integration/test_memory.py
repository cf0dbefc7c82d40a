"""Memory in whole runs: `tokmask estimate`, running out, and smaller micro-batches."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tokmask_peft
from tokmask_peft.cli.training import print_forecast
from tokmask_peft.data import hub
from tokmask_peft.errors import DataError, ModelError, RecipeError, RunError, RunInterruptedError, TokmaskError
from tokmask_peft.model import backbone as backbone_module
from tokmask_peft.model.memory.estimate import Memory
from tokmask_peft.recipe.loading import load_recipe
from tokmask_peft.training import memory as fits
from tokmask_peft.training import train as fit
from tokmask_peft.training.callbacks import StopOnSignal
from tokmask_peft.training.trainer import OrderedEvalTrainer

SHORT = ["training.epochs=1", "training.baseline=false", "training.batching=padded"]


ALLOCATOR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 4 GiB in all."
KERNEL = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"


def run_out(monkeypatch, above, at_step=0, error=torch.OutOfMemoryError, said=ALLOCATOR):
    """Let steps of more than so many texts run out of memory, from a step on."""
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
    message = str(caught.value)
    assert message.startswith("out of memory in training (CUDA out of memory")
    assert "training.batch_size=4 training.gradient_accumulation=2; training.auto_batch=true" in message
    assert "model.gradient_checkpointing=true" in message
    assert "tokmask estimate" in message
    assert "model.embedding=offload" in message
    with pytest.raises(RunError, match="out of memory in training") as caught:
        train(write_recipe("gemma3"), "oom-gemma3")
    assert "model.embedding" not in str(caught.value)


def test_running_out_of_memory_in_evaluation_blames_evaluation(write_recipe, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(OrderedEvalTrainer, "prediction_step", refuse)
    with pytest.raises(RunError, match=r"in evaluation .*training.eval_batch_size=32"):
        train(write_recipe(), "oom", "training.auto_batch=true")


def test_running_out_of_memory_while_loading_blames_the_backbone(write_recipe, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError(ALLOCATOR)

    monkeypatch.setattr("tokmask_peft.training.train.load_backbone", refuse)
    with pytest.raises(RunError, match=r"while the backbone was loaded .*model\.quantization=nf4") as caught:
        train(write_recipe(), "oom")
    assert "batch" not in str(caught.value)


def test_what_evaluate_advises_where_memory_runs_out_can_be_followed(write_recipe, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError(ALLOCATOR)

    def advice():
        with pytest.raises(RunError, match=r"other programs closed") as caught:
            tokmask_peft.evaluate(run)
        assert "model." not in str(caught.value)  # the command takes no keys of the recipe
        assert "training." not in str(caught.value)
        return str(caught.value)

    run = train(write_recipe(), "fits").folder.root
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
    [
        (0, "null", torch.OutOfMemoryError, ALLOCATOR),
        (3, "null", RuntimeError, KERNEL),
        (3, "5", MemoryError, ""),
    ],
)
def test_auto_batch_is_the_run_with_smaller_batches(write_recipe, monkeypatch, at_step, neftune, error, said):
    path, noise = write_recipe(), f"training.neftune_alpha={neftune}"
    expected = train(path, "small", noise, "training.batch_size=2", "training.gradient_accumulation=4")
    seen = run_out(monkeypatch, 2, at_step, error, said)
    run = train(path, "auto", noise, "training.auto_batch=true")
    assert seen[at_step] == 8  # and there it began again
    assert set(seen[at_step + 1 :]) == {4, 2}
    assert run.result.steps == expected.result.steps == 12
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
    message = str(caught.value)
    for key in ("model.gradient_checkpointing=true", "model.quantization=nf4", "model.embedding=offload"):
        assert key in message
    assert "batch" not in message
    monkeypatch.setattr("transformers.BertForSequenceClassification.supports_gradient_checkpointing", False)
    with pytest.raises(RunError, match=r"adapter\.layers=0\.5") as caught:
        train(write_recipe(), "none-either", "training.auto_batch=true", "model.embedding=offload")
    assert "checkpointing" not in str(caught.value)
    assert "model.embedding" not in str(caught.value)


@pytest.mark.parametrize("auto", ["true", "false"])
def test_a_backbone_that_does_not_fit_on_the_gpu_is_not_retried_with_fewer_texts(write_recipe, monkeypatch, auto):
    seen = []

    def refuse(self, *_):
        seen.append(self)
        raise torch.OutOfMemoryError(ALLOCATOR)

    monkeypatch.setattr("transformers.Trainer._move_model_to_device", refuse)
    with pytest.raises(RunError, match=r"while the backbone was loaded .*model\.quantization=nf4") as caught:
        train(write_recipe(), "oom", f"training.auto_batch={auto}")
    assert "batch" not in str(caught.value)
    assert len(seen) == 1


def test_a_run_that_will_not_fit_is_reported_before_it_starts(write_recipe, monkeypatch, capsys):
    monkeypatch.setattr(fits, "device_memory", lambda device: Memory(700 * 2**20, "this machine's free memory"))
    monkeypatch.setattr(OrderedEvalTrainer, "train", lambda *_, **__: pytest.fail("said before"))
    monkeypatch.setattr(fit, "make_console", lambda *_: fit_console())
    with pytest.raises(pytest.fail.Exception):
        tokmask_peft.train(load_recipe(write_recipe(), [*SHORT, "name=tight"]))
    said = capsys.readouterr().out
    assert "Warning: the largest batch would take" in said
    assert "training.batch_size=" in said
    assert "checkpointing" in said


def fit_console():
    from tokmask_peft.console import make_console

    return make_console()


def test_checkpointing_that_memory_asks_for_changes_no_weight(write_recipe, monkeypatch):
    path = write_recipe("qwen2", extra="")
    settings = ["adapter.dropout=0", "training.eval_batch_size=2"]
    plain = train(path, "plain", *settings)
    sizes = iter([Memory(700 * 2**20 + 2**18, "this machine's free memory")])
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
    parts = ("weights", "embedding", "adapter", "optimizer", "overhead")
    largest = found["largest"]
    step = max(largest["activations"] + largest["workspace"], largest["evaluation"])
    assert largest["total"] == sum(largest[part] for part in parts) + step
    assert found["quantization"] == "none"
    assert found["margin"] == 0.15
    assert any(one["changes"].get("training.batch_size") for one in found["suggestions"])


def test_validation_and_test_texts_count_as_they_are_evaluated(write_recipe, data_folder, tmp_path, monkeypatch):
    own = tmp_path / "long-test"
    own.mkdir()
    for file in data_folder.glob("*.tsv"):
        (own / file.name).write_text(file.read_text())
    with (own / "test.tsv").open("a") as file:
        file.writelines(f"{'casa amigo ' * 45}{number}\tpositive\n" for number in range(150))
    recipe = load_recipe(
        write_recipe(), [*SHORT, f"data.path={own}", "data.max_length=64", "training.eval_batch_size=128"]
    )
    found = fits.without_training(recipe).shapes
    assert max(found.largest.lengths) < 64
    assert found.evaluation.lengths == (64,) * 128  # there are 96 texts to train on
    made, forecast = [], fits.forecast
    monkeypatch.setattr(fits, "forecast", lambda *given, **more: made.append(forecast(*given, **more)) or made[-1])
    monkeypatch.setattr(OrderedEvalTrainer, "train", lambda *_, **__: pytest.fail("said before"))
    with pytest.raises(pytest.fail.Exception):
        tokmask_peft.train(recipe, quiet=True)
    assert made[0].shapes == found


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


def test_the_estimate_s_batches_are_padded_where_neftune_asks_for_it(write_recipe):
    recipe = load_recipe(write_recipe(), ["training.batching=padding_free"])
    assert fits.without_training(recipe).shapes.largest.packed
    noisy = load_recipe(write_recipe(), ["training.batching=padding_free", "training.neftune_alpha=5"])
    assert not fits.without_training(noisy).shapes.largest.packed


def test_the_estimate_has_the_attention_dropout_of_the_run(write_recipe, monkeypatch):
    recipe = load_recipe(write_recipe(), [*SHORT, "model.attention_dropout=0.3"])
    found = fits.without_training(recipe).largest
    made, forecast = [], fits.forecast
    monkeypatch.setattr(fits, "forecast", lambda *given, **more: made.append(forecast(*given, **more)) or made[-1])
    monkeypatch.setattr(OrderedEvalTrainer, "train", lambda *_, **__: pytest.fail("said before"))
    with pytest.raises(pytest.fail.Exception):
        tokmask_peft.train(recipe, quiet=True)
    assert made[0].largest == found
    monkeypatch.setattr(backbone_module, "_ATTENTION_DROPOUT", ("another_name",))
    with pytest.raises(ModelError, match=r"has no attention dropout; set model.attention_dropout=null"):
        fits.without_training(recipe)


def test_the_report_as_it_is_read(write_recipe, capsys):
    recipe = load_recipe(write_recipe(), SHORT)
    print_forecast(fits.without_training(recipe, "4GB"))
    said = capsys.readouterr().out
    assert "It fits: a GPU of 4 GiB has 4.0 GiB" in said
    assert "quantization none" in said
    print_forecast(fits.without_training(recipe, "0.6GB"))
    said = capsys.readouterr().out
    assert "It does NOT fit" in said
    assert "  training.batch_size=1 training.gradient_accumulation=8" in said
    assert "still too much" in said
    assert "within 15% of this" in said
    with pytest.raises(RecipeError, match="expected a size such as 6GB"):
        fits.without_training(recipe, "big")


@pytest.mark.parametrize(
    ("gpu", "precision", "said_so"), [("4GB", "auto", True), ("4GB", "fp32", False), (None, "auto", False)]
)
def test_a_gpu_is_taken_for_one_with_bf16_and_the_report_says_so(write_recipe, capsys, gpu, precision, said_so):
    recipe = load_recipe(write_recipe(), [*SHORT, f"model.precision={precision}"])
    found = fits.without_training(recipe, gpu)
    print_forecast(found)
    said = " ".join(capsys.readouterr().out.split())
    assert ("GTX 1650" in said) == said_so
    assert ("model.precision=fp32" in said) == said_so
    assert (found.to_dict()["assumed"] is not None) == said_so


@pytest.mark.parametrize("batching", ["padded", "grouped", "padding_free"])
def test_a_token_budget_makes_the_batches_and_a_resumed_run_the_same(write_recipe, monkeypatch, batching):
    path, seen = write_recipe(), []
    step = OrderedEvalTrainer.training_step

    def noted(self, model, inputs, *rest):
        seen.append(inputs["input_ids"].numel())
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(OrderedEvalTrainer, "training_step", noted)
    budget = ["training.tokens_per_batch=128", f"training.batching={batching}", "training.epochs=2"]
    whole = train(path, "whole", *budget)
    assert max(seen) <= 128
    assert len(set(seen)) > 2 or batching == "grouped"
    assert whole.result.steps == len(seen)
    assert whole.result.speed["tokens_per_second"] > 0
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


def test_a_budget_below_the_longest_text(write_recipe):
    with pytest.raises(RecipeError, match=r"training.tokens_per_batch: the longest text takes .* set it higher"):
        train(write_recipe(), "small", "training.tokens_per_batch=16")
    with pytest.raises(RecipeError, match=r"training.auto_batch changes batch_size"):
        load_recipe(write_recipe(), ["training.auto_batch=true", "training.tokens_per_batch=64"])


def test_auto_and_switches_of_checkpointing(write_recipe):
    path = write_recipe()
    assert load_recipe(path).model.gradient_checkpointing == "auto"
    assert load_recipe(path, ["model.gradient_checkpointing=true"]).model.gradient_checkpointing is True
    with pytest.raises(RecipeError, match="expected 'auto' or true or false"):
        load_recipe(path, ["model.gradient_checkpointing=1"])
