"""The report of a sweep: Markdown, LaTeX, a plot and the figures behind them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokmask_peft.errors import SweepError
from tokmask_peft.study.analysis import analyse
from tokmask_peft.study.plot import plot_f1
from tokmask_peft.study.results import read_sweep
from tokmask_peft.study.statistics import seeds_to_reach, smallest_p
from tokmask_peft.study.tables import (
    difference_table,
    interval,
    latex,
    markdown,
    mean_sd,
    needed_table,
    plain,
    score_table,
    signed,
)
from tokmask_peft.training.run_folder import write_json


@dataclass(frozen=True, slots=True)
class SweepReport:
    """Where a report lies, and what it says in short."""

    markdown: Path
    latex: Path
    plots: tuple[Path, ...]
    statistics: Path
    summary: str


def sweep_report(sweep: str | Path) -> SweepReport:
    """Compare the arms of a sweep and write `SWEEP/report`.

    Raises:
        SweepError: the folder is no sweep of a grid, has no finished run, or cannot be written.
    """
    results = read_sweep(Path(sweep))
    analysis = analyse(results)
    folder = Path(sweep) / "report"
    try:
        folder.mkdir(exist_ok=True)
        plots = plot_f1(analysis, folder)
        write_json(folder / "statistics.json", analysis)
        (folder / "report.md").write_text(_markdown(analysis), encoding="utf-8")
        (folder / "table.tex").write_text(_latex(analysis), encoding="utf-8")
    except OSError as error:
        raise SweepError(f"the report cannot be written to {folder}: {error.strerror}") from error
    return SweepReport(
        folder / "report.md", folder / "table.tex", tuple(plots), folder / "statistics.json", _summary(analysis)
    )


def findings(analysis: dict[str, Any]) -> list[str]:
    """Say in sentences what was found, the unfavourable too."""
    lines = []
    compared = [row for row in analysis["rows"] if "f1_macro" in row.get("difference", {})]
    for row in compared:
        found = row["difference"]["f1_macro"]
        up = sum(value > 0 for value in found["by_seed"])
        verdict = "higher" if found["mean"] > 0 else "lower" if found["mean"] < 0 else "the same"
        clear = found["p_holm"] <= 0.05
        lines.append(
            f"{row['label']}: macro-F1 {verdict} on average ({signed(found['mean'])}; higher in {up} of {found['n']} "
            f"seeds), {'a difference' if clear else 'not a difference'} that the seeds establish "
            f"(p = {found['p_value']:.3g}, after Holm {found['p_holm']:.3g})."
        )
    lines.extend(_chosen(analysis["chosen_by_validation"], analysis["scored_on"], _reference(analysis)))
    return lines


def cautions(analysis: dict[str, Any]) -> list[str]:
    """Say what limits the report."""
    lines = []
    compared = [row["difference"] for row in analysis["rows"] if "f1_macro" in row.get("difference", {})]
    if compared:
        lines.extend(_few_seeds(analysis["rows"]))
        if min(len(one["seeds"]) for one in compared) < 10:
            lines.append("The bootstrap draws among the seeds that there are: with so few its intervals are too short.")
        problems = {one["bootstrap_problem"] for one in compared if one["bootstrap_problem"]}
        lines.extend(f"No bootstrap: {problem}." for problem in sorted(problems))
    else:
        of_arms = any(row["regularizers"] != "recipe" for row in analysis["rows"])
        what, remedy = ("without a regularizer", "none to --arms") if of_arms else ("with p = 0", "0 to --p")
        if all(row["is_reference"] for row in analysis["rows"]):
            others = "arms to --arms" if of_arms else "rates to --p"
            lines.append(f"There is nothing to compare with {_reference(analysis)}; add {others}.")
        else:
            lines.append(f"There is no arm {what} beside others, so nothing is compared; add {remedy}.")
    if analysis["scored_on"] != "test":
        lines.append("The runs have no test texts: these are validation scores, which also chose the checkpoints.")
    if analysis["missing"]:
        names = ", ".join(analysis["missing"][:5]) + (", …" if len(analysis["missing"]) > 5 else "")
        lines.append(
            f"{len(analysis['missing'])} runs have no result and are left out: {names}. Where --prune stopped them, "
            "they are the worse ones, and every comparison is biased."
        )
    mixed = {name: found for name, found in analysis["versions"].items() if len(found) > 1}
    lines.extend(f"The runs were made with several versions of {name}: {', '.join(v)}." for name, v in mixed.items())
    return lines


def _few_seeds(rows: list[dict[str, Any]]) -> list[str]:
    """Say which differences the sign-flip test cannot establish for want of seeds; Holm's correction is per setting."""
    settings: dict[str, list[tuple[str, int]]] = {}
    for row in rows:
        if found := row.get("difference", {}).get("f1_macro"):
            settings.setdefault(str(row["setting"]), []).append((row["label"], found["n"]))
    arms = [arm for listed in settings.values() for arm in listed]
    lines = []
    for seeds in sorted({seeds for _, seeds in arms if smallest_p(seeds) > 0.05}):
        weak = list(dict.fromkeys(label for label, count in arms if count == seeds))
        names = "" if len(weak) == len({label for label, _ in arms}) else f" for {', '.join(weak)}"
        lines.append(
            f"With {seeds} seed{'s' if seeds > 1 else ''} the sign-flip test cannot give a p-value below "
            f"{smallest_p(seeds):.3g}, whatever the scores are: no difference can be established{names}. "
            f"{seeds_to_reach(0.05)} seeds are the least for .05, and more where Holm's correction is over several "
            "arms."
        )
    for listed in settings.values():
        smallest, count = max(smallest_p(seeds) for _, seeds in listed), len(listed)
        if smallest <= 0.05 < smallest * count:
            lines.append(
                f"With {min(seeds for _, seeds in listed)} seeds the smallest p-value is {smallest:.3g}, and Holm's "
                f"correction multiplies the smallest of {count} by {count}: a single arm cannot reach .05 after it."
            )
    return list(dict.fromkeys(lines))


