"""The report of a sweep (Markdown, LaTeX, a plot and their figures), and the templates, tables and plots of others."""

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tokmask_peft import __version__, html
from tokmask_peft.errors import SweepError, boundary, require, whole, write_json, write_whole
from tokmask_peft.html import FIRST, MUTED, SECOND, Picture
from tokmask_peft.study.plan import Arm, explained
from tokmask_peft.study.results import analyse, read_sweep
from tokmask_peft.study.statistics import seeds_to_reach, smallest_p
from tokmask_peft.tasks import get_task

LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {sign: f"\\{sign}" for sign in "_%&#${}"}
)
NAMES = {"f1_macro": "macro-F1", "f1_weighted": "weighted F1"}
ALPHA = 0.05
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # head and rows


@dataclass(frozen=True, slots=True)
class Report:
    """The files of a report, and its text for a terminal."""

    markdown: Path
    statistics: Path
    plots: tuple[Path, ...]
    summary: str
    latex: Path | None = None
    page: Path | None = None


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
    """Write the 95% interval of a mean score, which Student's t lets go below 0 and above 1."""
    low, high = found["interval"] or (0.0, 1.0)
    return "" if found["interval"] is None else f"[{max(low, 0.0):.4f}, {min(high, 1.0):.4f}]"


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    rows = [table[0], ["---"] * len(table[0]), *table[1]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def plain(table: Table, columns: Sequence[int] | None = None) -> str:
    """Write a table, or some of its columns, for a terminal."""
    rows = [[row[i] for i in columns] if columns else row for row in (table[0], *table[1])]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


TEMPLATES = Environment(
    loader=PackageLoader("tokmask_peft.study"),
    undefined=StrictUndefined,
    autoescape=False,  # noqa: S701 (Markdown, LaTeX and plain text)
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
for function in (signed, interval, mean_sd, Counter, smallest_p, seeds_to_reach):
    TEMPLATES.globals[function.__name__] = function
TEMPLATES.filters |= {
    "cell": lambda text: text.replace("|", "\\|"),
    "count": "{:,}".format,
    "g": "{:.3g}".format,
    "latex": lambda text: text.translate(LATEX),
    "lines": lambda text, *before: "\n".join("".join((*before, line)) for line in text.splitlines()),
    "markdown": markdown,
    "name": lambda path: Path(path).name,
    "number": "{:g}".format,
    "percent": "{:.0%}".format,
    "plain": plain,
    "score": "{:.4f}".format,
}


def render(template: str, **values: Any) -> str:
    """Return the text of a template; a value that is missing is an error."""
    return TEMPLATES.get_template(f"{template}.j2").render(values)


def draw(
    axes: Any,
    x: Sequence[float],
    found: Iterable[Mapping[str, Any]],
    style: str,
    colour: Any,
    label: str | None = None,
    scale: tuple[float, float] = (-math.inf, math.inf),
) -> None:
    """Draw values, or means, and a bar for each interval; an arrow marks a bar that is cut where the scale ends."""
    found = list(found)
    axes.plot(x, [one.get("value", one.get("mean")) for one in found], style, color=colour, markersize=5, label=label)
    for place, (low, high) in zip(x, (one["interval"] or (None, None) for one in found), strict=True):
        if low is not None and high is not None:
            axes.plot([place, place], [max(low, scale[0]), min(high, scale[1])], color=colour, linewidth=1.3)
            for end, mark, is_cut in ((scale[0], "v", low < scale[0]), (scale[1], "^", high > scale[1])):
                if is_cut:
                    axes.plot([place], [end], mark, color=colour, markersize=5, clip_on=False)


def finish(axes: Any, **settings: Any) -> None:
    """Set what a panel shows, remove its upper and right edge, and draw its horizontal grid lines."""
    axes.set(**settings)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def save(figure: Any, title: str, folder: Path, name: str) -> tuple[Path, Path]:
    """Give a figure its title and legend, and write it as PNG and SVG; the same figures make the same files."""
    from matplotlib import rc_context

    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    figure.suptitle(title, fontsize=11)
    paths = folder / f"{name}.png", folder / f"{name}.svg"
    with rc_context({"svg.hashsalt": "tokmask"}):
        with whole(paths[0]) as new:
            figure.savefig(new, format="png", dpi=150)
        with whole(paths[1]) as new:
            figure.savefig(new, format="svg", metadata={"Date": None})
    return paths


def score_table(analysis: dict[str, Any]) -> Table:
    """Return mean, deviation and interval of each arm."""
    head = ["arm", "seeds", "macro-F1", "95% interval", "weighted F1", "95% interval", "validation macro-F1", "cost"]
    entities = ["f1_entities"] if "f1_entities" in analysis["rows"][0] else []
    body = []
    for row in analysis["rows"]:
        cells = [row["label"], str(len(row["seeds"]))]
        for metric in NAMES:
            cells += [mean_sd(row[metric]), level(row[metric])]
        cost = "1" if row["is_reference"] else "" if row.get("cost") is None else f"{row['cost']:.2f}"
        cells += [mean_sd(row["validation_f1_macro"]), cost]
        for metric in entities:
            cells += [mean_sd(row[metric]), level(row[metric])]
        body.append(cells)
    return [*head, *(["entity F1", "95% interval"] if entities else [])], body


def difference_table(analysis: dict[str, Any], metric: str) -> Table:
    """Return the paired differences from the reference arm."""
    head = ("arm", "seeds", "difference", "95% t", "95% bootstrap", "p", "p (Holm)", "g_z")
    body = []
    for row, found in _compared(analysis, metric):
        difference = signed(found["mean"]) + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")
        cells = [row["label"], str(found["n"]), difference, interval(found["interval"]), interval(found["bootstrap"])]
        size = "" if found["effect_size"] is None else f"{found['effect_size']:+.2f}".replace("-", "−")
        body.append([*cells, f"{found['p_value']:.3g}", f"{found['p_holm']:.3g}", size])
    return head, body


def _compared(analysis: dict[str, Any], metric: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the rows that are compared with a reference, and their differences."""
    return [(row, found) for row in analysis["rows"] if (found := row.get("difference", {}).get(metric))]


def plot_f1(analysis: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Draw F1 against p, a line per setting and set of regularizers; return the PNG and the SVG.

    If there is one p, or an arm masks at a rate of its own, the arms stand next to each other instead.
    Points are seeds, the line goes through their means, bars are 95% intervals of the mean (Student's t). With few
    seeds these can reach far beyond the seeds: the axis follows the seeds.
    """
    from matplotlib.figure import Figure

    rates = sorted({row["p"] for row in analysis["rows"]})
    at_zero = (Arm(row["regularizers"], "0") for row in analysis["rows"] if row["p"] == 0)
    by_arm = len(rates) == 1 or not all(arm.is_unmasked for arm in at_zero)
    lines: dict[str, list[dict[str, Any]]] = {"mean": analysis["rows"]} if by_arm else {}
    for row in () if by_arm else sorted(analysis["rows"], key=lambda row: row["p"]):
        parts = [row["regularizers"] if row["regularizers"] not in ("recipe", "none") else "masking alone"]
        parts += [f"{key.rpartition('.')[2]} = {value}" for key, value in row["setting"].items()]
        lines.setdefault("; ".join(parts), []).append(row)
    step = min((b - a for a, b in itertools.pairwise(rates)), default=0.1) * min(0.12, 0.5 / len(lines))
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), NAMES, strict=True):
        values = [score for row in analysis["rows"] for score in row[metric]["by_seed"]]
        margin = max(0.35 * (max(values) - min(values)), 0.002)
        floors = [analysis["baseline"][metric]] if analysis["baseline"] else []
        scale = max(min(values + floors) - margin, 0.0), min(max(values + floors) + margin, 1.0)
        for number, (name, rows) in enumerate(lines.items()):
            colour = f"C{number % 10}"
            x = [*range(len(rows))] if by_arm else [row["p"] + (number - (len(lines) - 1) / 2) * step for row in rows]
            label = name if len(lines) > 1 or floors else None
            draw(axes, x, (row[metric] for row in rows), "o" if by_arm else "o-", colour, label, scale)
            for place, found in zip(x, (row[metric] for row in rows), strict=True):
                axes.plot([place] * found["n"], found["by_seed"], "_", alpha=0.55, markersize=9, color=colour)
        for floor in floors:
            axes.axhline(floor, color="0.4", linestyle="--", linewidth=1, label="character n-grams")
        name = f"{analysis['scored_on']} {NAMES[metric]}"
        finish(axes, ylim=scale, xticks=rates, xlabel="masking rate p", ylabel=name)
        if by_arm:
            axes.set(xlabel="", xlim=(-0.5, len(rows) - 0.5))
            labels = ["\n".join(textwrap.wrap(row["label"], 18)) for row in rows]
            axes.set_xticks(range(len(rows)), labels, rotation=40, ha="right", rotation_mode="anchor")
    seeds = len(analysis["seeds"])
    title = f"{analysis['sweep']}: mean and 95% interval over {seeds} seed{'s' if seeds > 1 else ''}"
    return save(figure, title, folder, "f1_against_p")


def verdict(
    compared: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], reference: str, analysis: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return sentences on whether an arm differs from the reference, and beats n-grams, each with its kind."""
    clear = [(row, one) for row, one in compared if one["p_holm"] <= ALPHA]
    kind, sentence = "", "There is nothing to compare: the sweep has no reference, or only that."
    if compared:
        row, one = max(clear or compared, key=lambda pair: abs(pair[1]["mean"]))
        found = f"macro-F1 {signed(one['mean'])} on average over {one['n']} seeds"
        found += f", 95% interval {interval(one['interval'])}" if one["interval"] else ""
        found += f", p = {one['p_holm']:.3g} after Holm's correction."
        few = not clear and all(
            len(counts) * smallest_p(max(counts)) > ALPHA for counts in analysis["seeds_by_setting"]
        )
        state = "can be established with this few seeds" if few else "is established"
        sentence = f"No difference from {reference} {state}. The largest is {row['label']}: {found}"
    if clear:
        kind = "good" if one["mean"] > 0 else "bad"
        others = len(clear) - 1
        more = f" So do{'es' * (others == 1)} {others} more of the {len(compared)} arms." if others else ""
        sentence = f"{row['label']} differs from {reference}: {found}{more}"
    sentences = [(sentence, kind)]
    if floor := analysis["baseline"]:
        best = max(analysis["rows"], key=lambda row: row["f1_macro"]["mean"])
        gain = best["f1_macro"]["mean"] - floor["f1_macro"]
        place = "above character n-grams" if gain > 0 else "not above character n-grams: use these, or other settings"
        sentence = f"The best arm ({best['label']}) is {place} (macro-F1 {signed(gain)} on average)."
        sentences.append((sentence, "" if gain > 0 else "bad"))
    return sentences


def forest(
    name: str, rows: Sequence[tuple[str, Mapping[str, Any]]], line: float | None, what: str, least: float, most: float
) -> Markup:
    """Draw for each arm the seeds, their mean and its 95% interval, on one axis, with a dashed line at a value.

    The axis follows the seeds, from `least` to `most`.
    """
    labels = ["\n".join(textwrap.wrap(label, 18)) for label, _ in rows]
    seeds = [value for _, one in rows for value in one["by_seed"]] + ([line] if line is not None else [])
    margin = max(0.35 * (max(seeds) - min(seeds)), 0.002)
    scale = max(min(seeds) - margin, least), min(max(seeds) + margin, most)

    def paint(axes: Any) -> None:
        if line is not None:
            axes.axvline(line, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for place, (_, one) in enumerate(rows):
            axes.plot(one["by_seed"], [place] * len(one["by_seed"]), "|", color=SECOND, markersize=9)
            if one["interval"] is not None:
                low, high = max(one["interval"][0], scale[0]), min(one["interval"][1], scale[1])
                axes.plot([low, high], [place, place], color=FIRST, linewidth=1.6)
            axes.plot([one["mean"]], [place], "o", color=FIRST, markersize=6)
        axes.set_yticks(range(len(rows)), labels)
        axes.set(xlim=scale, ylim=(len(rows) - 0.5, -0.5), xlabel=what)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(length=0)
        axes.grid(visible=False, axis="y")

    listed = "; ".join(f"{label} {one['mean']:+.4f}" for label, one in rows)
    return html.draw(name, f"{what} by arm: {listed}.", paint, (4.2, 0.9 + 0.42 * len(rows)))


def sweep_page(about: Mapping[str, Any]) -> str:
    """Return the page of a sweep as HTML, from what its other texts are made of: the verdict first."""
    compared, split = about["compared"], about["split"]
    floor, against = about["baseline"] and about["baseline"]["f1_macro"], about["reference"]
    note = "Marks are seeds, points means; bars are 95% intervals of the mean (Student's t), cut where the axis ends."
    means = [(row["label"], row["f1_macro"]) for row in about["rows"]]
    svg = forest("means", means, floor, f"macro-F1 on {split}", 0.0, 1.0)
    pictures = [Picture(svg, note + (" The dashed line is the score of character n-grams." if floor else ""))]
    if compared:
        gains = [(row["label"], one) for row, one in compared]
        svg = forest("gains", gains, 0.0, f"difference in macro-F1 ({split})", -1.0, 1.0)
        note = f"Differences from {against}, seed by seed. A bar that crosses 0 does not establish a difference; "
        note += "one that does not may still be chance, since bars are not corrected for the number of arms."
        pictures.append(Picture(svg, note))
    given = {**about, "task": get_task(about["task"]), "version": __version__, "signed": signed, "pictures": pictures}
    given["legend"] = explained(row["arm"] for row in about["rows"])
    sentences = verdict(compared, f"the reference ({against})", about)
    return html.environment().get_template("sweep.html.j2").render(**given, verdict=sentences)


def described(analysis: dict[str, Any]) -> dict[str, Any]:
    """Return what the texts of a report are made of: the analysis, its tables, and sentences."""
    rows, compared = analysis["rows"], _compared(analysis, "f1_macro")
    names = NAMES | ({"f1_entities": "entity F1"} if "f1_entities" in rows[0] else {})
    as_recipe = any(row["is_reference"] and row["regularizers"] == "recipe" for row in rows)
    by_setting = itertools.groupby(compared, key=lambda pair: pair[0]["setting"])
    about = {
        **analysis,
        "choice": analysis["chosen_by_validation"],
        "split": analysis["scored_on"],
        "reference": "p = 0" if as_recipe else "no regularizer",
        "of_arms": any(row["regularizers"] != "recipe" for row in rows),
        "compared": compared,
        "seeds_by_setting": [[found["n"] for _, found in pairs] for _, pairs in by_setting],
        "scores": score_table(analysis),
        "differences": {metric: difference_table(analysis, metric) for metric in names},
        "names": names,
    }
    return about | {name: dict.fromkeys(render(name, **about).splitlines()) for name in ("findings", "cautions")}


def sweep_report(sweep: str | Path, page: str | Path | None = None) -> Report:
    """Compare the arms of a sweep and write `SWEEP/report`; its page is `report.html` there, or `page`."""
    require("matplotlib", "sweep", "the plot")
    with boundary(f"comparing the runs of {sweep}, by its sweep.json and their result.json,", SweepError, "bad-sweep"):
        analysis = analyse(read_sweep(Path(sweep)))
    about, folder = described(analysis), Path(sweep) / "report"
    text, tex, statistics = folder / "report.md", folder / "table.tex", folder / "statistics.json"
    shown = folder / "report.html" if page is None else html.check_page(Path(page))
    with boundary(f"writing the report to {folder}", SweepError):
        folder.mkdir(exist_ok=True)
        plots = plot_f1(analysis, folder)
        write_json(statistics, analysis)
        write_whole(text, render("report.md", **about))
        write_whole(tex, render("table.tex", **about))
        write_whole(shown, sweep_page(about))
    return Report(text, statistics, plots, render("summary.txt", **about), tex, shown)
