"""The tables of the pages are what the committed JSON says, and so are the figures in the sentences around them."""

import functools
import itertools
import re
import statistics

import numpy as np
import pytest
from figures import TITLES, Study, clear, paired, pooled, read
from page import PAGES, SPEED, backbones, filled, own_data, speed
from tables import CONTRASTS, STAGE_0, contrast_of_tokens, second, stage

from tokmask_peft.study.report import signed
from tokmask_peft.study.statistics import holm, sign_flip_p, smallest_p, spread

RESULTS, SPEED_PAGE, _ = PAGES
README = RESULTS.parent.parent / "README.md"


STUDY = Study.read()
TREC, TWI, LID, POS = "trec", "afrisenti_twi", "ud_tur_deu_lid", "ud_tur_deu_pos"
CONFOUNDS, MIXED, COST = (read(name) for name in ("confounds", "lid_spaeng", "arms_cost"))
MODEL = CONFOUNDS["language_model"]
RATES = STUDY.masked_rates()
CELLS = {pair: found for pair in itertools.product(STUDY.tasks, RATES) if (found := STUDY.difference(*pair))}
POOLED = [STUDY.together(p, STUDY.whole_tasks) for p in RATES]
CHOICES = [STUDY.analysis(name)["chosen_by_validation"] for name in STUDY.tasks]
COSTS = {row["what"]: row["median"] for row in COST["table"]}
CONFOUND = {
    (group, row["arm"], p): rate
    for group, found in CONFOUNDS["groups"].items()
    for row in found["arms"]
    for p, rate in row["rates"].items()
}


def count(sign, clearly=False):
    return sum(sign * found["mean"] > 0 and (clear(found) or not clearly) for found in CELLS.values())


def lower(name):
    return [f"{p:g}" for (task, p), found in CELLS.items() if task == name and clear(found)]


def arm(name, label):
    rows = STUDY.analysis(f"{name}-500-arms")["rows"]
    return next(row for row in rows if row["label"] == label)["difference"]["f1_macro"]


def chosen_arm(name):
    return [signed(STUDY.analysis(f"{name}-500-arms")["chosen_by_validation"]["gain"]["mean"])]


def steps(*names):
    return [STUDY.sweeps[name]["steps"] for name in names]


def contrast(one, other, *sides, p=0.3):
    return [signed(STUDY.contrast(one, other, p)[side]) for side in sides or ("mean",)]


def confound(group, name, p, what):
    return CONFOUND[group, name, p][what]["mean"]


def parts(what):
    return [rate[what] for rate in CONFOUND.values() if what in rate]


def selection(group):
    found = CONFOUNDS["groups"][group]["selection"]
    return f"{found['mean']:+.3f}", found["runs"], f"{found['least']:+.3f}", f"{found['most']:+.3f}"


def settings(group):
    found = CONFOUNDS["settings"][group]
    return found["train"], found["epochs"], found["batch_size"], f"{found['learning_rate']:g}"


def epochs(key, form):
    return [format(confound("encoder", "authors", p, key), form) for p in ("0", "0.1", "0.3")]


def against(one, other, p):
    return [signed(paired(*STUDY.same_seeds([one, other], p))["mean"])]


def signed3(value):
    return f"{value:+.3f}".replace("-", "−")


SECOND = {name: {row["label"]: row for row in STUDY.analysis(name)["rows"]} for name in STAGE_0}
TOKENS = contrast_of_tokens(STUDY)
FORMS = [row["difference"]["f1_macro"] for row in SECOND["stage0-trec"].values() if "difference" in row]


def form(name, label):
    return signed(SECOND[name][label]["difference"]["f1_macro"]["mean"])


def log_loss(name, label):
    runs = [run for run in STUDY.sweeps[name]["runs"] if run["arm"] == label]
    return f"{statistics.mean(run['log_loss']['test'] for run in runs):.2f}"


