"""What was read, merged, removed and set aside: for the screen and for `result.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tokmask_peft.data.example import Example
from tokmask_peft.data.hygiene import HygieneReport
from tokmask_peft.data.labels import count_labels
from tokmask_peft.recipe import Task


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """Size of a split as it is used.

    Attributes:
        source: the file, Hub split or share it comes from.
        read: texts in the source.
        texts: texts used.
        words: words of those texts.
        labels: label -> texts (sequence) or words (token).
    """

    source: str
    read: int
    texts: int
    words: int
    labels: dict[str, int]

    @classmethod
    def of(cls, examples: Iterable[Example], source: str, read: int) -> SplitCounts:
        """Count a split."""
        examples = list(examples)
        words = sum(len(example.words) for example in examples)
        return cls(source, read, len(examples), words, count_labels(examples))


@dataclass(frozen=True, slots=True)
class DataReport:
    """The evidence about the data of a run.

    Attributes:
        task: `sequence` or `token`.
        labels: labels to learn, in the order of the classifier's outputs.
        splits: `train`, `validation` and, if there is one, `test`.
        hygiene: duplicates, conflicts and shared texts.
        label_map: `old -> new` with counts per split.
        warnings: what a user should look at; each names the field to change.
    """

    task: Task
    labels: tuple[str, ...]
    splits: dict[str, SplitCounts]
    hygiene: HygieneReport
    label_map: dict[str, dict[str, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        return asdict(self) | {"labels": list(self.labels), "warnings": list(self.warnings)}

    def lines(self) -> list[str]:
        """Return the report as lines to print."""
        return [*self._split_lines(), *self._map_lines(), *self._hygiene_lines(), *self._warning_lines()]

    def _split_lines(self) -> list[str]:
        lines = []
        for name, split in self.splits.items():
            labels = ", ".join(f"{label} {count:,}" for label, count in split.labels.items())
            lines.append(f"{name}: {split.texts:,} texts, {split.words:,} words ({split.source}); {labels}")
        return lines

    def _map_lines(self) -> list[str]:
        totals: dict[str, int] = {}
        for effects in self.label_map.values():
            for pair, count in effects.items():
                totals[pair] = totals.get(pair, 0) + count
        merged = {pair: count for pair, count in totals.items() if len(set(pair.split(" -> "))) > 1}
        return ["label_map: " + ", ".join(f"{pair} ({count:,})" for pair, count in merged.items())] if merged else []

    def _hygiene_lines(self) -> list[str]:
        found = self.hygiene
        kinds = {
            "duplicates": f"texts in train that repeat an earlier one: {found.duplicates:,}",
            "conflicting": f"texts in train with different labels: {found.conflicting:,} "
            f"({found.conflicting_rows:,} copies)",
            "train_in_validation": f"texts in train that are also in validation: {found.train_in_validation:,} "
            f"({found.validation_shared:,} there)",
            "train_in_test": f"texts in train that are also in test: {found.train_in_test:,} "
            f"({found.test_shared:,} there)",
            "validation_in_test": f"texts in validation that are also in test: {found.validation_in_test:,}",
        }
        lines = []
        for kind, sentence in kinds.items():
            if getattr(found, kind):
                shown = "; ".join(f"“{_short(text)}”" for text in found.examples.get(kind, []))
                lines.append(f"hygiene: {sentence}, such as {shown}")
        if lines and found.mode == "remove":
            lines.append(
                f"hygiene: removed {found.removed_from_train:,} texts from train and "
                f"{found.removed_from_validation:,} from validation (data.hygiene: report keeps them)"
            )
        elif lines:
            lines.append("hygiene: nothing removed (data.hygiene: remove would)")
        return lines

    def _warning_lines(self) -> list[str]:
        return [f"warning: {warning}" for warning in self.warnings]


def _short(text: str, width: int = 60) -> str:
    """Cut a text for display."""
    return text if len(text) <= width else text[: width - 1] + "…"
