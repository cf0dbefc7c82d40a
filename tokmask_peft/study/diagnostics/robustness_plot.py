"""F1 against masking and misspelling of the texts, a line per masking rate of training; F1 on seen and unseen words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokmask_peft.study.diagnostics.gradient_plot import matplotlib, save


def plot_robustness(analysis: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the panels; return the PNG and the SVG.

    Raises:
        SweepError: matplotlib is not installed.
    """
    mpl = matplotlib()
    figure = mpl.figure.Figure(figsize=(12, 4.2), layout="constrained")
    colours = mpl.color_sequences["tab10"]
    panels = figure.subplots(1, 3, sharey=True)
    groups = analysis["groups"]
    means = [row["f1_macro"]["mean"] for group in groups for row in group["rows"]]
    bottom, top = max(min(means) - 0.05, 0.0), min(max(means) + 0.05, 1.0)
    for number, group in enumerate(groups):
        colour = colours[number % len(colours)]
        centre = number - (len(groups) - 1) / 2
        for axes, kind in zip(panels, ("mask", "noise", "words"), strict=True):
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
        panels[0].plot([], [], "o-", color=colour, label=f"trained with {group['group']}")
    panels[0].set_xlabel("share of sub-tokens masked")
    panels[1].set_xlabel("share of words misspelt")
    names = ["seen words", "unseen words"]
    panels[2].set_xticks(
        [0, 1], names if analysis["task"] == "token" else ["texts without\nunseen words", "texts with\nunseen words"]
    )
    panels[2].set_xlim(-0.5, 1.5)
    panels[0].set_ylabel(f"{analysis['split']} macro-F1")
    for axes in panels:
        axes.set_ylim(bottom, top)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    seeds = max(len(group["seeds"]) for group in groups)
    over = f"mean and 95% interval over {seeds} seeds" if seeds > 1 else "one run each"
    figure.suptitle(f"Macro-F1 on disturbed texts: {over}", fontsize=11)
    return save(mpl, figure, folder, "robustness")
