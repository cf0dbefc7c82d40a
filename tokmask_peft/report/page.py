"""Make the report of a run: read it, look at its mistakes, write the page. Imports what is heavy when it gets there."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from tokmask_peft import __version__
from tokmask_peft.artifacts import Record
from tokmask_peft.console import baseline_verdict, calibration_line
from tokmask_peft.data.corpus import merged_labels
from tokmask_peft.errors import ModelError, RunError, TokmaskError
from tokmask_peft.hub.card import AUTO, hub_id, limit_lines, loading_snippet, training_lines
from tokmask_peft.inference.display import influence_words, strongest_words
from tokmask_peft.report.pictures import (
    Picture,
    mixing_picture,
    reliability_picture,
    require_matplotlib,
    training_curves,
)

if TYPE_CHECKING:
    from tokmask_peft.report.examples import Mistakes

_FINDINGS = {
    "duplicates": ("repeated in train", "duplicates"),
    "conflicting": ("in train with different labels", "conflicting"),
    "train_in_validation": ("in train and in validation", "validation_shared"),
    "train_in_test": ("in train and in test", "test_shared"),
    "validation_in_test": ("in validation and in test", "validation_in_test"),
}


def data_section(data: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """Return sizes, cuts, merged labels, duplicates and leaks for the page.

    Args:
        data: the part `data` of `result.json`.
        max_length: sub-tokens at which texts were cut.
    """
    cuts = data.get("truncation", {})
    found = data["hygiene"]
    examples = found.get("examples", {})
    return {
        "max_length": max_length,
        "splits": [
            {
                "name": name,
                "source": file_name(split["source"]),
                "texts": split["texts"],
                "words": split["words"],
                "labels": split.get("labels", {}),
                "texts_cut": cuts.get(name, {}).get("texts_cut", 0),
                "words_cut": cuts.get(name, {}).get("words_cut", 0),
            }
            for name, split in data["splits"].items()
        ],
        "merged": _merged(data.get("label_map", {})),
        "hygiene": [
            {"what": what, "texts": found.get(count, 0), "examples": examples.get(kind, [])}
            for kind, (what, count) in _FINDINGS.items()
        ],
        "removed": _removed(found),
        "warnings": data.get("warnings", []),
    }


def file_name(source: str) -> str:
    """Return the source of a split without the folders of the machine it lay on."""
    for kind in (PurePosixPath, PureWindowsPath):
        if (path := kind(source)).is_absolute():
            return path.name
    return source


def _merged(label_map: Mapping[str, Any]) -> str:
    return ", ".join(f"{old} → {new} ({count:,})" for old, new, count in merged_labels(label_map))


def _removed(found: Mapping[str, Any]) -> str:
    if found.get("mode") != "remove":
        return "Nothing was removed: the scores include what is shared."
    gone = {"train": found.get("removed_from_train", 0), "validation": found.get("removed_from_validation", 0)}
    listed = " and ".join(f"{count:,} from {name}" for name, count in gone.items() if count)
    return f"Removed: {listed}." if listed else "Nothing had to be removed."


_TASKS = {"sequence": "one label per text", "token": "one label per word"}
_THINGS = {"sequence": "texts", "token": "words"}
_CLEAR = 0.01  # macro-F1 above the baseline from which on the verdict is green
_DARKEST = 0.55  # opacity of a cell that holds its whole row


def environment() -> Environment:
    """Return the templates of the package; every value is escaped, and one that is missing is an error."""
    found = Environment(
        loader=ChoiceLoader(
            [PackageLoader("tokmask_peft.report", "templates"), PackageLoader("tokmask_peft", "inference")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "score": lambda value: f"{value:.4f}",
        "count": lambda value: f"{value:,}",
        "share": _share,
        "tinted": lambda mistake: influence_words(mistake.words, mistake.influences, mistake.word),
        "strongest": lambda mistake: strongest_words(mistake.words, mistake.influences),
    }
    return found


def render(record: Record, mistakes: Mistakes | None, no_mistakes: str = "") -> str:
    """Return the page of a run as HTML.

    Args:
        record: the run.
        mistakes: its most confident mistakes.
        no_mistakes: why there are none to show.
    """
    result, recipe = record.result, record.recipe
    context = {
        "name": recipe.name,
        "facts": _facts(record),
        "tiles": _tiles(record),
        "verdict": _verdict(record),
        "splits": _splits(result),
        "things": _THINGS[recipe.data.task],
        "token": recipe.data.task == "token",
        "split": record.split,
        "scores": record.scores,
        "baseline": result.get("baseline"),
        "caution": _caution(record),
        "limits": [line.removeprefix("- ") for line in limit_lines(recipe, result, 1)],
        "confusion": _confusion(record.scores["confusion"]),
        "mixing": _mixing(record.scores),
        "calibration": _calibration(result),
        "curves": training_curves(record.log, result.get("best_step")),
        "training": [line.removeprefix("- ") for line in training_lines(recipe, result)],
        "mistakes": None if mistakes is None else _told(record, mistakes),
        "no_mistakes": no_mistakes,
        "labels": result["labels"],
        "data": data_section(result["data"], recipe.data.max_length),
        "decisions": result.get("decisions", []),
        "speed": _speed(result.get("speed", {})),
        "commands": _commands(record),
        "snippet": loading_snippet(
            recipe, list(result["labels"]), AUTO[recipe.data.task], str(record.run.adapter), _spaced_words(record)
        ),
        "version": __version__,
    }
    sections = {
        "scores": "Scores",
        "classes": "By class",
        "mixing": "By code-mixing" if context["mixing"] else None,
        "calibration": "Calibration",
        "training": "Training",
        "mistakes": "Mistakes",
        "data": "Data",
        "decisions": "Decisions",
        "use": "Use it",
    }
    context["sections"] = [(anchor, title) for anchor, title in sections.items() if title]
    return environment().get_template("run.html.j2").render(context)


def _share(chance: float) -> str:
    return "above 99.9%" if 0.9995 <= chance < 1 else f"{100 * chance:.1f}%"


def _facts(record: Record) -> list[tuple[str, str]]:
    recipe = record.recipe
    backbone = hub_id(recipe.model.backbone) or f"{Path(recipe.model.backbone).name} (a local folder)"
    return [
        ("task", f"{_TASKS[recipe.data.task]}, {len(record.result['labels'])} labels"),
        ("backbone", backbone),
        ("masking rate", f"p = {recipe.masking.p:g}"),
        ("seed", str(recipe.seed)),
    ]


def _tiles(record: Record) -> list[tuple[str, float]]:
    scores, split = record.scores, record.split
    tiles = [(f"macro-F1 on {split}", scores["f1_macro"]), (f"accuracy on {split}", scores["accuracy"])]
    if split == "test":
        tiles.insert(1, ("macro-F1 on validation", record.result["validation"]["f1_macro"]))
    if floor := record.result.get("baseline"):
        tiles.append(("macro-F1 of n-grams", floor["f1_macro"]))
    return tiles


def _verdict(record: Record) -> dict[str, str]:
    """Return whether the adapter beats the baseline, in words and as a mood for the colour."""
    if not (sentence := baseline_verdict(record.result)):
        return {"mood": "", "text": "No baseline was scored: nothing says whether the adapter is worth its effort."}
    difference = record.scores["f1_macro"] - record.result["baseline"]["f1_macro"]
    mood = "good" if difference >= _CLEAR else "" if difference > 0 else "bad"
    return {"mood": mood, "text": sentence}


def _splits(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = {
        "test": "test",
        "validation": "validation",
        "baseline": "n-gram baseline",
    }
    return [(name, result[key]) for key, name in names.items() if result.get(key)]


def _caution(record: Record) -> str:
    chosen = "Validation selected the checkpoint"
    if record.split == "validation":
        return f"{chosen}, and there was no test split: the scores flatter the adapter. They are of one run, one seed."
    return f"{chosen}; test was scored once. One run, one seed: differences of a point or two may be chance."


def _confusion(confusion: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the rows of the matrix with the shade of each cell."""
    labels, rows = confusion["labels"], []
    for place, (label, numbers) in enumerate(zip(labels, confusion["matrix"], strict=False)):
        whole = max(sum(numbers), 1)
        cells = [
            {
                "number": number,
                "right": column == place,
                "weight": f"{_DARKEST * (number / whole) ** 0.5:.2f}",  # a root: rare errors are to be seen
                "share": f"{labels[column]}: {100 * number / whole:.1f}% of {label}",
            }
            for column, number in enumerate(numbers)
        ]
        rows.append((label, cells))
    return rows


