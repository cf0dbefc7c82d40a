"""The page of the masking study is what its JSON says, and README's figures are on it."""

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "benchmarks" / "studies"), str(ROOT / "benchmarks")]

import tables  # noqa: E402
from figures import TITLES, Study, paired  # noqa: E402
from findings import _overall, findings  # noqa: E402
from page import PAGE, README, in_readme, page, readme_table  # noqa: E402
from speed import LINES, speed_table  # noqa: E402

from tokmask_peft.study.statistics import spread  # noqa: E402

RATES = (0.0, 0.1, 0.2)
PLAIN = [0.6, 0.61, 0.62]


def sweep(by_rate, floor=0.5, task="sequence", bootstrap=(-0.03, -0.01)):
    """Return what is collected of a sweep, with the scores of its seeds at each rate."""
    rows = []
    for p, scores in by_rate.items():
        row = {"p": p, "regularizers": "recipe", "seeds": list(range(1, len(scores) + 1))}
        row["f1_macro"] = row["f1_weighted"] = {"by_seed": scores, **spread(scores)}
        if p:
            changes = [score - plain for score, plain in zip(scores, by_rate.get(0.0, scores), strict=True)]
            found = {"by_seed": changes, **spread(changes), "p_value": 0.1, "p_holm": 0.2, "bootstrap": bootstrap}
            row["difference"] = {"seeds": row["seeds"], "f1_macro": found, "f1_weighted": found}
        rows.append(row)
    gain = spread([0.01, 0.02])
    steps = {"texts": dict.fromkeys(("train", "validation", "test"), 9), "steps": 100, "labels": 3, "best_at_end": {}}
    steps |= {"words": steps["texts"], "command": "tokmask sweep", "environments": []}
    chosen = {"gain": gain, "f1_macro": gain, "per_seed": [{"p": 0.1}, {"p": 0.0}]}
    baseline = {"f1_macro": floor, "f1_weighted": floor}
    seeds = list(range(1, 1 + max(map(len, by_rate.values()))))
    analysis = {"task": task, "rows": rows, "baseline": baseline, "chosen_by_validation": chosen, "seeds": seeds}
    return {**steps, "analysis": {**analysis, "missing": [], "methods": {"interval": "by hand"}}}


def made_up(low=(-0.02, -0.021, -0.022), high=(0.03, 0.01, -0.05)):
    plain = PLAIN
    return Study(
        {
            "trec": sweep({0.0: plain, **dict(zip(RATES[1:], moved(plain, low, high), strict=True))}, floor=0.7),
            "trec-500": sweep({0.0: plain, **dict(zip(RATES[1:], moved(plain, high, high), strict=True))}),
        }
    )


def moved(plain, *changes):
    return [[score + change for score, change in zip(plain, one, strict=True)] for one in changes]


def sentences(study):
    return "\n".join(map(str, findings(study)))


def test_sentences_follow_the_figures():
    text = sentences(made_up())
    assert "**Masking lowered scores.** Of 4 comparisons with p = 0 (2 sweeps, 2 masking rates)" in text
    assert "higher with masking in 0, clearly so in 0, and lower in 4, clearly so in 1." in text
    assert f"Clearly lower: {TITLES['trec']} (−0.0210 at p = 0.1)." in text
    assert "Clearly higher" not in text
    assert "sign-flip test reaches .05 after Holm's correction over the rates in 0 of 4. With at most 3 seeds" in text
    assert "Validation chose a rate above 0 in 2 of 4 choices" in text
    assert f"stays below character n-grams with logistic regression on: {TITLES['trec']}." in text
    other = sentences(made_up(low=(0.02, 0.021, 0.022), high=(0.03, 0.01, 0.05)))
    assert "**Masking changed no score clearly.**" in other  # the bootstrap says otherwise
    assert "higher with masking in 4, clearly so in 0, and lower in 0" in other


