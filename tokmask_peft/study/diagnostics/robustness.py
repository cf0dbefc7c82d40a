"""`tokmask robustness`: how scores fall on masked and misspelt texts and on unseen words, against p of training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokmask_peft.console import make_console
from tokmask_peft.data import load_corpus
from tokmask_peft.errors import RunError
from tokmask_peft.inference.load import load
from tokmask_peft.inference.saved import find_saved
from tokmask_peft.study.diagnostics.disturbed import METRICS, Disturbances, score_disturbed
from tokmask_peft.study.diagnostics.robustness_plan import Member
from tokmask_peft.study.diagnostics.robustness_plot import plot_robustness
from tokmask_peft.study.diagnostics.robustness_report import markdown_report, summary
from tokmask_peft.study.diagnostics.unseen import vocabulary
from tokmask_peft.study.statistics import spread
from tokmask_peft.training.environment import versions
from tokmask_peft.training.run_folder import write_json

_FILE = "robustness.json"


@dataclass(frozen=True, slots=True)
class RobustnessReport:
    """Where the report lies, and what it says in short."""

    markdown: Path
    statistics: Path
    plots: tuple[Path, ...]
    summary: str


def robustness(
    members: Sequence[Member],
    what: Disturbances,
    folder: Path,
    *,
    backbone: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> RobustnessReport:
    """Score the runs and write the report; a run that was scored before in the same way is not scored again.

    Args:
        members: the runs.
        what: is done to their texts.
        folder: to write to.
        backbone: load the backbone from here.
        device: to compute on.
        quiet: print nothing.

    Raises:
        RunError, DataError, ModelError: with what to do.
    """
    console = make_console(quiet)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); choose a folder with --out") from error
    done = _read(folder / _FILE)
    runs: list[dict[str, Any]] = []
    for number, member in enumerate(members, start=1):
        key = _key(member, what)
        found = done.get(key)
        console.print(
            f"{number} of {len(members)}: {member.run.root} ({member.group}){'' if found is None else ', known'}",
            markup=False,
        )
        runs.append(found or {"key": key, **_score(member, what, backbone, device)})
        runs[-1]["group"] = member.group
        done[key] = runs[-1]
        write_json(folder / _FILE, {"runs": runs, "known": _others(done, runs)})
    analysis = analyse(runs, what)
    write_json(folder / _FILE, {**analysis, "known": _others(done, runs)})
    plots = plot_robustness(analysis, folder)
    (folder / "robustness.md").write_text(markdown_report(analysis), encoding="utf-8")
    return RobustnessReport(folder / "robustness.md", folder / _FILE, tuple(plots), summary(analysis))


def _score(member: Member, what: Disturbances, backbone: str | None, device: str | None) -> dict[str, Any]:
    recipe = member.recipe
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    split = "test" if corpus.test else "validation"
    classifier = load(find_saved(member.run.root, backbone), device)
    found = score_disturbed(classifier, corpus.test or corpus.validation, vocabulary(corpus.train), what)
    about = {"run": str(member.run.root), "seed": recipe.seed, "p": recipe.masking.p, "split": split}
    mask = None
    if what.rates:  # a model for which there is no mask token can still be scored on the rest
        mask = {"unit": recipe.masking.unit, "token": classifier.occlusion.mask_token.reason}
    found["reported"] = None
    if member.run.finished() and what.limit is None:
        found["reported"] = json.loads(member.run.result.read_text(encoding="utf-8")).get(split, {}).get("f1_macro")
    return {**about, "task": recipe.data.task, "mask_token": mask, **found}


def analyse(runs: Sequence[dict[str, Any]], what: Disturbances) -> dict[str, Any]:
    """Return means over the runs of each group, JSON-able."""
    groups = []
    for name in dict.fromkeys(run["group"] for run in runs):
        own = [run for run in runs if run["group"] == name]
        rows = [{"kind": "clean", "at": 0.0, **_over_runs([run["clean"] for run in own], own)}]
        for kind in ("mask", "noise"):
            for number, at in enumerate(one["at"] for one in own[0][kind]):
                rows.append({"kind": kind, "at": at, **_over_runs([run[kind][number] for run in own], own)})
        for kind in ("seen", "unseen"):
            parts = [run["words"][kind] for run in own]
            if all(part["items"] for part in parts):
                items = sum(part["items"] for part in parts) / len(parts)
                rows.append({"kind": kind, "at": 0.0, "items": items, **_over_runs(parts, own)})
        groups.append({"group": name, "p": own[0]["p"], "seeds": [run["seed"] for run in own], "rows": rows})
    return {
        "disturbances": what.to_dict(),
        "task": runs[0]["task"],
        "split": runs[0]["split"],
        "texts": runs[0]["texts"],
        "mask_token": runs[0]["mask_token"],
        "groups": groups,
        "runs": list(runs),
        "versions": versions(),
    }


def _over_runs(parts: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, deviation and interval over runs of the scores, and of what macro-F1 lost against clean texts."""
    found: dict[str, Any] = {metric: spread([part[metric] for part in parts]) for metric in METRICS}
    found["loss"] = spread([run["clean"]["f1_macro"] - part["f1_macro"] for part, run in zip(parts, runs, strict=True)])
    return found


def _key(member: Member, what: Disturbances) -> str:
    """Return what a score depends on: the adapter's weights and the disturbances."""
    weights = hashlib.sha256()
    for file in sorted(member.run.adapter.glob("adapter_model.*")):
        weights.update(file.read_bytes())
    content = [str(member.run.root.resolve()), weights.hexdigest(), what.to_dict()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _others(done: dict[str, dict[str, Any]], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that were scored by earlier commands and not asked for in this one."""
    asked = {run["key"] for run in runs}
    return [run for key, run in done.items() if key not in asked]


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Return the runs that were scored before, by key."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {run["key"]: run for run in (*found["runs"], *found.get("known", ()))}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
