"""The report of a sweep (Markdown, LaTeX, a plot and their figures), and the tables and plots of all reports."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tokmask_peft.errors import ExtraError, SweepError, boundary, whole, write_json, write_whole
from tokmask_peft.study.results import analyse, read_sweep
from tokmask_peft.study.statistics import seeds_to_reach, smallest_p

_SIGNS = {"\\": r"\textbackslash{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$"}
LATEX = str.maketrans(_SIGNS | {sign: f"\\{sign}" for sign in "_%&#"})
NAMES = {"f1_macro": "macro-F1", "f1_weighted": "weighted F1"}

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Head and rows."""


@dataclass(frozen=True, slots=True)
class Report:
    """The files of a report, and its text for a terminal."""

    markdown: Path
    statistics: Path
    plots: tuple[Path, ...]
    summary: str
    latex: Path | None = None


def signed(value: float) -> str:
    """Write a difference with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def interval(bounds: Sequence[float] | None) -> str:
    """Write an interval of differences."""
    return "" if bounds is None else f"[{signed(bounds[0])}, {signed(bounds[1])}]"


def mean_sd(found: Mapping[str, Any]) -> str:
    """Write mean ± standard deviation."""
    return f"{found['mean']:.4f}" + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")


def level(found: Mapping[str, Any]) -> str:
    """Write the 95% interval of a mean."""
    return "" if found["interval"] is None else f"[{found['interval'][0]:.4f}, {found['interval'][1]:.4f}]"


def markdown_cell(text: str) -> str:
    """Escape what would end a cell."""
    return text.replace("|", "\\|")


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    head, body = table
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(markdown_cell, row)) + " |" for row in rows)


def plain(table: Table, columns: Sequence[int] | None = None) -> str:
    """Write a table, or some of its columns, for a terminal."""
    rows = [[row[i] for i in columns] if columns else row for row in (table[0], *table[1])]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def latex(text: str) -> str:
    """Escape what LaTeX would read as its own."""
    return text.translate(LATEX)


def matplotlib() -> Any:
    """Return matplotlib.

    Raises:
        ExtraError: it is not installed.
    """
    try:
        import matplotlib as mpl
        import matplotlib.figure
    except ImportError as error:
        raise ExtraError("the plot needs matplotlib: pip install 'tokmask-peft[sweep]'", extra="sweep") from error
    return mpl


def finish(axes: Any) -> None:
    """Remove the upper and right edge of a panel, and draw its horizontal grid lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def save(mpl: Any, figure: Any, folder: Path, name: str) -> tuple[Path, Path]:
    """Write a figure as PNG and SVG; the same figures make the same files."""
    paths = folder / f"{name}.png", folder / f"{name}.svg"
    with mpl.rc_context({"svg.hashsalt": "tokmask"}):
        with whole(paths[0]) as new:
            figure.savefig(new, format="png", dpi=150)
        with whole(paths[1]) as new:
            figure.savefig(new, format="svg", metadata={"Date": None})
    return paths


def score_table(analysis: dict[str, Any]) -> Table:
    """Return mean, deviation and interval of each arm."""
    head = ("arm", "seeds", "macro-F1", "95% interval", "weighted F1", "95% interval", "validation macro-F1", "cost")
    body = []
    for row in analysis["rows"]:
        cost = "1" if row["is_reference"] else ("" if row.get("cost") is None else f"{row['cost']:.2f}")
        macro, weighted = row["f1_macro"], row["f1_weighted"]
        cells = [row["label"], str(len(row["seeds"])), mean_sd(macro), level(macro), mean_sd(weighted), level(weighted)]
        body.append([*cells, mean_sd(row["validation_f1_macro"]), cost])
    return head, body


def difference_table(analysis: dict[str, Any], metric: str) -> Table:
    """Return the paired differences from the reference arm."""
    head = ("arm", "seeds", "difference", "95% t", "95% bootstrap", "p", "p (Holm)", "g_z")
    body = []
    for row, found in _compared(analysis, metric):
        effect = found["effect_size"]
        difference = signed(found["mean"]) + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")
        cells = [row["label"], str(found["n"]), difference, interval(found["interval"]), interval(found["bootstrap"])]
        size = "" if effect is None else f"{effect:+.2f}".replace("-", "−")
        body.append([*cells, f"{found['p_value']:.3g}", f"{found['p_holm']:.3g}", size])
    return head, body


