"""Labels: merge them as the recipe says, list them, and refuse those that training never saw."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tokmask_peft.data.example import Example
from tokmask_peft.errors import DataError, nearest

OTHERS = "*"


@dataclass(frozen=True, slots=True)
class Mapped:
    """Examples with merged labels, and how often each merge applied.

    Attributes:
        examples: in the order given.
        effects: `old -> new` pairs with the number of texts or words they changed.
    """

    examples: list[Example]
    effects: dict[tuple[str, str], int]


def apply_label_map(examples: Iterable[Example], label_map: dict[str, str] | None) -> Mapped:
    """Replace labels as `label_map` says; its key '*' stands for every label that is not a key."""
    examples = list(examples)
    if not label_map:
        return Mapped(examples, {})
    seen = Counter(tag for example in examples for tag in example.tags)
    new = {tag: label_map.get(tag, label_map.get(OTHERS, tag)) for tag in seen}
    effects = {(tag, new[tag]): count for tag, count in seen.items() if new[tag] != tag or tag in label_map}
    mapped = [
        replace(
            example, label=new[example.label] if isinstance(example.label, str) else tuple(new[t] for t in example.tags)
        )
        for example in examples
    ]
    return Mapped(mapped, effects)


def unmatched_keys(label_map: dict[str, str] | None, effects: Iterable[tuple[str, str]]) -> list[str]:
    """Keys of the map that no label matched; '*' always counts as matched."""
    matched = {old for old, _ in effects}
    return [key for key in label_map or {} if key != OTHERS and key not in matched]


def count_labels(examples: Iterable[Example]) -> dict[str, int]:
    """Count labels (of texts, or of words), in natural order."""
    counts = Counter(tag for example in examples for tag in example.tags)
    return {label: counts[label] for label in sorted(counts, key=natural_key)}


def collect_labels(train: Sequence[Example]) -> tuple[str, ...]:
    """List the labels of the training texts in natural order (`class2` before `class10`).

    Raises:
        DataError: there are fewer than two.
    """
    labels = tuple(count_labels(train))
    if len(labels) < 2:
        raise DataError(
            f"the training texts have {len(labels)} label{'s' if len(labels) != 1 else ''} ({', '.join(labels)}), but "
            "a classifier needs two or more. Check data.label_column and data.label_map."
        )
    return labels


def check_known(examples: Iterable[Example], labels: Sequence[str], split: str) -> None:
    """Refuse labels that training never saw.

    Raises:
        DataError: names each label, its count, where it stands and the nearest known one.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    known = set(labels)
    for example in examples:
        for tag in example.tags:
            if tag not in known:
                counts[tag] += 1
                first.setdefault(tag, example.where)
    if counts:
        lines = [
            f"  '{tag}': {count} times, first at {first[tag]}.{nearest(tag, labels)}"
            for tag, count in sorted(counts.items())
        ]
        raise DataError(
            f"{split}: labels that no training text has (training has {', '.join(labels)}):\n"
            + "\n".join(lines)
            + "\nMerge them with data.label_map, for example {'"
            + next(iter(counts))
            + f"': '{labels[-1]}'}}; its key '*' stands for every label that is not named."
        )


def natural_key(label: str) -> list[tuple[int, int, str]]:
    """Sort key that orders numbers inside labels by value."""
    parts = re.split(r"(\d+)", label)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]
