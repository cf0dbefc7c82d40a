"""From the data section of a recipe to clean, labelled splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokmask_peft.data.example import Example
from tokmask_peft.data.files import canonical, find_files
from tokmask_peft.data.hygiene import clean
from tokmask_peft.data.labels import Mapped, apply_label_map, check_known, collect_labels, unmatched_keys
from tokmask_peft.data.read import read_split
from tokmask_peft.data.report import DataReport, SplitCounts
from tokmask_peft.data.split import carve, subset
from tokmask_peft.errors import DataError
from tokmask_peft.recipe import DataConfig, SourceConfig, Task


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