EARLY = [one for p in ("0.1", "0.3") for one in CONFOUND["encoder", "authors", p]["stopped_early"]]
GAINS = [one["gain"]["mean"] for one in CHOICES]
PICKS = [one["p"] for choice in CHOICES for one in choice["per_seed"]]
CLEAR = [found["mean"] > 0 for found in parts("difference") if found["clear"]]
CLAIMS = [  # a fragment of a sentence, and what stands in its braces
    ("Of {} comparisons with p = 0 ({} sweeps, {} masking rates)", (len(CELLS), len(STUDY.tasks), 3)),
    ("higher with masking in {}, clearly in {}, and lower in {}, clearly in {}.",
     (count(1), count(1, True), count(-1), count(-1, True))),
    ("TREC with 500 texts at p = {} and {},", lower("trec-500")),
    ("MeSent at {}, AfriSenti Twi at {} and {},", [*lower("mesent_mareng"), *lower(TWI)]),
    ("UD languages and UD parts of speech at {}, {} and {},", lower(LID)),
    ("UD languages and UD parts of speech at {}, {} and {},", lower(POS)),
    ("parts of speech with tuned training at {}.", lower(f"{POS}-tuned")),
    ("reaches .05 after Holm's correction over the rates in {} of {} comparisons. With at most {} seeds",
     (sum(one["p_holm"] <= 0.05 for one in CELLS.values()), len(CELLS), max(one["n"] for one in CELLS.values()))),
    ("before the correction is {}.", [f"{smallest_p(5):.3g}"]),
    ("macro-F1 by {} at p = 0.1, {} at 0.2 and {} at 0.3", [signed(one["mean"]) for one in POOLED]),
    ("higher in {} of {} seeds at each rate", (max(sum(x > 0 for x in one["by_seed"]) for one in POOLED), 5)),
    ("p = 0.2 ({}) and 0.3 ({})", [*contrast(POS, LID, p=0.2), *contrast(POS, LID)]),
    ("steps: {}, compared with {} and {}", steps("trec-500", TREC, TWI)),
    ("{} steps compared with {}): masking loses less, {} compared with {} at p = 0.3",
     [*steps("trec-500-long", "trec-500"), *contrast("trec-500-long", "trec-500", "one", "other")]),
    ("{} steps compared with {}): for UD", steps(f"{LID}-tuned", LID)),
    ("at p = 0.3 (gap {} [{}, {}])",
     [*contrast(f"{POS}-tuned", POS), *map(signed, STUDY.contrast(f"{POS}-tuned", POS, 0.3)["interval"])]),
    ("label smoothing is clearly higher ({}) and masking with NEFTune clearly lower ({})",
     [signed(arm(TREC, label)["mean"]) for label in ("label_smoothing", "mask 0.1 + neftune")]),
    ("is the highest ({})", [signed(arm(TWI, "label_smoothing")["mean"])]),
    ("takes {} (masking with label smoothing) to {} (NEFTune) times",
     [f"{COSTS[label]:.2f}" for label in ("mask 0.1 + label_smoothing", "neftune")]),
    ("above 0 in {} of {} choices", (sum(p > 0 for p in PICKS), len(PICKS))),
    ("chose scored {} compared with no masking on the test texts, as the mean over {} sweeps (from {} to {})",
     (signed(statistics.mean(GAINS)), len(GAINS), signed(min(GAINS)), signed(max(GAINS)))),
    ("altered what masking does in {} of {} comparisons",
     (sum(one["clear"] for one in parts("change")), len(parts("change")))),
    ("padding never masked, p = 0.3: {})", [f"{confound('causal', 'padding', '0.3', 'change'):+.3f}"]),
    ("clearly raised macro-F1 in {} of {} cells and clearly lowered it in {},",
     (sum(CLEAR), len(parts("difference")), len(CLEAR) - sum(CLEAR))),
    ("protocol ({}), with dropout after epoch 1 ({}), with id 0 ({}) or the unknown token ({}) as mask token, and with "
     "the checkpoint chosen on validation ({})",
     [signed3(confound("encoder", name, "0.3", "difference"))
      for name in ("authors", "dropout", "id0", "unk", "selection")]),
    ("UD parts of speech by {};", against(f"{POS}-tuned-top", f"{POS}-tuned-plain", 0.1)),
    ("depend on length, by {}.", against("mesent_mareng-grouped", "mesent_mareng", 0.0)),
    ("Padding alone costs {}.", [f"{COSTS['none, padded']:.2f}"]),
    ("what it chose scored {} compared with none", chosen_arm(TREC)),
    ("what it chose scored {} compared with none", chosen_arm(TWI)),
    *((f"{group} {{}}, {{}}, {{}} and {{}}", settings(group)) for group in CONFOUNDS["groups"]),
    ("epoch {} at p = 0, {} at 0.1 and {} at 0.3", epochs("epoch", ".1f")),
    ("rates of {}, {} and {}.", epochs("learning_rate", ".1e")),
    ("ended {} of its {} masked runs", (sum(EARLY), len(EARLY))),
    ("of validation gained {} macro-F1 on average over {} runs ({} to {})", selection("encoder")),
    ("reported set gained {} on average over {} runs ({} to {})", selection("words")),
    ("reported set gained {} on average over {} runs ({} to {})", selection("causal")),
    ("only {} of the test words are scored ({} of whole texts)",
     [f"{CONFOUND['words', name, '0']['scored_share']:.1%}" for name in ("authors", "whole-texts")]),
    ("is {} at p = 0, {} at 0.1 and {} at 0.3, compared with {}, {} and {} for whole texts",
     [f"{confound('words', name, p, 'score_all'):.3f}" for name in ("authors", "whole-texts")
      for p in ("0", "0.1", "0.3")]),
    ("position of {} of the training rows at p = 0.1 and of {} at p = 0.3",
     [f"{CONFOUND['causal', 'authors', p]['moved_share']:.0%}" for p in ("0.1", "0.3")]),
    ("of {} layers and {} units with the {} rows",
     (MODEL["shape"]["num_hidden_layers"], MODEL["shape"]["hidden_size"], MODEL["rows"])),
    ("on {} questions without their labels ({} epochs, training loss {})",
     (MODEL["texts"], MODEL["epochs"], f"{MODEL['loss_by_epoch'][-1]:.2f}")),
    ("Id 0 is {}, which {} of all texts contain", (repr(MODEL["id_0"]), MODEL["texts_with_id_0"])),
    ("one run (seed {seed}, p = {p:g}), development set, all {test_words:,d} words, {without_prediction} without a "
     "prediction: macro-F1 {test_f1_macro:.3f}, weighted F1 {test_f1_weighted:.3f}; character n-grams "
     "{baseline_f1_macro:.3f}".format(**MIXED), ()),
    ("`{command}`: {batches} batches of {batch_size}, {draws} mask draws".format(**read("diagnose_trec")), ()),
    ("`{}`: test macro-F1, mean", [read("robustness_trec")["command"]]),
    ("by {} on TREC, which the test does not establish (p = {}), and by {} on AfriSenti Twi, which it does (p = {},",
     [part for one in TOKENS for part in (signed(one["mean"]), f"{one['p_holm']:.3g}")]),
    ("All {} arms are below no masking, and {} t intervals exclude 0. The loss is smallest for *unk* at 0.1 ({}) and "
     "largest for *trained* at 0.3 ({})",
     (sum(one["mean"] < 0 for one in FORMS), sum(one["interval"][1] < 0 for one in FORMS),
      signed(max(one["mean"] for one in FORMS)), signed(min(one["mean"] for one in FORMS)))),
    ("(*unk* {}, *drop* {}), where `[MASK]` loses {}.",
     [form("stage0-twi", label) for label in ("unk:0.3", "drop:0.3", "own:0.3")]),
    ("({} without, {} with *drop* at 0.3). On Twi", [log_loss("stage0-trec", label) for label in ("none", "drop:0.3")]),
    ("better ({} without, {} with *drop* at 0.3)", [log_loss("stage0-twi", label) for label in ("none", "drop:0.3")]),
    ("{}; MiniLM, LoRA r = 16; three seeds", [read("faithfulness_trec")["texts"].partition("; ")[0]]),
]  # fmt: skip
QUOTED = [fragment.format(*figures) for fragment, figures in CLAIMS]


