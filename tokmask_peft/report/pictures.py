"""The pictures of a report: training curves, F1 by code-mixing index, and the reliability diagram."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tokmask_peft.html import FIRST, GRID, INK, MUTED, SECOND, Picture, draw

Points = list[tuple[float, float]]
Log = Sequence[Mapping[str, Any]]


def training_curves(log: Log, best_step: int | None) -> list[Picture]:
    """Draw loss, validation macro-F1 and masking rate over the steps, without what was not logged and a constant rate.

    `log` are the lines of `log.jsonl`, `best_step` is the step of the checkpoint that was kept.
    """
    keys = ("loss", "eval_loss", "eval_f1_macro", "masking_rate")
    loss, validation_loss, f1, rate = (_points(log, key) for key in keys)
    pictures = []
    if loss:
        alt = f"Training loss: {loss[0][1]:.3f} at step {loss[0][0]:g}, {loss[-1][1]:.3f} at step {loss[-1][0]:g}."
        if validation_loss:
            alt += f" Validation loss at the end: {validation_loss[-1][1]:.3f}."
        lines = {"training": (loss, FIRST), "validation": (validation_loss, SECOND)}
        pictures.append(Picture(_curve("loss", alt, lines, best_step, zero=True), "Loss"))
    if f1:
        top = max(f1, key=lambda point: point[1])
        alt = f"Validation macro-F1 over the steps; its highest value is {top[1]:.4f} at step {top[0]:g}."
        kept = "; the dashed line marks the checkpoint that was kept" if best_step else ""
        pictures.append(Picture(_curve("f1", alt, {"": (f1, SECOND)}, best_step), f"Macro-F1 on validation{kept}"))
    if len({value for _, value in rate}) > 1:
        alt = f"Masking rate: {rate[0][1]:g} at step {rate[0][0]:g}, {rate[-1][1]:g} at step {rate[-1][0]:g}."
        pictures.append(Picture(_curve("rate", alt, {"": (rate, FIRST)}, None, zero=True), "Masking rate p"))
    return pictures


def mixing_picture(rows: Sequence[Mapping[str, Any]], overall: float) -> Picture:
    """Draw macro-F1 per bin of the code-mixing index, with the overall score as a line."""
    names = [str(row["cmi"]).replace(" to ", "–") for row in rows]
    values = [float(row["f1_macro"]) for row in rows]

    def paint(axes: Any) -> None:
        axes.axhline(overall, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(range(len(rows)), values, color=FIRST, linewidth=1.2, marker="o", markersize=7)
        axes.set_xticks(range(len(rows)), names)
        axes.set_xlabel("code-mixing index of the post")
        axes.margins(x=0.08, y=0.15)
        axes.grid(visible=False, axis="x")

    listed = ", ".join(f"{value:.3f} at {name}" for name, value in zip(names, values, strict=True))
    svg = draw("mixing", f"Macro-F1 by code-mixing index: {listed}.", paint)
    return Picture(svg, "Macro-F1 by code-mixing index; the dashed line is the score of all posts")


def reliability_picture(before: Mapping[str, Any], after: Mapping[str, Any], split: str) -> Picture | None:
    """Draw accuracy against confidence, before and after the temperature; none if the run stored no bins.

    `before` and `after` hold `ece` and `reliability`, a list of bins with `items`, `confidence` and `accuracy`.
    """
    bins = {"before": before.get("reliability") or [], "after": after.get("reliability") or []}
    if not all(bins.values()):
        return None

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        styles = {"before": (SECOND, "s", "none"), "after": (FIRST, "o", FIRST)}
        for name, (colour, marker, fill) in styles.items():
            x, y, items = ([row[key] for row in bins[name]] for key in ("confidence", "accuracy", "items"))
            sizes = [14 + 150 * count / sum(items) for count in items]
            axes.plot(x, y, color=colour, linewidth=1)
            axes.scatter(x, y, s=sizes, marker=marker, facecolor=fill, edgecolor=colour, label=name, zorder=3)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.04), ylim=(0, 1.04), aspect="equal")
        legend = axes.legend(loc="upper left", labelcolor=INK)
        for handle in legend.legend_handles:
            handle.set_sizes([40])

    errors = f"{before['ece']:.4f} before the temperature, {after['ece']:.4f} after"
    alt = f"Reliability diagram of {split}: expected calibration error {errors}."
    caption = "Accuracy of answers by their confidence. On the diagonal, answers with confidence .8 are right in 80 of "
    caption += "100 cases; larger marks stand for more answers."
    return Picture(draw("reliability", alt, paint, (3.6, 3.5)), caption)


def _points(log: Log, key: str) -> Points:
    """Return (step, value) of the lines that hold a number for `key`."""
    return [(float(row["step"]), float(row[key])) for row in log if isinstance(row.get(key), int | float)]


def _curve(
    name: str, alt: str, lines: Mapping[str, tuple[Points, str]], best: int | None, zero: bool = False
) -> Markup:
    def paint(axes: Any) -> None:
        if best:
            axes.axvline(best, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for label, (points, colour) in lines.items():
            few = "o" if len(points) < 15 else None
            steps, values = [step for step, _ in points], [value for _, value in points]
            axes.plot(steps, values, color=colour, linewidth=1.5, marker=few, markersize=4, label=label or None)
        axes.set_xlabel("step")
        if zero:
            highest = max(value for points, _ in lines.values() for _, value in points)
            axes.set_ylim(0, 1.08 * highest if highest > 0 else 1)
        axes.tick_params(length=0)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.spines["left"].set_color(GRID)
        if sum(bool(points) for points, _ in lines.values()) > 1:
            axes.legend(labelcolor=INK)

    return draw(name, alt, paint)
