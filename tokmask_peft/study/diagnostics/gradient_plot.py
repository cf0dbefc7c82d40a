"""Variance, agreement and shift of gradients against the masking rate, a line per point of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokmask_peft.errors import SweepError
from tokmask_peft.study.diagnostics.gradient_report import MAIN, NAMES

PANELS = {
    "ratio": "variance: masks / batches",
    "agreement": "cosine between mask draws",
    "cosine": "cosine, mean masked to unmasked",
    "distance": "distance, mean masked to unmasked",
}


def matplotlib() -> Any:
    """Return matplotlib.

    Raises:
        SweepError: it is not installed.
    """
    try:
        import matplotlib as mpl
        import matplotlib.figure
    except ImportError as error:
        raise SweepError("the plot needs matplotlib: pip install 'tokmask-peft[sweep]'") from error
    return mpl


def plot_gradients(analysis: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the four panels for the LoRA weights; return the PNG and the SVG.

    Raises:
        SweepError: matplotlib is not installed.
    """
    mpl = matplotlib()
    figure = mpl.figure.Figure(figsize=(10, 7), layout="constrained")
    colours = mpl.colormaps["viridis"]
    count = len(analysis["points"])
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        values: list[float] = []
        for number, point in enumerate(analysis["points"]):
            rows = [row for row in point["groups"][MAIN]["rates"] if row[name]["value"] is not None]
            if not rows:
                continue
            colour = colours(0.85 * number / max(count - 1, 1))
            shift = (number - (count - 1) / 2) * 0.012 * max(analysis["rates"])
            x = [row["p"] + shift for row in rows]
            y = [row[name]["value"] for row in rows]
            axes.plot(x, y, "o-", color=colour, markersize=5, label=f"{point['share']:.0%} (step {point['step']})")
            values += y
            for place, row in zip(x, rows, strict=True):
                bounds = row[name]["interval"]
                if bounds is not None and None not in bounds:
                    axes.plot([place, place], bounds, color=colour, linewidth=1.3)
                    values += bounds
        if name == "ratio":
            axes.axhline(1.0, color="0.4", linestyle="--", linewidth=1)
        if name in ("agreement", "cosine"):
            axes.set_ylim(min([*values, 0.0]) - 0.02, 1.02)
        else:
            axes.set_ylim(0, None)
        axes.set_xlim(0, max(analysis["rates"]) * 1.06)
        axes.set_xticks([0.0, *analysis["rates"]])
        axes.set_xlabel("masking rate p")
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(len(labels), 1), frameon=False)
    about = f"{analysis['batches']} batches of {analysis['batch_size']} texts, {analysis['draws']} mask draws each"
    figure.suptitle(f"{analysis['recipe']['name']}, gradients of {NAMES[MAIN]}: {about}", fontsize=11)
    return save(mpl, figure, folder, "gradients")


def save(mpl: Any, figure: Any, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG; the same figures make the same files."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with mpl.rc_context({"svg.hashsalt": "tokmask"}):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