def prose(page):
    return re.sub(r"<!-- ([\w -]+) -->.*?<!-- /\1 -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("quoted", QUOTED, ids=[quoted[:40] for quoted in QUOTED])
def test_a_sentence_quotes_its_figures(quoted):
    assert quoted in prose(RESULTS)


def test_no_figure_is_quoted_without_a_claim():
    """Figures are what has a sign, an exponent, or three decimals and more."""
    text = functools.reduce(lambda text, quoted: text.replace(quoted, ""), QUOTED, prose(RESULTS))
    assert re.findall(r"[−+-]\d*\.\d+|\d*\.\d{3,}|\d\.\de-\d\d", text.replace("a learning rate of 5e-4", "")) == []


def test_what_stage_0_established_is_said_so():
    assert [one["p_holm"] <= 0.05 for one in TOKENS] == [False, True]
    assert len(FORMS) == 8
    assert (
        max(
            SECOND["stage0-trec"].values(),
            key=lambda row: row.get("difference", {"f1_macro": {"mean": -1}})["f1_macro"]["mean"],
        )["label"]
        == "unk:0.1"
    )
    assert min(FORMS, key=lambda one: one["mean"]) == SECOND["stage0-trec"]["trained:0.3"]["difference"]["f1_macro"]
    for label in ("unk:0.3", "drop:0.3"):
        low, high = SECOND["stage0-twi"][label]["difference"]["f1_macro"]["interval"]
        assert low < 0 < high
    assert all(
        row["f1_macro"]["n"] == 8 for rows in SECOND.values() for row in rows.values() if row["f1_macro"]["n"] > 1
    )


def test_what_is_clear_or_not_is_said_so():
    labels = [row["label"] for row in STUDY.analysis("trec-500-arms")["rows"][1:]]
    assert {label for label in labels if clear(arm(TREC, label))} == {"label_smoothing", "mask 0.1 + neftune"}
    assert not any(clear(arm(TWI, label)) for label in labels)
    assert max(labels, key=lambda label: arm(TWI, label)["mean"]) == "label_smoothing"
    found = [{p: STUDY.contrast(*pair, p) for p in RATES} for pair in CONTRASTS]
    excludes = [[p for p, one in rates.items() if one and np.prod(one["interval"]) > 0] for rates in found]
    assert excludes == [[0.2, 0.3], [], [], [], [], [0.3]]
    costs = {label: cost for label, cost in COSTS.items() if "padded" not in label}
    assert min(costs, key=costs.get) == "mask 0.1 + label_smoothing"
    assert max(costs, key=costs.get) == "neftune"
    below = {
        name for name in TITLES
        if STUDY.row(name, 0.0)["f1_macro"]["mean"] < STUDY.analysis(name)["baseline"]["f1_macro"]
    }  # fmt: skip
    assert below == {"mesent_mareng", TWI, "afrisenti_twi-500", LID, POS, f"{POS}-tuned"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_committed_tables_are_what_the_committed_figures_say(page):
    text = page.read_text(encoding="utf-8")
    assert filled(text, STUDY) == text, "run: python benchmarks/studies/page.py"


def test_cells_are_a_line_for_all_seeds_and_what_has_not_run_is_not_measured():
    about = {
        "corpus": "kin",
        "backbone": "minilm",
        "size": 360,
        "texts": 360,
        "arm": "",
        "floor": 0.5,
        "constant": False,
    }
    costs = {"cpu_seconds": 60.0, "adapter_bytes": 3_400_000, "peak_bytes": 2_000_000_000}
    cells = [
        about | costs | {"seed": seed, "f1_macro": score, "verdict": verdict}
        for seed, score, verdict in ((1, 0.5, "cannot tell"), (2, 0.7, "beats"))
    ]
    ran = {"cells": [*cells, cells[0] | {"arm": "model.pooling=cls"}], "environment": {"threads": 1, "device": "CPU"}}
    (line,) = (line for line in backbones(lambda _: ran).splitlines() if "MiniLM" in line)
    assert "Kinyarwanda" in line
    assert "| 2 | 0.600 (0.500 to 0.700) | 0.500 | 60 | 3.4 MB | 2.0 GB |" in line
    (line,) = (line for line in own_data(lambda _: ran).splitlines() if "Kinyarwanda" in line)
    assert "| 360 | 2 | 0.600 (0.500 to 0.700) | 0.500 | +0.100 | 1 beats, 1 cannot tell | 0 | 60 |" in line
    assert backbones(lambda _: None) == own_data(lambda _: None) == "Nothing has been measured yet."


def test_labels_on_a_word_s_last_sub_token_and_seeing_the_whole_text_gain_what_the_page_says():
    cells, text = read("decoders")["cells"], PAGES[2].read_text(encoding="utf-8")
    arms = {
        arm: [cell["f1_macro"] for cell in cells if cell["arm"] == arm]
        for arm in dict.fromkeys(c["arm"] for c in cells)
    }
    assert {len(scores) for scores in arms.values()} == {3}, "the page says three seeds"
    for arm, scores in arms.items():
        shown = ", ".join(f"{score:.3f}".lstrip("0") for score in scores)
        assert f"| {arm} | {shown} |" in text


def test_every_score_in_the_readme_is_on_a_page():
    """Figures of three or four decimals, as .953 or 0.1234."""
    pages = RESULTS.read_text(encoding="utf-8") + SPEED_PAGE.read_text(encoding="utf-8")
    known, quoted = (
        {found.lstrip("0") for found in re.findall(r"(?<![\d.])0?\.\d{3,4}\b", text)}
        for text in (pages, README.read_text(encoding="utf-8"))
    )
    assert not sorted(quoted - known)


def test_a_machine_without_bf16_leaves_rows_of_the_speed_table_out():
    names = {name for *_, template in SPEED for name in re.findall(r"{(.*?):\.", template)}
    names |= {"default run, share of the bf16 matrix rate"}
    names |= {f"{who}, static + saved (MiB)" for who in ("ours", "PEFT's preparation, checkpointed")}

    def measured(on):
        table = [{"what": name, "median": 1.5} for name in on]
        return speed(
            lambda name: {"table": table, "texts": {"tweets": {"mean": 17.6}}} if name == "default_run" else None
        )

    assert speed().count("\n| ") == len(SPEED) + 2
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


def arms(scores, texts=100, precision="bf16"):
    """Return what is collected of a sweep over arms, with the scores of each arm by seed."""
    rows, plain = [], scores.get("none", {})
    for label, by_seed in scores.items():
        values = {"by_seed": [*by_seed.values()], **spread([*by_seed.values()])}
        rows.append({"label": label, "seeds": [*by_seed], "f1_macro": values, "f1_weighted": values})
        if seeds := [seed for seed in by_seed if seed in plain and label != "none"]:
            changes = [by_seed[seed] - plain[seed] for seed in seeds]
            found = {"by_seed": changes, **spread(changes), "p_value": float(sign_flip_p(changes)), "p_holm": 0.0}
            rows[-1]["difference"] = {"seeds": seeds, "f1_macro": found}
    runs = [
        {"arm": label, "seed": seed, "precision": precision, "log_loss": {"test": 1 - score}}
        for label, by_seed in scores.items()
        for seed, score in by_seed.items()
    ]
    return {"analysis": {"rows": rows}, "runs": runs, "texts": {"train": texts}, "environments": [{"device": "H100"}]}


def test_arms_that_are_sweeps_of_their_own_are_compared_with_none_of_the_main_sweep():
    main = {"none": {11: 0.6, 12: 0.7, 13: 0.65}, "mask 0.1": {11: 0.61, 12: 0.73, 13: 0.66}}
    own = {
        "stage1-trec-annealed": arms({"anneal:0.1": {11: 0.5, 12: 0.6, 13: 0.6}}),
        "stage1-trec-twice": arms({"none": {13: 0.66, 11: 0.62, 14: 0.9}}),  # seed 12 failed
    }
    made = Study({"stage1-trec": arms(main), **own, "stage1-lr-trec": arms({"p = 0": {1: 0.9}})})
    rows = {row["label"]: row for row in made.arms("stage1-trec")}
    assert [*rows] == ["none", "mask 0.1", "annealed", "twice"]
    found = {label: row["difference"]["f1_macro"] for label, row in rows.items() if label != "none"}
    assert found["twice"]["by_seed"] == pytest.approx([0.02, 0.01])
    assert found["annealed"]["mean"] == pytest.approx(-0.25 / 3)
    assert found["twice"]["interval"] == pytest.approx(spread([0.02, 0.01])["interval"])
    tests = [float(sign_flip_p(one["by_seed"])) for one in found.values()]
    assert [one["p_holm"] for one in found.values()] == holm(tests)
    (line,) = (line for line in second("stage1-trec", made)[1] if line[0] == "twice")
    assert line[2].startswith("+0.0150 [")
    assert line[-1] == "0.2733 ± 0.1514"  # log-loss of seeds 11, 13 and 14
    for others in ({"texts": 90}, {"precision": "fp32"}):
        mixed = made.sweeps | {"stage1-trec-twice": arms({"none": {11: 0.6}}, **others)}
        with pytest.raises(SystemExit, match="stage1-trec-twice"):
            Study(mixed).arms("stage1-trec")


def test_pooling_over_data_sets_is_that_of_metafor():
    """Its example: vaccines for tuberculosis (dat.bcg), `rma(yi, vi, method="REML", test="knha")`."""
    effects = [-0.8893, -1.5854, -1.3481, -1.4416, -0.2175, -0.7861, -1.6209, 0.0120, -0.4694, -1.3713, -0.3394, 0.4459]
    variances = [0.3256, 0.1946, 0.4154, 0.0200, 0.0512, 0.0069, 0.2230, 0.0040, 0.0564, 0.0730, 0.0124, 0.5325]
    found = pooled([*effects, -0.0173], [*variances, 0.0714])
    assert found["mean"] == pytest.approx(-0.7145, abs=2e-4)
    assert found["tau"] ** 2 == pytest.approx(0.3132, abs=2e-4)
    assert found["interval"] == pytest.approx([-1.1084, -0.3206], abs=5e-4)
    assert found["p_value"] == pytest.approx(0.0019, abs=1e-4)
    low, high = found["prediction"]
    assert low < found["interval"][0]
    assert (low + high) / 2 == pytest.approx(found["mean"])
    same = pooled([0.1, 0.11], [0.04, 0.04])
    assert (same["tau"], same["prediction"]) == (0.0, None)
    assert same["mean"] == pytest.approx(0.105)


def test_a_stage_is_a_line_for_each_arm_pooled_over_its_data_sets():
    none = {11: 0.6, 12: 0.7}
    better, worse, smooth = {11: 0.62, 12: 0.73}, {11: 0.58, 12: 0.69}, {11: 0.61, 12: 0.70}
    names = {"none": none, "label_smoothing": smooth, "views": worse, "share:0.5": none}
    made = {f"stage1-{name}": arms(names | ({"mask 0.1": better} if name == "twi" else {})) for name in ("trec", "twi")}
    made |= {f"stage1-{name}-twice": arms({"none": better}) for name in ("trec", "twi")}
    head, body = stage(1, Study(made))
    assert head == ("arm", "TREC", "Twi", "pooled", "another data set", "p, Holm")
    assert [line[0] for line in body] == ["twice", "label_smoothing", "views", "share:0.5", "mask 0.1"]
    assert body[0][1] == "+0.0250; 2/2"
    assert body[0][3].startswith("+0.0250 [")
    # label smoothing is not one of those tested, and what changes nothing has no weight
    assert [line[-1] == "" for line in body] == [False, True, False, True, True]
    assert body[-1][1:] == ["", "+0.0250; 2/2", "", "", ""]
    assert stage(2, Study(made))[1] == second("stage2-kin", Study(made))[1] == []
