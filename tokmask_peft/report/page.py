"""The report of a run: read it, look at its mistakes, draw pictures, write one HTML page. Heavy imports are late."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tokmask_peft import __version__
from tokmask_peft.artifacts import Result, Run, RunFolder, open_run
from tokmask_peft.console import baseline_verdict, beside_verdict, calibration_line
from tokmask_peft.data.corpus import merged_labels
from tokmask_peft.errors import ModelError, RunError, TokmaskError, boundary, require, write_whole
from tokmask_peft.html import FIRST, GRID, INK, MUTED, SECOND, Picture, check_page, draw, environment
from tokmask_peft.hub.card import hub_id, limits, loading_snippet, training_facts
from tokmask_peft.tasks import get_task

if TYPE_CHECKING:
    from tokmask_peft.report.examples import Mistakes

Points = list[tuple[float, float]]
Log = Sequence[Mapping[str, Any]]


def prepare(run: str | Path, out: str | Path | None = None) -> tuple[Run, Path]:
    """Read a run and choose the file of its page (`report.html` in it), before heavy imports, or raise an error."""
    found = open_run(run)
    path = check_page(Path(out) if out is not None else found.folder.root / "report.html")
    require("matplotlib", "plots", "a report")
    return found, path


def report_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    examples: bool = True,
    backbone: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Path, str]:
    """Write the report of a run: one HTML file, `out` as for `prepare`, that loads nothing; return it.

    With `examples` the scored split is predicted again, to show the most confident mistakes. That needs the data and
    the backbone, which is loaded from `backbone` if given, and may run code of its own with `trust_remote_code`. Also
    returned is why it shows no mistakes although they were requested; empty if it does.
    """
    found, path = prepare(run, out)
    mistakes, problem = None, ""
    if examples:
        from tokmask_peft.report.examples import find_mistakes

        try:
            mistakes = find_mistakes(found, backbone, trust_remote_code)
        except TokmaskError as error:
            problem = str(error)
    with boundary(f"the page of {run}, from its result.json, log.jsonl and recipe.yaml,", RunError, "bad-result"):
        # the reason itself, which may name folders of this machine, is for the terminal: a page may be sent to anybody
        why = "their data or the backbone could not be read" if problem else "the report was made with --no-examples"
        page = render(found, mistakes, why)
    write_whole(path, page)
    return path, problem


def render(run: Run, mistakes: Mistakes | None, no_mistakes: str = "") -> str:
    """Return the page of a finished run as HTML; `no_mistakes` says why there are no mistakes to show."""
    recipe, result, scores, calibration = run.recipe, run.result, run.result.scored, run.result.calibration
    mixing, reliability = scores.get("by_mixing"), None
    root = run.folder.root
    place = RunFolder(Path("runs", root.name) if root.is_absolute() else root)  # no folders of this machine
    if calibration:
        split = "test" if "test" in calibration else "validation"
        reliability = reliability_picture(calibration[split]["before"], calibration[split]["after"], split)
    template = environment().get_template("run.html.j2")
    return template.render(
        recipe=recipe,
        result=result,
        task=get_task(recipe.data.task),
        split=result.scored_split,
        scores=scores,
        backbone=hub_id(recipe.model.backbone) or f"{Path(recipe.model.backbone).name} (a local folder)",
        verdict=baseline_verdict(scores, result.baseline),
        alerts=alerts(result),
        mixing_picture=mixing_picture(mixing, scores["f1_macro"]) if mixing else None,
        calibration_line=calibration_line(calibration) if calibration else "",
        reliability_picture=reliability,
        curves=training_curves(run.log, result.best_step),
        training=training_facts(recipe, result),
        limits=limits(recipe, result),
        mistakes=mistakes,
        no_mistakes=no_mistakes,
        merged=merged_labels(result.data.get("label_map", {})),
        run=shlex.quote(str(place.root)),
        snippet=loading_snippet(recipe, result, str(place.adapter), _words_are_spaced(run)),
        version=__version__,
    )


def alerts(result: Result) -> list[str]:
    """Return what a reader must know before the scores: warnings of the run, and leaks that were left in."""
    found = beside_verdict(result.warnings) + result.data.get("warnings", [])
    cleaning, split = result.data.get("hygiene", {}), result.scored_split
    keys = ("test_shared", "validation_in_test") if split == "test" else ("validation_shared",)
    if cleaning.get("mode") != "remove" and (shared := sum(cleaning.get(key, 0) for key in keys)):
        problem = f"{shared:,} texts are both in {split} and in another split, and were not removed"
        found.append(f"{problem}: the scores are too high (data.hygiene=remove)")
    if cut := result.scored.get("without_prediction"):
        found.append(f"{cut:,} words of {split} have no prediction and count as errors")
    return found


def _words_are_spaced(run: Run) -> bool:
    """Return whether words were encoded with their leading space, by the tokenizer that is saved with the adapter."""
    adapter = run.folder.adapter
    if not get_task(run.recipe.data.task).words_given or not (adapter / "tokenizer.json").is_file():
        return False
    from tokmask_peft.data.encoding import words_need_a_space
    from tokmask_peft.model.backbone import load_tokenizer

    try:
        no_code = run.recipe.model.model_copy(update={"trust_remote_code": False})
        return words_need_a_space(load_tokenizer(no_code, str(adapter)))
    except ModelError:  # the snippet cannot load it either
        return False


def training_curves(log: Log, best_step: int | None) -> list[Picture]:
    """Draw loss, validation macro-F1 and masking rate by step, if logged and not constant; mark the kept checkpoint."""
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