def test_higher_and_lower_are_told_apart():
    gain = sweep({0.0: PLAIN, 0.1: [0.63, 0.641, 0.649]}, bootstrap=(0.01, 0.05))
    loss = sweep({0.0: PLAIN, 0.1: [0.57, 0.579, 0.591]})
    text = sentences(Study({"trec": gain, "afrisenti_twi": loss}))
    assert "**Masking here helped and there hurt.**" in text
    assert "higher with masking in 1, clearly so in 1, and lower in 1, clearly so in 1" in text
    assert f"Clearly higher: {TITLES['trec']}" in text
    assert f"Clearly lower: {TITLES['afrisenti_twi']}" in text
    assert "**Masking helped.**" in sentences(Study({"trec": gain}))


def test_many_seeds_that_establish_a_difference_are_named():
    scores = [0.6 + 0.001 * seed for seed in range(8)]
    study = Study({"trec": sweep({0.0: scores, 0.1: [score - 0.02 - 0.001 * (score > 0.603) for score in scores]})})
    study.difference("trec", 0.1)["p_holm"] = 0.0078
    text = sentences(study)
    assert f"in 1 of 1 ({TITLES['trec']} at p = 0.1)." in text
    assert "it cannot" not in text


@pytest.mark.parametrize(
    ("languages", "speech", "expected"),
    [
        (-0.02, -0.03, "masking clearly hurts both"),
        (0.02, -0.03, "masking clearly helps one and hurts the other"),
        (0.02, 0.03, "masking clearly helps both"),
        (0.0, -0.03, "there is no rate at which masking clearly helps one and hurts the other"),
    ],
)
def test_languages_and_parts_of_speech(languages, speech, expected):
    made = {
        name: sweep({0.0: PLAIN, 0.1: scores(mean)}, bootstrap=(mean, mean))
        for name, mean in (("ud_tur_deu_lid", languages), ("ud_tur_deu_pos", speech))
    }
    assert expected in sentences(Study(made))


def scores(change):
    """Return scores whose change from PLAIN is all but the same in every seed."""
    return [score + change + wobble for score, wobble in zip(PLAIN, (-0.001, 0.0, 0.001), strict=True)]


@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [
        (-0.05, -0.01, "masking does clearly better at 1 of 1 rate ("),
        (-0.01, -0.05, "masking does clearly worse at 1 of 1 rate ("),
        (0.05, 0.01, "masking does clearly worse at 1 of 1 rate ("),
        (-0.02, -0.0199, "masking loses less, so part of its loss may be time, but these seeds cannot tell"),
        (0.02, 0.0199, "no clear difference between the two"),
        (-0.0199, -0.02, "no clear difference between the two"),
    ],
)
@pytest.mark.parametrize("name", ["trec-500-long", "ud_tur_deu_pos-tuned"])
def test_longer_training_is_compared_over_the_seeds_of_both(short, long, expected, name):
    few = sweep({0.0: [*PLAIN, 0.1], 0.1: [*scores(short), 0.9]})  # its last seed would turn it round
    wobbly = [score + wobble for score, wobble in zip(scores(long), (0.001, -0.003, 0.002), strict=True)]
    many = sweep({0.0: PLAIN, 0.1: wobbly})
    text = sentences(Study({name.rpartition("-")[0]: few, name: many}))
    start = "Longer" if name.endswith("long") else "Training tuned on validation (batches of 8"
    line = next(line for line in text.splitlines() if line.startswith(start))
    if name.endswith("tuned"):
        expected = expected.replace(
            "part of its loss may be time", "part of its loss may lie in how the first runs trained"
        )
    assert expected in line
    assert "over 3 seeds" in line


def test_regularizers_are_among_the_first_lines():
    arms = sweep({0.0: PLAIN, 0.1: scores(-0.02)})
    rows = arms["analysis"]["rows"]
    rows[0]["label"], rows[1]["label"] = "none", "label_smoothing"
    rows[1]["cost"] = 7.77  # of runs that shared the machine
    made = {"trec-500-arms": arms, "trec": sweep({0.0: PLAIN})}
    assert "CPU time" not in sentences(Study(made))
    text = sentences(Study(made, {"label_smoothing": 1.25, "other": 9.0}))
    assert "clearly higher: none; clearly lower: label_smoothing (−0.0200)" in text
    assert "highest on average: label_smoothing" in text
    assert "A step takes 1.25 (label_smoothing) to 1.25 (label_smoothing) times the CPU time of one without." in text