def _compared(analysis: dict[str, Any], metric: str = "f1_macro") -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the rows that are compared with a reference, and their differences."""
    return [(row, found) for row in analysis["rows"] if (found := row.get("difference", {}).get(metric))]


def plot_f1(analysis: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Draw F1 against p, a line per setting and set of regularizers; return the PNG and the SVG.

    Points are seeds, the line goes through their means, bars are 95% intervals of the mean (Student's t). With few
    seeds these can reach far beyond the seeds: the axis follows the seeds, and an arrow marks a bar that is cut.

    Raises:
        ExtraError: matplotlib is not installed.
    """
    mpl = matplotlib()
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(analysis["rows"], key=lambda row: row["p"]):
        parts = [row["regularizers"] if row["regularizers"] not in ("recipe", "none") else "masking alone"]
        parts += [f"{key.rpartition('.')[2]} = {value}" for key, value in row["setting"].items()]
        lines.setdefault("; ".join(parts), []).append(row)
    rates = sorted({row["p"] for row in analysis["rows"]})
    step = min((b - a for a, b in itertools.pairwise(rates)), default=0.1) * min(0.12, 0.5 / len(lines))
    figure = mpl.figure.Figure(figsize=(9.5, 4.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), NAMES, strict=True):
        values = [score for row in analysis["rows"] for score in row[metric]["by_seed"]]
        margin = max(0.35 * (max(values) - min(values)), 0.002)
        floors = [analysis["baseline"][metric]] if analysis["baseline"] else []
        bottom, top = min(values + floors) - margin, min(max(values + floors) + margin, 1.0)
        for number, (name, rows) in enumerate(lines.items()):
            style = {"color": mpl.color_sequences["tab10"][number % 10]}
            x = [row["p"] + (number - (len(lines) - 1) / 2) * step for row in rows]
            axes.plot(x, [row[metric]["mean"] for row in rows], "o-", markersize=5, label=name, **style)
            for place, found in zip(x, (row[metric] for row in rows), strict=True):
                axes.plot([place] * found["n"], found["by_seed"], "_", alpha=0.55, markersize=9, **style)
                low, high = found["interval"] or (None, None)
                if low is not None:
                    axes.plot([place, place], [max(low, bottom), min(high, top)], linewidth=1.3, alpha=0.9, **style)
                if low is not None and low < bottom:
                    axes.plot([place], [bottom], "v", markersize=5, clip_on=False, **style)
                if high is not None and high > top:
                    axes.plot([place], [top], "^", markersize=5, clip_on=False, **style)
        for floor in floors:
            axes.axhline(floor, color="0.4", linestyle="--", linewidth=1, label="character n-grams")
        axes.set(ylim=(bottom, top), xticks=rates, xlabel="masking rate p")
        axes.set_ylabel(f"{analysis['scored_on']} {NAMES[metric]}")
        finish(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    seeds = len(analysis["seeds"])
    figure.suptitle(f"{analysis['sweep']}: mean and 95% interval over {seeds} seed{'s' if seeds > 1 else ''}")
    return save(mpl, figure, folder, "f1_against_p")


TEMPLATES = Environment(
    loader=PackageLoader("tokmask_peft.study"),
    undefined=StrictUndefined,
    autoescape=False,  # noqa: S701 (Markdown, LaTeX and plain text)
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_functions = (signed, interval, mean_sd, markdown, plain, Counter, smallest_p, seeds_to_reach)
TEMPLATES.globals |= {one.__name__: one for one in _functions}
TEMPLATES.filters |= {"latex": latex, "cell": markdown_cell, "g": "{:.3g}".format}


def _render(name: str, context: dict[str, Any]) -> str:
    return TEMPLATES.get_template(f"{name}.j2").render(context)


def sweep_report(sweep: str | Path) -> Report:
    """Compare the arms of a sweep and write `SWEEP/report`.

    Raises:
        SweepError: the folder is not the sweep of a grid, has no finished run, or cannot be written.
        RunError: a result cannot be read.
        ExtraError: matplotlib is not installed.
    """
    with boundary(f"comparing the runs of {sweep}, by its sweep.json and their result.json,", SweepError, "bad-sweep"):
        analysis = analyse(read_sweep(Path(sweep)))
        about = _context(analysis)
        about |= {name: _sentences(name, about) for name in ("findings", "cautions")}
    folder = Path(sweep) / "report"
    report, tex, statistics = folder / "report.md", folder / "table.tex", folder / "statistics.json"
    with boundary(f"writing the report to {folder}", SweepError):
        folder.mkdir(exist_ok=True)
        plots = plot_f1(analysis, folder)
        write_json(statistics, analysis)
        write_whole(report, _render("report.md", about))
        write_whole(tex, _render("table.tex", about))
    return Report(report, statistics, plots, _render("summary.txt", about), tex)


def findings(analysis: dict[str, Any]) -> list[str]:
    """Return sentences about what was found, including what does not favour masking."""
    return _sentences("findings", _context(analysis))


def _sentences(name: str, context: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(_render(name, context).splitlines()))


def _context(analysis: dict[str, Any]) -> dict[str, Any]:
    """Return what the templates of this folder read: the analysis, and what follows from it in several places."""
    rows = analysis["rows"]
    as_recipe = any(row["is_reference"] and row["regularizers"] == "recipe" for row in rows)
    compared = _compared(analysis, "f1_macro")
    by_setting = itertools.groupby(compared, key=lambda pair: pair[0]["setting"])
    return {
        **analysis,
        "choice": analysis["chosen_by_validation"],
        "split": analysis["scored_on"],
        "reference": "p = 0" if as_recipe else "no regularizer",
        "of_arms": any(row["regularizers"] != "recipe" for row in rows),
        "compared": compared,
        "seeds_by_setting": [[found["n"] for _, found in pairs] for _, pairs in by_setting],
        "scores": score_table(analysis),
        "differences": {metric: difference_table(analysis, metric) for metric in NAMES},
    }
