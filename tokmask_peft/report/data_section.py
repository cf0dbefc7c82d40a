"""What a report says about the data of a run, from `result.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

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


def _merged(label_map: Mapping[str, Mapping[str, int]]) -> str:
    totals: Counter[str] = Counter()
    for effects in label_map.values():
        totals.update(effects)
    changed = {pair: count for pair, count in totals.items() if len(set(pair.split(" -> "))) > 1}
    return ", ".join(f"{pair.replace(' -> ', ' → ')} ({count:,})" for pair, count in changed.items())


def _removed(found: Mapping[str, Any]) -> str:
    if found.get("mode") != "remove":
        return "Nothing was removed: the scores include what is shared."
    gone = {"train": found.get("removed_from_train", 0), "validation": found.get("removed_from_validation", 0)}
    listed = " and ".join(f"{count:,} from {name}" for name, count in gone.items() if count)
    return f"Removed: {listed}." if listed else "Nothing had to be removed."
