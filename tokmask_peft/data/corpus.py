"""From the data section of a recipe to clean, labelled splits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tokmask_peft.data.cleaning import HygieneReport, clean
from tokmask_peft.data.files import canonical, find_files
from tokmask_peft.data.readers import read_split
from tokmask_peft.data.split import carve, subset
from tokmask_peft.errors import DataError, nearest
from tokmask_peft.recipe.schema import DataConfig, SourceConfig, Task
from tokmask_peft.tasks import Example

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


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts to learn from and to score on.

    Attributes:
        task: `sequence` or `token`.
        train: training texts, in the order of their source.
        validation: texts that select the checkpoint.
        test: texts that score it; may be empty.
        labels: labels in the order of the classifier's outputs.
        report: what was read, merged, removed and set aside.
    """

    task: Task
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: tuple[str, ...]
    report: DataReport


def load_corpus(config: DataConfig, seed: int) -> Corpus:
    """Read, merge labels, clean, set validation aside, and draw at most `max_train` training texts.

    Args:
        config: the data section of a recipe.
        seed: seed of the draws.

    Raises:
        DataError: the data cannot be read or does not fit the task.
    """
    sources = {"train": _where(config, config.train)}
    if isinstance(config.validation, str):
        sources["validation"] = _where(config, config.validation)
    else:
        sources["validation"] = f"a share of {config.validation:g} of train"
    test_source, test_split = _test_of(config)
    if test_split is not None:
        sources["test"] = _where(test_source, test_split)
    _refuse_same_source(sources)

    read: dict[str, list[Example]] = {"train": read_split(config, config.train, config.task)}
    if isinstance(config.validation, str):
        read["validation"] = read_split(config, config.validation, config.task)
    if test_split is not None:
        read["test"] = read_split(test_source, test_split, config.task)

    mapped = {name: apply_label_map(examples, config.label_map) for name, examples in read.items()}
    cleaned = clean(
        mapped["train"].examples,
        mapped["validation"].examples if "validation" in mapped else [],
        mapped["test"].examples if "test" in mapped else [],
        config.hygiene,
    )
    train, validation = cleaned.train, cleaned.validation
    if not train:
        raise DataError("hygiene left no training text: data.hygiene: report shows what it would remove and keeps it")
    if isinstance(config.validation, float):
        train, validation = carve(train, config.validation, seed)
    elif not validation:
        raise DataError("every validation text is also in test: set data.validation to a share of train such as 0.1")
    if config.max_train is not None:
        train = subset(train, config.max_train, seed)

    labels = collect_labels(train)
    check_known(validation, labels, "validation")
    check_known(cleaned.test, labels, "test")
    used = {"train": train, "validation": validation, "test": cleaned.test}
    report = DataReport(
        task=config.task,
        labels=labels,
        splits={
            name: SplitCounts.of(used[name], source, len(read[name]) if name in read else len(used[name]))
            for name, source in sources.items()
        },
        hygiene=cleaned.report,
        label_map={name: {f"{old} -> {new}": n for (old, new), n in m.effects.items()} for name, m in mapped.items()},
        warnings=tuple(_warnings(config, mapped, used, labels)),
    )
    return Corpus(config.task, train, validation, cleaned.test, labels, report)


def _test_of(config: DataConfig) -> tuple[SourceConfig, str | None]:
    """Source and split of the test texts."""
    source = config.test_source
    if source is None:
        return config, config.test
    if config.test is None:
        raise DataError("data.test is null, but data.test_source is set: name the split of that source in data.test")
    if source.path is not None and Path(source.path).expanduser().is_file():
        return source, Path(source.path).name
    return source, config.test


def _where(source: SourceConfig, split: str) -> str:
    """Name the place of a split: its files, Hub id or built-in split."""
    if source.path is not None:
        return ", ".join(str(file.resolve()) for file in find_files(source.path, split, source.format))
    if source.hub is not None:
        parts = [source.hub, source.hub_config, source.hub_revision]
        return " ".join(part for part in parts if part) + f" [{canonical(split)}]"
    return f"built-in [{canonical(split)}]"


def _refuse_same_source(sources: dict[str, str]) -> None:
    """Refuse a file that serves two purposes.

    Raises:
        DataError: two splits are the same file or Hub split.
    """
    if sources["validation"] == sources.get("test"):
        raise DataError(
            f"data.validation and data.test are the same texts ({sources['test']}): what selects the checkpoint would "
            "also score it. Set data.validation to a share of train such as 0.1."
        )
    for name in ("validation", "test"):
        if sources.get(name) == sources["train"]:
            raise DataError(
                f"data.train and data.{name} are the same texts ({sources['train']}). "
                + ("Set data.validation to a share of train such as 0.1." if name == "validation" else "")
                + ("Name another file in data.test, or set it to null." if name == "test" else "")
            )


def _warnings(
    config: DataConfig, mapped: dict[str, Mapped], used: dict[str, list[Example]], labels: Sequence[str]
) -> list[str]:
    """List what looks like a mistake but may be meant."""
    warnings = []
    effects = {pair for part in mapped.values() for pair in part.effects}
    for key in unmatched_keys(config.label_map, effects):
        warnings.append(f"data.label_map: no label '{key}' in the data; the key has no effect")
    for name in ("validation", "test"):
        absent = set(labels) - {tag for example in used[name] for tag in example.tags}
        if used[name] and absent:
            warnings.append(
                f"{name} has no text with {', '.join(sorted(absent))}: its score says nothing about that label; "
                f"see data.{name}"
            )
    return warnings


def merged_labels(stored: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Return the labels that were merged into others, with their counts over all splits."""
    totals: Counter[tuple[str, str]] = Counter()
    for merges in stored.values():
        for pair, count in merges.items():
            old, new = pair.split(" -> ", 1)
            totals[old, new] += count
    return [(old, new, count) for (old, new), count in totals.items() if old != new]
