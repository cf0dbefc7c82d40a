import html
import json
import re

import numpy as np
import pytest
from scipy import stats

from tokmask_peft.errors import RunError, SweepError
from tokmask_peft.study import results
from tokmask_peft.study.plan import MASKED
from tokmask_peft.study.report import (
    LATEX,
    described,
    level,
    markdown,
    plot_f1,
    render,
    sweep_page,
    sweep_report,
    verdict,
)
from tokmask_peft.study.results import analyse, read_sweep
from tokmask_peft.study.statistics import seeds_needed

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _few_replicates(monkeypatch):
    monkeypatch.setattr(results, "REPLICATES", 200)


def about(folder):
    """Return what the texts of a sweep's report are made of."""
    return described(analyse(read_sweep(folder)))


def rows_by_arm(found):
    return {row["arm"]: row for row in found["rows"]}


def change(file, **parts):
    result = json.loads(file.read_text())
    for name, part in parts.items():
        result[name] |= part
    file.write_text(json.dumps(result))


def test_figures_are_those_of_the_runs(made_up_sweep):
    folder = made_up_sweep({"p0.2": 0.15}, p="0,0.1,0.2", seeds="5")
    found = about(folder)
    rows = rows_by_arm(found)
    scores = {
        arm: [json.loads((folder / f"{arm}-seed{s}" / "result.json").read_text())["test"] for s in range(1, 6)]
        for arm in ("p0", "p0.1", "p0.2")
    }
    for metric in ("f1_macro", "f1_weighted"):
        plain, masked = (np.array([run[metric] for run in scores[arm]]) for arm in ("p0", "p0.2"))
        row = rows["p = 0.2"]
        assert row[metric]["by_seed"] == pytest.approx(masked)
        difference = row["difference"][metric]
        assert difference["by_seed"] == pytest.approx(masked - plain)
        assert difference["p_value"] == pytest.approx(2 / 2**5)  # all five went up
        low, high = stats.ttest_rel(masked, plain).confidence_interval()
        assert difference["interval"] == pytest.approx([low, high])
        low, high = difference["bootstrap"]
        assert low < difference["mean"] < high
    assert rows["p = 0"]["is_reference"]
    assert "difference" not in rows["p = 0"]
    needed = found["paper"]["rows"][0]["needed"]["mBERT"]
    assert needed["interval"][0] <= needed["seeds"] <= needed["interval"][1]
    assert "reports, on sentiment, Spanish-English" in render("report.md", **found)


def test_entities_are_a_third_score(made_up_sweep):
    folder = made_up_sweep({"p0.1": 0.2}, p="0,0.1", seeds="6", labels=("B-x", "I-x", "O"))
    analysis = about(folder)
    row = rows_by_arm(analysis)["p = 0.1"]
    read = [json.loads((folder / f"p0.1-seed{seed}/result.json").read_text())["test"] for seed in range(1, 7)]
    assert row["f1_entities"]["by_seed"] == [one["f1_entities"] for one in read]
    found = row["difference"]["f1_entities"]
    assert 0 < found["bootstrap"][0] < found["mean"] < found["bootstrap"][1]
    assert found["p_holm"] == pytest.approx(2 / 2**6)
    assert analysis["choice"]["overall"]["f1_entities"]["mean"] == row["f1_entities"]["mean"]
    texts = [render(name, **analysis) for name in ("report.md", "table.tex", "summary.txt")]
    for text in (*texts, sweep_page(analysis)):
        assert f"{found['mean']:+.4f}" in text.replace("$", "")
    assert "entity F1" in texts[2]


def test_holm_runs_over_the_rates_of_one_setting(made_up_sweep):
    folder = made_up_sweep({"p0.1": 0.2}, p="0,0.1,0.2", seeds="6", grid=["adapter.r=4,8"])
    rows = about(folder)["rows"]
    assert len(rows) == 6
    for rank in ("4", "8"):
        group = [r["difference"]["f1_macro"] for r in rows if r["setting"] == {"adapter.r": rank} and "difference" in r]
        smaller, larger = sorted(group, key=lambda one: one["p_value"])
        assert smaller["p_holm"] == pytest.approx(min(1, 2 * smaller["p_value"]))
        assert larger["p_holm"] == pytest.approx(max(smaller["p_holm"], larger["p_value"]))


