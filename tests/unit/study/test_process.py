"""A trial's process: its end, its reason, and what becomes of its files."""

import json
import os
import sys

import pytest

from tokmask_peft.artifacts import check_run
from tokmask_peft.errors import SweepError
from tokmask_peft.recipe.loading import to_yaml
from tokmask_peft.study.ledger import Claim
from tokmask_peft.study.plan import make_plan
from tokmask_peft.study.runner import TrialProcess, drop_checkpoints, finished_result, interrupted, reject_result


@pytest.fixture
def plan(tmp_path):
    return make_plan("quickstart", [f"output_dir={tmp_path}"], p="0,0.1", seeds="1,", name="mine")


@pytest.fixture
def start(plan):
    """Return a function that runs Python code as the trial of the first cell."""

    def run(code):
        cell = plan.cells[0]
        return TrialProcess(Claim(cell, 0, ()), plan.recipe_of(cell), [sys.executable, "-c", code], threads=1)

    return run


def ended(process):
    code = process._process.wait(timeout=60)
    process.close()
    return code


def test_the_task_is_told_on_standard_input(start, tmp_path):
    process = start("import sys; print(sys.stdin.readline())")
    ended(process)
    task = json.loads(process.log.read_text())
    assert task["recipe"]["name"] == "p0-seed1"
    assert task["resume"] is False


def test_a_folder_that_holds_something_is_resumed(start, plan):
    folder = plan.folder / "p0-seed1"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").touch()
    process = start("import sys; print(sys.stdin.readline())")
    ended(process)
    assert json.loads(process.log.read_text())["resume"] is True


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('Error: mine: 2 problems'); print('  a: wrong'); exit(2)", "mine: 2 problems a: wrong (exit code 2)"),
        ("raise MemoryError('too large')", "MemoryError: too large (exit code 1)"),
        ("exit(3)", "no message (exit code 3)"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL (out of memory?)"),
        ("import os; os.kill(os.getpid(), 15)", "killed by SIGTERM"),
    ],
)
def test_the_reason_of_a_failure(start, code, said):
    process = start(code)
    status = ended(process)
    assert process.reason(status) == said
    assert not interrupted(status, process)


def test_a_trial_ends_with_the_sweep_that_began_it(start):
    process = start("from tokmask_peft.study.trial import read_task; read_task(); import time; time.sleep(120)")
    process.close()  # the system closes the pipe of a killed process
    assert process._process.wait(timeout=60) == 130


def test_ctrl_c_at_the_terminal_does_not_reach_it(start):
    process = start("import os; print(os.getsid(0))")
    ended(process)
    assert int(process.log.read_text()) != os.getsid(0)


def test_stopping_asks_first_and_then_insists(start):
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('asked', flush=True))\n"
        "print('ready', flush=True)"
    )
    process = start(f"{code}\nwhile True: time.sleep(0.01)")
    while "ready" not in process.log.read_text():
        assert process.poll() is None
    process.stop()
    while "asked" not in process.log.read_text():
        assert process.poll() is None
    process.stop()
    assert ended(process) == -9
    assert interrupted(-9, process)


def test_evaluations_are_read_once(start):
    process = start("pass")
    ended(process)
    process.run.root.mkdir(parents=True)
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "eval_f1_macro": 0.25}]
    process.run.log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "eval_')
    assert list(process.new_evaluations()) == [(2, 0.25)]
    assert list(process.new_evaluations()) == []


class TestFinished:
    def test_a_result_is_taken_only_from_the_same_recipe(self, plan):
        cell, other = plan.cells
        recipe = plan.recipe_of(cell)
        assert finished_result(recipe) is None
        recipe.run_dir.mkdir(parents=True)
        (recipe.run_dir / "result.json").write_text('{"validation": {}}')
        (recipe.run_dir / "recipe.yaml").write_text(to_yaml(recipe))
        assert finished_result(recipe) == {"validation": {}}
        (recipe.run_dir / "recipe.yaml").write_text(to_yaml(plan.recipe_of(other)))
        with pytest.raises(SweepError, match=r"masking.p: 0.1 before, 0.0 now"):
            finished_result(recipe)

    def test_a_sweep_to_which_a_rate_is_added_keeps_its_runs(self, plan, tmp_path):
        wider = make_plan("quickstart", [f"output_dir={tmp_path}"], p="0.3,0,0.1", seeds="1,", name="mine")
        before, after = plan.recipe_of(plan.cells[0]), wider.recipe_of(wider.cells[1])
        assert before.run_dir == after.run_dir
        assert (before.training.baseline, after.training.baseline) == (True, False)  # the first arm of a seed fits it
        before.run_dir.mkdir(parents=True)
        (before.run_dir / "recipe.yaml").write_text(to_yaml(before))
        assert check_run(after, resume=True).root == before.run_dir
        (before.run_dir / "result.json").write_text('{"validation": {}}')
        assert finished_result(after) == {"validation": {}}

    def test_a_rejected_result_is_none(self, plan):
        recipe = plan.recipe_of(plan.cells[0])
        recipe.run_dir.mkdir(parents=True)
        (recipe.run_dir / "result.json").write_text("{}")
        reject_result(recipe)
        assert finished_result(recipe) is None
        assert (recipe.run_dir / "result.rejected.json").is_file()

    def test_checkpoints_go(self, plan):
        recipe = plan.recipe_of(plan.cells[0])
        (recipe.run_dir / "checkpoints" / "checkpoint-3").mkdir(parents=True)
        drop_checkpoints(recipe)
        drop_checkpoints(recipe)
        assert not (recipe.run_dir / "checkpoints").exists()


def test_a_result_that_cannot_be_read_is_told(plan):
    recipe = plan.recipe_of(plan.cells[0])
    recipe.run_dir.mkdir(parents=True)
    (recipe.run_dir / "result.json").write_text("")  # after a power cut
    with pytest.raises(SweepError, match=r"result\.json cannot be read .*remove it, and the run goes on"):
        finished_result(recipe)
