"""The tables of the pages are what the committed JSON says, and so are the figures in the sentences around them."""

import itertools
import re
import statistics
from functools import cache

import numpy as np
import pytest
from figures import TITLES, Study, clear, paired, read
from page import PAGES, SPEED, filled, speed

from tokmask_peft.study.report import signed
from tokmask_peft.study.statistics import smallest_p, spread

RESULTS, BENCHMARKS, README = PAGES


@cache
def study():
    return Study.read()


def cells():
    pairs = itertools.product(study().tasks, study().masked_rates())
    return {pair: found for pair in pairs if (found := study().difference(*pair))}


def count(sign, clearly=False):
    return sum(sign * found["mean"] > 0 and (clear(found) or not clearly) for found in cells().values())


def clearly_lower(name):
    return ", ".join(f"{p:g}" for (task, p), found in cells().items() if task == name and clear(found))


def pooled(p):
    return study().together(p, study().whole_tasks)


def arm(name, label):
    rows = study().analysis(f"{name}-500-arms")["rows"]
    return next(row for row in rows if row["label"] == label)["difference"]["f1_macro"]


def cost(label):
    return next(row["median"] for row in read("arms_cost")["table"] if row["what"] == label)


def choices():
    return [study().analysis(name)["chosen_by_validation"] for name in study().tasks]


def below(name):
    return study().row(name, 0.0)["f1_macro"]["mean"] < study().analysis(name)["baseline"]["f1_macro"]


def confound(group, name, p="0.3", what="difference"):
    rows = read("confounds")["groups"][group]["arms"]
    return next(row for row in rows if row["arm"] == name)["rates"][p][what]


def confound_cells(what):
    groups = read("confounds")["groups"].values()
    return [rate[what] for group in groups for row in group["arms"] for rate in row["rates"].values() if what in rate]


def selection(group):
    found = read("confounds")["groups"][group]["selection"]
    return f"{found['mean']:+.3f}", found["runs"], f"{found['least']:+.3f}", f"{found['most']:+.3f}"


def settings(group):
    found = read("confounds")["settings"][group]
    return found["train"], found["epochs"], found["batch_size"], f"{found['learning_rate']:g}"


def epochs(key, form):
    return [format(confound("encoder", "authors", p, key)["mean"], form) for p in ("0", "0.1", "0.3")]


def gap(one, other, p):
    return signed(study().contrast(one, other, p)["mean"])


def bound(found):
    return ", ".join(signed(value) for value in found["interval"])


def against(one, other, p):
    rows = study().same_seeds([one, other], p)
    return signed(paired(rows[0], rows[1])["mean"])


