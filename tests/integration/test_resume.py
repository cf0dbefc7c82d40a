"""Ctrl-C leaves a run that goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tokmask_peft.artifacts import RunFolder, read_log, write_json
from tokmask_peft.cli import app
from tokmask_peft.errors import RunError
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training.scoring import score_best
from tokmask_peft.training.train import train

SHORT = ("training.max_steps=3", "training.baseline=false")
LONG = ("training.epochs=6", "training.baseline=false")


@pytest.fixture
def stopped(write_recipe, begin, tmp_path):
    """Return a function that stops a run by a signal in its second epoch; it gives the recipe, the run and the step."""

    def stop(number):
        recipe, broken = write_recipe(), RunFolder(tmp_path / "runs" / "broken")
        python = begin("-m", "tokmask_peft", "train", recipe, *LONG, "name=broken")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and python.process.is_alive():
            if broken.log.is_file() and len(broken.log.read_text().splitlines()) >= 20:
                os.kill(python.process.pid, number)
                break
            time.sleep(0.005)
        done = python.end()
        text = done.stdout + done.stderr
        assert done.returncode == 130, text
        assert "Traceback" not in text
        assert "--resume" in text
        assert not broken.finished()
        scored = [line["step"] for line in map(json.loads, broken.log.read_text().splitlines()) if "eval_loss" in line]
        assert all(step % 12 == 0 for step in scored), "a broken-off epoch was scored"
        step = int(broken.last_checkpoint().name.removeprefix("checkpoint-"))
        assert 0 < step < 72
        assert f"stopped at step {step} of 72" in text, "the checkpoint of the stop is not the one that is kept"
        return recipe, broken, step

    return stop


def test_the_end_of_a_terminal_is_ctrl_c(stopped):
    stopped(signal.SIGHUP)


def test_interrupted_and_resumed_is_uninterrupted(stopped, tokmask, tmp_path):
    recipe, broken, stopped_at = stopped(signal.SIGINT)
    whole = train(Recipe.load(recipe, [*LONG, "name=whole"]), quiet=True).folder
    assert "--resume" in tokmask("train", recipe, *LONG, "name=broken", code=2).stderr
    other = tokmask("train", recipe, *LONG, "name=broken", "masking.p=0.2", "--resume", code=2)
    assert "masking.p: 0.1 before, 0.2 now" in other.stderr

    weights = broken.last_checkpoint() / "adapter_model.safetensors"
    whole_file, half = weights.read_bytes(), dict(list(load_file(weights).items())[::2])
    save_file(half, weights)
    unfit = tokmask("train", broken.recipe, "--resume", code=2)
    assert f"{len(load_file(whole.adapter / weights.name)) - len(half)} missing" in unfit.stderr
    weights.write_bytes(whole_file)

    tokmask("train", broken.recipe, "--resume", "--quiet")
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, broken))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=0)
    losses = [
        {line["step"]: line["loss"] for line in map(json.loads, run.log.read_text().splitlines()) if "loss" in line}
        for run in (whole, broken)
    ]
    assert list(losses[1]) == list(range(1, 73))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    (summary,) = (line for line in read_log(broken.log) if "train_runtime" in line)
    assert (summary["step"], summary["since_step"]) == (72, stopped_at)
    later = [loss for step, loss in losses[1].items() if step > stopped_at]
    assert summary["train_loss"] == pytest.approx(sum(later) / len(later), abs=1e-3)


def test_a_reader_that_is_gone_stops_a_run_as_ctrl_c_does(write_recipe, tmp_path):
    run = RunFolder(tmp_path / "runs" / "tiny")
    os.mkfifo(tmp_path / "stdout")
    arguments = ("-m", "tokmask_peft", "train", write_recipe(), "training.epochs=40")
    process = forked.Python.start(arguments, tmp_path, os.environ, tmp_path).process
    with (tmp_path / "stdout").open() as reader:
        assert any("step 20/" in line for line in reader)
    process.join(100)
    said = (tmp_path / "stderr").read_text()
    assert process.exitcode == 130, said
    assert "continue with `tokmask train" in said
    assert "Traceback" not in said
    assert f"stopped at step {run.last_checkpoint().name[11:]} of " in said


def test_two_trainings_of_one_name_exclude_each_other(write_recipe, tokmask, begin, tmp_path):
    run, recipe = RunFolder(tmp_path / "runs" / "tiny"), write_recipe()
    python = begin("-m", "tokmask_peft", "train", recipe, "--quiet")
    while not run.lock.exists() and python.process.is_alive():
        time.sleep(0.005)
    for more in ([], ["--resume"]):
        assert "another process" in tokmask("train", recipe, *more, code=2).stderr
    assert python.end().returncode == 0
    assert run.finished()
    assert not run.lock.exists()


@pytest.mark.parametrize(
    ("phase", "options", "steps"),
    [
        ("load_corpus", SHORT, 3),
        ("score_best", SHORT, 3),  # of 12 in an epoch
        ("save_adapter_folder", ("training.patience=1", "training.learning_rate=1e-9", *LONG), 24),
    ],
)
def test_a_signal_in_any_phase_leaves_a_run_that_can_be_continued(
    write_recipe, monkeypatch, tmp_path, phase, options, steps
):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    recipe, run = write_recipe(), RunFolder(tmp_path / "runs" / "tiny")
    with monkeypatch.context() as patch:
        patch.setattr(f"tokmask_peft.training.train.{phase}", stop)
        stopped = CliRunner().invoke(app, ["train", str(recipe), *options, "--quiet"])
    assert stopped.exit_code == 130
    assert run.root.exists() == (phase != "load_corpus")
    assert ("--resume" in stopped.stderr) == run.root.exists()
    assert not run.finished()
    assert not run.adapter.exists()
    found = train(Recipe.load(recipe, options), resume=run.root.exists(), quiet=True)
    assert not [path for path in run.root.iterdir() if path.name.startswith(".")]
    scored = [line["step"] for line in found.log if "eval_loss" in line]
    assert (found.result.steps, scored) == (steps, [*range(12, steps, 12), steps]), "it ended when it was stopped"


def test_a_run_is_not_resumed_with_other_data_or_another_backbone(write_recipe, data_folder, tiny_backbone, tmp_path):
    (data, backbone), sources = (tmp_path / "texts", tmp_path / "model"), (data_folder, tiny_backbone("bert"))
    for source, copy in zip(sources, (data, backbone), strict=True):
        shutil.copytree(source, copy)
    recipe = Recipe.load(write_recipe(), [f"data.path={data}", f"model.backbone={backbone}", *SHORT])
    run = train(recipe, quiet=True).folder
    run.result.unlink()

    def changed(path, content):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(RunError) as caught:
            train(recipe, resume=True, quiet=True)
        path.write_bytes(before)
        assert caught.value.code == "other-data"
        return caught.value.fields["changed"], str(caught.value)

    test, train_file, weights = data / "test.tsv", data / "train.tsv", backbone / "model.safetensors"
    assert changed(test, test.read_bytes() + b"one more text\tpositive\n")[0] == ["test"]
    for split in (test, data / "validation.tsv"):
        split.write_bytes(split.read_bytes().replace(b"\tpositive", b"\tgood"))
    found, message = changed(train_file, train_file.read_bytes().replace(b"\tpositive", b"\tgood"))
    assert found == ["labels", "train", "validation", "test"]
    assert "negative, positive before, good, negative now" in message
    for split in (test, data / "validation.tsv"):
        split.write_bytes(split.read_bytes().replace(b"\tgood", b"\tpositive"))
    scaled = {name: value * 1.01 for name, value in load_file(weights).items()}
    save_file(scaled, tmp_path / "scaled", {"format": "pt"})
    assert changed(weights, (tmp_path / "scaled").read_bytes())[0] == ["backbone (linear)", "backbone (others)"]
    assert train(recipe, resume=True, quiet=True).folder.finished()


def test_scores_of_other_weights_than_the_best_finish_no_run(write_recipe, tmp_path, monkeypatch):
    def other(*given):
        result, predictions = score_best(*given)
        return replace(result, validation=result.validation | {"f1_macro": -1.0}), predictions

    monkeypatch.setattr("tokmask_peft.training.train.score_best", other)
    with pytest.raises(RunError) as caught:
        train(Recipe.load(write_recipe(), SHORT), quiet=True)
    assert caught.value.code == "not-the-best"
    run = RunFolder(tmp_path / "runs" / "tiny")
    assert not run.finished()
    assert not run.adapter.exists()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("part", "put"),
    [
        ("optimizer.pt", Path.touch),
        ("scheduler.pt", os.mkfifo),  # to open it for writing would never end
        ("trainer_state.json", Path.mkdir),
        ("adapter_config.json", os.mkfifo),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(trained, copied, tokmask, part, put):
    run = copied(trained())
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    last = run.last_checkpoint()
    (last / part).unlink()
    put(last / part)
    run.result.unlink()
    shutil.rmtree(run.adapter)
    done = tokmask("train", run.recipe, f"output_dir={run.root.parent}", "--resume")
    assert last.name in done.stdout
    assert part in done.stdout
    assert (last / part).is_file()
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == weights


def test_a_moved_run_ends_with_its_best_weights(trained, copied):
    run = trained()
    moved = copied(run, "moved")
    best, last = sorted(moved.checkpoints.iterdir())
    state = json.loads((last / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].startswith(str(run.folder.root))
    step = int(best.name.removeprefix("checkpoint-"))
    (metric,) = (line["eval_f1_macro"] for line in state["log_history"] if line["step"] == step and "eval_loss" in line)
    gone = str(moved.root.parent / "gone" / best.name)
    state |= {"best_global_step": step, "best_metric": metric, "best_model_checkpoint": gone}
    write_json(last / "trainer_state.json", state)
    moved.result.unlink()
    shutil.rmtree(moved.adapter)
    found = train(Recipe.load(moved.recipe, ["name=moved", f"output_dir={moved.root.parent}"]), resume=True, quiet=True)
    assert found.result.best_step == step
    folders = (moved.adapter, moved.checkpoints / best.name)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
