"""Who may write into a run folder, what a run leaves there, and how it is read again."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from filelock import FileLock
from run_files import log, result, write_run
from safetensors.torch import save_file

from tokmask_peft import artifacts
from tokmask_peft.artifacts import (
    AdapterInfo,
    Calibration,
    Loading,
    Result,
    RunFolder,
    check_run,
    locked,
    open_finished,
    open_run,
    write_json,
)
from tokmask_peft.errors import ModelError, RunError, whole
from tokmask_peft.masking.config import TokenMaskConfig
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
    return caught.value


class TestCheckRun:
    def test_a_new_name_is_free_and_nothing_is_made(self, recipe):
        assert check_run(recipe, resume=False).root == recipe.run_dir
        assert not recipe.run_dir.parent.exists()

    def test_an_empty_folder_is_free(self, recipe):
        recipe.run_dir.mkdir(parents=True)
        check_run(recipe, resume=False)

    def test_nothing_to_resume(self, recipe):
        error = refusal(recipe, resume=True)
        assert error.code == "no-run"
        assert "start it without --resume" in str(error)

    def test_an_unfinished_name_is_taken_but_can_be_resumed(self, recipe, begun):
        error = refusal(recipe)
        assert error.code == "run-unfinished"
        assert "continue it with --resume, or choose another name (name=…) or remove it" in str(error)
        assert check_run(recipe, resume=True) == begun

    def test_a_finished_run_is_neither_overwritten_nor_resumed(self, recipe, begun):
        write_json(begun.result, {})
        assert refusal(recipe).code == refusal(recipe, resume=True).code == "run-finished"
        assert "choose another name" in str(refusal(recipe))

    def test_another_recipe_is_not_mixed_in(self, recipe, begun):
        other = recipe.model_copy(update={"seed": 7, "masking": recipe.masking.model_copy(update={"p": 0.5})})
        error = refusal(other, resume=True)
        assert error.code == "other-recipe"
        assert error.fields["differences"] == ["masking.p: 0.1 before, 0.5 now", "seed: 42 before, 7 now"]
        assert f"`tokmask train {begun.recipe} --resume`" in str(error)

    def test_a_run_that_was_moved_can_be_resumed(self, recipe, begun):
        moved = begun.root.rename(begun.root.with_name("moved"))
        check_run(recipe.model_copy(update={"name": "moved"}), resume=True)
        assert Recipe.load(moved / "recipe.yaml") == recipe


class TestLocked:
    def refused(self, run):
        with pytest.raises(RunError) as caught, locked(run):
            pass
        return caught.value

    @pytest.mark.parametrize("where", ["runs", "runs/mine"])
    def test_a_file_in_the_way(self, recipe, tmp_path, where):
        (tmp_path / where).parent.mkdir(exist_ok=True)
        (tmp_path / where).write_text("")
        error = self.refused(RunFolder(recipe.run_dir))
        assert (error.code, error.fields["path"]) == ("not-writable", recipe.run_dir)

    def test_one_process_trains_a_run(self, recipe, tmp_path):
        run = RunFolder(recipe.run_dir)
        with locked(run):
            assert check_run(recipe, resume=False) == run
            assert self.refused(run).code == "run-in-use"
        assert list(tmp_path.iterdir()) == []  # nothing was written
        with locked(run):
            write_json(run.result, {})
        assert list(run.root.iterdir()) == [run.result]

    def test_a_lock_whose_file_was_removed_just_before_is_not_held(self, recipe, monkeypatch):
        run, removed = RunFolder(recipe.run_dir), []

        class Late(FileLock):
            def acquire(self, *args, **kwargs):
                found = super().acquire(*args, **kwargs)
                if not removed:
                    removed.append(run.lock.unlink())
                return found

        monkeypatch.setattr(artifacts, "FileLock", Late)
        with locked(run):
            assert self.refused(run).code == "run-in-use"

    def test_a_killed_process_holds_no_lock(self, recipe):
        run = RunFolder(recipe.run_dir)
        if (child := os.fork()) == 0:
            with locked(run):
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert run.lock.exists()
        assert refusal(recipe, resume=True).code == "no-run"
        with locked(run):
            check_run(recipe, resume=False)


class TestLastCheckpoint:
    PARTS = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")

    def checkpoint(self, run, name, complete=True, best=None):
        folder = run.checkpoints / name
        folder.mkdir(parents=True)
        if complete:
            save_file({"a": torch.ones(4)}, folder / self.PARTS[0])
            for part in self.PARTS[1:4]:
                torch.save({"a": torch.ones(4)}, folder / part)
            write_json(folder / self.PARTS[4], {"global_step": int(name[11:]), "best_global_step": best})
        return folder

    def test_the_newest_by_number(self, begun):
        newest = [self.checkpoint(begun, f"checkpoint-{step}") for step in (90, 1000, 200)][1]
        assert begun.last_checkpoint() == newest

    def test_what_is_incomplete_or_none_is_passed_over(self, begun):
        whole = self.checkpoint(begun, "checkpoint-10")
        self.checkpoint(begun, "checkpoint-20", complete=False)
        self.checkpoint(begun, "checkpoint-30.tmp", complete=False)
        for step, left in ((25, ""), (26, '{"global_step": 2')):  # after a power cut
            (self.checkpoint(begun, f"checkpoint-{step}") / "trainer_state.json").write_text(left)
        self.checkpoint(begun, "checkpoint-best", complete=False)
        (begun.checkpoints / "checkpoint-40").write_text("a file")
        assert begun.last_checkpoint() == whole

    @pytest.mark.parametrize("left", [None, 0, 0.5])
    @pytest.mark.parametrize("part", PARTS)
    def test_one_that_lacks_a_part_is_passed_over_with_a_message(self, begun, part, left):
        before, newest = self.checkpoint(begun, "checkpoint-10"), self.checkpoint(begun, "checkpoint-20")
        assert begun.last_checkpoint() == newest
        content = (newest / part).read_bytes()
        (newest / part).unlink()
        if left is not None:
            (newest / part).write_bytes(content[: int(len(content) * left)])
        said = []
        assert begun.last_checkpoint(said.append) == before
        assert len(said) == 1
        assert "checkpoint-20" in said[0]
        assert part in said[0]

    def test_one_whose_best_checkpoint_is_gone_is_passed_over(self, begun):
        first = self.checkpoint(begun, "checkpoint-10", best=10)
        newest = self.checkpoint(begun, "checkpoint-20", best=10)
        self.checkpoint(begun, "checkpoint-30", best=15)
        assert begun.last_checkpoint() == newest
        (first / self.PARTS[0]).unlink()
        assert begun.last_checkpoint() is None

    def test_those_of_two_processes_and_of_shards(self, begun):
        newest = self.checkpoint(begun, "checkpoint-10")
        (newest / "rng_state.pth").rename(newest / "rng_state_0.pth")
        shutil.copy(newest / "rng_state_0.pth", newest / "rng_state_1.pth")
        (newest / "optimizer.pt").rename(newest / "optimizer.bin")
        assert begun.last_checkpoint() == newest
        (newest / "rng_state_1.pth").write_bytes(b"")
        assert begun.last_checkpoint() is None

    def test_one_that_lacks_the_random_state_of_a_process_is_passed_over(self, begun):
        before, newest = self.checkpoint(begun, "checkpoint-10"), self.checkpoint(begun, "checkpoint-20")
        state, said = json.loads((newest / "trainer_state.json").read_text()), []
        for processes, missing in ((3, "rng_state_2.pth"), (None, "rng_state_1.pth")):  # None: not recorded
            (newest / "rng_state.pth").unlink(missing_ok=True)
            for rank in range(3):
                shutil.copy(before / "rng_state.pth", newest / f"rng_state_{rank}.pth")
            saved = {"stateful_callbacks": {"LogFile": {"processes": processes}}} if processes else {}
            write_json(newest / "trainer_state.json", state | saved)
            assert begun.last_checkpoint() == newest
            (newest / missing).unlink()
            assert begun.last_checkpoint(said.append) == before
            assert missing in said[-1]

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

    def test_what_killed_processes_left_is_removed(self, tmp_path):
        strays = [tmp_path / f".result.json.{number}" for number in (os.getpid(), 2**22 + 1, 1)]
        for stray in strays:
            stray.write_text("half")
        (tmp_path / ".adapter.4194305").mkdir()
        write_json(tmp_path / "result.json", {})
        assert {path.name for path in tmp_path.iterdir()} == {"result.json", ".adapter.4194305", ".result.json.1"}
        with whole(tmp_path / "adapter") as folder:
            folder.mkdir()
        assert {path.name for path in tmp_path.iterdir()} == {"result.json", "adapter", ".result.json.1"}


class TestOpenRun:
    def test_no_run(self, tmp_path):
        for place in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(RunError) as caught:
                open_run(place)
            assert caught.value.code == "not-a-run"

    def test_an_unfinished_run(self, begun):
        for _ in ("without an adapter", "without a result"):
            with pytest.raises(RunError, match=r"finish it with `tokmask train .*recipe.yaml --resume`") as caught:
                open_run(begun.root)
            assert caught.value.code == "unfinished"
            begun.adapter.mkdir(exist_ok=True)
            (begun.adapter / "adapter_config.json").write_text("{}")
        assert open_finished(str(begun.root)) == begun

    def test_a_finished_one(self, tmp_path):
        written = {key: value for key, value in result().items() if key != "baseline"}
        run = open_run(write_run(tmp_path / "run", {**written, "later": 1}))
        assert (run.recipe.name, run.result.best_step, len(run.log)) == ("made-up", 20, len(log()))
        assert (run.result.scored_split, run.result.scored) == ("test", written["test"])
        assert {**written, "masking": {}} == run.result.to_dict()
        without_test = Result.from_dict({key: value for key, value in written.items() if key != "test"})
        assert (without_test.scored_split, without_test.scored) == ("validation", written["validation"])

    @pytest.mark.parametrize(
        "content", ["", "{", "[]", "{}", '{"validation": {}}', '{"validation": {}, "labels": [[1]]}', "[" * 9000]
    )
    def test_a_result_without_scores(self, tmp_path, content):
        folder = write_run(tmp_path / "run")
        (folder / "result.json").write_text(content)
        with pytest.raises(RunError) as caught:
            open_run(folder)
        assert caught.value.code == "bad-result"


class TestAdapterInfo:
    MASKING = TokenMaskConfig(p=0.3, mask_token=103)
    CALIBRATION: ClassVar = {"temperature": 1.5, "method": "one temperature", "test": {"items": 3}}
    LOADING: ClassVar = {"max_length": 64, "package": "package:a/b", "revision": None, "quantization": "nf4"}

    def test_one_file_holds_it_all(self, tmp_path):
        calibration, loading = Calibration(**self.CALIBRATION), Loading(**self.LOADING)
        info = AdapterInfo(
            task="token", labels=("a", "b"), calibration=calibration, loading=loading, masking=self.MASKING
        )
        info.write(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["tokmask.json"]
        assert json.loads((tmp_path / "tokmask.json").read_text())["calibration"] == self.CALIBRATION
        assert AdapterInfo.read(tmp_path) == info

    def test_the_four_files_of_older_adapters_are_read(self, tmp_path):
        write_json(tmp_path / "labels.json", {"task": "token", "labels": ["a", "b"]})
        found = AdapterInfo.read(tmp_path)
        assert (found.calibration.temperature, found.loading, found.masking) == (1.0, None, None)
        write_json(tmp_path / "calibration.json", self.CALIBRATION)
        write_json(tmp_path / "tokmask.json", self.LOADING)
        self.MASKING.save_pretrained(tmp_path)
        found = AdapterInfo.read(tmp_path)
        assert (found.task, found.labels, found.masking) == ("token", ("a", "b"), self.MASKING)
        assert (found.calibration.temperature, found.loading) == (1.5, Loading(**self.LOADING))

    def test_an_adapter_of_another_package(self, tmp_path):
        with pytest.raises(ModelError, match="AutoPeftModel") as caught:
            AdapterInfo.read(tmp_path)
        assert (caught.value.code, caught.value.fields["path"]) == ("foreign-adapter", tmp_path / "tokmask.json")
