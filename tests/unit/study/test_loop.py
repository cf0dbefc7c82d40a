"""The loop of a sweep: the results it takes, and what it does when its runs belong to another worker."""

import io
import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
from rich.console import Console

pytest.importorskip("optuna")

from tokmask_peft.artifacts import RunFolder, check_run
from tokmask_peft.errors import SweepError
from tokmask_peft.recipe.loading import to_yaml
from tokmask_peft.study.ledger import CellState, Ledger
from tokmask_peft.study.plan import make_plan
from tokmask_peft.study.runner import TEXTS, Loop, Options, closing_lines, finished_result, remaining_seconds, run_sweep
from tokmask_peft.study.worker import Worker

RESULT = '{"labels": ["a"], "validation": {"f1_macro": 0.5}}'
CELLS = {
    "a": CellState("done", 0.5, 60.0),
    "b": CellState("done", 0.75, 120.0),
    "c": CellState("running"),
    "d": CellState("waiting"),
    "e": CellState("failed", reason="no memory"),
    "f": CellState("pruned"),
}


def stub(recipe):
    """Return a worker without a process."""
    worker = Mock(spec=Worker, run=RunFolder(recipe.run_dir), seconds=30.0, signals=0)
    answers = {"poll": None, "reason": "stopped", "progress": "step 4, loss 0.5", "new_evaluations": []}
    worker.configure_mock(**{f"{name}.return_value": answer for name, answer in answers.items()})
    return worker


@pytest.fixture
def loop(plan, tmp_path):
    """A loop with both of its cells running."""
    made = Loop(plan, Ledger(plan, tmp_path / "journal", prune=True), Options(workers=2, prune=True))
    made.console = Console(file=io.StringIO(), force_terminal=True, width=200)
    made.running = {stub(plan.recipe_of(cell)): made.ledger.claim() for cell in plan.cells}
    made.workers = list(made.running)
    return made


@pytest.mark.parametrize("evaluations", [[], [(10, 0.5), (20, 0.6)]])
def test_a_run_that_was_taken_over_stops(loop, evaluations):
    gone, kept = loop.workers
    loop.ledger.close(loop.running[gone].trial_id, "interrupted")
    loop._next_look = float("inf")
    loop._next_beat = float("inf") if evaluations else 0.0  # evaluations or a sign of life
    gone.new_evaluations.return_value = kept.new_evaluations.return_value = evaluations
    loop.step()
    assert (gone.end.call_count, kept.end.call_count) == (1, 0)
    assert list(loop.running) == [kept]
    assert loop.console.file.getvalue() == "p0-seed1 was taken over by another worker; stopped here\n"


def test_the_lines_of_a_terminal(loop):
    loop.cells = {**CELLS, "e": CellState("failed", reason="no \x1b[2Jmemory")}
    shown = loop.screen().plain
    for expected in ("2/6 done", "p0-seed1  step 4, loss 0.5  30 s", "failed: e: no \\u001b[2Jmemory", "left"):
        assert expected in shown


def test_the_summary():
    assert TEXTS.summary(CELLS, 130) == (
        "2/6 done, 1 running, 1 failed, 1 pruned; best b (validation macro-F1 0.7500); about 2 min left"
    )
    assert TEXTS.summary({}) == "0/0 done, 0 running"
    assert [TEXTS.duration(s) for s in (5, 89, 600, 7260)] == ["5 s", "89 s", "10 min", "2 h 1 min"]


@pytest.mark.parametrize(
    ("names", "elapsed", "workers", "left"),
    [
        ("abcdef", [30.0], 1, 2 * 90 - 30),
        ("abcdef", [500.0], 1, 90),  # it takes longer than the mean; the other is to come
        ("abcdef", [], 2, 90),
        ("d", [], 1, None),
        ("a", [], 1, None),
    ],
)
def test_remaining_time_is_that_of_unfinished_cells(names, elapsed, workers, left):
    assert remaining_seconds({name: CELLS[name] for name in names}, elapsed, workers) == left


