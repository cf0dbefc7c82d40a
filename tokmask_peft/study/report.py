"""The report of a sweep: Markdown, LaTeX, a plot and the figures behind them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokmask_peft.artifacts import write_json
from tokmask_peft.errors import SweepError
from tokmask_peft.study.results import analyse, read_sweep
from tokmask_peft.study.statistics import seeds_to_reach, smallest_p

LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
}

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def signed(value: float) -> str:
    """Write a difference with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def interval(bounds: Sequence[float] | None) -> str:
    """Write an interval of differences."""
    return "" if bounds is None else f"[{signed(bounds[0])}, {signed(bounds[1])}]"


def mean_sd(found: dict[str, Any]) -> str:
    """Write mean ± standard deviation."""
    return f"{found['mean']:.4f}" + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")


def level(found: dict[str, Any]) -> str:
    """Write the 95% interval of a mean."""
    return "" if found["interval"] is None else f"[{found['interval'][0]:.4f}, {found['interval'][1]:.4f}]"


def score_table(analysis: dict[str, Any]) -> Table:
    """Return mean, deviation and interval of each arm."""
    head = ("arm", "seeds", "macro-F1", "95% interval", "weighted F1", "95% interval", "validation macro-F1", "cost")
    body = []
    for row in analysis["rows"]:
        cost = "1" if row["is_reference"] else ("" if row.get("cost") is None else f"{row['cost']:.2f}")
        macro, weighted = row["f1_macro"], row["f1_weighted"]
        cells = [row["label"], str(len(row["seeds"])), mean_sd(macro), level(macro), mean_sd(weighted), level(weighted)]
        body.append([*cells, mean_sd(row["validation_f1_macro"]), cost])
    return head, body


def difference_table(analysis: dict[str, Any], metric: str) -> Table:
    """Return the paired differences from the arm without masking."""
    head = ("arm", "seeds", "difference", "95% t", "95% bootstrap", "p", "p (Holm)", "g_z")
    body = []
    for row in analysis["rows"]:
        found = row.get("difference", {}).get(metric)
        if not found:
            continue
        effect = found["effect_size"]
        body.append(
            [
                row["label"],
                str(found["n"]),
                signed(found["mean"]) + ("" if found["sd"] is None else f" ± {found['sd']:.4f}"),
                interval(found["interval"]),
                interval(found["bootstrap"]),
                f"{found['p_value']:.3g}",
                f"{found['p_holm']:.3g}",
                "" if effect is None else f"{effect:+.2f}".replace("-", "−"),
            ]
        )
    return head, body


def needed_table(analysis: dict[str, Any]) -> Table:
    """Return how many seeds would show each of the paper's gains."""
    gains = analysis["paper"]["gains"]
    head = ("arm", "sd of the differences", *(f"{name} ({signed(gain)})" for name, gain in gains.items()))
    body = []
    for row in analysis["paper"]["rows"]:
        counts = [_count(row["needed"][name]) for name in gains]
        body.append([row["label"], f"{row['sd']:.4f}", *counts])
    return head, body


def _count(found: dict[str, Any]) -> str:
    low, high = ("over a million" if bound is None else f"{bound:,}" for bound in found["interval"])
    middle = "over a million" if found["seeds"] is None else f"{found['seeds']:,}"
    return f"{middle} ({low} to {high})"


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    head, body = table
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def plain(table: Table) -> str:
    """Write a table for a terminal."""
    head, body = table
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *body)]
    return "\n".join(line.rstrip() for line in lines)


def latex(table: Table, caption: str) -> str:
    """Write a table in LaTeX, for the package booktabs."""
    head, body = table
    columns = "l" + "r" * (len(head) - 1)
    rows = [" & ".join(_tex(cell) for cell in row) + r" \\" for row in body]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(_tex(cell) for cell in head) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_tex(caption)}}}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _tex(text: str) -> str:
    return re.sub("[" + re.escape("".join(LATEX)) + "]", lambda found: LATEX[found[0]], text)


NAMES = {"f1_macro": "macro-F1", "f1_weighted": "weighted F1"}
_ROOM = 0.35  # of the range of the scores, above and below


def plot_f1(analysis: dict[str, Any], folder: Path) -> list[Path]:
    """Draw F1 against p, a line per setting and set of regularizers; return the PNG and the SVG.

    Points are seeds, the line goes through their means, bars are 95% intervals of the mean (Student's t). With few
    seeds these can reach far beyond the seeds: the axis follows the seeds, and an arrow marks a bar that is cut.

    Raises:
        SweepError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SweepError("the plot needs matplotlib: pip install 'tokmask-peft[sweep]'") from error
    lines = _lines(analysis)
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    colours = mpl.color_sequences["tab10"]
    for axes, metric in zip(figure.subplots(1, 2), NAMES, strict=True):
        values = [score for row in analysis["rows"] for score in row[metric]["by_seed"]]
        floor = (analysis["baseline"] or {}).get(metric)
        shown = values if floor is None else [*values, floor]
        room = max(_ROOM * (max(values) - min(values)), 0.002)
        bottom, top = min(shown) - room, min(max(shown) + room, 1.0)
        rates = sorted({row["p"] for row in analysis["rows"]})
        step = min((b - a for a, b in itertools.pairwise(rates)), default=0.1)
        for number, (name, rows) in enumerate(lines.items()):
            colour = colours[number % len(colours)]
            shift = (number - (len(lines) - 1) / 2) * min(0.12, 0.5 / len(lines)) * step
            x = [row["p"] + shift for row in rows]
            axes.plot(x, [row[metric]["mean"] for row in rows], "o-", color=colour, markersize=5, label=name)
            for place, row in zip(x, rows, strict=True):
                scores = row[metric]["by_seed"]
                axes.plot([place] * len(scores), scores, "_", color=colour, alpha=0.55, markersize=9)
                if row[metric]["interval"] is None:
                    continue
                low, high = row[metric]["interval"]
                axes.plot([place, place], [max(low, bottom), min(high, top)], color=colour, linewidth=1.3, alpha=0.9)
                for bound, edge, marker in ((low, bottom, "v"), (high, top, "^")):
                    if (bound < edge) if marker == "v" else (bound > edge):
                        axes.plot([place], [edge], marker, color=colour, markersize=5, clip_on=False)
        if floor is not None:
            axes.axhline(floor, color="0.4", linestyle="--", linewidth=1, label="character n-grams")
        axes.set_ylim(bottom, top)
        axes.set_xticks(rates)
        axes.set_xlabel("masking rate p")
        axes.set_ylabel(f"{analysis['scored_on']} {NAMES[metric]}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    seeds = len(analysis["seeds"])
    figure.suptitle(f"{analysis['sweep']}: mean and 95% interval over {seeds} seed{'s' if seeds > 1 else ''}")
    paths = [folder / "f1_against_p.png", folder / "f1_against_p.svg"]
    with mpl.rc_context({"svg.hashsalt": "tokmask"}):  # the same figures make the same file
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _lines(analysis: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Group the rows into lines over p."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in analysis["rows"]:
        parts = [row["regularizers"]] if row["regularizers"] not in ("recipe", "none") else ["masking alone"]
        parts += [f"{key.rpartition('.')[2]} = {value}" for key, value in row["setting"].items()]
        lines.setdefault("; ".join(parts), []).append(row)
    return {name: sorted(rows, key=lambda row: row["p"]) for name, rows in lines.items()}


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
