"""Find texts that would make a score look better, or learning worse, than it is.

Two texts are the same if they agree after normalisation: Unicode NFC, lower case, white space collapsed.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tokmask_peft.tasks import Example, Label

EXAMPLES_SHOWN = 3
WIDTH = 60


def normalise(text: str) -> str:
    """Normalise a text for comparison."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


@dataclass(frozen=True, slots=True)
class CleaningReport:
    """What was found before anything was removed, and what was removed."""

    mode: Literal["remove", "report"]
    duplicates: int = 0  # training texts that repeat an earlier one
    conflicting: int = 0  # distinct training texts that have different labels
    conflicting_rows: int = 0  # training texts of those, all copies counted
    train_in_validation: int = 0  # texts of the first that are also in the second; likewise below
    train_in_test: int = 0
    validation_in_test: int = 0
    validation_shared: int = 0  # validation texts that are also in train
    test_shared: int = 0  # test texts that are also in train
    removed_from_train: int = 0
    removed_from_validation: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)  # up to three normalised texts of each kind

    def lines(self) -> list[str]:
        """Return the report as lines to print; none if nothing was found."""
        kinds = {
            "duplicates": ("train that repeat an earlier one", ""),
            "conflicting": ("train with different labels", f" ({self.conflicting_rows:,} copies)"),
            "train_in_validation": ("train that are also in validation", f" ({self.validation_shared:,} there)"),
            "train_in_test": ("train that are also in test", f" ({self.test_shared:,} there)"),
            "validation_in_test": ("validation that are also in test", ""),
        }
        lines = []
        for kind, (what, more) in kinds.items():
            if count := getattr(self, kind):
                short = (text if len(text) <= WIDTH else text[: WIDTH - 1] + "…" for text in self.examples[kind])
                shown = "; ".join(f"“{text}”" for text in short)
                lines.append(f"cleaning: texts in {what}: {count:,}{more}, such as {shown}")
        outcome = "nothing removed (data.hygiene: remove would)"
        if self.mode == "remove":
            train, validation = f"{self.removed_from_train:,}", f"{self.removed_from_validation:,}"
            outcome = f"removed {train} texts from train and {validation} from validation"
            outcome += " (data.hygiene: report keeps them)"
        return [*lines, f"cleaning: {outcome}"] if lines else []


def clean(
    train: Sequence[Example],
    validation: Sequence[Example],
    test: Sequence[Example],
    mode: Literal["remove", "report"] = "remove",
) -> tuple[list[Example], list[Example], CleaningReport]:
    """Return the training and the validation texts, cleaned if `mode` is `remove`, and what was found.

    Removed from train: all copies of a text with conflicting labels (in token tasks: different tag sequences), repeats
    of a text, and texts that are also in validation or test. Removed from validation: texts that are also in test. Test
    stays as it is, so that scores can be compared with those of others.
    """
    keys = [normalise(example.string) for example in train]
    validation_keys = [normalise(example.string) for example in validation]
    test_keys = [normalise(example.string) for example in test]
    in_train, in_validation, in_test = set(keys), set(validation_keys), set(test_keys)

    labels: dict[str, set[Label]] = defaultdict(set)
    for key, example in zip(keys, train, strict=True):
        labels[key].add(example.label)
    conflicting = {key for key, found in labels.items() if len(found) > 1}

    kept: list[Example] = []
    shown: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for key, example in zip(keys, train, strict=True):
        kinds = {
            "conflicting": key in conflicting and key not in seen,
            "duplicates": key in seen,
            "train_in_validation": key in in_validation,
            "train_in_test": key in in_test,
        }
        for kind, applies in kinds.items():
            if applies and len(shown[kind]) < EXAMPLES_SHOWN and key not in shown[kind]:
                shown[kind].append(key)
        if not any(kinds.values()):
            kept.append(example)
        seen.add(key)

    kept_validation = [e for e, key in zip(validation, validation_keys, strict=True) if key not in in_test]
    both = [key for key in validation_keys if key in in_test]
    shown["validation_in_test"] = list(dict.fromkeys(both))[:EXAMPLES_SHOWN]
    remove = mode == "remove"
    report = CleaningReport(
        mode=mode,
        duplicates=len(keys) - len(in_train),
        conflicting=len(conflicting),
        conflicting_rows=sum(key in conflicting for key in keys),
        train_in_validation=sum(key in in_validation for key in keys),
        train_in_test=sum(key in in_test for key in keys),
        validation_in_test=len(both),
        validation_shared=sum(key in in_train for key in validation_keys),
        test_shared=sum(key in in_train for key in test_keys),
        removed_from_train=len(train) - len(kept) if remove else 0,
        removed_from_validation=len(both) if remove else 0,
        examples={kind: texts for kind, texts in shown.items() if texts},
    )
    return (kept, kept_validation, report) if remove else (list(train), list(validation), report)
