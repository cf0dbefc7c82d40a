"""Who may write into a run folder, and what an interrupted run leaves there."""

import json
import math
import os
from pathlib import Path

import pytest

from tokmask_peft.artifacts import RunFolder, check_run, open_finished, start_run, write_json
from tokmask_peft.errors import RunError
from tokmask_peft.recipe.loading import to_yaml
from tokmask_peft.recipe.schema import Recipe


@pytest.fixture
def recipe(tmp_path):
    return Recipe.load("quickstart", [f"output_dir={tmp_path}/runs", "name=mine"])


@pytest.fixture
def begun(recipe):
    """A run that was interrupted: a recipe, a checkpoint, no result."""
    run = RunFolder(recipe.run_dir)
    run.checkpoints.mkdir(parents=True)
    run.recipe.write_text(to_yaml(recipe), encoding="utf-8")
    return run


def refusal(recipe, resume=False):
    with pytest.raises(RunError) as caught:
        check_run(recipe, resume)
    return str(caught.value)


class TestCheckRun:
    def test_a_new_name_is_free_and_nothing_is_made(self, recipe):
        assert check_run(recipe, resume=False).root == recipe.run_dir
        assert not recipe.run_dir.parent.exists()

    def test_an_empty_folder_is_free(self, recipe):
        recipe.run_dir.mkdir(parents=True)
        check_run(recipe, resume=False)

    def test_nothing_to_resume(self, recipe):
        assert refusal(recipe, resume=True) == (
            f"there is no run to resume in {recipe.run_dir}; start it without --resume"
        )

    def test_an_unfinished_name_is_taken_but_can_be_resumed(self, recipe, begun):
        assert refusal(recipe) == (
            f"the run {begun.root} exists and was not finished: continue it with --resume, "
            "or choose another name (name=…) or remove it"
        )
        assert check_run(recipe, resume=True) == begun

    def test_a_finished_run_is_neither_overwritten_nor_resumed(self, recipe, begun):
        write_json(begun.result, {})
        assert refusal(recipe) == (
            f"the run {begun.root} exists and is finished: choose another name (name=…) or remove it"
        )
        assert "is finished: its scores are in" in refusal(recipe, resume=True)

    def test_another_recipe_is_not_mixed_in(self, recipe, begun):
        other = recipe.model_copy(update={"seed": 7, "masking": recipe.masking.model_copy(update={"p": 0.5})})
        said = refusal(other, resume=True)
        assert "Differences: masking.p: 0.1 before, 0.5 now; seed: 42 before, 7 now." in said
        assert f"`tokmask train {begun.recipe} --resume`" in said

    def test_a_run_that_was_moved_can_be_resumed(self, recipe, begun):
        moved = begun.root.rename(begun.root.with_name("moved"))
        check_run(recipe.model_copy(update={"name": "moved"}), resume=True)
        assert Recipe.load(moved / "recipe.yaml") == recipe

    @pytest.mark.parametrize("where", ["runs", "runs/mine"])
    def test_a_file_in_the_way(self, recipe, tmp_path, where):
        (tmp_path / where).parent.mkdir(exist_ok=True)
        (tmp_path / where).write_text("")
        assert f"{tmp_path / where} is a file" in refusal(recipe)


class TestLastCheckpoint:
    def checkpoint(self, run, name, complete=True):
        folder = run.checkpoints / name
        folder.mkdir(parents=True)
        if complete:
            (folder / "trainer_state.json").write_text("{}")
        return folder

    def test_the_newest_by_number(self, begun):
        newest = [self.checkpoint(begun, f"checkpoint-{step}") for step in (90, 1000, 200)][1]
        assert begun.last_checkpoint() == newest

    def test_what_is_incomplete_or_none_is_passed_over(self, begun):
        whole = self.checkpoint(begun, "checkpoint-10")
        self.checkpoint(begun, "checkpoint-20", complete=False)
        self.checkpoint(begun, "checkpoint-30.tmp")
        for step, left in ((25, ""), (26, '{"global_step": 2')):  # after a power cut
            (self.checkpoint(begun, f"checkpoint-{step}") / "trainer_state.json").write_text(left)
        self.checkpoint(begun, "checkpoint-best")
        (begun.checkpoints / "checkpoint-40").write_text("a file")
        assert begun.last_checkpoint() == whole

    def test_there_is_none(self, begun, tmp_path):
        assert begun.last_checkpoint() is None
        assert RunFolder(tmp_path / "nowhere").last_checkpoint() is None


class TestWriteJson:
    def test_it_replaces_and_leaves_nothing_beside(self, tmp_path):
        path = tmp_path / "result.json"
        for content in ({"a": 1}, {"ñ": [1.5, None]}):
            write_json(path, content)
            assert json.loads(path.read_text(encoding="utf-8")) == content
        assert "ñ" in path.read_text(encoding="utf-8")
        assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]

    @pytest.mark.parametrize("bad", [math.nan, math.inf, object()])
    def test_what_is_no_json_leaves_the_old_file(self, tmp_path, bad):
        path = tmp_path / "result.json"
        write_json(path, {"a": 1})
        with pytest.raises((ValueError, TypeError)):
            write_json(path, {"a": bad})
        assert json.loads(path.read_text()) == {"a": 1}
        assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]

    def test_a_writer_that_dies_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "result.json"
        write_json(path, {"a": 1})
        with path.open() as reader:  # a reader that came before sees what it opened
            write_json(path, {"a": 2})
            assert json.load(reader) == {"a": 1}
        monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"a": 3})
        assert json.loads(path.read_text()) == {"a": 2}

    def test_what_it_renames_is_on_the_disk(self, tmp_path, monkeypatch):
        done = []
        sync, rename = os.fsync, Path.replace
        monkeypatch.setattr("os.fsync", lambda number: done.append("sync") or sync(number))
        monkeypatch.setattr("pathlib.Path.replace", lambda *both: done.append("rename") or rename(*both))
        write_json(tmp_path / "result.json", {"a": 1})
        assert done == ["sync", "rename"]


def test_a_recipe_is_whole_or_not_there(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "mine")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        start_run(run, "name: mine\n")
    assert not run.recipe.exists()


class TestOpenFinished:
    def test_no_run(self, tmp_path):
        for place in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(RunError, match="is not a run folder"):
                open_finished(place)

    def test_a_run_without_an_adapter(self, begun):
        with pytest.raises(
            RunError, match=r"has no adapter yet; finish it with `tokmask train .*recipe.yaml --resume`"
        ):
            open_finished(begun.root)

    def test_a_finished_one(self, begun):
        begun.adapter.mkdir()
        (begun.adapter / "adapter_config.json").write_text("{}")
        assert open_finished(str(begun.root)) == begun
