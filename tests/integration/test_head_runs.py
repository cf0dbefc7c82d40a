"""Runs whose head starts from a linear probe."""

import json
from pathlib import Path

import pytest

import tokmask_peft.training.train as training
from tokmask_peft import Recipe, evaluate, load, train
from tokmask_peft.errors import RunInterruptedError
from tokmask_peft.training.callbacks import StopOnSignal

PROBE = ["training.head=probe", "training.max_steps=3"]


@pytest.mark.parametrize(
    ("family", "task", "batching"),
    [("bert", "sequence", "padding_free"), ("bert", "token", "padded"), ("xlm-r", "sequence", "padding_free"),
     ("distilbert", "sequence", "padded"), ("qwen2", "sequence", "padding_free"), ("gemma3", "sequence", "padded")],
)  # fmt: skip
def test_the_head_starts_as_the_probe_and_its_score_is_a_floor(write_recipe, monkeypatch, family, task, batching):
    started = []

    def start(trainer, splits, seed):
        found = training_start(trainer, splits, seed)
        started.append(found[1])
        again = trainer.predict_windows(splits["test"])[0]
        assert again.to_dict() == found[1].to_dict()
        return found

    training_start = training.start_head
    monkeypatch.setattr(training, "start_head", start)
    rate = ["training.learning_rate=1e-9", f"training.batching={batching}"]  # what it starts from is what it ends with
    run = train(Recipe.load(write_recipe(family, task), [*PROBE, *rate]), quiet=True)
    assert {"what": "head", "choice": "probe"}.items() <= next(
        one.items() for one in run.result.decisions if one["what"] == "head"
    )
    assert run.result.probe["f1_macro"] == pytest.approx(run.result.test["f1_macro"], abs=0.02)
    if family != "distilbert":  # whose random ReLU layer of 32 units comes before the last one
        assert run.result.probe["f1_macro"] > 0.55  # the label depends on one word
    assert "not-above-floor" in {one["code"] for one in run.result.warnings}
    assert json.loads(run.folder.probe.read_text()) == started[0].to_dict()


@pytest.mark.parametrize(
    ("carrier", "shown", "options"),
    [
        ("last", "last = [", []),
        ("mean", "mean = {", ["training.views=2"]),
        ("mean", "mean = {", ["training.batching=padded", "training.head=probe", "data.max_length=14"]),
    ],
)
def test_a_run_decides_what_is_auto_and_its_scores_are_repeated(write_recipe, tmp_path, carrier, shown, options):
    """By `evaluate`, and by a prediction from the adapter's folder, with the label on the last or all sub-tokens."""
    auto = [f"training.{key}=auto" for key in ("epochs", "batch_size", "patience")]
    run = train(
        Recipe.load(
            write_recipe("bert", "token"),
            [*auto, "training.max_steps=3", f"data.label_on={carrier}", "model.pooling=mean", *options],
        ),
        quiet=True,
    )
    chosen = {one["what"]: one["choice"] for one in run.result.decisions}
    assert (chosen["batch size"], chosen["patience"]) == ("8", "17")
    assert "epochs" not in chosen  # the steps are given
    assert "batches of 8 texts" in (run.folder.adapter / "README.md").read_text()
    assert evaluate(run.folder.root)["confusion"] == run.result.test["confusion"]
    moved = run.folder.adapter.rename(tmp_path / "moved")
    card = (moved / "README.md").read_text()
    assert shown in card
    assert "pool(" not in card  # words are not pooled
    classifier = load(moved, backbone=run.recipe.model.backbone)
    test = [block.split("\n") for block in Path(run.recipe.data.path, "test.conll").read_text().strip().split("\n\n")]
    answers = classifier.predict([[line.split("\t")[0] for line in lines] for lines in test])
    labels, predicted = run.result.labels, json.loads(run.folder.predictions.read_text())["test"]["predicted"]
    assert [[labels[at] for at in row] for row in predicted] == [list(one.labels) for one in answers]


def test_a_resumed_run_takes_the_head_from_its_checkpoint(write_recipe, monkeypatch):
    recipe, whole = (Recipe.load(write_recipe(), [*PROBE, f"name={name}"]) for name in ("stopped", "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(StopOnSignal, "on_step_begin", lambda self, *_, **__: self._ask(), raising=False)
        with pytest.raises(RunInterruptedError):
            train(recipe, quiet=True)
        assert recipe.run_dir.joinpath("probe.json").is_file()
    with monkeypatch.context() as patched:
        patched.setattr(training, "start_head", None)
        found = train(recipe, resume=True, quiet=True)
    expected = train(whole, quiet=True)
    assert found.result.probe == expected.result.probe
    assert found.folder.predictions.read_text() == expected.folder.predictions.read_text()