def _mixing(scores: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = scores.get("by_mixing")
    return {"rows": rows, "picture": mixing_picture(rows, scores["f1_macro"])} if rows else None


def _calibration(result: Mapping[str, Any]) -> dict[str, Any] | None:
    calibration = result.get("calibration")
    if not calibration:
        return None
    split = "test" if "test" in calibration else "validation"
    picture: Picture | None = reliability_picture(calibration[split]["before"], calibration[split]["after"], split)
    parts = [(name, calibration[name]) for name in ("test", "validation") if name in calibration]
    return {"sentence": calibration_line(calibration), "picture": picture, "parts": parts}


def _told(record: Record, mistakes: Mistakes) -> dict[str, Any]:
    """Return the mistakes, with a word on data that are no longer those of the scores."""
    counted = record.scores["items"]
    whole = mistakes.texts == mistakes.of
    changed = ""
    if whole and mistakes.items != counted:
        things = _THINGS[record.recipe.data.task]
        changed = (
            f"The data have changed since training: {mistakes.items:,} {things} now, {counted:,} in the scores above."
        )
    return {**{name: getattr(mistakes, name) for name in mistakes.__slots__}, "changed": changed}


def _speed(speed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was measured of time, memory and versions; what an old run lacks is left out."""
    found, place = [], speed.get("environment", {})
    if seconds := speed.get("step_seconds"):
        found.append(("training", f"{seconds:,.0f} s in {speed.get('steps', 0):,} steps"))
    if rate := speed.get("tokens_per_second"):
        found.append(("speed", f"{rate:,.0f} sub-tokens per second"))
    if (memory := speed.get("peak_memory", {})).get("bytes"):
        found.append(("peak memory", f"{memory['bytes'] / 2**30:.2f} GiB ({memory['of']})"))
    if "device" in place:
        many = f", {place.get('processes', 1)} processes" if place.get("processes", 1) > 1 else ""
        found.append(("device", f"{place['device']}, {place.get('threads', '?')} threads{many}"))
    if "platform" in place:
        found.append(("platform", place["platform"]))
    return [*found, *place.get("versions", {}).items()]


def _spaced_words(record: Record) -> bool:
    """Return whether words were encoded with their leading space, by the tokenizer that lies with the adapter."""
    adapter = record.run.adapter
    if record.recipe.data.task != "token" or not (adapter / "tokenizer.json").is_file():
        return False
    from tokmask_peft.data.encoding import words_need_a_space
    from tokmask_peft.model.backbone import load_tokenizer

    try:
        return words_need_a_space(load_tokenizer(record.recipe.model, str(adapter)))
    except ModelError:  # the snippet cannot load it, either
        return False


def _commands(record: Record) -> str:
    run = shlex.quote(str(record.run.root))
    return f'tokmask predict {run} "a text of yours"\ntokmask demo {run}'


MARK = "<!-- tokmask report -->"
"""Stands at the head of every page, so that one is replaced and no other file is."""


def prepare(run: str | Path, out: str | Path | None = None) -> tuple[Record, Path]:
    """Read a run and choose the file of its page, before anything heavy is loaded.

    Args:
        run: the run folder.
        out: the file to write; none means `report.html` in the run folder.

    Raises:
        RunError: the folder is no finished run, or the file cannot be written or is no report.
        ExtraError: matplotlib is not installed.
    """
    record = Record.open(run)
    path = Path(out) if out is not None else record.run.root / "report.html"
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise RunError(f"{path} cannot be written: " + ("it is a folder" if path.is_dir() else "its folder is missing"))
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:200]:
        raise RunError(f"{path} exists and is no report of this tool; give another file with --out")
    require_matplotlib()
    return record, path


def report_run(
    run: str | Path, out: str | Path | None = None, *, examples: bool = True, backbone: str | None = None
) -> tuple[Path, str]:
    """Write the report of a run: one HTML file that loads nothing.

    Args:
        run: the run folder.
        out: the file to write; none writes `report.html` in the run folder.
        examples: predict the scored split again to show the most confident mistakes; needs the data and the backbone.
        backbone: where to load the backbone from for that, in place of what the recipe says.

    Returns:
        The file, and why it shows no mistakes though they were asked for; empty where it does.

    Raises:
        RunError, ExtraError: as `prepare`.
    """
    record, path = prepare(run, out)

    mistakes, why_not = None, ""
    if examples:
        from tokmask_peft.report.examples import find_mistakes

        try:
            mistakes = find_mistakes(record, backbone)
        except TokmaskError as error:
            why_not = str(error)
    page = render(record, mistakes, why_not or "the report was made with --no-examples")
    path.write_text(page, encoding="utf-8")
    return path, why_not
