"""The tables of the masking study and of the single measurements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from figures import TITLES, Study, paired, read

from tokmask_peft.study.report import Table, difference_table, interval, mean_sd, score_table, signed

CONTRASTS = (
    ("ud_tur_deu_pos", "ud_tur_deu_lid"),
    ("trec-500", "trec"),
    ("afrisenti_twi-500", "afrisenti_twi"),
    ("trec-500-long", "trec-500"),
    ("ud_tur_deu_lid-tuned", "ud_tur_deu_lid"),
    ("ud_tur_deu_pos-tuned", "ud_tur_deu_pos"),
)
"""Sweeps whose differences from p = 0 are compared with each other."""


def trained(study: Study) -> Table:
    """Return what was trained on what."""
    body = []
    for name in study.tasks:
        found = study.sweeps[name]
        words = found["analysis"]["task"] == "token"
        sizes = [
            f"{found['texts'][split]:,}" + (f" ({found['words'][split]:,} words)" if words else "")
            for split in ("train", "validation", "test")
        ]
        ends = ", ".join(f"{share:.0%}" for share in found["best_at_end"].values())
        seeds = len(found["analysis"]["seeds"])
        body.append([TITLES[name], *sizes, str(found["labels"]), str(found["steps"]), ends, str(seeds)])
    return ("task", "train", "validation", "test", "labels", "steps", "best at the end", "seeds"), body


def scores(study: Study, metric: str) -> Table:
    """Return the scores by masking rate, after those of character n-grams."""
    rates, body = [0.0, *study.masked_rates()], []
    for name in study.tasks:
        floor = study.analysis(name)["baseline"]
        cells = [mean_sd(row[metric]) if (row := study.row(name, p)) else "" for p in rates]
        body.append([TITLES[name], f"{floor[metric]:.4f}" if floor else "", *cells])
    return ("task", "character n-grams", *(f"p = {p:g}" for p in rates)), body


def differences(study: Study, metric: str) -> Table:
    """Return the paired differences from p = 0, and last their mean over the tasks with all texts."""
    rates = study.masked_rates()
    body = [[TITLES[name], *(_difference(study.difference(name, p, metric)) for p in rates)] for name in study.tasks]
    pooled = [study.together(p, study.whole_tasks, metric) for p in rates]
    if all(pooled):
        body.append(["mean of the tasks with all texts", *map(_difference, pooled)])
    return ("task", *(f"p = {p:g}" for p in rates)), body


def _difference(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    up, p_value = sum(value > 0 for value in found["by_seed"]), found.get("p_holm", found["p_value"])
    return f"{_mean(found)}; {up}/{found['n']}; p = {p_value:.3g}"


def _mean(found: dict[str, Any]) -> str:
    return f"{signed(found['mean'])} {interval(found['interval'])}".rstrip()


def contrasts(study: Study) -> Table:
    """Return how far the effect of masking differs between two sweeps, over the seeds of both."""
    rates, body = study.masked_rates(), []
    for one, other in CONTRASTS:
        found = [study.contrast(one, other, p) for p in rates]
        if any(found):
            cells = [f"{signed(f['one'])} and {signed(f['other'])}: {_mean(f)}" if f else "" for f in found]
            body.append([f"{TITLES[one]} − {TITLES[other]}", *cells])
    return ("sweeps", *(f"p = {p:g}" for p in rates)), body


def chosen(study: Study) -> Table:
    """Return which rates validation would have chosen, and what they score on test."""
    body = []
    for name in study.tasks:
        choice = study.analysis(name)["chosen_by_validation"]
        if choice["per_seed"]:
            picks = ", ".join(f"{one['p']:g}" for one in choice["per_seed"])
            body.append(
                [TITLES[name], picks, mean_sd(choice["f1_macro"]), _mean(choice["gain"]) if "gain" in choice else ""]
            )
    return ("task", "chosen, seed by seed", "test macro-F1", "against p = 0"), body


def arms(study: Study, name: str) -> Table:
    """Return the scores of regularizers; the cost of a step is the one that `arms_cost.py` measured on TREC."""
    head, body = score_table(study.analysis(name))
    if not (name.startswith("trec") and (cost := read("arms_cost"))):
        return head[:-1], [row[:-1] for row in body]
    costs = {"none": "1", **{row["what"]: f"{row['median']:.2f}" for row in cost["table"]}}
    return head, [[*row[:-1], costs.get(row[0], "")] for row in body]


def defaults(study: Study) -> Table:
    """Compare the fast defaults, and half an adapter, with fp32 and padded batches."""
    head = ("task", "seeds", "fp32, padded, all layers", "defaults: bf16, no padding", "difference")
    return (*head, "upper half", "difference"), _compared(study, ("-plain", "", "-top"), 0.1)


def grouped(study: Study) -> Table:
    """Compare batches of texts of similar length with random ones."""
    head = ("task", "seeds", "random batches", "grouped by length", "difference")
    return head, _compared(study, ("", "-grouped"), 0.0)


def _compared(study: Study, endings: tuple[str, ...], p: float) -> list[list[str]]:
    body = []
    for name in study.tasks:
        rows = study.same_seeds([f"{name}{ending}" for ending in endings], p)
        if rows:
            cells = [mean_sd(rows[0])]
            for row in rows[1:]:
                cells += [mean_sd(row), _mean(paired(row, rows[0]))]
            body.append([TITLES[name], str(len(rows[0]["seeds"])), *cells])
    return body


def readme(study: Study) -> Table:
    """Return the table of the README."""
    body = []
    for name in study.tasks:
        rows, found = [study.row(name, p) for p in (0.0, 0.1)], study.difference(name, 0.1)
        if found is None or None in rows:
            continue
        floor, up = study.analysis(name)["baseline"], sum(value > 0 for value in found["by_seed"])
        cells = [mean_sd(row["f1_macro"]) for row in rows if row]
        floor_cell = f"{floor['f1_macro']:.4f}" if floor else ""
        body.append([TITLES[name], floor_cell, *cells, _mean(found), f"{up} of {found['n']}"])
    return ("task", "character n-grams", "p = 0", "p = 0.1", "difference", "higher in"), body


def confounds(name: str) -> Table:
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


def quickstart() -> Table:
    """Return the runs of the quickstart."""
    body = [
        [f"`{run['command']}`", f"{run['test_f1_macro']:.3f}", f"{run['baseline_f1_macro']:.3f}", str(run["steps"])]
        for run in read("quickstart")["runs"]
    ]
    return ("command", "test macro-F1", "character n-grams", "steps"), body


def mixing() -> Table:
    """Return the scores of language identification by how mixed the posts are."""
    rows = read("lid_spaeng")["by_mixing"]
    return ("code-mixing index", "macro-F1", "posts"), [
        [one["cmi"], f"{one['f1_macro']:.3f}", f"{one['posts']:,}"] for one in rows
    ]


def gradients() -> Table:
    """Return what masks do to gradients in the course of a training."""
    body = []
    for point in read("diagnose_trec")["points"]:
        group = point["groups"]["lora"]
        first = [str(point["step"]), _outweighs(group["outweighs_at"])]
        for row in group["rates"]:
            values = [f"{row[key]['value']:.2f}" for key in ("ratio", "cosine", "distance")]
            body.append([first[0], f"{row['p']:g}", *values, first[1]])
            first = ["", ""]
    head = ("step", "p", "variance of masks to that of batches", "cosine", "distance")
    return (*head, "masks outweigh batches from p ="), body


def _outweighs(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "none of these"
    low, high = ("beyond" if bound is None else f"{bound:.2f}" for bound in found["interval"])
    return f"{found['value']:.2f} [{low}, {high}]"


def robustness() -> Table:
    """Return scores on perturbed texts."""
    groups = read("robustness_trec")["groups"]
    body = []
    for number, row in enumerate(groups[0]["rows"]):
        found = [group["rows"][number]["f1_macro"] for group in groups]
        at = f"{row['at']:g}" if isinstance(row["at"], float) and row["at"] else ""
        body.append([row["kind"], at, *(f"{one['mean']:.3f} ± {one['sd']:.3f}" for one in found)])
    return ("test texts", "at", *(f"trained with {group['group']}" for group in groups)), body


def faithfulness() -> Table:
    """Return how faithful the influences of words are with and without masking in training."""
    measures = {
        "least_minus_most": "area, least minus most influential first",
        "random_minus_most": "area, random minus most influential first",
        "relative": "relative area",
        "random_fall": "mean fall of the probability under random masks",
    }
    pairs = read("faithfulness_trec")["runs"]
    body = []
    for key, title in measures.items():
        cells = []
        for pair in pairs:
            one, other = (pair[run]["measures"][key]["mean"] for run in ("run", "against"))
            change = pair["difference"][key]
            bounds = f"[{change['low']:+.2f}, {change['high']:+.2f}]"
            cells.append(f"{one:.2f} / {other:.2f} ({change['mean']:+.2f} {bounds})")
        body.append([title, *cells])
    return ("measure", *(f"p = {run['run']['p']:g} / p = 0 (pair {n})" for n, run in enumerate(pairs, 1))), body


METRICS = ("f1_macro", "f1_weighted")
STUDY: dict[str, Callable[[Study], Table]] = {
    "results": readme,
    "trained": trained,
    **{f"scores {metric}": lambda study, metric=metric: scores(study, metric) for metric in METRICS},
    **{f"differences {metric}": lambda study, metric=metric: differences(study, metric) for metric in METRICS},
    "contrasts": contrasts,
    "chosen": chosen,
    **{f"arms {name}": lambda study, name=name: arms(study, f"{name}-500-arms") for name in ("trec", "afrisenti_twi")},
    **{
        f"arms {name} differences": lambda study, name=name: difference_table(
            study.analysis(f"{name}-500-arms"), "f1_macro"
        )
        for name in ("trec", "afrisenti_twi")
    },
    "defaults": defaults,
    "grouped": grouped,
}
SINGLE: dict[str, Callable[[], Table]] = {
    **{f"confounds {name}": lambda name=name: confounds(name) for name in ("encoder", "words", "causal")},
    "quickstart": quickstart,
    "mixing": mixing,
    "gradients": gradients,
    "robustness": robustness,
    "faithfulness": faithfulness,
}
"""The tables by the marks that they are written between."""
