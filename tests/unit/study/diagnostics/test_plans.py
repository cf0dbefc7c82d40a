"""What the command line says to mistakes, and which runs are compared."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from run_files import write_run
from typer.testing import CliRunner

from tokmask_peft.cli import app
from tokmask_peft.errors import DataError, RunError
from tokmask_peft.examples import Example
from tokmask_peft.study.diagnostics import reports, robustness
from tokmask_peft.study.diagnostics.gradients import draw_batches
from tokmask_peft.study.diagnostics.plans import Perturbations, find_members
from tokmask_peft.study.diagnostics.reports import robustness_report, robustness_table
from tokmask_peft.study.diagnostics.robustness import analyse, by_unseen
from tokmask_peft.study.statistics import spread
from tokmask_peft.tasks import get_task


def mistake(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(part) for part in arguments])
    assert done.exit_code == 2, done.output
    return done.output


class TestDiagnose:
    def test_mistakes(self, tmp_path):
        said = mistake("diagnose", "quickstart", "--p", "0,2", "--at", "0,1.5", "--draws", "1", "--batches", "2")
        for part in ("--p 0,2: '2'", "--at 0,1.5: '1.5'", "--draws 1", "--batches 2"):
            assert part in said
        assert "give a rate above 0" in mistake("diagnose", "quickstart", "--p", "0")
        (tmp_path / "gradients.json").write_text("{}")
        assert "choose another folder with --out" in mistake("diagnose", "quickstart", "--out", tmp_path)

    def test_batches_are_disjoint_and_fit(self):
        rows = draw_batches(20, 4, 5, seed=1)
        assert sorted(index for row in rows for index in row) == list(range(20))
        assert rows == draw_batches(20, 4, 5, seed=1) != draw_batches(20, 4, 5, seed=2)
        with pytest.raises(DataError, match=r"--batches 4, or training\.batch_size=3") as caught:
            draw_batches(24, 8, 5, seed=1)
        assert caught.value.code == "too-few-texts"


class TestRobustness:
    def test_mistakes(self, tmp_path):
        assert "is not a run folder" in mistake("robustness", tmp_path)
        assert "is not a share of words" in mistake("robustness", tmp_path, "--noise", "2")
        one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
        assert "--out FOLDER" in mistake("robustness", one, two)

    @pytest.mark.parametrize(("schedule", "suffix"), [("constant", ""), ("linear", ", linear")])
    def test_runs_are_grouped_by_their_masking_rate_and_schedule(self, tmp_path, schedule, suffix):
        runs = [write_run(tmp_path / f"run{i}", masking=p) for i, p in enumerate((0.1, 0.0, 0.1))]
        for run in runs:
            changed(run, masking={"p": 0.0 if run.name == "run1" else 0.1, "schedule": schedule})
        found = [(one.group, one.run.root.name) for one in find_members([str(run) for run in runs])]
        assert found == [(f"p = {p}{suffix}", name) for p, name in (("0", "run1"), ("0.1", "run0"), ("0.1", "run2"))]

    def test_runs_that_differ_otherwise_are_refused(self, tmp_path):
        one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
        changed(two, training={"learning_rate": 1e-3})
        with pytest.raises(RunError) as caught:
            find_members([str(one), str(two)])
        assert [line.partition(":")[0] for line in caught.value.fields["differences"]] == ["training.learning_rate"]

    def test_the_runs_of_one_sweep_are_grouped_by_arm(self, made_up_sweep, tmp_path):
        folder = made_up_sweep(p="0,0.1", seeds="2")
        for cell in folder.glob("p0*"):
            write_run(tmp_path / cell.name)
            (tmp_path / cell.name / "adapter").rename(cell / "adapter")
            (tmp_path / cell.name / "recipe.yaml").rename(cell / "recipe.yaml")
        assert [one.group for one in find_members([str(folder)])] == ["p = 0", "p = 0", "p = 0.1", "p = 0.1"]
        with pytest.raises(RunError) as caught:
            find_members([str(folder), str(tmp_path)])
        assert caught.value.code == "mixed-runs"


def changed(run, **sections):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **sections}))


@pytest.mark.parametrize(
    ("task", "texts", "gold", "predicted", "seen"),
    [
        ("sequence", [("a b", "x"), ("a zzz", "y"), ("b", "y")], [[0], [1], [1]], [[0], [0], [1]], (2, 1.0)),
        ("token", [(("a", "zzz", "b"), ("x", "y", "y"))], [[0, 1, 1]], [[0, 0, 0]], (2, 0.5)),
        ("multilabel", [("a b", ("x",)), ("a zzz", ("y",))], [[0, -1], [-1, 1]], [[0, -1], [0, 1]], (1, 1.0)),
    ],
)
def test_texts_or_words_by_whether_they_are_unseen(task, texts, gold, predicted, seen):
    examples = [Example(words, tags, "here") for words, tags in texts]
    gold, predicted = ([np.array(row) for row in rows] for rows in (gold, predicted))
    found = by_unseen(examples, gold, predicted, {"a", "b"}, ("x", "y"), get_task(task))
    assert (found["seen"]["items"], found["seen"]["accuracy"]) == seen
    assert (found["unseen"]["items"], found["unseen"]["accuracy"]) == (1, 0.0)


def scored(group, seed, clean, masked):
    """Return what the scoring of a run returns."""

    def part(score, **more):
        return {"f1_macro": score, "f1_weighted": score, "accuracy": score, **more}

    words = {"seen": part(clean, items=7), "unseen": part(0.0, items=0)}
    about = {"group": group, "seed": seed, "p": 0.1, "split": "test", "task": "sequence", "texts": 7}
    about["mask_token"] = {"unit": "token", "token": "its own"}
    return {**about, "clean": part(clean), "mask": [{"at": 0.5, **part(masked)}], "noise": [], "words": words}


def test_groups_have_intervals_over_their_runs():
    runs = [scored("p = 0", 1, 0.9, 0.5), scored("p = 0", 2, 0.8, 0.6), scored("p = 0.1", 1, 0.7, 0.7)]
    found = analyse(runs, Perturbations((0.5,), (), 1))
    both, alone = found["groups"]
    masked = both["rows"][1]
    assert masked["f1_macro"] == spread([0.5, 0.6])
    assert masked["loss"] == spread([0.9 - 0.5, 0.8 - 0.6])
    assert alone["rows"][1]["f1_macro"]["interval"] is None
    assert [row["kind"] for row in both["rows"]] == ["clean", "mask", "seen"]  # nothing is unseen
    head, body = robustness_table(found)
    assert head == ["texts", "trained with p = 0, 2 seeds", "trained with p = 0.1, seed 1"]
    assert [row[0] for row in body] == ["as they are", "50% of sub-tokens masked", "texts with no unseen word (7)"]
    assert body[1][2] == "0.7000"


@pytest.fixture
def _without_a_plot(monkeypatch):
    monkeypatch.setattr(reports, "_plot_robustness", lambda *_: ())


@pytest.mark.usefixtures("_without_a_plot")
def test_a_run_is_scored_once_whatever_is_asked_for_in_between(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    score, asked = Mock(side_effect=lambda member, *_: scored(member.group, 1, 0.9, 0.5)), Perturbations((0.5,), (), 1)
    monkeypatch.setattr(robustness, "_score", score)
    names = [str(write_run(tmp_path / name)) for name in "abc"]

    def runs_of(names, what):
        report = robustness.robustness(find_members(names), what, tmp_path / "found", quiet=True)
        return json.loads(report.statistics.read_text())["runs"]

    first = runs_of(names[:2], asked)
    assert len(runs_of(names[2:], asked)) == 1
    assert runs_of(names[:2], asked) == first
    assert score.call_count == 3
    assert len(runs_of(names[:1], Perturbations((0.5,), (), 2))) == 1
    assert runs_of(names[:2], asked) == first
    assert score.call_count == 4


@pytest.mark.usefixtures("_without_a_plot")
@pytest.mark.parametrize(("apart", "shown"), [(0.00003, False), (0.0002, True)])
def test_a_score_that_differs_from_the_runs_own_is_shown_if_four_decimals_show_it(tmp_path, apart, shown):
    run = {**scored("p = 0", 1, 0.5 + apart, 0.4), "reported": 0.5}
    report = robustness_report(analyse([run], Perturbations((0.5,), (), 1)), tmp_path)
    for text in (report.summary, report.markdown.read_text()):
        assert ("1 of 1 runs differ by up to 0.0002" in text) == shown
        assert "up to 0.0000" not in text
