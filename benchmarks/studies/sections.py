"""The tables of the masking study's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from figures import COSTS_OF, TITLES, Study, counted, paired, with_seeds

from tokmask_peft.study.report import Table, difference_table, interval, markdown, mean_sd, score_table, signed
from tokmask_peft.study.report import findings as report_findings

METRICS = {"f1_macro": "Macro-F1", "f1_weighted": "Weighted F1"}


def setting(study: Study) -> list[str]:
    """Say what was trained on what."""
    head = ("task", "train", "validation", "test", "labels", "steps", "best at the end", "seeds")
    body = []
    for name in study.tasks:
        found = study.sweeps[name]
        words = found["analysis"]["task"] == "token"
        sizes = [
            f"{found['texts'][split]:,}" + (f" ({found['words'][split]:,} words)" if words else "")
            for split in ("train", "validation", "test")
        ]
        seeds = str(len(found["analysis"]["seeds"]))
        ends = ", ".join(f"{share:.0%}" for share in found["best_at_end"].values())
        body.append([TITLES[name], *sizes, str(found["labels"]), str(found["steps"]), ends, seeds])
    return [
        "## What was trained",
        "MiniLM (all-MiniLM-L6-v2, 22M parameters, an English encoder) with LoRA of rank 16 on all linear layers, by "
        "the shipped recipes, except for the number of epochs and, where it says so, of training texts; the UD sweeps "
        "that are not called tuned take batches of 32 at a learning rate of 5e-4, too. Training texts that repeat, "
        "contradict each other or occur in validation or test are removed. All rates train for the same number of "
        "steps. Validation chooses the checkpoint, test is scored once.",
        markdown((head, body)),
        "*Best at the end* is the share of runs, by rate, whose last evaluation was their best on validation. The "
        "learning rate falls to 0, so a run need not have been cut short for that; but where it rises with the rate, "
        "part of what masking loses may be time.",
    ]


def scores(study: Study) -> list[str]:
    """Return the scores by masking rate, beside the n-gram floor."""
    parts = ["## Scores by masking rate", "Test scores, mean ± standard deviation over seeds."]
    for metric, title in METRICS.items():
        rates = [0.0, *study.masked_rates()]
        head = ("task", "character n-grams", *(f"p = {p:g}" for p in rates))
        body = []
        for name in study.tasks:
            floor = study.analysis(name)["baseline"]
            cells = [mean_sd(row[metric]) if (row := study.row(name, p)) else "" for p in rates]
            body.append([TITLES[name], f"{floor[metric]:.4f}" if floor else "", *cells])
        parts += [f"### {title}", markdown((head, body))]
    return parts


def differences(study: Study) -> list[str]:
    """Return the paired differences from p = 0."""
    parts = [
        "## Differences from p = 0, seed by seed",
        "For one seed all rates share the initial head, the batches and the dropout stream, and what is masked at a "
        "low rate is masked at a higher one. Mean difference with its 95% t interval, in how many seeds it is above 0, "
        "and the p-value of the exact sign-flip test over seeds after Holm's correction over the rates. With n seeds "
        "that test cannot go below 2 to the power of 1 - n before the correction, whatever the scores (.0625 with "
        "five): read the intervals. The last line averages these tasks seed by seed first, languages and parts of "
        "speech of the same sentences as one; its p-value is not corrected, and it says nothing of other tasks.",
        "![Change in macro-F1 by masking rate](results/masking/differences.svg)",
    ]
    for metric, title in METRICS.items():
        head = ("task", *(f"p = {p:g}" for p in study.masked_rates()))
        body = []
        for name in study.tasks:
            found = [study.difference(name, p, metric) for p in study.masked_rates()]
            body.append([TITLES[name], *(_difference(one) if one else "" for one in found)])
        whole = study.whole_tasks
        pooled = [study.together(p, whole, metric) for p in study.masked_rates()]
        if all(pooled):
            body.append(["mean of the tasks with all texts", *(_difference(one) for one in pooled if one)])
        parts += [f"### {title}", markdown((head, body))]
    return parts


def _difference(found: dict[str, Any]) -> str:
    up, p_value = sum(value > 0 for value in found["by_seed"]), found.get("p_holm", found["p_value"])
    return f"{signed(found['mean'])} {interval(found['interval'])}; {up}/{found['n']}; p = {p_value:.3g}"


def chosen(study: Study) -> list[str]:
    """Return what validation would have chosen."""
    head = ("task", "chosen, seed by seed", "test macro-F1", "against p = 0")
    body = []
    for name in study.tasks:
        choice = study.analysis(name)["chosen_by_validation"]
        if not choice["per_seed"]:
            continue
        picks = ", ".join(f"{one['p']:g}" for one in choice["per_seed"])
        gain = f"{signed(choice['gain']['mean'])} {interval(choice['gain']['interval'])}" if "gain" in choice else ""
        body.append([TITLES[name], picks, mean_sd(choice["f1_macro"]), gain])
    return [
        "## The p that validation chooses",
        "Choosing the best p on test would flatter masking. This is the honest number: each seed takes the rate that "
        "scored best on its validation texts.",
        markdown((head, body)),
    ]


def regularizers(study: Study) -> list[str]:
    """Compare masking with other regularizers."""
    parts: list[str] = []
    for name in study.sweeps:
        if not name.endswith("-arms"):
            continue
        analysis = study.analysis(name)
        parts += [
            f"### {TITLES.get(name.removesuffix('-arms'), name)}",
            *(f"- {line}" for line in report_findings(analysis)),
            markdown(_with_cost(study.costs_of(name), *score_table(analysis))),
            "Macro-F1, differences from no regularizer, seed by seed:",
            markdown(difference_table(analysis, "f1_macro")),
        ]
    if not parts:
        return []
    intro = (
        "Each arm switches on what it names and all others off; the dropout of the backbone's hidden layers (0.1) "
        "stays. NEFTune scales its noise by the length of a padded batch, so its arms pad the batches that the others "
        "pack. "
    )
    intro += (
        "Cost is the CPU time of an optimizer step beside that without any, measured apart in interleaved rounds "
        f"on {TITLES[COSTS_OF.removesuffix('-arms')]} (`python benchmarks/arms_cost.py`). Padding alone costs "
        f"{study.costs['none, padded']:.2f}."
        if study.costs
        else "What the arms cost has not been measured yet: the runs shared the machine."
    )
    return ["## Beside other regularizers", intro, *_with_lists(parts)]


def _with_cost(costs: dict[str, float], head: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    """Put the cost that was measured apart in place of the runs' own, which shared the machine."""
    if not costs:
        return head[:-1], [row[:-1] for row in body]
    cost = {"none": "1", **{label: f"{value:.2f}" for label, value in costs.items()}}
    return head, [[*row[:-1], cost.get(row[0], "")] for row in body]