def test_the_best_values_of_a_sampler_are_shown(tmp_path):
    drawing = {"sampler": "random", "trials": 1, "grid": ["adapter.r=4..8"]}
    plan = make_plan("quickstart", [f"output_dir={tmp_path}/my runs"], p="0,0.1", name="drawn", **drawing)
    recipe = plan.recipe_of(plan.cells[0], ["adapter.r=5", "masking.p=0.1"])
    recipe.run_dir.mkdir(parents=True)
    (recipe.run_dir / "recipe.yaml").write_text(to_yaml(recipe))
    done = {"trial-0000": CellState("done", 0.5)}
    assert "adapter.r=5 masking.p=0.1." in closing_lines(plan, done)[-1]
    grid = replace(plan, sampler="grid")
    assert closing_lines(grid, done)[-1] == f"Next: tokmask report '{plan.folder}'"


class TestFinished:
    @pytest.fixture
    def finish(self, plan):
        """Return a function that leaves a run with the recipe of one cell and a result in the folder of another."""

        def write(cell, recipe_of=None, result=RESULT):
            folder = plan.recipe_of(cell).run_dir
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "result.json").write_text(result)
            (folder / "recipe.yaml").write_text(to_yaml(plan.recipe_of(recipe_of or cell)))
            return folder

        return write

    def test_a_result_is_taken_only_from_the_same_recipe(self, plan, finish):
        cell, other = plan.cells
        recipe = plan.recipe_of(cell)
        assert finished_result(recipe) is None
        finish(cell)
        assert finished_result(recipe).validation == {"f1_macro": 0.5}
        finish(cell, recipe_of=other)
        with pytest.raises(SweepError) as caught:
            finished_result(recipe)
        assert caught.value.fields["differences"] == ["masking.p: 0.1 before, 0.0 now"]

    def test_a_sweep_to_which_a_rate_is_added_keeps_its_runs(self, plan, tmp_path, finish):
        wider = make_plan("quickstart", [f"output_dir={tmp_path}"], p="0.3,0,0.1", seeds="1,", name="mine")
        before, after = plan.recipe_of(plan.cells[0]), wider.recipe_of(wider.cells[1])
        assert before.run_dir == after.run_dir
        assert (before.training.baseline, after.training.baseline) == (True, False)  # the first arm of a seed fits it
        result = finish(plan.cells[0]) / "result.json"
        assert finished_result(after) is not None
        result.unlink()
        assert check_run(after, resume=True).root == before.run_dir

    def test_a_result_that_cannot_be_read(self, plan, finish):
        finish(plan.cells[0], result="")  # after a power cut
        with pytest.raises(SweepError, match="remove it to continue the run") as caught:
            finished_result(plan.recipe_of(plan.cells[0]))
        assert caught.value.code == "broken-result"

    def test_a_failed_run_leaves_no_result(self, loop, finish):
        worker = loop.workers[0]
        finish(loop.plan.cells[0])
        worker.poll.return_value = 1
        loop.step()
        assert finished_result(loop.plan.recipe_of(loop.plan.cells[0])) is None
        assert worker.run.result.with_name("result.rejected.json").is_file()
        assert loop.cells["p0-seed1"] == CellState("failed", reason="stopped")

    def test_finished_runs_are_taken_without_training_and_checkpoints_go(self, plan, finish):
        for cell in plan.cells:
            (finish(cell) / "checkpoints" / "checkpoint-3").mkdir(parents=True)
        cells = run_sweep(plan, options=Options(train=None), quiet=True)
        assert {cell.state for cell in cells.values()} == {"done"}
        assert not list(plan.folder.rglob("checkpoint-3"))
        assert set(json.loads((plan.folder / "sweep.json").read_text())["cells"]) == {c.name for c in plan.cells}
