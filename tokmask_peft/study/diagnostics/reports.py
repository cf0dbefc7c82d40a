"""Tables, plots and files of `tokmask diagnose` and `tokmask robustness`; their sentences are in the templates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokmask_peft.errors import RunError, boundary, check_place, require, write_json, write_whole
from tokmask_peft.study.report import Report, Table, draw, finish, level, mean_sd, render, save
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
VISIBLE = 5e-5  # the least difference that four decimals show


def make_folder(folder: Path) -> None:
    """Make the folder of a report; raise a RunError or an ExtraError if the report could not be written or drawn."""
    require("matplotlib", "sweep", "the plot")
    with boundary(f"making {folder} (choose another folder with --out)", RunError, "out"):
        folder.mkdir(parents=True, exist_ok=True)
    check_place(folder / "report.md", RunError, "out")


def _write(folder: Path, name: str, content: Mapping[str, Any], plots: tuple[Path, ...], **values: Any) -> Report:
    text, statistics = folder / f"{name}.md", folder / f"{name}.json"
    write_json(statistics, content)
    write_whole(text, render(name, terminal=False, **content, **values))
    return Report(text, statistics, plots, render(name, terminal=True, **content, **values))


def gradient_report(analysis: dict[str, Any], folder: Path) -> Report:
    """Write the report of `gradients.diagnose`."""
    head, tables = ("done", "step", "p", *(column for column, _ in COLUMNS.values()), "distance, not debiased"), {}
    for group in NAMES:
        body = []
        for point in analysis["points"]:
            for row in point["groups"][group]["rates"]:
                cells = [f"{point['share']:.0%}", str(point["step"]), f"{row['p']:g}"]
                naive = _number(row["naive_distance"]["value"])
                body.append([*cells, *(_bounded(row[name]) for name in COLUMNS), naive])
        tables[group] = head, body
    plots = _plot_gradients(analysis, folder)
    return _write(folder, "gradients", analysis, plots, tables=tables, names=NAMES, main=MAIN, shifted=_shifted)


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
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    count, most = len(analysis["points"]), max(analysis["rates"])
    for axes, (name, (_, title)) in zip(figure.subplots(2, 2).flat, COLUMNS.items(), strict=True):
        for number, point in enumerate(analysis["points"]):
            rows = [row for row in point["groups"][MAIN]["rates"] if row[name]["value"] is not None]
            if rows:
                colour = colormaps["viridis"](0.85 * number / max(count - 1, 1))
                x = [row["p"] + (number - (count - 1) / 2) * 0.012 * most for row in rows]
                label = f"{point['share']:.0%} (step {point['step']})"
                draw(axes, x, [row[name] for row in rows], "o-", colour, label)
        if name == "ratio":
            axes.axhline(1.0, color="0.4", linestyle="--", linewidth=1)
        ends = (min(axes.dataLim.ymin, 0.0) - 0.02, 1.02) if name in ("agreement", "cosine") else (0, None)
        finish(axes, ylim=ends, xlim=(0, most * 1.06), xticks=[0.0, *analysis["rates"]], xlabel="masking rate p")
        axes.set_title(title, fontsize=10, loc="left")
    about = f"{analysis['batches']} batches of {analysis['batch_size']} texts, {analysis['draws']} mask draws each"
    title = f"{analysis['recipe']['name']}, gradients of {NAMES[MAIN]}: {about}"
    return save(figure, title, folder, "gradients")


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
    from matplotlib.figure import Figure

    groups = analysis["groups"]
    axis_names = {"mask": "share of sub-tokens masked", "noise": "share of words misspelt"}
    kinds = {row["kind"] for group in groups for row in group["rows"]}
    panels = [*(kind for kind in axis_names if kind in kinds), "words"]
    figure = Figure(figsize=(4 * max(len(panels), 2), 4.2), layout="constrained")
    means = [row["f1_macro"]["mean"] for group in groups for row in group["rows"]]
    scale = max(min(means) - 0.05, 0.0), min(max(means) + 0.05, 1.0)
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        of_words = panel == "words"
        wanted = ("seen", "unseen") if of_words else ("clean", panel)
        for number, group in enumerate(groups):
            rows = [row for row in group["rows"] if row["kind"] in wanted]
            places = [wanted.index(row["kind"]) if of_words else row["at"] for row in rows]
            shift = (number - (len(groups) - 1) / 2) * (0.08 if of_words else 0.01 * max([*places, 0.1]))
            x, found = [place + shift for place in places], [row["f1_macro"] for row in rows]
            style = "o" if of_words else "o-"
            draw(axes, x, found, style, f"C{number % 10}", f"trained with {group['group']}", scale)
        finish(axes, ylim=scale, xlabel=axis_names.get(panel, ""))
    names = [name.replace(" with", "\nwith") for name in get_task(analysis["task"]).unseen_parts]
    figure.axes[-1].set(xlim=(-0.5, 1.5), xticks=[0, 1], xticklabels=names)
    figure.axes[0].set_ylabel(f"{analysis['split']} macro-F1")
    seeds = max(len(group["seeds"]) for group in groups)
    over = f"mean and 95% interval over {seeds} seeds" if seeds > 1 else "one run each"
    return save(figure, f"Macro-F1 on perturbed texts: {over}", folder, "robustness")