def test_validation_chooses_and_test_scores(made_up_sweep):
    folder = made_up_sweep(p="0,0.1", seeds="3")
    validation = {(0, 1): 0.9, (0.1, 1): 0.5, (0, 2): 0.5, (0.1, 2): 0.6, (0, 3): 0.5, (0.1, 3): 0.5}
    for number, ((p, seed), score) in enumerate(validation.items()):
        file = folder / f"p{p}-seed{seed}" / "result.json"
        change(file, validation={"f1_macro": score}, test={"f1_macro": 0.1 * number})
    found = about(folder)["choice"]
    assert [one["label"] for one in found["per_seed"]] == ["p = 0", "p = 0.1", "p = 0"]  # equal: the smaller rate
    assert [one["f1_macro"] for one in found["per_seed"]] == pytest.approx([0.0, 0.3, 0.4])
    assert [one["gain"] for one in found["per_seed"]] == pytest.approx([0.0, 0.1, 0.0])
    assert found["overall"]["label"] == "p = 0"
    assert found["overall"]["f1_macro"]["mean"] == pytest.approx((0.0 + 0.2 + 0.4) / 3)


def test_arms_are_compared_with_none_and_their_cost_is_shown(made_up_sweep):
    folder = made_up_sweep(p="0,0.1", arms="mask,none,neftune,mask+neftune")
    change(folder / "mask0.1-seed2" / "result.json", speed={"step_seconds": 0.3, "steps": 3})  # it was resumed
    found = about(folder)
    rows = rows_by_arm(found)
    assert list(rows) == ["none", "neftune", "mask 0.1", "mask 0.1 + neftune"]
    assert (rows["mask 0.1"]["cost"], rows["mask 0.1 + neftune"]["cost"]) == (1.0, 2.0)
    text = render("report.md", **found)
    for expected in ("differences from", "Gain over", "macro-F1 against"):
        assert f"{expected} no regularizer" in text
    assert "its arms pad the same batches" in text


def test_signs_of_failure_are_named_where_they_are_seen(made_up_sweep):
    folder = made_up_sweep({"p0.1": -0.1, "p0.2": -0.2}, p="0,0.1,0.2", seeds="8")
    found = about(folder)
    signs = found["signs"]
    assert [one["rates"] for one in signs["falling"]] == [[0, 0.1, 0.2]]
    assert (signs["stuck"], signs["unshown"]) == ([], [])
    assert [render(name, **found).count("Sign of failure") for name in ("report.md", "summary.txt")] == [1, 1]

    folder = made_up_sweep({"p0.2": 0.05}, p="0,0.1,0.2", seeds="3", name="other")
    for arm, last in (("p0", 0.2), ("p0.1", 0.9), ("p0.2", 0.97)):
        for seed in (1, 2, 3):
            losses = [1.0, *[0.8] * 18, last]
            lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses)]
            (folder / f"{arm}-seed{seed}" / "log.jsonl").write_text("\n".join(lines))
    found = about(folder)
    signs = found["signs"]
    assert signs["falling"] == []
    assert [one["label"] for one in signs["stuck"]] == ["p = 0.2"]  # means of two steps at each end: 0.9 and 0.885
    assert signs["stuck"][0]["share"] == pytest.approx(0.885 / 0.9)
    (unshown,) = signs["unshown"]
    assert unshown["seeds"] == 3
    sds = [row["difference"]["f1_macro"]["sd"] for row in found["rows"] if "difference" in row]
    for gain, sd in zip(unshown["gains"], sorted(sds), strict=True):
        needed = [seeds_needed(gain * near, sd, alpha=0.05 / 2) for near in (1.001, 0.999)]
        assert needed == [3, 4], "for one of two arms"
    assert not unshown["reachable"]
    assert "with this few seeds none can be." in render("summary.txt", **found)

    found = about(made_up_sweep({"p0.1": 0.0}, p="0,0.1", seeds="6", name="reachable"))
    assert [one["reachable"] for one in found["signs"]["unshown"]] == [True]
    said = " ".join(render("summary.txt", **found).split())
    assert "would be found in four of five such sweeps" in said
    assert "there is none" not in said


