"""Tables, plots and files of `tokmask diagnose` (gradients against p) and `tokmask robustness` (F1 on perturbed texts).

Their sentences, for the Markdown and for a terminal, are in `templates`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tokmask_peft.errors import RunError, boundary, write_json, write_whole
from tokmask_peft.study.report import Report, Table, finish, level, markdown, matplotlib, mean_sd, plain, save
from tokmask_peft.tasks import get_task

NAMES = {"lora": "the LoRA weights", "head": "the head (and a trained mask row)", "all": "all trained weights"}
MAIN = "lora"
COLUMNS = {
    "ratio": ("mask / batch variance", "variance: masks / batches"),
    "agreement": ("agreement of draws", "cosine between mask draws"),
    "cosine": ("cosine of mean to unmasked", "cosine, mean masked to unmasked"),
    "distance": ("distance of mean to unmasked", "distance, mean masked to unmasked"),
}
"""Estimate -> its column in tables and the title of its panel."""
VISIBLE = 5e-5
"""The least difference that four decimals show."""


def make_folder(folder: Path) -> None:
    """Make the folder of a report.

    Raises:
        RunError: it cannot be made.
    """
    with boundary(f"making {folder} (another folder: --out)", RunError, "out"):
        folder.mkdir(parents=True, exist_ok=True)


def render(template: str, **values: Any) -> str:
    """Return the text of a template of this folder; a value that is missing is an error."""
    loader = PackageLoader("tokmask_peft.study.diagnostics", "templates")
    environment = Environment(  # noqa: S701 - plain text and Markdown, not HTML
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "count": "{:,}".format,
        "lines": _lines,
        "markdown": markdown,
        "name": lambda path: Path(path).name,
        "number": "{:g}".format,
        "percent": "{:.0%}".format,
        "plain": plain,
        "score": "{:.4f}".format,
    }
    return environment.get_template(f"{template}.j2").render(values)


def _lines(text: str, before: str = "") -> str:
    return "\n".join(before + line for line in text.splitlines())


def _write(folder: Path, name: str, content: Mapping[str, Any], plots: tuple[Path, ...], **values: Any) -> Report:
    text, statistics = folder / f"{name}.md", folder / f"{name}.json"
    write_json(statistics, content)
    write_whole(text, render(name, terminal=False, **content, **values))
    return Report(text, statistics, plots, render(name, terminal=True, **content, **values))


def _line(
    axes: Any,
    x: Sequence[float],
    found: Sequence[Mapping[str, Any]],
    style: str,
    colour: Any,
    label: str | None = None,
    scale: tuple[float, float] = (-math.inf, math.inf),
) -> None:
    """Draw values, or means, and a bar for each interval, cut where the scale ends."""
    axes.plot(x, [one.get("value", one.get("mean")) for one in found], style, color=colour, markersize=5, label=label)
    for place, one in zip(x, found, strict=True):
        if one["interval"] is not None and None not in one["interval"]:
            bar = max(one["interval"][0], scale[0]), min(one["interval"][1], scale[1])
            axes.plot([place, place], bar, color=colour, linewidth=1.3)


def gradient_report(analysis: dict[str, Any], folder: Path) -> Report:
    """Write the report of `gradients.diagnose`."""
    tables = {group: gradient_table(analysis, group) for group in NAMES}
    plots = _plot_gradients(analysis, folder)
    return _write(folder, "gradients", analysis, plots, tables=tables, names=NAMES, main=MAIN, shifted=_shifted)


def gradient_table(analysis: dict[str, Any], group: str) -> Table:
    """Return a row per point and rate."""
    body = []
    for point in analysis["points"]:
        for row in point["groups"][group]["rates"]:
            cells = [f"{point['share']:.0%}", str(point["step"]), f"{row['p']:g}"]
            body.append([*cells, *(_bounded(row[name]) for name in COLUMNS), _number(row["naive_distance"]["value"])])
    return ("done", "step", "p", *(column for column, _ in COLUMNS.values()), "distance, not debiased"), body


def _bounded(found: dict[str, Any]) -> str:
    """Write a value with its interval."""
    if found["value"] is None:
        return "undefined"
    bounds = found["interval"]
    return _number(found["value"]) + (f" [{', '.join(map(_number, bounds))}]" if bounds is not None else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".replace("-", "−")


def _shifted(rows: Sequence[dict[str, Any]], apart: bool) -> list[dict[str, Any]]:
    """Return the rates at which the mean masked gradient is shown to differ from the unmasked one, or is not."""
    known = [row for row in rows if row["distance"]["value"] is not None and row["distance_squared"]["interval"]]
    return [row for row in known if ((row["distance_squared"]["interval"][0] or 0.0) > 0) == apart]


def _plot_gradients(analysis: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    mpl = matplotlib()
    figure = mpl.figure.Figure(figsize=(10, 7), layout="constrained")
    count, most = len(analysis["points"]), max(analysis["rates"])
    for axes, (name, (_, title)) in zip(figure.subplots(2, 2).flat, COLUMNS.items(), strict=True):
        for number, point in enumerate(analysis["points"]):
            rows = [row for row in point["groups"][MAIN]["rates"] if row[name]["value"] is not None]
            if not rows:
                continue
            colour = mpl.colormaps["viridis"](0.85 * number / max(count - 1, 1))
            x = [row["p"] + (number - (count - 1) / 2) * 0.012 * most for row in rows]
            label = f"{point['share']:.0%} (step {point['step']})"
            _line(axes, x, [row[name] for row in rows], "o-", colour, label)
        if name == "ratio":
            axes.axhline(1.0, color="0.4", linestyle="--", linewidth=1)
        is_cosine = name in ("agreement", "cosine")
        axes.set_ylim(*((min(axes.dataLim.ymin, 0.0) - 0.02, 1.02) if is_cosine else (0, None)))
        axes.set_xlim(0, most * 1.06)
        axes.set_xticks([0.0, *analysis["rates"]])
        axes.set_xlabel("masking rate p")
        axes.set_title(title, fontsize=10, loc="left")
        finish(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(len(labels), 1), frameon=False)
    about = f"{analysis['batches']} batches of {analysis['batch_size']} texts, {analysis['draws']} mask draws each"
    figure.suptitle(f"{analysis['recipe']['name']}, gradients of {NAMES[MAIN]}: {about}", fontsize=11)
    return save(mpl, figure, folder, "gradients")


def robustness_report(analysis: dict[str, Any], folder: Path, **more: Any) -> Report:
    """Write the report of `robustness.robustness`; `more` goes into its JSON only."""
    names = {"f1_macro": "Macro-F1", "f1_weighted": "Weighted F1"}
    tables = {name: robustness_table(analysis, metric) for metric, name in names.items()}
    reported = [(run["clean"]["f1_macro"], run.get("reported")) for run in analysis["runs"]]
    differences = [abs(found - before) for found, before in reported if before is not None]
    plots = _plot_robustness(analysis, folder)
    content = {**analysis, **more}
    return _write(folder, "robustness", content, plots, tables=tables, differences=differences, visible=VISIBLE)


def robustness_table(analysis: dict[str, Any], metric: str = "f1_macro") -> Table:
    """Return a row per condition and a column per group."""
    groups, body = analysis["groups"], []
    names = {"clean": "as they are", "mask": "{:.0%} of sub-tokens masked", "noise": "{:.0%} of words misspelt"}
    for kind, part in zip(("seen", "unseen"), get_task(analysis["task"]).unseen_parts, strict=True):
        names[kind] = f"{part} ({{items:,.0f}})"
    by_group = [{(row["kind"], row["at"]): row for row in group["rows"]} for group in groups]
    for kind, at in dict.fromkeys(key for rows in by_group for key in rows):
        found = [rows.get((kind, at)) for rows in by_group]
        items = next(row.get("items") for row in found if row is not None)
        cells = ["" if row is None else f"{mean_sd(row[metric])} {level(row[metric])}".strip() for row in found]
        body.append([names[kind].format(at, items=items), *cells])
    seeds = [f"{len(of)} seeds" if len(of) > 1 else f"seed {of[0]}" for of in (group["seeds"] for group in groups)]
    return ["texts", *(f"trained with {one['group']}, {of}" for one, of in zip(groups, seeds, strict=True))], body


def _plot_robustness(analysis: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    mpl, groups = matplotlib(), analysis["groups"]
    axis_names = {"mask": "share of sub-tokens masked", "noise": "share of words misspelt"}
    kinds = {row["kind"] for group in groups for row in group["rows"]}
    panels = [*(kind for kind in axis_names if kind in kinds), "words"]
    figure = mpl.figure.Figure(figsize=(4 * max(len(panels), 2), 4.2), layout="constrained")
    means = [row["f1_macro"]["mean"] for group in groups for row in group["rows"]]
    bottom, top = max(min(means) - 0.05, 0.0), min(max(means) + 0.05, 1.0)
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        of_words = panel == "words"
        wanted = ("seen", "unseen") if of_words else ("clean", panel)
        for number, group in enumerate(groups):
            colour = mpl.color_sequences["tab10"][number % 10]
            rows = [row for row in group["rows"] if row["kind"] in wanted]
            places = [wanted.index(row["kind"]) if of_words else row["at"] for row in rows]
            shift = (number - (len(groups) - 1) / 2) * (0.08 if of_words else 0.01 * max([*places, 0.1]))
            x = [place + shift for place in places]
            found = [row["f1_macro"] for row in rows]
            _line(axes, x, found, "o" if of_words else "o-", colour, scale=(bottom, top))
            if axes is figure.axes[0]:
                axes.plot([], [], "o-", color=colour, label=f"trained with {group['group']}")
        axes.set_ylim(bottom, top)
        axes.set_xlabel(axis_names.get(panel, ""))
        finish(axes)
    names = [name.replace(" with", "\nwith") for name in get_task(analysis["task"]).unseen_parts]
    figure.axes[-1].set_xticks([0, 1], names)
    figure.axes[-1].set_xlim(-0.5, 1.5)
    figure.axes[0].set_ylabel(f"{analysis['split']} macro-F1")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    seeds = max(len(group["seeds"]) for group in groups)
    over = f"mean and 95% interval over {seeds} seeds" if seeds > 1 else "one run each"
    figure.suptitle(f"Macro-F1 on perturbed texts: {over}", fontsize=11)
    return save(mpl, figure, folder, "robustness")
