"""The picture of the masking study: change in macro-F1 by masking rate, a panel per task."""

from __future__ import annotations

from pathlib import Path

from figures import TITLES, Study


def draw(study: Study, path: Path) -> None:
    """Draw the paired differences from p = 0: seeds as ticks, means as points, 95% t intervals as bars."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = study.tasks
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.7 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        axes.axhline(0, color="0.5", linewidth=0.8)
        seen = []
        for p in study.masked_rates():
            found = study.difference(name, p)
            if not found:
                continue
            seen += found["by_seed"]
            axes.plot([p] * found["n"], found["by_seed"], "_", color="C0", alpha=0.6, markersize=10)
            axes.plot([p], [found["mean"]], "o", color="C0", markersize=5)
            if found["interval"]:
                axes.plot([p, p], found["interval"], color="C0", linewidth=1.3)
                seen += found["interval"]
        room = 1.1 * max(map(abs, seen), default=0.01)
        axes.set_ylim(-room, room)
        axes.set_title(TITLES[name].replace(", ", ",\n", 1), fontsize=9)
        axes.set_xticks([0, *study.masked_rates()])
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.supxlabel("masking rate p", fontsize=9)
    figure.supylabel("change in test macro-F1", fontsize=9)
    with mpl.rc_context({"svg.hashsalt": "tokmask", "svg.fonttype": "none"}):  # the same figures make the same file
        figure.savefig(path, metadata={"Date": None})