def defaults(study: Study) -> list[str]:
    """Compare the fast defaults with fp32, padded batches."""
    head = ("task", "seeds", "fp32, padded, all layers", "defaults: bf16, no padding", "difference")
    head = (*head, "upper half", "difference")
    body, found = [], {"bf16 without padding": [], "the same, upper half of the layers": []}
    for name in study.tasks:
        rows = _same_seeds(study, [f"{name}-plain", name, f"{name}-top"], 0.1)
        if not rows:
            continue
        plain, *others = rows
        cells = [mean_sd(plain["f1_macro"])]
        for row, listed in zip(others, found.values(), strict=True):
            change = paired(row, plain)
            by_seed = ", ".join(signed(value) for value in change["by_seed"])
            cells += [mean_sd(row["f1_macro"]), f"{signed(change['mean'])} ({by_seed})"]
            listed.append(f"{TITLES[name]} {signed(change['mean'])} {interval(change['interval'])}".rstrip())
        body.append([TITLES[name], str(len(plain["seeds"])), *cells])
    if not body:
        return []
    return [
        "## What the fast defaults cost",
        "\n".join(f"- Against fp32, padded, all layers: {what}: {'; '.join(parts)}." for what, parts in found.items()),
        "Test macro-F1 at p = 0.1, mean ± standard deviation over the seeds that all columns have; differences from "
        "the first column, seed by seed, and above with their 95% t interval.",
        markdown((head, body)),
    ]


