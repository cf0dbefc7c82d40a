"""The report of a run: read it, look at its mistakes, write one HTML page. Heavy libraries are imported late."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tokmask_peft import __version__
from tokmask_peft.artifacts import Result, Run, open_run
from tokmask_peft.console import baseline_verdict, beside_verdict, calibration_line
from tokmask_peft.data.corpus import merged_labels
from tokmask_peft.errors import ModelError, RunError, TokmaskError, boundary, require, write_whole
from tokmask_peft.html import check_page, environment
from tokmask_peft.hub.card import hub_id, limits, loading_snippet, training_facts
from tokmask_peft.report.pictures import mixing_picture, reliability_picture, training_curves
from tokmask_peft.tasks import get_task

if TYPE_CHECKING:
    from tokmask_peft.report.examples import Mistakes


def prepare(run: str | Path, out: str | Path | None = None) -> tuple[Run, Path]:
    """Read a run and choose the file of its page (`report.html` in the run folder), before heavy libraries are loaded.

    Raises:
        RunError: the folder is not a finished run, or the file cannot be written or is not a report.
        ExtraError: matplotlib is not installed.
    """
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
    """Write the report of a run: one HTML file, `out` as for `prepare`, that loads nothing.

    With `examples` the scored split is predicted again, to show the most confident mistakes. That needs the data and
    the backbone, which is loaded from `backbone` if given, and may run code of its own with `trust_remote_code`.

    Returns:
        The file, and why it shows no mistakes although they were requested; empty if it does.
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
        page = render(found, mistakes, problem or "the report was made with --no-examples")
    write_whole(path, page)
    return path, problem


def render(run: Run, mistakes: Mistakes | None, no_mistakes: str = "") -> str:
    """Return the page of a finished run as HTML; `no_mistakes` says why there are no mistakes to show."""
    recipe, result, scores, calibration = run.recipe, run.result, run.result.scored, run.result.calibration
    mixing, reliability = scores.get("by_mixing"), None
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
        run=shlex.quote(str(run.folder.root)),
        snippet=loading_snippet(recipe, result, str(run.folder.adapter), _words_are_spaced(run)),
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
