"""The report of a sweep (Markdown, LaTeX, a plot and their figures), and the tables and plots of all reports."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokmask_peft.artifacts import write_json
from tokmask_peft.errors import ExtraError, SweepError
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
NAMES = {"f1_macro": "macro-F1", "f1_weighted": "weighted F1"}

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Head and rows."""


@dataclass(frozen=True, slots=True)
class Report:
    """The files of a report, and its text for a terminal."""

    markdown: Path
    statistics: Path
    plots: tuple[Path, ...]
    summary: str
    latex: Path | None = None


def signed(value: float) -> str:
    """Write a difference with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def interval(bounds: Sequence[float] | None) -> str:
    """Write an interval of differences."""
    return "" if bounds is None else f"[{signed(bounds[0])}, {signed(bounds[1])}]"


def mean_sd(found: Mapping[str, Any]) -> str:
    """Write mean ± standard deviation."""
    return f"{found['mean']:.4f}" + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")


def level(found: Mapping[str, Any]) -> str:
    """Write the 95% interval of a mean."""
    return "" if found["interval"] is None else f"[{found['interval'][0]:.4f}, {found['interval'][1]:.4f}]"


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    head, body = table
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def plain(table: Table, columns: Sequence[int] | None = None) -> str:
    """Write a table, or some of its columns, for a terminal."""
    rows = [[row[i] for i in columns] if columns else row for row in (table[0], *table[1])]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def latex(table: Table, caption: str) -> str:
    """Write a table in LaTeX, for the package booktabs."""

    def escaped(text: str) -> str:
        return re.sub("[" + re.escape("".join(LATEX)) + "]", lambda found: LATEX[found[0]], text)

    head, *rows = (" & ".join(map(escaped, row)) + r" \\" for row in (table[0], *table[1]))
    body = "\n".join(rows)
    return rf"""\begin{{table}}
\centering
\begin{{tabular}}{{l{"r" * (len(table[0]) - 1)}}}
\toprule
{head}
\midrule
{body}
\bottomrule
\end{{tabular}}
\caption{{{escaped(caption)}}}
\end{{table}}"""


def matplotlib() -> Any:
    """Return matplotlib.

    Raises:
        ExtraError: it is not installed.
    """
    try:
        import matplotlib as mpl
        import matplotlib.figure
    except ImportError as error:
        raise ExtraError("the plot needs matplotlib: pip install 'tokmask-peft[sweep]'", extra="sweep") from error
    return mpl


def finish(axes: Any) -> None:
    """Take away what a panel does not need, and draw the grid of its scale."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def save(mpl: Any, figure: Any, folder: Path, name: str) -> tuple[Path, Path]:
    """Write a figure as PNG and SVG; the same figures make the same files."""
    paths = folder / f"{name}.png", folder / f"{name}.svg"
    with mpl.rc_context({"svg.hashsalt": "tokmask"}):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


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
    """Return the paired differences from the reference arm."""
    head = ("arm", "seeds", "difference", "95% t", "95% bootstrap", "p", "p (Holm)", "g_z")
    body = []
    for row, found in _compared(analysis, metric):
        effect = found["effect_size"]
        difference = signed(found["mean"]) + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")
        cells = [row["label"], str(found["n"]), difference, interval(found["interval"]), interval(found["bootstrap"])]
        size = "" if effect is None else f"{effect:+.2f}".replace("-", "−")
        body.append([*cells, f"{found['p_value']:.3g}", f"{found['p_holm']:.3g}", size])
    return head, body


def _compared(analysis: dict[str, Any], metric: str = "f1_macro") -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the rows that are compared with a reference, and their differences."""
    return [(row, found) for row in analysis["rows"] if (found := row.get("difference", {}).get(metric))]


def needed_table(analysis: dict[str, Any]) -> Table:
    """Return how many seeds would show each of the paper's gains."""
    gains = analysis["paper"]["gains"]

    def count(seeds: int | None) -> str:
        return "over a million" if seeds is None else f"{seeds:,}"

    body = []
    for row in analysis["paper"]["rows"]:
        needed = [row["needed"][name] for name in gains]
        counts = [f"{count(one['seeds'])} ({' to '.join(map(count, one['interval']))})" for one in needed]
        body.append([row["label"], f"{row['sd']:.4f}", *counts])
    return ("arm", "sd of the differences", *(f"{name} ({signed(gain)})" for name, gain in gains.items())), body


