import json
import re

import numpy as np
import pytest
from scipy import stats

from tokmask_peft.errors import SweepError
from tokmask_peft.study.report import LATEX, markdown, sweep_report
from tokmask_peft.study.results import read_sweep

pytest.importorskip("matplotlib")


def statistics(report):
    return json.loads(report.statistics.read_text())


def rows_by_arm(report):
    return {row["arm"]: row for row in statistics(report)["rows"]}


def test_figures_are_those_of_the_runs(made_up_sweep):
    folder = made_up_sweep({"p0.2": 0.15}, p="0,0.1,0.2", seeds="5")
    found = rows_by_arm(sweep_report(folder))
    scores = {
        arm: [json.loads((folder / f"{arm}-seed{s}" / "result.json").read_text())["test"] for s in range(1, 6)]
        for arm in ("p0", "p0.1", "p0.2")
    }
    for metric in ("f1_macro", "f1_weighted"):
        plain, masked = (np.array([run[metric] for run in scores[arm]]) for arm in ("p0", "p0.2"))
        row = found["p = 0.2"]
        assert row[metric]["by_seed"] == pytest.approx(masked)
        difference = row["difference"][metric]
        assert difference["by_seed"] == pytest.approx(masked - plain)
        assert difference["p_value"] == pytest.approx(2 / 2**5)  # all five went up
        low, high = stats.ttest_rel(masked, plain).confidence_interval()
        assert difference["interval"] == pytest.approx([low, high])
        assert difference["p_holm"] >= difference["p_value"]
        low, high = difference["bootstrap"]
        assert low < difference["mean"] < high
    assert found["p = 0"]["is_reference"]
    assert "difference" not in found["p = 0"]


def test_holm_runs_over_the_rates_of_one_setting(made_up_sweep):
    folder = made_up_sweep({"p0.1": 0.2}, p="0,0.1,0.2", seeds="6", grid=["adapter.r=4,8"])
    rows = statistics(sweep_report(folder))["rows"]
    assert len(rows) == 6
    for rank in ("4", "8"):
        group = [r["difference"]["f1_macro"] for r in rows if r["setting"] == {"adapter.r": rank} and "difference" in r]
        smaller, larger = sorted(group, key=lambda one: one["p_value"])
        assert smaller["p_holm"] == pytest.approx(min(1, 2 * smaller["p_value"]))
        assert larger["p_holm"] == pytest.approx(max(smaller["p_holm"], larger["p_value"]))


def test_validation_chooses_and_test_scores(made_up_sweep):
    folder = made_up_sweep(p="0,0.1", seeds="3")
    validation = {
        "p0-seed1": 0.9,
        "p0.1-seed1": 0.5,
        "p0-seed2": 0.5,
        "p0.1-seed2": 0.6,
        "p0-seed3": 0.5,
        "p0.1-seed3": 0.5,
    }
    test = {name: 0.1 * number for number, name in enumerate(validation)}
    for name in validation:
        file = folder / name / "result.json"
        result = json.loads(file.read_text())
        result["validation"]["f1_macro"], result["test"]["f1_macro"] = validation[name], test[name]
        file.write_text(json.dumps(result))
    found = statistics(sweep_report(folder))["chosen_by_validation"]
    assert [one["label"] for one in found["per_seed"]] == ["p = 0", "p = 0.1", "p = 0"]  # equal: the smaller rate
    assert [one["f1_macro"] for one in found["per_seed"]] == pytest.approx([0.0, 0.3, 0.4])
    assert [one["gain"] for one in found["per_seed"]] == pytest.approx([0.0, 0.1, 0.0])
    assert found["overall"]["label"] == "p = 0"
    assert found["overall"]["f1_macro"]["mean"] == pytest.approx((0.0 + 0.2 + 0.4) / 3)


def test_arms_are_compared_with_none_and_their_cost_is_told(made_up_sweep):
    folder = made_up_sweep(p="0,0.1", arms="mask,none,neftune,mask+neftune")
    resumed = folder / "mask0.1-seed2" / "result.json"  # timed three of its ten steps
    result = json.loads(resumed.read_text())
    result["speed"].update(step_seconds=0.3, steps=3)
    resumed.write_text(json.dumps(result))
    report = sweep_report(folder)
    found = rows_by_arm(report)
    assert list(found) == ["none", "neftune", "mask 0.1", "mask 0.1 + neftune"]
    assert found["mask 0.1 + neftune"]["cost"] == 2.0
    assert found["mask 0.1"]["cost"] == 1.0
    text = report.markdown.read_text()
    assert "differences from no regularizer" in text
    assert "Gain over no regularizer" in text
    assert "macro-F1 against no regularizer" in text
    assert "no masking" not in text
    assert "its arms pad the same batches" in text


def test_what_few_seeds_cannot_show_is_said(made_up_sweep):
    said = sweep_report(made_up_sweep({"p0.1": 0.3}, p="0,0.1", seeds="3")).summary
    assert "With 3 seeds the sign-flip test cannot give a p-value below 0.25" in said
    assert "At least 6 seeds are needed for .05" in said
    assert "not a difference that the seeds establish (p = 0.25" in said


def test_an_arm_that_lacks_seeds_does_not_speak_for_the_others(made_up_sweep):
    gone = [f"p0.3-seed{seed}" for seed in range(3, 9)]
    said = sweep_report(made_up_sweep({"p0.1": 0.3}, p="0,0.1,0.3", seeds="8", leave_out=gone)).summary
    assert "p = 0.1: macro-F1 higher on average" in said
    assert "a difference that the seeds establish" in said
    assert "With 2 seeds the sign-flip test cannot" in said
    assert "no difference can be established for p = 0.3." in said
    assert "6 runs have no result and are left out" in said
    assert "If --prune stopped them, they are the worse ones" in said