@pytest.mark.parametrize(
    ("gains", "sweep", "expected", "absent"),
    [
        (
            {},
            {"seeds": "1"},
            ["With 1 seed the sign-flip test", "(p = 1, 1 after Holm's correction)"],
            ["With 1 seeds"],
        ),
        (
            {"p0.1": 0.3},
            {"seeds": "3"},
            [
                "cannot give a p-value below 0.25",
                "It takes at least 6 seeds",
                "not established by these seeds (p = 0.25",
            ],
            ["smallest of", "0 of 3 seeds"],
        ),
        ({"p0.1": 0.3}, {"seeds": "8"}, ["8 of 8 seeds), established by these seeds (p = 0.00781"], ["cannot give"]),
        (  # an arm that lacks seeds does not speak for the others
            {"p0.1": 0.3},
            {"p": "0,0.1,0.3", "seeds": "8", "leave_out": [f"p0.3-seed{seed}" for seed in range(3, 9)]},
            [
                "p = 0.1: macro-F1 higher",
                "seeds), established by these seeds",
                "With 2 seeds the sign-flip",
                "no difference can be established for p = 0.3.",
                "6 runs have no result and are left out",
                "If --prune stopped them, they were the worse",
                "an arm's score is the mean of the seeds that it has",
            ],
            ["With 8 seeds", "for p = 0.1", "add 0"],
        ),
        ({}, {"seeds": "6", "grid": ["adapter.r=2,4"]}, [], ["whatever the scores"]),  # one in each setting
        (
            {},
            {"p": "0,0.1,0.2", "seeds": "6"},
            ["smallest of 2 by 2: no difference can be established, whatever", "takes 7 seeds"],
            ["by 3"],
        ),
        ({}, {"p": "0.1,0.2"}, ["add 0 to --p"], ["nothing to compare"]),
        ({}, {"p": "0.1", "arms": "lora_dropout,mask"}, ["no finished arm without", "add none to"], ["add 0"]),
        ({}, {"seeds": "2", "leave_out": ["p0-seed1", "p0.1-seed2"]}, ["no seed of p = 0 in common"], ["add 0"]),
        ({}, {"p": "0"}, ["There is nothing to compare with p = 0; add rates to --p."], ["add 0"]),
        ({}, {"p": "0.1", "arms": "none"}, ["nothing to compare with no regularizer; add arms to"], ["add none"]),
    ],
)
def test_what_is_said(made_up_sweep, gains, sweep, expected, absent):
    text = render("summary.txt", **about(made_up_sweep(gains, **{"p": "0,0.1", **sweep})))
    assert [part for part in expected if part not in text] == []
    assert [part for part in absent if part in text] == []


def test_missing_runs_are_named_and_pairs_stay_pairs(made_up_sweep):
    found = about(made_up_sweep(p="0,0.1", seeds="4", leave_out=["p0-seed2", "p0.1-seed3"]))
    assert rows_by_arm(found)["p = 0.1"]["difference"]["seeds"] == [1, 4]
    assert "2 runs have no result and are left out: p0-seed2, p0.1-seed3." in render("summary.txt", **found)
    assert found["choice"]["seeds_left_out"] == [2, 3]


def test_without_predictions_or_with_other_texts_there_is_no_bootstrap_and_a_reason(made_up_sweep):
    folder = made_up_sweep(p="0,0.1")
    file = folder / "p0.1-seed2" / "predictions.json"
    change(file, test={"gold": [[0]] * 120})
    assert "No bootstrap: the test texts differ between seeds." in about(folder)["cautions"]
    file.unlink()
    found = about(folder)
    assert rows_by_arm(found)["p = 0.1"]["difference"]["f1_macro"]["bootstrap"] is None
    assert "No bootstrap: p0.1-seed2 has no predictions.json." in found["cautions"]


def test_files(made_up_sweep, tmp_path):
    folder, mine = made_up_sweep(p="0,0.1", seeds="2"), tmp_path / "mine.html"
    mine.write_text("notes")
    with pytest.raises(RunError) as caught:
        sweep_report(folder, mine)
    assert (caught.value.code, mine.read_text()) == ("taken", "notes")
    for file in folder.glob("*/result.json"):
        floor = {"baseline": {"f1_macro": 0.9, "f1_weighted": 0.9}}
        file.write_text(json.dumps(json.loads(file.read_text()) | floor))
    report = sweep_report(folder, tmp_path / "new.html")
    names = {"report.md", "table.tex", "f1_against_p.png", "f1_against_p.svg", "statistics.json"}
    assert {path.name for path in (folder / "report").iterdir()} == names
    assert report.page == tmp_path / "new.html"
    assert "not above character n-grams" in re.search('<p class="verdict bad">(.*?)</p>', report.page.read_text())[1]
    png, svg = report.plots
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg.read_bytes()
    _, again = plot_f1(json.loads(report.statistics.read_text()), tmp_path)
    assert svg.read_bytes() == again.read_bytes(), "the same runs make the same picture"
    tex = report.latex.read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 2
    body = re.findall(r"\\midrule\n(.*?)\\bottomrule", tex, re.DOTALL)
    assert [block.count(r"\\") for block in body] == [2, 1]
    assert not re.search(r"(?<!\\)[_%#]", tex), "a sign that LaTeX takes for its own"


@pytest.mark.parametrize("arms", ["none,own:0.1", "none,mask,drop:0.3"])
def test_arms_that_mask_at_a_rate_of_their_own_are_not_drawn_at_zero(made_up_sweep, tmp_path, arms):
    found = about(made_up_sweep(p="0.1", arms=arms, seeds="2"))
    _, svg = plot_f1(found, tmp_path)
    for row in found["rows"]:
        assert f"<!-- {row['label']} -->" in svg.read_text()
    assert "masking rate" not in svg.read_text()