def _chosen(choice: dict[str, Any], split: str, reference: str) -> list[str]:
    if not choice["per_seed"]:
        return ["No seed has all arms yet, so validation chooses nothing."]
    picks: dict[str, int] = {}
    for one in choice["per_seed"]:
        picks[one["label"]] = picks.get(one["label"], 0) + 1
    listed = ", ".join(f"{label} ({count})" for label, count in picks.items())
    lines = [
        f"Chosen by validation seed by seed: {listed}; {split} macro-F1 {mean_sd(choice['f1_macro'])}"
        + (f", {signed(choice['gain']['mean'])} against {reference}." if "gain" in choice else ".")
    ]
    overall = choice["overall"]
    lines.append(
        f"Chosen by mean validation macro-F1: {overall['label']}; {split} macro-F1 {mean_sd(overall['f1_macro'])}, "
        f"weighted F1 {mean_sd(overall['f1_weighted'])}."
    )
    return lines


def _markdown(analysis: dict[str, Any]) -> str:
    choice, paper = analysis["chosen_by_validation"], analysis["paper"]
    parts = [f"# {analysis['sweep']}", "", *(f"- {line}" for line in findings(analysis)), ""]
    parts += ["![F1 against p](f1_against_p.png)", "", f"## Scores on {analysis['scored_on']}", ""]
    parts += [
        "Mean ± standard deviation over seeds; intervals by Student's t. Cost is the median time of an optimizer step, "
        "p = 0 alone being 1; what else the machine did at the time is in it.",
        "",
        markdown(score_table(analysis)),
        "",
    ]
    if analysis["baseline"]:
        floor = analysis["baseline"]
        parts += [f"Character n-grams: macro-F1 {floor['f1_macro']:.4f}, weighted {floor['f1_weighted']:.4f}.", ""]
    for metric, name in (("f1_macro", "Macro-F1"), ("f1_weighted", "Weighted F1")):
        table = difference_table(analysis, metric)
        if table[1]:
            parts += [f"## {name}: differences from {_reference(analysis)}, seed by seed", "", markdown(table), ""]
    if choice["per_seed"]:
        parts += ["## What validation would have chosen", "", markdown(_choice_table(choice, _reference(analysis))), ""]
        if "gain" in choice:
            within = interval(choice["gain"]["interval"])
            parts += [
                f"Gain over {_reference(analysis)}: {signed(choice['gain']['mean'])}"
                + (f" {within} (t)." if within else "."),
                "",
            ]
    if paper["rows"]:
        parts += [
            "## How many seeds would show the paper's gain?",
            "",
            f"The paper (arXiv:2505.11746) reports, on {paper['task']}, dev set, one run each, these gains in macro-F1 "
            "at p = 0.1. With differences that vary from seed to seed as they do here, a paired t-test sees a gain of "
            "that size with 80% power from so many seeds on (in brackets: for the ends of the 95% interval of the "
            "standard deviation).",
            "",
            markdown(needed_table(analysis)),
            "",
        ]
    parts += ["## Cautions", "", *(f"- {line}" for line in cautions(analysis)), ""]
    parts += ["## Methods", "", *(f"- {name}: {text}" for name, text in analysis["methods"].items()), ""]
    if any(row["regularizers"] != "recipe" for row in analysis["rows"]):
        parts += [
            "In a sweep over arms all regularizers named here are off but those of the arm; the dropout of the "
            "backbone's hidden layers stays as the backbone has it. NEFTune scales its noise by the length of a padded "
            "batch: where the recipe is padding-free, its arms pad the same batches, which is part of their cost.",
            "",
        ]
    versions = ", ".join(f"{name} {' and '.join(found)}" for name, found in analysis["versions"].items())
    return "\n".join([*parts, f"Versions: {versions}." if versions else "", ""])


