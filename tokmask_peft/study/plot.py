"""F1 against the masking rate, with intervals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tokmask_peft.errors import SweepError

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
