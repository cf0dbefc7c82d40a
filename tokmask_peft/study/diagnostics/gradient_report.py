"""Variance, agreement and shift of gradients against the masking rate, a line per point of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokmask_peft.errors import SweepError
from tokmask_peft.study.report import Table, markdown, plain

NAMES = {"lora": "the LoRA weights", "head": "the head (and a trained mask row)", "all": "all trained weights"}
MAIN = "lora"


def gradient_table(analysis: dict[str, Any], group: str) -> Table:
    """Return a row per point and rate."""
    head = (
        "done",
        "step",
        "p",
        "mask / batch variance",
        "agreement of draws",
        "cosine of mean to unmasked",
        "distance of mean to unmasked",
        "distance, not debiased",
    )
    body = []
    for point in analysis["points"]:
        for row in point["groups"][group]["rates"]:
            body.append(
                [
                    f"{point['share']:.0%}",
                    str(point["step"]),
                    f"{row['p']:g}",
                    bounded(row["ratio"]),
                    bounded(row["agreement"]),
                    bounded(row["cosine"]),
                    bounded(row["distance"]),
                    _number(row["naive_distance"]["value"]),
                ]
            )
    return head, body


def findings(analysis: dict[str, Any], group: str = MAIN) -> list[str]:
    """Say in sentences what was found for a group of weights."""
    lines = []
    most = max(analysis["rates"])
    for point in analysis["points"]:
        found = point["groups"][group]
        at = found["outweighs_at"]
        when = f"{point['share']:.0%} of the training"
        if at["value"] is None:
            text = f"masking adds less variance than batches have, up to p = {most:g}"
        else:
            text = f"masking adds more variance than batches have from p = {at['value']:.2f} on"
        if at["interval"] is not None:
            text += f" ({_rates(at['interval'], most)})"
        lines.append(f"{when}: {text}.")
        lines.extend(f"{when}: {said}." for said in _shift(found["rates"]))
    return lines


def _shift(rows: list[dict[str, Any]]) -> list[str]:
    """Say at which rates the mean masked gradient is another one than the unmasked."""
    apart: list[tuple[float, float]] = []
    alike: list[tuple[float, float]] = []
    for row in rows:
        distance, bounds = row["distance"]["value"], row["distance_squared"]["interval"]
        if distance is not None and bounds is not None:
            (apart if bounds[0] is not None and bounds[0] > 0 else alike).append((row["p"], distance))
    lines = []
    for found, verdict in ((apart, "is not its unmasked one"), (alike, "cannot be told from its unmasked one")):
        if found:
            rates = ", ".join(f"{p:g}" for p, _ in found)
            shares = ", ".join(f"{distance:.0%}" for _, distance in found)
            lines.append(
                f"a batch's mean masked gradient {verdict} at p = {rates}: they lie {shares} of its length apart"
            )
    return lines


def cautions(analysis: dict[str, Any]) -> list[str]:
    """Say what limits the measurement."""
    lines = [
        "Dropout is off in the measurement (the model is in eval mode), and so is NEFTune; in training they add "
        "variance of their own.",
        "These are raw gradients, before clipping and before AdamW scales each weight by its history: how much of the "
        "added variance reaches the weights is not measured.",
        f"One seed, one model: intervals are over {analysis['batches']} batches of {analysis['batch_size']} texts, and "
        "say nothing about other seeds. With so few batches they are rough.",
        "The points see the same batches and masks, and so do the rates; lines over p are smoother than independent "
        "measurements would be.",
    ]
    if any(point["step"] == 0 for point in analysis["points"]):
        lines.append("Before the first step LoRA's B is 0, so that its A has no gradient yet, and the head is random.")
    return lines


def summary(analysis: dict[str, Any]) -> str:
    """Return the text for a terminal."""
    head, body = gradient_table(analysis, MAIN)
    kept = range(len(head) - 1)
    table = [head[i] for i in kept], [[row[i] for i in kept] for row in body]
    return "\n".join(
        [
            f"Gradients of {NAMES[MAIN]} ({analysis['parameters'][MAIN]:,} values), 95% intervals over batches",
            plain(table),
            "",
            *findings(analysis),
            "",
            *(f"Caution: {line}" for line in cautions(analysis)),
            "",
        ]
    )


def markdown_report(analysis: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    recipe = analysis["recipe"]
    parts = [f"# {recipe['name']}: gradients under masking", ""]
    parts += [
        f"Trained with p = {recipe['masking']['p']:g}, seed {recipe['seed']}; measured on {analysis['batches']} "
        f"batches of {analysis['batch_size']} training texts with {analysis['draws']} mask draws each. 95% intervals "
        "over batches.",
        "",
        *(f"- {line}" for line in findings(analysis)),
        "",
        "![Gradients against p](gradients.png)",
        "",
    ]
    for group in (MAIN, "head", "all"):
        if analysis["parameters"][group]:
            parts += [f"## {NAMES[group].capitalize()} ({analysis['parameters'][group]:,} values)", ""]
            parts += [markdown(gradient_table(analysis, group)), ""]
    parts += ["## Cautions", "", *(f"- {line}" for line in cautions(analysis)), ""]
    parts += ["## Meaning", "", *(f"- {name}: {text}" for name, text in analysis["meaning"].items())]
    parts += [
        f"- intervals: {analysis['replicates']} bootstrap draws of batches, expanded percentile (Hesterberg 2015)",
        "",
        f"All figures are in `gradients.json`. Versions: "
        f"{', '.join(f'{name} {version}' for name, version in analysis['versions'].items())}.",
        "",
    ]
    return "\n".join(parts)


def bounded(found: dict[str, Any]) -> str:
    """Write a value with its interval."""
    if found["value"] is None:
        return "undefined"
    if found["interval"] is None:
        return _number(found["value"])
    low, high = (_number(bound) for bound in found["interval"])
    return f"{_number(found['value'])} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".replace("-", "−")


def _rates(bounds: list[float | None], most: float) -> str:
    if all(bound is None for bound in bounds):
        return f"95% interval: above {most:g}"
    low, high = (f"above {most:g}" if bound is None else f"{bound:.2f}" for bound in bounds)
    return f"95% interval {low} to {high}"


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