def _reference(analysis: dict[str, Any]) -> str:
    as_recipe = any(row["is_reference"] and row["regularizers"] == "recipe" for row in analysis["rows"])
    return "p = 0" if as_recipe else "no regularizer"


def _choice_table(choice: dict[str, Any], reference: str) -> tuple[list[str], list[list[str]]]:
    body = []
    for one in choice["per_seed"]:
        gain = signed(one["gain"]) if "gain" in one else ""
        body.append([str(one["seed"]), one["label"], f"{one['f1_macro']:.4f}", f"{one['f1_weighted']:.4f}", gain])
    gain = signed(choice["gain"]["mean"]) if "gain" in choice else ""
    body.append(["mean", "", mean_sd(choice["f1_macro"]), mean_sd(choice["f1_weighted"]), gain])
    return ["seed", "chosen", "macro-F1", "weighted F1", f"macro-F1 against {reference}"], body


def _latex(analysis: dict[str, Any]) -> str:
    about = f"{analysis['sweep']}: {analysis['scored_on']} scores over {len(analysis['seeds'])} seeds"
    scores = latex(score_table(analysis), f"{about}, mean ± standard deviation, with 95% t intervals of the mean.")
    differences = difference_table(analysis, "f1_macro")
    if not differences[1]:
        return scores + "\n"
    caption = (
        f"{analysis['sweep']}: paired differences in macro-F1 from {_reference(analysis)}; sign-flip permutation test "
        "over seeds, Holm-corrected; g_z is Hedges' correction of Cohen's d_z."
    )
    return f"{scores}\n\n{latex(differences, caption)}\n"


def _summary(analysis: dict[str, Any]) -> str:
    head, body = score_table(analysis)
    kept = [0, 1, 2, 3, 4, 6]
    scores = ([head[i] for i in kept], [[row[i] for i in kept] for row in body])
    parts = [f"Scores on {analysis['scored_on']}", plain(scores), ""]
    differences = difference_table(analysis, "f1_macro")
    if differences[1]:
        parts += [f"Macro-F1, differences from {_reference(analysis)}, seed by seed", plain(differences), ""]
    parts += [*findings(analysis), "", *(f"Caution: {line}" for line in cautions(analysis)), ""]
    return "\n".join(parts)
