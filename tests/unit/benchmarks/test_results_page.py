"""The page of the masking study is what its JSON says, and README's figures are on it."""

import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks" / "studies"))

from figures import TITLES, Study, paired  # noqa: E402
from findings import findings  # noqa: E402
from page import PAGE, README, in_readme, page  # noqa: E402

from tokmask_peft.study.statistics import spread  # noqa: E402

RATES = (0.0, 0.1, 0.2)


def sweep(by_rate, floor=0.5, task="sequence", bootstrap=(-0.03, -0.01)):
    """Return what is collected of a sweep, with the scores of its seeds at each rate."""
    rows = []
    for p, scores in by_rate.items():
        row = {"p": p, "regularizers": "recipe", "seeds": list(range(1, len(scores) + 1))}
        row["f1_macro"] = row["f1_weighted"] = {"by_seed": scores, **spread(scores)}
        if p:
            changes = [score - plain for score, plain in zip(scores, by_rate[0.0], strict=True)]
            found = {"by_seed": changes, **spread(changes), "p_value": 0.1, "p_holm": 0.2, "bootstrap": bootstrap}
            row["difference"] = {"seeds": row["seeds"], "f1_macro": found, "f1_weighted": found}
        rows.append(row)
    gain = spread([0.01, 0.02])
    chosen = {"gain": gain, "f1_macro": gain, "per_seed": [{"p": 0.1}, {"p": 0.0}]}
    baseline = {"f1_macro": floor, "f1_weighted": floor}
    return {"analysis": {"task": task, "rows": rows, "baseline": baseline, "chosen_by_validation": chosen}}


def made_up(low=(-0.02, -0.021, -0.022), high=(0.03, 0.01, -0.05)):
    plain = [0.6, 0.61, 0.62]
    return Study(
        {
            "trec": sweep({0.0: plain, **dict(zip(RATES[1:], moved(plain, low, high), strict=True))}, floor=0.7),
            "trec-500": sweep({0.0: plain, **dict(zip(RATES[1:], moved(plain, high, high), strict=True))}),
        }
    )


def moved(plain, *changes):
    return [[score + change for score, change in zip(plain, one, strict=True)] for one in changes]


def test_sentences_follow_the_figures():
    text = "\n".join(findings(made_up()))
    assert "higher on average in 0 of 4 comparisons and lower in 4" in text
    assert f"texts): {TITLES['trec']} (−0.0210 at p = 0.1)" in text
    assert "texts): nowhere" in text
    assert "That is 1 of 4 comparisons" in text
    assert "Validation chose a rate above 0 in 2 of 4 choices" in text
    assert f"stays below character n-grams with logistic regression on: {TITLES['trec']}." in text
    other = "\n".join(findings(made_up(low=(0.02, 0.021, 0.022), high=(0.03, 0.01, 0.05))))
    assert "higher on average in 4 of 4 comparisons and lower in 0" in other
    assert "That is 0 of 4 comparisons" in other  # the bootstrap says otherwise


def test_tasks_are_averaged_seed_by_seed_before_they_are_tested():
    study = made_up()
    changes = [study.difference(name, 0.1)["by_seed"] for name in study.tasks]
    values = np.mean(changes, axis=0)
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    expected = (np.abs((signs * values).mean(axis=1)) >= abs(values.mean()) - 1e-12).mean()
    found = study.together(0.1, study.tasks)
    assert found["n"] == 3  # seeds, not runs
    assert found["p_value"] == pytest.approx(expected)
    assert found["by_seed"] == pytest.approx(values)


def test_pairs_are_of_the_same_seed():
    one = {"seeds": [1, 2, 3], "f1_macro": {"by_seed": [0.1, 0.2, 0.3]}}
    other = {"seeds": [3, 1], "f1_macro": {"by_seed": [0.25, 0.1]}}
    assert paired(one, other)["by_seed"] == pytest.approx([0.0, 0.05])


def test_the_committed_page_is_what_the_committed_figures_say():
    study = Study.read()
    assert PAGE.read_text(encoding="utf-8") == page(study), "run: python benchmarks/studies/page.py"
    text = README.read_text(encoding="utf-8")
    assert in_readme(text, study) == text
    assert "<!-- results -->" in text


def test_every_score_in_the_readme_is_on_a_page():
    """Figures of three or four decimals, as .953 or 0.1234."""
    pages = PAGE.read_text(encoding="utf-8") + (PAGE.parent / "BENCHMARKS.md").read_text(encoding="utf-8")
    known, quoted = (
        {found.lstrip("0") for found in re.findall(r"(?<![\d.])0?\.\d{3,4}\b", text)}
        for text in (pages, README.read_text(encoding="utf-8"))
    )
    assert not sorted(quoted - known)