def _choice_table(analysis: dict[str, Any]) -> Table:
    choice = analysis["chosen_by_validation"]
    body = []
    for one in choice["per_seed"]:
        gain = signed(one["gain"]) if "gain" in one else ""
        body.append([str(one["seed"]), one["label"], f"{one['f1_macro']:.4f}", f"{one['f1_weighted']:.4f}", gain])
    gain = signed(choice["gain"]["mean"]) if "gain" in choice else ""
    body.append(["mean", "", mean_sd(choice["f1_macro"]), mean_sd(choice["f1_weighted"]), gain])
    return ["seed", "chosen", "macro-F1", "weighted F1", f"macro-F1 against {_reference(analysis)}"], body


def plot_f1(analysis: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Draw F1 against p, a line per setting and set of regularizers; return the PNG and the SVG.

    Points are seeds, the line goes through their means, bars are 95% intervals of the mean (Student's t). With few
    seeds these can reach far beyond the seeds: the axis follows the seeds, and an arrow marks a bar that is cut.

    Raises:
        ExtraError: matplotlib is not installed.
    """
    mpl = matplotlib()
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(analysis["rows"], key=lambda row: row["p"]):
        parts = [row["regularizers"] if row["regularizers"] not in ("recipe", "none") else "masking alone"]
        parts += [f"{key.rpartition('.')[2]} = {value}" for key, value in row["setting"].items()]
        lines.setdefault("; ".join(parts), []).append(row)
    rates = sorted({row["p"] for row in analysis["rows"]})
    step = min((b - a for a, b in itertools.pairwise(rates)), default=0.1) * min(0.12, 0.5 / len(lines))
    figure = mpl.figure.Figure(figsize=(9.5, 4.2), layout="constrained")
    colours = mpl.color_sequences["tab10"]
    for axes, metric in zip(figure.subplots(1, 2), NAMES, strict=True):
        values = [score for row in analysis["rows"] for score in row[metric]["by_seed"]]
        floor = (analysis["baseline"] or {}).get(metric)
        margin = max(0.35 * (max(values) - min(values)), 0.002)
        reached = values if floor is None else [*values, floor]
        bottom, top = min(reached) - margin, min(max(reached) + margin, 1.0)
        for number, (name, rows) in enumerate(lines.items()):
            colour = colours[number % len(colours)]
            x = [row["p"] + (number - (len(lines) - 1) / 2) * step for row in rows]
            axes.plot(x, [row[metric]["mean"] for row in rows], "o-", color=colour, markersize=5, label=name)
            for place, row in zip(x, rows, strict=True):
                scores = row[metric]["by_seed"]
                axes.plot([place] * len(scores), scores, "_", color=colour, alpha=0.55, markersize=9)
                if row[metric]["interval"] is None:
                    continue
                low, high = row[metric]["interval"]
                axes.plot([place, place], [max(low, bottom), min(high, top)], color=colour, linewidth=1.3, alpha=0.9)
                for is_cut, edge, marker in ((low < bottom, bottom, "v"), (high > top, top, "^")):
                    if is_cut:
                        axes.plot([place], [edge], marker, color=colour, markersize=5, clip_on=False)
        if floor is not None:
            axes.axhline(floor, color="0.4", linestyle="--", linewidth=1, label="character n-grams")
        axes.set_ylim(bottom, top)
        axes.set_xticks(rates)
        axes.set_xlabel("masking rate p")
        axes.set_ylabel(f"{analysis['scored_on']} {NAMES[metric]}")
        finish(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    seeds = len(analysis["seeds"])
    figure.suptitle(f"{analysis['sweep']}: mean and 95% interval over {seeds} seed{'s' if seeds > 1 else ''}")
    return save(mpl, figure, folder, "f1_against_p")


def sweep_report(sweep: str | Path) -> Report:
    """Compare the arms of a sweep and write `SWEEP/report`.

    Raises:
        SweepError: the folder is not the sweep of a grid, has no finished run, or cannot be written.
        ExtraError: matplotlib is not installed.
    """
    analysis = analyse(read_sweep(Path(sweep)))
    folder = Path(sweep) / "report"
    text, tex, statistics = folder / "report.md", folder / "table.tex", folder / "statistics.json"
    try:
        folder.mkdir(exist_ok=True)
        plots = plot_f1(analysis, folder)
        write_json(statistics, analysis)
        text.write_text(_markdown(analysis), encoding="utf-8")
        tex.write_text(_latex(analysis), encoding="utf-8")
    except OSError as error:
        raise SweepError(
            f"the report cannot be written to {folder}: {error.strerror}", code="report-not-written"
        ) from error
    return Report(text, statistics, plots, _summary(analysis), tex)


def findings(analysis: dict[str, Any]) -> list[str]:
    """Return sentences about what was found, including what does not favour masking."""
    lines = []
    for row, found in _compared(analysis):
        up = sum(value > 0 for value in found["by_seed"])
        verdict = "higher" if found["mean"] > 0 else "lower" if found["mean"] < 0 else "the same"
        clear = found["p_holm"] <= 0.05
        lines.append(
            f"{row['label']}: macro-F1 {verdict} on average ({signed(found['mean'])}; higher in {up} of {found['n']} "
            f"seeds), {'a difference' if clear else 'not a difference'} that the seeds establish "
            f"(p = {found['p_value']:.3g}, after Holm {found['p_holm']:.3g})."
        )
    choice, split = analysis["chosen_by_validation"], analysis["scored_on"]
    if not choice["per_seed"]:
        return [*lines, "No seed has all arms yet, so validation chooses nothing."]
    picks = Counter(one["label"] for one in choice["per_seed"])
    gain = f", {signed(choice['gain']['mean'])} against {_reference(analysis)}" if "gain" in choice else ""
    overall = choice["overall"]
    return [
        *lines,
        f"Chosen by validation seed by seed: {', '.join(f'{label} ({count})' for label, count in picks.items())}; "
        f"{split} macro-F1 {mean_sd(choice['f1_macro'])}{gain}.",
        f"Chosen by mean validation macro-F1: {overall['label']}; {split} macro-F1 {mean_sd(overall['f1_macro'])}, "
        f"weighted F1 {mean_sd(overall['f1_weighted'])}.",
    ]


def cautions(analysis: dict[str, Any]) -> list[str]:
    """Return sentences about what limits the report."""
    lines = []
    if compared := [row["difference"] for row, _ in _compared(analysis)]:
        lines.extend(_few_seeds(analysis))
        if min(len(one["seeds"]) for one in compared) < 10:
            lines.append("The bootstrap draws from the seeds of the sweep: with so few its intervals are too short.")
        problems = {one["bootstrap_problem"] for one in compared if one["bootstrap_problem"]}
        lines.extend(f"No bootstrap: {problem}." for problem in sorted(problems))
    else:
        of_arms = any(row["regularizers"] != "recipe" for row in analysis["rows"])
        what, remedy = ("without a regularizer", "none to --arms") if of_arms else ("with p = 0", "0 to --p")
        if all(row["is_reference"] for row in analysis["rows"]):
            others = "arms to --arms" if of_arms else "rates to --p"
            lines.append(f"There is nothing to compare with {_reference(analysis)}; add {others}.")
        else:
            lines.append(f"There is no arm {what} to compare the others with; add {remedy}.")
    if analysis["scored_on"] != "test":
        lines.append("The runs have no test texts: these are validation scores, which also chose the checkpoints.")
    if missing := analysis["missing"]:
        lines.append(
            f"{len(missing)} runs have no result and are left out: {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else ''}. If --prune stopped them, they are the worse ones, and every "
            "comparison is biased."
        )
    mixed = {name: found for name, found in analysis["versions"].items() if len(found) > 1}
    lines.extend(f"The runs were made with several versions of {name}: {', '.join(v)}." for name, v in mixed.items())
    return lines


def _few_seeds(analysis: dict[str, Any]) -> list[str]:
    """Name the differences that the sign-flip test cannot establish with so few seeds; Holm counts arms per setting."""
    settings: dict[str, list[tuple[str, int]]] = {}
    for row, found in _compared(analysis):
        settings.setdefault(str(row["setting"]), []).append((row["label"], found["n"]))
    arms = [arm for listed in settings.values() for arm in listed]
    lines = []
    for seeds in sorted({seeds for _, seeds in arms if smallest_p(seeds) > 0.05}):
        weak = dict.fromkeys(label for label, count in arms if count == seeds)
        names = "" if len(weak) == len({label for label, _ in arms}) else f" for {', '.join(weak)}"
        lines.append(
            f"With {seeds} seed{'s' if seeds > 1 else ''} the sign-flip test cannot give a p-value below "
            f"{smallest_p(seeds):.3g}, whatever the scores are: no difference can be established{names}. "
            f"At least {seeds_to_reach(0.05)} seeds are needed for .05, and more if Holm's correction is over several "
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


def _reference(analysis: dict[str, Any]) -> str:
    as_recipe = any(row["is_reference"] and row["regularizers"] == "recipe" for row in analysis["rows"])
    return "p = 0" if as_recipe else "no regularizer"


def _markdown(analysis: dict[str, Any]) -> str:
    choice, paper, floor = analysis["chosen_by_validation"], analysis["paper"], analysis["baseline"]
    reference, split = _reference(analysis), analysis["scored_on"]
    parts = [
        f"# {analysis['sweep']}",
        "\n".join(f"- {line}" for line in findings(analysis)),
        "![F1 against p](f1_against_p.png)",
        f"## Scores on {split}",
        "Mean ± standard deviation over seeds; intervals by Student's t. Cost is the median time of an optimizer step, "
        f"relative to {reference}; it includes whatever else the machine did at the time.",
        markdown(score_table(analysis)),
    ]
    if floor:
        parts += [f"Character n-grams: macro-F1 {floor['f1_macro']:.4f}, weighted {floor['f1_weighted']:.4f}."]
    for metric, name in (("f1_macro", "Macro-F1"), ("f1_weighted", "Weighted F1")):
        if _compared(analysis, metric):
            table = markdown(difference_table(analysis, metric))
            parts += [f"## {name}: differences from {reference}, seed by seed", table]
    if choice["per_seed"]:
        parts += ["## What validation would have chosen", markdown(_choice_table(analysis))]
        if "gain" in choice:
            within = f" {found} (t)" if (found := interval(choice["gain"]["interval"])) else ""
            parts += [f"Gain over {reference}: {signed(choice['gain']['mean'])}{within}."]
    if paper["rows"]:
        parts += [
            "## How many seeds would show the paper's gain?",
            f"The paper (arXiv:2505.11746) reports, on {paper['task']}, dev set, one run each, these gains in macro-F1 "
            "at p = 0.1. If differences vary from seed to seed as they do here, a paired t-test detects a gain of that "
            "size with 80% power from this many seeds on (in brackets: for the ends of the 95% interval of the "
            "standard deviation).",
            markdown(needed_table(analysis)),
        ]
    parts += ["## Cautions", "\n".join(f"- {line}" for line in cautions(analysis))]
    parts += ["## Methods", "\n".join(f"- {name}: {text}" for name, text in analysis["methods"].items())]
    if any(row["regularizers"] != "recipe" for row in analysis["rows"]):
        parts += [
            "In a sweep over arms only the regularizers of the arm are on, of those named here; the dropout of the "
            "backbone's hidden layers stays as the backbone has it. NEFTune scales its noise by the length of a padded "
            "batch: if the recipe is padding-free, its arms pad the same batches, which is part of their cost."
        ]
    versions = ", ".join(f"{name} {' and '.join(found)}" for name, found in analysis["versions"].items())
    return "\n\n".join([*parts, *([f"Versions: {versions}."] if versions else [])]) + "\n"


def _latex(analysis: dict[str, Any]) -> str:
    about = f"{analysis['sweep']}: {analysis['scored_on']} scores over {len(analysis['seeds'])} seeds"
    scores = latex(score_table(analysis), f"{about}, mean ± standard deviation, with 95% t intervals of the mean.")
    if not _compared(analysis):
        return scores + "\n"
    caption = (
        f"{analysis['sweep']}: paired differences in macro-F1 from {_reference(analysis)}; sign-flip permutation test "
        "over seeds, Holm-corrected; g_z is Hedges' correction of Cohen's d_z."
    )
    return f"{scores}\n\n{latex(difference_table(analysis, 'f1_macro'), caption)}\n"


def _summary(analysis: dict[str, Any]) -> str:
    parts = [f"Scores on {analysis['scored_on']}", plain(score_table(analysis), [0, 1, 2, 3, 4, 6]), ""]
    if _compared(analysis):
        parts += [f"Macro-F1, differences from {_reference(analysis)}, seed by seed"]
        parts += [plain(difference_table(analysis, "f1_macro")), ""]
    return "\n".join([*parts, *findings(analysis), "", *(f"Caution: {line}" for line in cautions(analysis)), ""])
