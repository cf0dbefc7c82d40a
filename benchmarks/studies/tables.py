"""The tables of the masking study and of the single measurements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from figures import TITLES, Study, paired, pooled, read

from tokmask_peft.study.report import Table, difference_table, interval, mean_sd, score_table, signed
from tokmask_peft.study.statistics import holm, sign_flip_p, spread

CONTRASTS = (
    ("ud_tur_deu_pos", "ud_tur_deu_lid"),
    ("trec-500", "trec"),
    ("afrisenti_twi-500", "afrisenti_twi"),
    ("trec-500-long", "trec-500"),
    ("ud_tur_deu_lid-tuned", "ud_tur_deu_lid"),
    ("ud_tur_deu_pos-tuned", "ud_tur_deu_pos"),
)
"""Sweeps whose differences from p = 0 are compared with each other."""
STAGE_0 = {"stage0-trec": "TREC, 500 training texts", "stage0-twi": "AfriSenti Twi, 500 training texts"}
STAGES = {
    1: {"stage1-trec": "TREC", "stage1-twi": "Twi", "stage1-sagt": "SAGT languages"},
    2: {
        "stage2-kin": "Kinyarwanda", "stage2-swa": "Swahili", "stage2-tso": "Xitsonga", "stage2-sentimix": "SentiMix",
        "stage2-melid": "MeLID", "stage2-lince": "LinCE",
    },
}  # fmt: skip
"""The sweeps of the later stages of the second study, and their data sets."""
FAITHFULNESS = {
    "least_minus_most": "area, least minus most influential first",
    "random_minus_most": "area, random minus most influential first",
    "relative": "relative area",
    "random_fall": "mean fall of the probability under random masks",
}


def trained(study: Study) -> Table:
    """Return what was trained on what."""
    body = []
    for name in study.tasks:
        found, analysis = study.sweeps[name], study.analysis(name)
        sizes = [f"{found['texts'][split]:,}" for split in ("train", "validation", "test")]
        if analysis["task"] == "token":
            counts = (found["words"][split] for split in ("train", "validation", "test"))
            sizes = [f"{texts} ({words:,} words)" for texts, words in zip(sizes, counts, strict=True)]
        ends = ", ".join(f"{share:.0%}" for share in found["best_at_end"].values())
        counted = str(found["labels"]), str(found["steps"]), ends, str(len(analysis["seeds"]))
        body.append([TITLES[name], *sizes, *counted])
    return ("task", "train", "validation", "test", "labels", "steps", "best at the end", "seeds"), body


def scores(metric: str, study: Study) -> Table:
    """Return the scores by masking rate, after those of character n-grams."""
    rates, body = [0.0, *study.masked_rates()], []
    for name in study.tasks:
        cells = [mean_sd(row[metric]) if (row := study.row(name, p)) else "" for p in rates]
        body.append([TITLES[name], _floor(study, name, metric), *cells])
    return ("task", "character n-grams", *_at(rates)), body


def differences(metric: str, study: Study) -> Table:
    """Return the paired differences from p = 0, and last their mean over the tasks with all texts."""
    rates = study.masked_rates()
    rows = {TITLES[name]: [study.difference(name, p, metric) for p in rates] for name in study.tasks}
    pooled = [study.together(p, study.whole_tasks, metric) for p in rates]
    if all(pooled):
        rows["mean of the tasks with all texts"] = pooled
    body = []
    for title, row in rows.items():
        cells = [
            f"{_mean(one)}; {_up(one, '/')}; p = {one.get('p_holm', one['p_value']):.3g}" if one else "" for one in row
        ]
        body.append([title, *cells])
    return ("task", *_at(rates)), body


def _at(rates: list[float]) -> list[str]:
    return [f"p = {p:g}" for p in rates]


def _floor(study: Study, name: str, metric: str = "f1_macro") -> str:
    baseline = study.analysis(name)["baseline"]
    return f"{baseline[metric]:.4f}" if baseline else ""


def _mean(found: dict[str, Any]) -> str:
    return f"{signed(found['mean'])} {interval(found['interval'])}".rstrip()


def _up(found: dict[str, Any], of: str) -> str:
    return f"{sum(value > 0 for value in found['by_seed'])}{of}{found['n']}"


def contrasts(study: Study) -> Table:
    """Return how far the effect of masking differs between two sweeps, over the seeds of both."""
    rates, body = study.masked_rates(), []
    for one, other in CONTRASTS:
        found = [study.contrast(one, other, p) for p in rates]
        if any(found):
            cells = [f"{signed(f['one'])} and {signed(f['other'])}: {_mean(f)}" if f else "" for f in found]
            body.append([f"{TITLES[one]} − {TITLES[other]}", *cells])
    return ("sweeps", *_at(rates)), body


def chosen(study: Study) -> Table:
    """Return which rates validation would have chosen, and what they score on test."""
    body = []
    for name in study.tasks:
        choice = study.analysis(name)["chosen_by_validation"]
        if choice["per_seed"]:
            picks = ", ".join(f"{one['p']:g}" for one in choice["per_seed"])
            gain = _mean(choice["gain"]) if "gain" in choice else ""
            body.append([TITLES[name], picks, mean_sd(choice["f1_macro"]), gain])
    return ("task", "chosen, seed by seed", "test macro-F1", "against p = 0"), body


def arms(name: str, study: Study) -> Table:
    """Return the scores of regularizers; the cost of a step is the one that `arms_cost.py` measured on TREC."""
    head, body = score_table(study.analysis(f"{name}-500-arms"))
    if name != "trec" or not (cost := read("arms_cost")):
        return head[:-1], [row[:-1] for row in body]
    costs = {"none": "1", **{row["what"]: f"{row['median']:.2f}" for row in cost["table"]}}
    return head, [[*row[:-1], costs.get(row[0], "")] for row in body]


def arms_differences(name: str, study: Study) -> Table:
    """Return how the scores of regularizers differ from those of none."""
    return difference_table(study.analysis(f"{name}-500-arms"), "f1_macro")


def compared(study: Study, columns: dict[str, str], p: float) -> Table:
    """Compare sweeps whose names have these endings, at one rate; the first column is what the others differ from."""
    body = []
    for name in study.tasks:
        if rows := study.same_seeds([f"{name}{ending}" for ending in columns.values()], p):
            cells = [cell for row in rows[1:] for cell in (mean_sd(row), _mean(paired(row, rows[0])))]
            body.append([TITLES[name], str(rows[0]["n"]), mean_sd(rows[0]), *cells])
    first, *others = columns
    return ("task", "seeds", first, *(title for other in others for title in (other, "difference"))), body


def summary(study: Study) -> Table:
    """Return scores with and without masking, for each task, and the floor."""
    body = []
    for name in study.tasks:
        rows, found = [study.row(name, p) for p in (0.0, 0.1)], study.difference(name, 0.1)
        if found is not None and None not in rows:
            cells = [mean_sd(row["f1_macro"]) for row in rows if row]
            body.append([TITLES[name], _floor(study, name), *cells, _mean(found), _up(found, " of ")])
    return ("task", "character n-grams", "p = 0", "p = 0.1", "difference", "higher in"), body


def second(name: str, study: Study) -> Table:
    """Return the arms of a sweep of the second study: scores, differences from none seed by seed, log-loss."""
    body = []
    for row in study.arms(name) if name in study.sweeps else ():
        if row["f1_macro"]["n"] < 2:  # only begun
            continue
        cells = [row["label"], mean_sd(row["f1_macro"]), ""]
        if found := row.get("difference", {}).get("f1_macro"):
            cells[-1] = f"{_mean(found)}; {_up(found, '/')}; p = {found['p_holm']:.3g}"
        body.append([*cells, mean_sd(row["f1_weighted"]), mean_sd(spread(row["log_losses"]))])
    return ("arm", "macro-F1", "difference", "weighted F1", "log-loss"), body


def stage(number: int, study: Study) -> Table:
    """Return what the arms of a stage change on each data set, and pooled over all that have run, the highest first.

    Holm's correction is over the arms without label smoothing, which the plan only reports.
    """
    names = {name: title for name, title in STAGES[number].items() if name in study.sweeps}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        for row in study.arms(name):
            if (one := row.get("difference", {}).get("f1_macro")) and one["n"] > 1:
                found.setdefault(row["label"], {})[name] = one
    whole = {label: [*by_name.values()] for label, by_name in found.items() if len(by_name) == len(names) > 1}
    together = {
        label: pooled([one["mean"] for one in ones], [one["sd"] ** 2 / one["n"] for one in ones])
        for label, ones in whole.items()
        if all(one["sd"] for one in ones)
    }
    tested = [label for label in together if label != "label_smoothing"]
    corrected = dict(zip(tested, holm([together[label]["p_value"] for label in tested]), strict=True))
    body = []
    for label in sorted(found, key=lambda one: -together.get(one, {"mean": -1.0})["mean"]):
        ones = (found[label].get(name) for name in names)
        cells = [f"{signed(one['mean'])}; {_up(one, '/')}" if one else "" for one in ones]
        all_of_them = together.get(label)
        cells += [_mean(all_of_them), interval(all_of_them["prediction"])] if all_of_them else ["", ""]
        body.append([label, *cells, f"{corrected[label]:.3g}" if label in corrected else ""])
    return ("arm", *names.values(), "pooled", "another data set", "p, Holm"), body


def contrast_of_tokens(study: Study) -> list[dict[str, Any]]:
    """Return stage 0's contrast: a healthy place, `unk` and `drop` averaged, minus the model's own token, at p = .3."""
    found = [study.arm_contrast(name, ("unk:0.3", "drop:0.3"), "own:0.3") for name in STAGE_0]
    tests = [float(sign_flip_p(one["by_seed"])) for one in found]
    adjusted = zip(found, tests, holm(tests), strict=True)
    return [{**one, "p_value": p, "p_holm": corrected} for one, p, corrected in adjusted]


def token_contrast(study: Study) -> Table:
    """Return the table of `contrast_of_tokens`."""
    body = [
        [title, str(one["n"]), _mean(one), _up(one, " of "), f"{one['p_value']:.3g}", f"{one['p_holm']:.3g}"]
        for title, one in zip(STAGE_0.values(), contrast_of_tokens(study), strict=True)
    ]
    return ("data", "seeds", "difference", "higher in", "p", "p, Holm"), body


def confounds(name: str, _: Study) -> Table:
    """Return the arms of a group of the study of confounds; bold if both intervals exclude 0."""
    found = read("confounds")
    rows = found["groups"][name]["arms"]
    rates = [f"{p:g}" for p in found["rates"] if p > 0 and any(f"{p:g}" in row["rates"] for row in rows)]
    head = [f"p = {p} minus p = 0" for p in rates] + [f"changed minus theirs, p = {p}" for p in rates]
    body = []
    for row in rows:
        cells = [row["lifted"], f"{row['rates']['0']['score']['mean']:.3f}"]
        for what in ("difference", "change"):
            cells += [_cell(row["rates"][p].get(what)) if p in row["rates"] else "not run" for p in rates]
        body.append(cells)
    return ("changed", "macro-F1, p = 0", *head), body


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["interval"] or (float("nan"), float("nan"))
    text = f"{found['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if found["clear"] else text


def quickstart(_: Study) -> Table:
    """Return the runs of the quickstart."""
    body = [
        [f"`{run['command']}`", f"{run['test_f1_macro']:.3f}", f"{run['baseline_f1_macro']:.3f}", str(run["steps"])]
        for run in read("quickstart")["runs"]
    ]
    return ("command", "test macro-F1", "character n-grams", "steps"), body


def mixing(_: Study) -> Table:
    """Return the scores of language identification by how mixed the posts are."""
    rows = read("lid_spaeng")["by_mixing"]
    body = [[one["cmi"], f"{one['f1_macro']:.3f}", f"{one['posts']:,}"] for one in rows]
    return ("code-mixing index", "macro-F1", "posts"), body


def gradients(_: Study) -> Table:
    """Return what masks do to gradients in the course of a training."""
    body = []
    for point in read("diagnose_trec")["points"]:
        group = point["groups"]["lora"]
        first, found = [str(point["step"]), "none of these"], group["outweighs_at"]
        if found["value"] is not None:
            low, high = ("beyond" if bound is None else f"{bound:.2f}" for bound in found["interval"])
            first[1] = f"{found['value']:.2f} [{low}, {high}]"
        for row in group["rates"]:
            values = [f"{row[key]['value']:.2f}" for key in ("ratio", "cosine", "distance")]
            body.append([first[0], f"{row['p']:g}", *values, first[1]])
            first = ["", ""]
    head = ("step", "p", "variance of masks to that of batches", "cosine", "distance")
    return (*head, "masks outweigh batches from p ="), body


def robustness(_: Study) -> Table:
    """Return scores on perturbed texts."""
    groups = read("robustness_trec")["groups"]
    body = []
    for rows in zip(*(group["rows"] for group in groups), strict=True):
        at = f"{rows[0]['at']:g}" if isinstance(rows[0]["at"], float) and rows[0]["at"] else ""
        cells = [f"{row['f1_macro']['mean']:.3f} ± {row['f1_macro']['sd']:.3f}" for row in rows]
        body.append([rows[0]["kind"], at, *cells])
    return ("test texts", "at", *(f"trained with {group['group']}" for group in groups)), body


def faithfulness(_: Study) -> Table:
    """Return how faithful the influences of words are with and without masking in training."""
    pairs = read("faithfulness_trec")["runs"]
    body = []
    for key, title in FAITHFULNESS.items():
        cells = []
        for pair in pairs:
            one, other = (pair[run]["measures"][key]["mean"] for run in ("run", "against"))
            change = pair["difference"][key]
            bounds = f"[{change['low']:+.2f}, {change['high']:+.2f}]"
            cells.append(f"{one:.2f} / {other:.2f} ({change['mean']:+.2f} {bounds})")
        body.append([title, *cells])
    return ("measure", *(f"p = {run['run']['p']:g} / p = 0 (pair {n})" for n, run in enumerate(pairs, 1))), body


DEFAULTS = {"fp32, padded, all layers": "-plain", "defaults: bf16, no padding": "", "upper half": "-top"}
GROUPED = {"random batches": "", "grouped by length": "-grouped"}
METRICS, CORPORA, GROUPS = ("f1_macro", "f1_weighted"), ("trec", "afrisenti_twi"), ("encoder", "words", "causal")
TABLES: dict[str, Callable[[Study], Table]] = {
    "results": summary,
    "trained": trained,
    **{f"scores {metric}": partial(scores, metric) for metric in METRICS},
    **{f"differences {metric}": partial(differences, metric) for metric in METRICS},
    "contrasts": contrasts,
    "chosen": chosen,
    **{f"arms {name}": partial(arms, name) for name in CORPORA},
    **{f"arms {name} differences": partial(arms_differences, name) for name in CORPORA},
    "defaults": partial(compared, columns=DEFAULTS, p=0.1),
    "grouped": partial(compared, columns=GROUPED, p=0.0),
    **{f"confounds {name}": partial(confounds, name) for name in GROUPS},
    **{name: partial(second, name) for name in (*STAGE_0, *STAGES[1], *STAGES[2])},
    **{f"stage {number}": partial(stage, number) for number in STAGES},
    "token contrast": token_contrast,
    "quickstart": quickstart,
    "mixing": mixing,
    "gradients": gradients,
    "robustness": robustness,
    "faithfulness": faithfulness,
}
"""The tables by the marks that they are written between."""