def test_tables_escape_what_their_language_reads():
    table = (["a_b", "c"], [["50% | x", "±1"]])
    assert markdown(table).splitlines()[2] == "| 50% \\| x | ±1 |"
    assert r"a_b\50% & ±1".translate(LATEX) == r"a\_b\textbackslash{}50\% \& $\pm$1"
    assert "{a: $1}~^".translate(LATEX) == r"\{a: \$1\}\textasciitilde{}\textasciicircum{}"


@pytest.mark.parametrize(
    ("sweep", "code"),
    [
        ({"p": "0", "seeds": "1,", "leave_out": ["p0-seed1"]}, "no-finished-run"),
        ({"p": "0,0.1", "sampler": "random", "trials": 2}, "no-arms"),
        (None, "not-a-sweep"),
    ],
)
def test_what_cannot_be_reported(made_up_sweep, tmp_path, sweep, code):
    folder = made_up_sweep(**sweep) if sweep else tmp_path
    with pytest.raises(SweepError) as caught:
        sweep_report(folder)
    assert caught.value.code == code


@pytest.mark.parametrize("content", ["{}", '{"sampler": "grid", "cells": {"p0": 1}}'])
def test_a_damaged_sweep_is_one_error_with_its_file(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(SweepError, match="sweep") as caught:
        read_sweep(tmp_path)
    assert caught.value.code == "bad-sweep"


class TestPage:
    def test_the_verdict_comes_first_and_every_arm_is_there(self, made_up_sweep):
        found = about(made_up_sweep({"p0.2": 0.2}, p="0,0.1,0.2", seeds="8"))
        page = sweep_page(found)
        first = re.search(r'<p class="verdict (\w*)">(.*?)</p>', page)
        assert first[1] == "good"
        assert first[2].startswith("p = 0.2 differs from the reference (p = 0): macro-F1 +0.")
        assert page.index(first[0]) < page.index("<svg") < page.index("<table")
        assert page.count("<svg") == 2
        for loads in ("http:", "src=", "@import", "url(h"):
            assert loads not in page.replace("http://www.w3.org/1999/xlink", "")
        for row in found["rows"]:
            assert f'<th scope="row">{row["label"]}</th>' in page
            assert f"{row['f1_macro']['mean']:.4f}" in page

    @pytest.mark.parametrize(
        ("seeds", "rates", "words"),
        [("2", "0,0.1", "can be established with this few seeds"), ("3", "0", "nothing to compare")],
    )
    def test_what_the_seeds_do_not_show_is_not_claimed(self, made_up_sweep, seeds, rates, words):
        page = sweep_page(about(made_up_sweep({"p0.1": 0.2}, p=rates, seeds=seeds)))
        assert re.search(r'<p class="verdict ">(.*?)</p>', page)[1].count(words) == 1

    def test_each_part_of_an_arm_s_name_is_explained_with_what_it_sets(self, made_up_sweep):
        arms = ["none", "views", "anneal:0.3", "mask+neftune:15", *MASKED]
        page = html.unescape(sweep_page(about(made_up_sweep(p="0.1", arms=",".join(arms), seeds="2"))))
        legend = dict(re.findall("<li><strong>(.*?)</strong>: (.*?)</li>", page))
        assert {*legend} == {"none", "views", "anneal:0.3", "mask", "neftune:15", *MASKED}
        for part, keys in {
            "anneal:0.3": "masking.p_start=0.3 masking.end=0.7",
            "views": "training.views=2",
            "neftune:15": "training.neftune_alpha=15",
            "drop": "masking.p=0.1",
            "mask": "masking.p",
        }.items():
            assert keys in legend[part]
        page = sweep_page(about(made_up_sweep(p="0,0.1", seeds="2", name="rates")))
        assert re.findall("<li><strong>(.*?)</strong>: ", page) == ["p"]

    def test_no_interval_of_a_score_leaves_the_scale_of_scores(self, made_up_sweep):
        found = about(made_up_sweep({"p0.1": 0.3}, p="0,0.1", seeds="2", texts=20))
        assert found["rows"][1]["f1_macro"]["interval"][1] > 1
        assert found["scores"][1][1][3].endswith(", 1.0000]")
        assert level({"interval": (-0.2, 0.5)}) == "[0.0000, 0.5000]"


def test_the_verdict_counts_the_other_arms_that_differ():
    one = {"p_holm": 0.01, "mean": 0.1, "n": 5, "interval": None}
    for others, words in (
        (0, "correction."),
        (1, " So does 1 more of the 3 arms."),
        (2, " So do 2 more of the 3 arms."),
    ):
        rest = [one | {"p_holm": 0.9}] * (2 - others)
        compared = [({"label": "mask"}, found) for found in [one] * (1 + others) + rest]
        assert verdict(compared, "none", {"baseline": None})[0][0].endswith(words)