def test_what_is_half_there_makes_a_page():
    """Whatever is missing is left out: seeds, rates, the n-gram floor, a whole sweep's comparisons."""
    whole, one_seed = sweep({0.0: PLAIN, 0.1: scores(-0.02)}), sweep({0.0: [0.6], 0.1: [0.61]})
    no_floor = sweep({0.0: PLAIN, 0.2: scores(-0.02)})
    no_floor["analysis"]["baseline"] = None
    fewer = sweep({0.1: [0.6, 0.61]})
    study = Study(
        {
            "trec": whole,
            "trec-500": one_seed,
            "afrisenti_twi": no_floor,
            "afrisenti_twi-500": whole,
            "ud_tur_deu_lid": no_floor,
            "ud_tur_deu_pos": whole,
            "trec-plain": fewer,
            "trec-top": fewer,
            "trec-500-grouped": whole,
            "afrisenti_twi-grouped": fewer,
        }
    )
    text = page(study)
    assert "Less data, AfriSenti" not in text  # they have no rate in common
    assert f"| {TITLES['trec']} | 2 |" in text  # the defaults, over the two seeds of all columns
    section = text[text.index("## What grouping texts by length costs") :]
    assert f"| {TITLES['trec-500']} | 1 | 0.6000 | 0.6000 | +0.0000 (+0.0000) |" in section
    assert f"- Grouped against random batches: {TITLES['trec-500']} +0.0000." in section
    assert TITLES["afrisenti_twi"] not in section[: section.index("## How")]  # its runs have no p = 0
    table = readme_table(study)
    assert f"| {TITLES['trec-500']} | 0.5000 | 0.6000 | 0.6100 | +0.0100 | 1 of 1 |" in table
    assert TITLES["afrisenti_twi"] not in table


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


def test_the_committed_speed_table_is_whole():
    results = PAGE.parent / "results"
    texts = json.loads((results / "default_run.json").read_text())["texts"]
    missing = 0 if len(texts) > 1 else 1  # drawn lengths are one corpus
    assert speed_table(results).count("\n| ") == len(LINES) - missing + 2


def test_the_committed_benchmarks_are_what_their_figures_say():
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page(), "run: python benchmarks/tables.py"


def test_a_machine_without_bf16_leaves_lines_of_the_speed_table_out(tmp_path):
    said = "".join(line[-1] for line in LINES)
    names = {name.rpartition(":")[0].replace(" - ", ": ") for name in re.findall(r"{([^}]*)}", said)}
    names |= {"default run, share of the bf16 matrix rate"}
    names |= {f"{what}, static + saved (MiB)" for what in ("ours", "PEFT's preparation, checkpointed")}
    texts = {"some tweets": {"mean": 17.6}}

    def measured(on: set[str]) -> str:
        content = {"table": [{"what": name, "median": 1.5} for name in on], "texts": texts}
        (tmp_path / "default_run.json").write_text(json.dumps(content))
        return speed_table(tmp_path)

    whole = measured(names)
    assert whole.count("\n| ") == len(LINES) + 2
    assert "computes in bf16 there. Its texts: some tweets (18 sub-tokens on average)." in whole
    less = measured({name for name in names if "bf16" not in name})
    assert "computes in fp32" in less
    assert "`predict`" not in less
    assert "NEFTune" in less


def test_a_few_clear_cells_against_the_rest_are_no_verdict():
    study = Study.read()
    many = {"mean": 0.01, "interval": [-0.1, 0.1], "bootstrap": [-0.1, 0.1], "by_seed": [0.0, 0.02], "n": 2}
    one = {**many, "mean": -0.02, "interval": [-0.03, -0.01], "bootstrap": [-0.03, -0.01]}
    pairs = [("trec", 0.1), ("trec", 0.2), ("trec", 0.3)]

    class Turned(type(study)):
        def difference(self, name, p, metric="f1_macro"):
            return (one if p == 0.3 else many) if (name, p) in pairs else None

    (line,) = _overall(Turned(study.sweeps, study.costs))
    assert "went no way clearly" in str(line)
