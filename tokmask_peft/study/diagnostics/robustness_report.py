"""F1 against masking and misspelling of the texts, a line per masking rate of training; F1 on seen and unseen words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokmask_peft.study.diagnostics.gradient_report import matplotlib, save
from tokmask_peft.study.report import Table, level, markdown, mean_sd, plain

SHOWN = 5e-5
"""The least difference that four decimals show."""


def label(row: dict[str, Any], task: str) -> str:
    """Name a condition."""
    if row["kind"] == "mask":
        return f"{row['at']:.0%} of sub-tokens masked"
    if row["kind"] == "noise":
        return f"{row['at']:.0%} of words misspelt"
    if row["kind"] == "clean":
        return "as they are"
    if task == "token":
        return f"{row['kind']} words ({row['items']:,.0f})"
    has = "no" if row["kind"] == "seen" else "an"
    return f"texts with {has} unseen word ({row['items']:,.0f})"


def score_table(analysis: dict[str, Any], metric: str = "f1_macro") -> Table:
    """Return a row per condition and a column per group."""
    groups = analysis["groups"]
    body = []
    for kind, at in dict.fromkeys((row["kind"], row["at"]) for group in groups for row in group["rows"]):
        found = [next((row for row in one["rows"] if (row["kind"], row["at"]) == (kind, at)), None) for one in groups]
        first = next(row for row in found if row is not None)
        cells = ["" if row is None else f"{mean_sd(row[metric])} {level(row[metric])}".strip() for row in found]
        body.append([label(first, analysis["task"]), *cells])
    return ["texts", *(_head(group) for group in groups)], body


def _head(group: dict[str, Any]) -> str:
    seeds = len(group["seeds"])
    return f"trained with {group['group']}" + (f", {seeds} seeds" if seeds > 1 else f", seed {group['seeds'][0]}")


def findings(analysis: dict[str, Any]) -> list[str]:
    """Say in sentences what masking and noise cost each group."""
    lines = []
    for group in analysis["groups"]:
        parts = []
        for kind, name in (("mask", "masked sub-tokens"), ("noise", "misspelt words")):
            rows = [row for row in group["rows"] if row["kind"] == kind]
            if rows:
                parts.append(f"{rows[-1]['loss']['mean']:.4f} at {rows[-1]['at']:.0%} {name}")
        if parts:
            clean = next(row for row in group["rows"] if row["kind"] == "clean")
            lines.append(f"{group['group']}: macro-F1 {clean['f1_macro']['mean']:.4f}; loses {' and '.join(parts)}.")
    return lines


def cautions(analysis: dict[str, Any]) -> list[str]:
    """Say what limits the scores."""
    what = analysis["disturbances"]
    lines = [
        f"Scores are means over {what['draws']} draws of masks and misspellings, the same for every run. Texts longer "
        "than those of training are read in windows, as `tokmask predict` does.",
        "Misspellings are made up (a swapped, dropped, inserted or replaced letter in a word), not people's.",
        "Texts with unseen words differ from the others in more than that, as in length and in labels: compare a row "
        "between models, not the two rows of one model. Macro-F1 of a part is over the classes that occur in it.",
    ]
    if analysis["split"] != "test":
        lines.append("There are no test texts: these are validation scores, which also chose the checkpoints.")
    reported = [(run["clean"]["f1_macro"], run.get("reported")) for run in analysis["runs"]]
    apart = [abs(found - before) for found, before in reported if before is not None]
    if max(apart, default=0.0) >= SHOWN:
        lines.append(
            f"{sum(one >= SHOWN for one in apart)} of {len(apart)} runs score up to {max(apart):.4f} otherwise on the "
            "texts as they are than their result.json says: bf16 rounds otherwise in predictions than in evaluation, "
            "and nothing is cut here."
        )
    fewest = min(len(group["seeds"]) for group in analysis["groups"])
    if fewest < 2:
        lines.append("One run per line: nothing is known about how much another seed would differ.")
    elif fewest < 5:
        lines.append(f"{fewest} seeds: the intervals are wide, and rest on normally distributed scores.")
    return lines


def summary(analysis: dict[str, Any]) -> str:
    """Return the text for a terminal."""
    parts = [f"Macro-F1 on {analysis['texts']:,} {analysis['split']} texts", plain(score_table(analysis)), ""]
    parts += [*findings(analysis), "", *(f"Caution: {line}" for line in cautions(analysis)), ""]
    return "\n".join(parts)


def markdown_report(analysis: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    parts = ["# Robustness", "", *(f"- {line}" for line in findings(analysis)), ""]
    parts += ["![F1 on disturbed texts](robustness.png)", ""]
    parts += [
        f"Mean ± standard deviation over seeds, with 95% intervals of the mean (Student's t); {analysis['texts']:,} "
        f"{analysis['split']} texts.",
        "",
    ]
    for metric, name in (("f1_macro", "Macro-F1"), ("f1_weighted", "Weighted F1")):
        parts += [f"## {name}", "", markdown(score_table(analysis, metric)), ""]
    mask = analysis["mask_token"]
    parts += [
        "## Methods",
        "",
        *([f"- Masked: by the rule of training (unit {mask['unit']}); {mask['token']}."] if mask else []),
        "- Misspelt: in a share of the words that have a letter, two neighbouring letters are swapped, one is dropped, "
        "inserted or replaced. New letters are of the same script and take the case of their place; marks stay with "
        "their letter.",
        "- Unseen: words that no training text of the run holds, case and punctuation at the ends aside.",
        "",
        "## Cautions",
        "",
        *(f"- {line}" for line in cautions(analysis)),
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in analysis['versions'].items())}.",
        "",
    ]
    return "\n".join(parts)


def plot_robustness(analysis: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the panels; return the PNG and the SVG.

    Raises:
        SweepError: matplotlib is not installed.
    """
    mpl = matplotlib()
    groups = analysis["groups"]
    present = {row["kind"] for group in groups for row in group["rows"]}
    shown = [kind for kind in ("mask", "noise") if kind in present] + ["words"]
    figure = mpl.figure.Figure(figsize=(4 * max(len(shown), 2), 4.2), layout="constrained")
    colours = mpl.color_sequences["tab10"]
    panels = dict(zip(shown, figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], strict=True))
    first = panels[shown[0]]
    means = [row["f1_macro"]["mean"] for group in groups for row in group["rows"]]
    bottom, top = max(min(means) - 0.05, 0.0), min(max(means) + 0.05, 1.0)
    for number, group in enumerate(groups):
        colour = colours[number % len(colours)]
        centre = number - (len(groups) - 1) / 2
        for kind, axes in panels.items():
            kinds = ("seen", "unseen") if kind == "words" else ("clean", kind)
            rows = [row for row in group["rows"] if row["kind"] in kinds]
            places = [kinds.index(row["kind"]) if kind == "words" else row["at"] for row in rows]
            reach = max([*places, 0.1])
            x = [place + centre * (0.08 if kind == "words" else 0.01 * reach) for place in places]
            style = "o" if kind == "words" else "o-"
            axes.plot(x, [row["f1_macro"]["mean"] for row in rows], style, color=colour, markersize=5)
            for place, row in zip(x, rows, strict=True):
                if row["f1_macro"]["interval"] is not None:
                    low, high = row["f1_macro"]["interval"]
                    axes.plot([place, place], [max(low, bottom), min(high, top)], color=colour, linewidth=1.3)
        first.plot([], [], "o-", color=colour, label=f"trained with {group['group']}")
    for kind, name in (("mask", "share of sub-tokens masked"), ("noise", "share of words misspelt")):
        if kind in panels:
            panels[kind].set_xlabel(name)
    names = ["seen words", "unseen words"]
    panels["words"].set_xticks(
        [0, 1], names if analysis["task"] == "token" else ["texts without\nunseen words", "texts with\nunseen words"]
    )
    panels["words"].set_xlim(-0.5, 1.5)
    first.set_ylabel(f"{analysis['split']} macro-F1")
    for axes in panels.values():
        axes.set_ylim(bottom, top)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    seeds = max(len(group["seeds"]) for group in groups)
    over = f"mean and 95% interval over {seeds} seeds" if seeds > 1 else "one run each"
    figure.suptitle(f"Macro-F1 on disturbed texts: {over}", fontsize=11)
    return save(mpl, figure, folder, "robustness")
