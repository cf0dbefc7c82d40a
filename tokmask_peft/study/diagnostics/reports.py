"""Text and plots of `tokmask diagnose` (gradients against p) and `tokmask robustness` (F1 on perturbed texts)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokmask_peft.artifacts import write_json
from tokmask_peft.errors import RunError
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); choose a folder with --out", code="out") from error


def _write(folder: Path, name: str, text: str, content: dict[str, Any], plots: Any, summary: str) -> Report:
    write_json(folder / f"{name}.json", content)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return Report(folder / f"{name}.md", folder / f"{name}.json", plots, summary)


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _terminal(title: str, table: str, found: Sequence[str], limits: Sequence[str]) -> str:
    return "\n".join([title, table, "", *found, "", *(f"Caution: {line}" for line in limits), ""])


def _versions(analysis: dict[str, Any]) -> str:
    return f"Versions: {', '.join(f'{name} {version}' for name, version in analysis['versions'].items())}."


def gradient_report(analysis: dict[str, Any], folder: Path) -> Report:
    """Write the report of `gradients.diagnose`."""
    recipe, batches = analysis["recipe"], f"{analysis['batches']} batches of {analysis['batch_size']}"
    found, limits = gradient_findings(analysis), _gradient_cautions(analysis)
    parts = [
        f"# {recipe['name']}: gradients under masking",
        f"Trained with p = {recipe['masking']['p']:g}, seed {recipe['seed']}; measured on {batches} training texts "
        f"with {analysis['draws']} mask draws each. 95% intervals over batches.",
        _listed(found),
        "![Gradients against p](gradients.png)",
    ]
    for group in (MAIN, "head", "all"):
        if count := analysis["parameters"][group]:
            parts += [f"## {NAMES[group].capitalize()} ({count:,} values)", markdown(gradient_table(analysis, group))]
    meaning = [f"{name}: {text}" for name, text in analysis["meaning"].items()]
    meaning += [
        f"intervals: {analysis['replicates']} bootstrap draws of batches, expanded percentile (Hesterberg 2015)"
    ]
    parts += ["## Cautions", _listed(limits), "## Meaning", _listed(meaning)]
    parts += [f"All figures are in `gradients.json`. {_versions(analysis)}"]
    title = f"Gradients of {NAMES[MAIN]} ({analysis['parameters'][MAIN]:,} values), 95% intervals over batches"
    text = _terminal(title, plain(gradient_table(analysis, MAIN), range(7)), found, limits)
    return _write(folder, "gradients", "\n\n".join(parts) + "\n", analysis, _plot_gradients(analysis, folder), text)


def gradient_table(analysis: dict[str, Any], group: str) -> Table:
    """Return a row per point and rate."""
    body = []
    for point in analysis["points"]:
        for row in point["groups"][group]["rates"]:
            cells = [f"{point['share']:.0%}", str(point["step"]), f"{row['p']:g}"]
            body.append([*cells, *(bounded(row[name]) for name in COLUMNS), _number(row["naive_distance"]["value"])])
    return ("done", "step", "p", *(column for column, _ in COLUMNS.values()), "distance, not debiased"), body


def bounded(found: dict[str, Any]) -> str:
    """Write a value with its interval."""
    if found["value"] is None:
        return "undefined"
    bounds = found["interval"]
    return _number(found["value"]) + (f" [{', '.join(map(_number, bounds))}]" if bounds is not None else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".replace("-", "−")


def gradient_findings(analysis: dict[str, Any], group: str = MAIN) -> list[str]:
    """Return sentences about what was found for a group of weights."""
    lines, most = [], max(analysis["rates"])
    for point in analysis["points"]:
        found, when = point["groups"][group], f"{point['share']:.0%} of the training"
        at, bounds = found["outweighs_at"]["value"], found["outweighs_at"]["interval"]
        text = f"masking adds less variance than batches have, up to p = {most:g}"
        if at is not None:
            text = f"masking adds more variance than batches have from p = {at:.2f} on"
        if bounds is not None:
            low, high = (f"above {most:g}" if bound is None else f"{bound:.2f}" for bound in bounds)
            text += f" (95% interval: {low})" if bounds == [None, None] else f" (95% interval {low} to {high})"
        lines.append(f"{when}: {text}.")
        lines.extend(f"{when}: {sentence}." for sentence in _shift(found["rates"]))
    return lines


def _shift(rows: list[dict[str, Any]]) -> list[str]:
    """Return at which rates the mean masked gradient differs from the unmasked one."""
    apart: list[tuple[float, float]] = []
    alike: list[tuple[float, float]] = []
    for row in rows:
        distance, bounds = row["distance"]["value"], row["distance_squared"]["interval"]
        if distance is not None and bounds is not None:
            (apart if bounds[0] is not None and bounds[0] > 0 else alike).append((row["p"], distance))
    return [
        f"a batch's mean masked gradient {verdict} its unmasked one at p = {', '.join(f'{p:g}' for p, _ in found)}: "
        f"their distance is {', '.join(f'{distance:.0%}' for _, distance in found)} of its length"
        for found, verdict in ((apart, "differs from"), (alike, "cannot be distinguished from"))
        if found
    ]


def _gradient_cautions(analysis: dict[str, Any]) -> list[str]:
    first = "Before the first step LoRA's B is 0, so that its A has no gradient yet, and the head is random."
    return [
        "Dropout is off in the measurement (the model is in eval mode), and so is NEFTune; in training they add "
        "variance of their own.",
        "These are raw gradients, before clipping and before AdamW scales each weight by its history: how much of the "
        "added variance reaches the weights is not measured.",
        f"One seed, one model: intervals are over {analysis['batches']} batches of {analysis['batch_size']} texts, and "
        "say nothing about other seeds. With so few batches they are rough.",
        "The points see the same batches and masks, and so do the rates; lines over p are smoother than independent "
        "measurements would be.",
        *([first] if any(point["step"] == 0 for point in analysis["points"]) else []),
    ]


def _plot_gradients(analysis: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    mpl = matplotlib()
    figure = mpl.figure.Figure(figsize=(10, 7), layout="constrained")
    count, most = len(analysis["points"]), max(analysis["rates"])
    for axes, (name, (_, title)) in zip(figure.subplots(2, 2).flat, COLUMNS.items(), strict=True):
        values: list[float] = []
        for number, point in enumerate(analysis["points"]):
            rows = [row for row in point["groups"][MAIN]["rates"] if row[name]["value"] is not None]
            if not rows:
                continue
            colour = mpl.colormaps["viridis"](0.85 * number / max(count - 1, 1))
            x = [row["p"] + (number - (count - 1) / 2) * 0.012 * most for row in rows]
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
        is_cosine = name in ("agreement", "cosine")
        axes.set_ylim(*((min([*values, 0.0]) - 0.02, 1.02) if is_cosine else (0, None)))
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
    found, limits = robustness_findings(analysis), robustness_cautions(analysis)
    texts = f"{analysis['texts']:,} {analysis['split']} texts"
    parts = [
        "# Robustness",
        _listed(found),
        "![F1 on perturbed texts](robustness.png)",
        f"Mean ± standard deviation over seeds, with 95% intervals of the mean (Student's t); {texts}.",
    ]
    for metric, name in (("f1_macro", "Macro-F1"), ("f1_weighted", "Weighted F1")):
        parts += [f"## {name}", markdown(robustness_table(analysis, metric))]
    mask = analysis["mask_token"]
    methods = [f"Masked: by the rule of training (unit {mask['unit']}); {mask['token']}."] if mask else []
    methods += [
        "Misspelt: in a share of the words that have a letter, two neighbouring letters are swapped, one is dropped, "
        "inserted or replaced. New letters are of the same script and take the case of their place; marks stay with "
        "their letter.",
        "Unseen: words that no training text of the run has, ignoring case and punctuation at the ends.",
    ]
    parts += ["## Methods", _listed(methods), "## Cautions", _listed(limits), _versions(analysis)]
    text = _terminal(f"Macro-F1 on {texts}", plain(robustness_table(analysis)), found, limits)
    plots = _plot_robustness(analysis, folder)
    return _write(folder, "robustness", "\n\n".join(parts) + "\n", {**analysis, **more}, plots, text)


def _condition(row: dict[str, Any], task: str) -> str:
    if row["kind"] in ("seen", "unseen"):
        return f"{get_task(task).unseen_parts[row['kind'] == 'unseen']} ({row['items']:,.0f})"
    names = {"clean": "as they are", "mask": "{:.0%} of sub-tokens masked", "noise": "{:.0%} of words misspelt"}
    return names[row["kind"]].format(row["at"])


def robustness_table(analysis: dict[str, Any], metric: str = "f1_macro") -> Table:
    """Return a row per condition and a column per group."""
    groups, body = analysis["groups"], []
    for kind, at in dict.fromkeys((row["kind"], row["at"]) for group in groups for row in group["rows"]):
        found = [next((row for row in one["rows"] if (row["kind"], row["at"]) == (kind, at)), None) for one in groups]
        cells = ["" if row is None else f"{mean_sd(row[metric])} {level(row[metric])}".strip() for row in found]
        body.append([_condition(next(row for row in found if row is not None), analysis["task"]), *cells])
    head = ["texts"]
    for group in groups:
        seeds = group["seeds"]
        about = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
        head.append(f"trained with {group['group']}, {about}")
    return head, body


def robustness_findings(analysis: dict[str, Any]) -> list[str]:
    """Return sentences about what masks and misspellings cost each group."""
    lines = []
    for group in analysis["groups"]:
        by_kind = {row["kind"]: row for row in group["rows"]}  # of each kind the largest share
        parts = [
            f"{by_kind[kind]['loss']['mean']:.4f} at {by_kind[kind]['at']:.0%} {name}"
            for kind, name in (("mask", "masked sub-tokens"), ("noise", "misspelt words"))
            if kind in by_kind
        ]
        clean = by_kind["clean"]["f1_macro"]["mean"]
        lines += [f"{group['group']}: macro-F1 {clean:.4f}; loses {' and '.join(parts)}."] if parts else []
    return lines


def robustness_cautions(analysis: dict[str, Any]) -> list[str]:
    """Return sentences about what limits the scores."""
    lines = [
        f"Scores are means over {analysis['disturbances']['draws']} draws of masks and misspellings, the same for "
        "every run. Texts longer than those of training are read in windows, as `tokmask predict` does.",
        "Misspellings are artificial (a swapped, dropped, inserted or replaced letter in a word), not people's.",
        "Texts with unseen words also differ from the others in other ways, as in length and labels: compare a row "
        "between models, not the two rows of one model. Macro-F1 of a part is over the classes that occur in it.",
    ]
    if analysis["split"] != "test":
        lines.append("There are no test texts: these are validation scores, which also chose the checkpoints.")
    reported = [(run["clean"]["f1_macro"], run.get("reported")) for run in analysis["runs"]]
    apart = [abs(found - before) for found, before in reported if before is not None]
    if max(apart, default=0.0) >= VISIBLE:
        lines.append(
            f"On the texts as they are, {sum(one >= VISIBLE for one in apart)} of {len(apart)} runs differ by up to "
            f"{max(apart):.4f} from the score in their result.json: bf16 rounds differently in predictions and in "
            "evaluation, and nothing is truncated here."
        )
    fewest = min(len(group["seeds"]) for group in analysis["groups"])
    if fewest < 2:
        lines.append("One run per line: how much another seed would differ is not known.")
    elif fewest < 5:
        lines.append(f"{fewest} seeds: the intervals are wide, and assume normally distributed scores.")
    return lines


def _plot_robustness(analysis: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    mpl, groups = matplotlib(), analysis["groups"]
    axis_names = {"mask": "share of sub-tokens masked", "noise": "share of words misspelt"}
    kinds = [kind for kind in axis_names if any(row["kind"] == kind for group in groups for row in group["rows"])]
    figure = mpl.figure.Figure(figsize=(4 * max(len(kinds) + 1, 2), 4.2), layout="constrained")
    panels = dict(
        zip([*kinds, "words"], figure.subplots(1, len(kinds) + 1, sharey=True, squeeze=False)[0], strict=True)
    )
    means = [row["f1_macro"]["mean"] for group in groups for row in group["rows"]]
    bottom, top = max(min(means) - 0.05, 0.0), min(max(means) + 0.05, 1.0)
    for number, group in enumerate(groups):
        colour = mpl.color_sequences["tab10"][number % 10]
        for kind, axes in panels.items():
            wanted = ("seen", "unseen") if kind == "words" else ("clean", kind)
            rows = [row for row in group["rows"] if row["kind"] in wanted]
            places = [wanted.index(row["kind"]) if kind == "words" else row["at"] for row in rows]
            shift = (number - (len(groups) - 1) / 2) * (0.08 if kind == "words" else 0.01 * max([*places, 0.1]))
            style = "o" if kind == "words" else "o-"
            x = [place + shift for place in places]
            axes.plot(x, [row["f1_macro"]["mean"] for row in rows], style, color=colour, markersize=5)
            for place, row in zip(x, rows, strict=True):
                if row["f1_macro"]["interval"] is not None:
                    low, high = row["f1_macro"]["interval"]
                    axes.plot([place, place], [max(low, bottom), min(high, top)], color=colour, linewidth=1.3)
        next(iter(panels.values())).plot([], [], "o-", color=colour, label=f"trained with {group['group']}")
    for kind, axes in panels.items():
        axes.set_ylim(bottom, top)
        axes.set_xlabel(axis_names.get(kind, ""))
        finish(axes)
    names = [name.replace(" with", "\nwith") for name in get_task(analysis["task"]).unseen_parts]
    panels["words"].set_xticks([0, 1], names)
    panels["words"].set_xlim(-0.5, 1.5)
    figure.axes[0].set_ylabel(f"{analysis['split']} macro-F1")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    seeds = max(len(group["seeds"]) for group in groups)
    over = f"mean and 95% interval over {seeds} seeds" if seeds > 1 else "one run each"
    figure.suptitle(f"Macro-F1 on perturbed texts: {over}", fontsize=11)
    return save(mpl, figure, folder, "robustness")
