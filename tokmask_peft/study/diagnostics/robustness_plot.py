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