def grouped(study: Study) -> list[str]:
    """Compare batches of texts of similar length with random ones."""
    head = ("task", "seeds", "random batches", "grouped by length", "difference")
    body, found = [], []
    for name in study.tasks:
        rows = _same_seeds(study, [name, f"{name}-grouped"], 0.0)
        if not rows:
            continue
        change = paired(rows[1], rows[0])
        by_seed = ", ".join(signed(value) for value in change["by_seed"])
        cells = [*(mean_sd(row["f1_macro"]) for row in rows), f"{signed(change['mean'])} ({by_seed})"]
        body.append([TITLES[name], str(len(rows[0]["seeds"])), *cells])
        found.append(f"{TITLES[name]} {signed(change['mean'])} {interval(change['interval'])}".rstrip())
    if not body:
        return []
    return [
        "## What grouping texts by length costs",
        f"- Grouped against random batches: {'; '.join(found)}.",
        "Test macro-F1 at p = 0, mean ± standard deviation over the seeds that both have. Where the label goes with "
        "the length, grouped batches hold few labels each. The default is random batches, packed without padding.",
        markdown((head, body)),
    ]


def _same_seeds(study: Study, names: Sequence[str], p: float) -> list[dict[str, Any]]:
    """Return the rows of sweeps at a rate, over the seeds that all have; none where there are none."""
    if not all(name in study.sweeps for name in names):
        return []
    found = [next((row for row in study.analysis(name)["rows"] if row["p"] == p), None) for name in names]
    rows = [row for row in found if row]
    seeds = sorted(set.intersection(*({*row["seeds"]} for row in rows))) if len(rows) == len(found) else []
    return [with_seeds(row, seeds) for row in rows] if seeds else []


def _with_lists(parts: list[str]) -> list[str]:
    """Join the lines of lists, which the page would put apart."""
    joined: list[str] = []
    for part in parts:
        if part.startswith("- ") and joined and joined[-1].startswith("- "):
            joined[-1] += f"\n{part}"
        else:
            joined.append(part)
    return joined


def how(study: Study, planned: Sequence[str]) -> list[str]:
    """Say how it was made: commands, versions, machine."""
    machines: dict[tuple[str, str], list[str]] = {}
    for name, one in study.sweeps.items():
        for found in one["environments"]:
            versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
            about = f"{found['platform']}, {found['cpu_cores']} CPU cores, {counted(found['threads'], 'thread')} a run"
            machines.setdefault((versions, f"{found['device']}; {about}"), []).append(name)
    missing = [name for name in planned if name not in study.sweeps]
    gaps = [
        f"{name}: {len(one['analysis']['missing'])}" for name, one in study.sweeps.items() if one["analysis"]["missing"]
    ]
    commands = "\n".join(found["command"] for found in study.sweeps.values())
    return [
        "## How it was made",
        "`python benchmarks/studies/masking.py NAME …` trains sweeps again, `python benchmarks/studies/page.py` writes "
        "this page from the JSON in `benchmarks/results`, where the scores of every seed are. Single commands, with "
        "`TOKMASK_DATA` as the folder of the corpora:",
        f"```\n{commands}\n```",
        *([f"Planned and not run yet: {', '.join(missing)}."] if missing else []),
        *([f"Runs without a result, left out: {', '.join(gaps)}."] if gaps else []),
        *(
            f"Versions: {versions}. Machine: {machine}."
            + (f" Sweeps: {', '.join(names)}." if len(machines) > 1 else "")
            for (versions, machine), names in machines.items()
        ),
        "Tests and intervals as `tokmask report` makes them: "
        + "; ".join(f"{name}: {text}" for name, text in study.analysis(study.tasks[0])["methods"].items())
        + ".",
    ]
