"""The page of a run: everything that `result.json` and `log.jsonl` hold, in one file that loads nothing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from tokmask_peft import __version__
from tokmask_peft.console import baseline_verdict, calibration_line
from tokmask_peft.errors import ModelError
from tokmask_peft.hub.card_metadata import hub_id
from tokmask_peft.hub.card_sections import limit_lines, training_lines
from tokmask_peft.hub.card_snippets import AUTO, loading_snippet
from tokmask_peft.inference.coloured_words import influence_words, strongest_words
from tokmask_peft.report.data_section import data_section
from tokmask_peft.report.pictures import Picture, mixing_picture, reliability_picture, training_curves
from tokmask_peft.report.record import Record

if TYPE_CHECKING:
    from tokmask_peft.report.examples import Mistakes

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
    from tokmask_peft.data.encode import words_need_a_space
    from tokmask_peft.model.backbone import load_tokenizer

    try:
        return words_need_a_space(load_tokenizer(record.recipe.model, str(adapter)))
    except ModelError:  # the snippet cannot load it, either
        return False


def _commands(record: Record) -> str:
    run = shlex.quote(str(record.run.root))
    return f'tokmask predict {run} "a text of yours"\ntokmask demo {run}'