LID, POS = "ud_tur_deu_lid", "ud_tur_deu_pos"
CLAIMS = [  # a fragment of a sentence, and what stands in its braces
    ("Of {} comparisons with p = 0 ({} sweeps, {} masking rates)", lambda: (len(cells()), len(study().tasks), 3)),
    (
        "higher with masking in {}, clearly in {}, and lower in {}, clearly in {}.",
        lambda: (count(1), count(1, True), count(-1), count(-1, True)),
    ),
    ("TREC with 500 texts at p = {} and {},", lambda: clearly_lower("trec-500").split(", ")),
    (
        "MeSent at {}, AfriSenti Twi at {} and {},",
        lambda: [clearly_lower("mesent_mareng"), *clearly_lower("afrisenti_twi").split(", ")],
    ),
    ("UD languages and UD parts of speech at {}, {} and {},", lambda: clearly_lower(LID).split(", ")),
    ("UD languages and UD parts of speech at {}, {} and {},", lambda: clearly_lower(POS).split(", ")),
    ("parts of speech with tuned training at {}.", lambda: [clearly_lower(f"{POS}-tuned")]),
    (
        "reaches .05 after Holm's correction over the rates in {} of {} comparisons. With at most {} seeds",
        lambda: (
            sum(one["p_holm"] <= 0.05 for one in cells().values()),
            len(cells()),
            max(one["n"] for one in cells().values()),
        ),
    ),
    ("before the correction is {}.", lambda: [f"{smallest_p(5):.3g}"]),
    (
        "macro-F1 by {} at p = 0.1, {} at 0.2 and {} at 0.3",
        lambda: [signed(pooled(p)["mean"]) for p in (0.1, 0.2, 0.3)],
    ),
    (
        "higher in {} of {} seeds at each rate",
        lambda: (max(sum(x > 0 for x in pooled(p)["by_seed"]) for p in (0.1, 0.2, 0.3)), 5),
    ),
    ("p = 0.2 ({}) and 0.3 ({})", lambda: (gap(POS, LID, 0.2), gap(POS, LID, 0.3))),
    (
        "steps: {}, compared with {} and {}",
        lambda: [study().sweeps[n]["steps"] for n in ("trec-500", "trec", "afrisenti_twi")],
    ),
    (
        "{} steps compared with {}): masking loses less, {} compared with {} at p = 0.3",
        lambda: [
            study().sweeps["trec-500-long"]["steps"],
            study().sweeps["trec-500"]["steps"],
            *(signed(study().contrast("trec-500-long", "trec-500", 0.3)[side]) for side in ("one", "other")),
        ],
    ),
    ("{} steps compared with {}): for UD", lambda: [study().sweeps[name]["steps"] for name in (f"{LID}-tuned", LID)]),
    (
        "at p = 0.3 (gap {} [{}])",
        lambda: (gap(f"{POS}-tuned", POS, 0.3), bound(study().contrast(f"{POS}-tuned", POS, 0.3))),
    ),
    (
        "label smoothing is clearly higher ({}) and masking with NEFTune clearly lower ({})",
        lambda: [signed(arm("trec", label)["mean"]) for label in ("label_smoothing", "mask 0.1 + neftune")],
    ),
    ("is the highest ({})", lambda: [signed(arm("afrisenti_twi", "label_smoothing")["mean"])]),
    (
        "takes {} (masking with label smoothing) to {} (NEFTune) times",
        lambda: [f"{cost(label):.2f}" for label in ("mask 0.1 + label_smoothing", "neftune")],
    ),
    (
        "above 0 in {} of {} choices",
        lambda: (
            sum(one["p"] > 0 for c in choices() for one in c["per_seed"]),
            sum(len(c["per_seed"]) for c in choices()),
        ),
    ),
    (
        "chose scored {} compared with no masking on the test texts, as the mean over {} sweeps (from {} to {})",
        lambda: (lambda gains: (signed(statistics.mean(gains)), len(gains), signed(min(gains)), signed(max(gains))))(
            [one["gain"]["mean"] for one in choices()]
        ),
    ),
    (
        "altered what masking does in {} of {} comparisons",
        lambda: (sum(one["clear"] for one in confound_cells("change")), len(confound_cells("change"))),
    ),
    ("padding never masked, p = 0.3: {})", lambda: [f"{confound('causal', 'padding', '0.3', 'change')['mean']:+.3f}"]),
    (
        "clearly raised macro-F1 in {} of {} cells and clearly lowered it in {},",
        lambda: [
            sum(one["clear"] and one["mean"] > 0 for one in confound_cells("difference")),
            len(confound_cells("difference")),
            sum(one["clear"] and one["mean"] < 0 for one in confound_cells("difference")),
        ],
    ),
    (
        "protocol ({}), with dropout after epoch 1 ({}), with id 0 ({}) or the unknown token ({}) as mask token, and "
        "with the checkpoint chosen on validation ({})",
        lambda: [
            signed3(confound("encoder", name)["mean"]) for name in ("authors", "dropout", "id0", "unk", "selection")
        ],
    ),
    ("UD parts of speech by {};", lambda: [against(f"{POS}-tuned-top", f"{POS}-tuned-plain", 0.1)]),
    ("depend on length, by {}.", lambda: [against("mesent_mareng-grouped", "mesent_mareng", 0.0)]),
    ("Padding alone costs {}.", lambda: [f"{cost('none, padded'):.2f}"]),
    ("what it chose scored {} compared with none", lambda: [signed(chosen_arm("trec"))]),
    ("what it chose scored {} compared with none", lambda: [signed(chosen_arm("afrisenti_twi"))]),
    *(
        (f"{group} {{}}, {{}}, {{}} and {{}}", lambda group=group: settings(group))
        for group in ("encoder", "words", "causal")
    ),
    ("epoch {} at p = 0, {} at 0.1 and {} at 0.3", lambda: epochs("epoch", ".1f")),
    ("rates of {}, {} and {}.", lambda: epochs("learning_rate", ".1e")),
    ("ended {} of its {} masked runs", lambda: (sum(early()), len(early()))),
    ("of validation gained {} macro-F1 on average over {} runs ({} to {})", lambda: selection("encoder")),
    ("reported set gained {} on average over {} runs ({} to {})", lambda: selection("words")),
    ("reported set gained {} on average over {} runs ({} to {})", lambda: selection("causal")),
    (
        "only {} of the test words are scored ({} of whole texts)",
        lambda: [f"{confound('words', name, '0', 'scored_share'):.1%}" for name in ("authors", "whole-texts")],
    ),
    (
        "is {} at p = 0, {} at 0.1 and {} at 0.3, compared with {}, {} and {} for whole texts",
        lambda: [
            f"{confound('words', name, p, 'score_all')['mean']:.3f}"
            for name in ("authors", "whole-texts")
            for p in ("0", "0.1", "0.3")
        ],
    ),
    (
        "position of {} of the training rows at p = 0.1 and of {} at p = 0.3",
        lambda: [f"{confound('causal', 'authors', p, 'moved_share'):.0%}" for p in ("0.1", "0.3")],
    ),
    (
        "of {} layers and {} units with the {} rows",
        lambda: [*shape("num_hidden_layers", "hidden_size"), model()["rows"]],
    ),
    (
        "on {} questions without their labels ({} epochs, training loss {})",
        lambda: (model()["texts"], model()["epochs"], f"{model()['loss_by_epoch'][-1]:.2f}"),
    ),
    ("Id 0 is {}, which {} of all texts contain", lambda: (repr(model()["id_0"]), model()["texts_with_id_0"])),
    (
        "one run (seed {}, p = {}), development set, all {} words, {} without a prediction: macro-F1 {}, weighted F1 "
        "{}; character n-grams {}",
        lambda: [mixed(key, form) for key, form in LID_FIGURES],
    ),
    (
        "`{}`: {} batches of {}, {} mask draws",
        lambda: [read("diagnose_trec")[key] for key in ("command", "batches", "batch_size", "draws")],
    ),
    ("`{}`: test macro-F1, mean", lambda: [read("robustness_trec")["command"]]),
    ("{}; MiniLM, LoRA r = 16; three seeds", lambda: [read("faithfulness_trec")["texts"].partition("; ")[0]]),
]
LID_FIGURES = (
    ("seed", "d"), ("p", "g"), ("test_words", ",d"), ("without_prediction", "d"), ("test_f1_macro", ".3f"),
    ("test_f1_weighted", ".3f"), ("baseline_f1_macro", ".3f"),
)  # fmt: skip