def test_the_correction_is_told_for_each_setting(made_up_sweep):
    one = sweep_report(made_up_sweep(p="0,0.1", seeds="6")).summary
    assert "single arm" not in one
    several = made_up_sweep(p="0,0.1", seeds="6", grid=["adapter.r=2,4,8,16"], name="several")
    assert "single arm" not in sweep_report(several).summary  # four settings, one comparison in each
    rates = sweep_report(made_up_sweep(p="0,0.1,0.2", seeds="6", name="rates")).summary
    assert "smallest of 2 by 2: a single arm cannot reach .05" in rates


def test_enough_seeds_and_a_real_difference(made_up_sweep):
    said = sweep_report(made_up_sweep({"p0.1": 0.3}, p="0,0.1", seeds="8")).summary
    assert "higher on average" in said
    assert "higher in 8 of 8 seeds), a difference that the seeds establish (p = 0.00781" in said
    assert "cannot give" not in said


def test_one_seed_alone(made_up_sweep):
    report = sweep_report(made_up_sweep(p="0,0.1", seeds="1"))
    row = rows_by_arm(report)["p = 0.1"]
    assert row["f1_macro"]["sd"] is row["f1_macro"]["interval"] is None
    assert row["difference"]["f1_macro"]["p_value"] == 1.0


def test_missing_runs_are_named_and_pairs_stay_pairs(made_up_sweep):
    report = sweep_report(made_up_sweep(p="0,0.1", seeds="4", leave_out=["p0-seed2", "p0.1-seed3"]))
    assert rows_by_arm(report)["p = 0.1"]["difference"]["seeds"] == [1, 4]
    assert "2 runs have no result and are left out: p0-seed2, p0.1-seed3." in report.summary
    assert statistics(report)["chosen_by_validation"]["seeds_left_out"] == [2, 3]


def test_without_predictions_there_is_no_bootstrap_and_a_reason(made_up_sweep):
    folder = made_up_sweep(p="0,0.1")
    (folder / "p0.1-seed2" / "predictions.json").unlink()
    report = sweep_report(folder)
    assert rows_by_arm(report)["p = 0.1"]["difference"]["f1_macro"]["bootstrap"] is None
    assert "No bootstrap: p0.1-seed2 has no predictions.json." in report.summary


def test_no_reference(made_up_sweep):
    assert "add 0 to --p" in sweep_report(made_up_sweep(p="0.1,0.2")).summary
    said = sweep_report(made_up_sweep(p="0.1", arms="lora_dropout,mask", name="arms")).summary
    assert "no arm without a regularizer to compare the others with; add none to --arms" in said


def test_nothing_but_the_reference(made_up_sweep):
    said = sweep_report(made_up_sweep(p="0")).summary
    assert "There is nothing to compare with p = 0; add rates to --p." in said
    said = sweep_report(made_up_sweep(p="0.1", arms="none", name="arms")).summary
    assert "There is nothing to compare with no regularizer; add arms to --arms." in said


def test_seeds_needed_are_given_with_their_uncertainty(made_up_sweep):
    report = sweep_report(made_up_sweep(p="0,0.1", seeds="5"))
    needed = statistics(report)["paper"]["rows"][0]["needed"]["mBERT"]
    assert needed["interval"][0] <= needed["seeds"] <= needed["interval"][1]
    assert "reports, on sentiment, Spanish-English" in report.markdown.read_text()


def test_files(made_up_sweep):
    report = sweep_report(made_up_sweep(p="0,0.1"))
    assert {path.name for path in report.markdown.parent.iterdir()} == {
        "report.md",
        "table.tex",
        "f1_against_p.png",
        "f1_against_p.svg",
        "statistics.json",
    }
    png, svg = report.plots
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    first = svg.read_bytes()
    sweep_report(report.markdown.parent.parent)
    assert svg.read_bytes() == first, "the same runs make the same picture"
    tex = report.latex.read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 2
    body = re.findall(r"\\midrule\n(.*?)\\bottomrule", tex, re.DOTALL)
    assert [block.count(r"\\") for block in body] == [2, 1]
    assert not re.search(r"(?<!\\)[_%#]", tex), "a sign that LaTeX takes for its own"


def test_tables_escape_what_their_language_reads():
    table = (["a_b", "c"], [["50% | x", "±1"]])
    assert markdown(table).splitlines()[2] == "| 50% \\| x | ±1 |"
    assert r"a_b\50% & ±1".translate(LATEX) == r"a\_b\textbackslash{}50\% \& $\pm$1"


class TestMistakes:
    def test_no_sweep(self, tmp_path):
        with pytest.raises(SweepError) as caught:
            sweep_report(tmp_path)
        assert caught.value.code == "not-a-sweep"

    def test_nothing_finished(self, made_up_sweep):
        folder = made_up_sweep(p="0", seeds="1,", leave_out=["p0-seed1"])
        with pytest.raises(SweepError, match="no finished run yet"):
            sweep_report(folder)

    def test_values_that_a_sampler_drew(self, made_up_sweep):
        folder = made_up_sweep(p="0,0.1", sampler="random", trials=2)
        with pytest.raises(SweepError) as caught:
            read_sweep(folder)
        assert caught.value.code == "no-arms"