def signed3(value):
    return f"{value:+.3f}".replace("-", "−")


def chosen_arm(name):
    return study().analysis(f"{name}-500-arms")["chosen_by_validation"]["gain"]["mean"]


def early():
    return [one for p in ("0.1", "0.3") for one in confound("encoder", "authors", p, "stopped_early")]


def model():
    return read("confounds")["language_model"]


def shape(*keys):
    return [model()["shape"][key] for key in keys]


def mixed(key, form):
    return format(read("lid_spaeng")[key], form)


def prose(page):
    return re.sub(r"<!-- ([\w -]+) -->.*?<!-- /\1 -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize(("fragment", "figures"), CLAIMS, ids=[fragment[:40] for fragment, _ in CLAIMS])
def test_a_sentence_quotes_its_figures(fragment, figures):
    assert fragment.format(*figures()) in prose(RESULTS)


def test_no_figure_is_quoted_without_a_claim():
    """Figures are what has a sign, an exponent, or three decimals and more."""
    text = prose(RESULTS)
    for fragment, figures in CLAIMS:
        text = text.replace(fragment.format(*figures()), "")
    assert re.findall(r"[−+-]\d*\.\d+|\d*\.\d{3,}|\d\.\de-\d\d", text.replace("a learning rate of 5e-4", "")) == []


def test_what_is_clear_or_not_is_said_so():
    labels = [row["label"] for row in study().analysis("trec-500-arms")["rows"][1:]]
    assert {label for label in labels if clear(arm("trec", label))} == {"label_smoothing", "mask 0.1 + neftune"}
    assert not any(clear(arm("afrisenti_twi", label)) for label in labels)
    assert max(labels, key=lambda label: arm("afrisenti_twi", label)["mean"]) == "label_smoothing"
    pairs = [(POS, LID), ("trec-500", "trec"), ("afrisenti_twi-500", "afrisenti_twi"), ("trec-500-long", "trec-500")]
    pairs += [(f"{LID}-tuned", LID), (f"{POS}-tuned", POS)]
    found = [{p: study().contrast(*pair, p) for p in study().masked_rates()} for pair in pairs]
    excludes = [[p for p, one in rates.items() if one and np.prod(one["interval"]) > 0] for rates in found]
    assert excludes == [[0.2, 0.3], [], [], [], [], [0.3]]
    costs = {row["what"]: row["median"] for row in read("arms_cost")["table"] if "padded" not in row["what"]}
    assert min(costs, key=costs.get) == "mask 0.1 + label_smoothing"
    assert max(costs, key=costs.get) == "neftune"
    lower = {name for name in TITLES if below(name)}
    assert lower == {"mesent_mareng", "afrisenti_twi", "afrisenti_twi-500", LID, POS, f"{POS}-tuned"}


def test_readme_repeats_findings_of_the_page():
    text, section = README.read_text(encoding="utf-8"), RESULTS.read_text(encoding="utf-8")
    findings = text.partition("<!-- /results -->")[2].partition("The trainings are short")[0]
    lines = [line for line in findings.splitlines() if line.startswith("- ")]
    assert len(lines) > 5
    assert [line for line in lines if line not in section] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_committed_tables_are_what_the_committed_figures_say(page):
    text = page.read_text(encoding="utf-8")
    assert filled(text, study()) == text, "run: python benchmarks/studies/page.py"


def test_every_score_in_the_readme_is_on_a_page():
    """Figures of three or four decimals, as .953 or 0.1234."""
    pages = RESULTS.read_text(encoding="utf-8") + BENCHMARKS.read_text(encoding="utf-8")
    known, quoted = (
        {found.lstrip("0") for found in re.findall(r"(?<![\d.])0?\.\d{3,4}\b", text)}
        for text in (pages, README.read_text(encoding="utf-8"))
    )
    assert not sorted(quoted - known)


def test_the_committed_speed_table_is_complete():
    assert speed().count("\n| ") == len(SPEED) + 2


def test_a_machine_without_bf16_leaves_rows_of_the_speed_table_out():
    names = {name for *_, template in SPEED for name in re.findall(r"{(.*?):\.", template)}
    names |= {"default run, share of the bf16 matrix rate"}
    names |= {f"{who}, static + saved (MiB)" for who in ("ours", "PEFT's preparation, checkpointed")}

    def measured(on):
        table = [{"what": name, "median": 1.5} for name in on]
        return speed(
            lambda name: {"table": table, "texts": {"tweets": {"mean": 17.6}}} if name == "default_run" else None
        )

    whole, less = measured(names), measured({name for name in names if "bf16" not in name})
    assert whole.count("\n| ") == len(SPEED) + 2
    assert "computes in bf16 there. Its texts: tweets (18 sub-tokens on average)." in whole
    assert "computes in fp32" in less
    assert "`predict`" not in less
    assert "NEFTune" in less


def sweep(by_rate):
    """Return what is collected of a sweep, with the scores of its seeds at each rate."""
    rows = []
    for p, scores in by_rate.items():
        row = {"p": p, "regularizers": "recipe", "seeds": list(range(len(scores))), "f1_macro": {"by_seed": scores}}
        if p:
            changes = [score - plain for score, plain in zip(scores, by_rate[0.0], strict=True)]
            row["difference"] = {"seeds": row["seeds"], "f1_macro": {"by_seed": changes, **spread(changes)}}
        rows.append(row)
    return {"analysis": {"rows": rows}}


def test_tasks_are_averaged_seed_by_seed_before_they_are_tested():
    made = Study({
        "trec": sweep({0.0: [0.6, 0.61, 0.62], 0.1: [0.58, 0.589, 0.598]}),
        "trec-500": sweep({0.0: [0.6, 0.61, 0.62], 0.1: [0.63, 0.62, 0.57]}),
    })  # fmt: skip
    values = np.mean([made.difference(name, 0.1)["by_seed"] for name in made.tasks], axis=0)
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    found = made.together(0.1, made.tasks)
    assert found["n"] == 3  # seeds, not runs
    expected = (np.abs((signs * values).mean(axis=1)) >= abs(values.mean()) - 1e-12).mean()
    assert found["p_value"] == pytest.approx(expected)
    assert found["by_seed"] == pytest.approx(values)


def test_only_seeds_of_both_sweeps_are_compared():
    one, other = sweep({0.0: [0.6, 0.6, 0.1], 0.1: [0.7, 0.6, 0.9]}), sweep({0.0: [0.5, 0.5], 0.1: [0.5, 0.6]})
    made = Study({"one": one, "other": other})
    assert made.contrast("one", "other", 0.1)["mean"] == pytest.approx(0.0)
    assert made.contrast("one", "other", 0.1)["one"] == pytest.approx(0.05)
    rows = made.same_seeds(["one", "other"], 0.0)
    assert [row["by_seed"] for row in rows] == [[0.6, 0.6], [0.5, 0.5]]
    assert made.same_seeds(["one", "missing"], 0.0) == []
