"""From the data section of a recipe to clean, labelled splits."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from tokmask_peft.console import Decision
from tokmask_peft.data.cleaning import CleaningReport, clean, clean_share
from tokmask_peft.data.readers import find_files, read_split
from tokmask_peft.data.split import canonical, carve, subset
from tokmask_peft.errors import DataError, nearest
from tokmask_peft.examples import Example, Label
from tokmask_peft.recipe.data import DataConfig, SourceConfig
from tokmask_peft.spans import NO_SPANS, Spans, find_scheme
from tokmask_peft.tasks import get_task

OTHERS = "*"
MANY_LABELS, SHOWN = 50, 10
_LIKE_MISSING = {"nan", "none", "null", "na", "n/a", "<na>", "nat", "_"}


class Merge(NamedTuple):
    """A label in the data, the label that a label map makes of it, and how many texts or words had it."""

    old: str
    new: str
    items: int


def apply_label_map(
    examples: Iterable[Example], label_map: Mapping[str, str] | None
) -> tuple[list[Example], tuple[Merge, ...]]:
    """Return the texts that have a label, mapped by `label_map` (key '*': every other label), and what was mapped."""
    examples = [example for example in examples if example.label is not None]
    if not label_map:
        return examples, ()
    seen = Counter(tag for example in examples for tag in example.tags)
    new = {tag: label_map.get(tag, label_map.get(OTHERS, tag)) for tag in seen}
    merges = tuple(Merge(tag, new[tag], n) for tag, n in seen.items() if new[tag] != tag or tag in label_map)

    def mapped(label: Label) -> Label:
        return new[label] if isinstance(label, str) else label and type(label)(new[tag] for tag in label)

    return [replace(example, label=mapped(example.label)) for example in examples], merges


def merged_labels(stored: Mapping[str, Any]) -> list[Merge]:
    """Return merged labels with their counts over all splits; older runs stored them as `{"old -> new": count}`."""
    totals: Counter[tuple[str, str]] = Counter()
    for merges in stored.values():
        if isinstance(merges, Mapping):
            merges = [(*pair.split(" -> ", 1), count) for pair, count in merges.items()]
        for merge in merges:
            old, new, count = (merge[key] for key in ("from", "to", "count")) if isinstance(merge, Mapping) else merge
            totals[old, new] += count
    return [Merge(old, new, count) for (old, new), count in totals.items() if old != new]


def count_labels(examples: Iterable[Example]) -> Counter[str]:
    """Count labels (of texts, or of words), in natural order: `class2` before `class10`."""
    counts = Counter(tag for example in examples for tag in example.tags)
    return Counter({label: counts[label] for label in sorted(counts, key=_natural_key)})


def _natural_key(label: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", label)
    pairs = [(part, part.lstrip("0")) for part in parts if part]  # not int(), which refuses thousands of digits
    return [(0, len(number), number) if part.isdecimal() else (1, 0, part) for part, number in pairs]


def collect_labels(train: Sequence[Example]) -> tuple[str, ...]:
    """List the training labels in natural order; DataError if fewer than two, or almost as many as items."""
    counts = count_labels(train)
    if MANY_LABELS < len(counts) > counts.total() / 2:
        problem = f"almost as many different labels as labels in all: {len(counts):,} of {counts.total():,}, such as "
        problem += f"'{next(iter(counts))[:40]}': is data.label_column the right column?"
        raise DataError(problem, code="too-many-labels", labels=len(counts))
    if len(labels := tuple(counts)) < 2:
        problem = f"the only label of the training texts is {', '.join(labels)}, but a classifier needs two or more"
        raise DataError(f"{problem}. Check data.label_column and data.label_map.", code="one-label", labels=labels)
    return labels


def respelled(labels: Mapping[str, int]) -> dict[str, str]:
    """Map labels to the most frequent one that differs only by case, spaces, Unicode form or a trailing `.0`."""
    groups: dict[str, list[str]] = {}
    for label in sorted(labels, key=lambda label: (-labels[label], len(label), label)):
        plain = "".join(unicodedata.normalize("NFKC", label).casefold().split())
        groups.setdefault(re.sub(r"(?<=\d)\.0+$", "", plain), []).append(label)
    return {other: first for first, *others in groups.values() for other in others}


def _like_missing(labels: Mapping[str, int], named: bool) -> list[str]:
    """List labels that may stand for a missing one; `named`: `_` is the label of words without a key of CoNLL-U."""
    negative = [label for label in labels if re.fullmatch(r"-\d+(\.0+)?", label)]
    numbers = all(re.fullmatch(r"-?\d+(\.0+)?", label) for label in labels)
    odd = negative if numbers and len(negative) == 1 and len(labels) > 2 else []
    words = _LIKE_MISSING - ({"_"} if named else set())
    return [label for label in labels if label in odd or label.startswith("-100") or label.casefold() in words]


def shown_map(label_map: Mapping[str, str]) -> str:
    """Return a label map to copy, with escapes if labels may look alike in print."""
    alike = any(unicodedata.normalize("NFKC", label) != label for label in [*label_map, *label_map.values()])
    return json.dumps(label_map, ensure_ascii=alike)


def with_unseen(labels: Sequence[str], examples: Iterable[Example]) -> tuple[str, ...]:
    """Return the labels of a classifier, followed by those that only `examples` have: it can never give these."""
    return (*labels, *(label for label in count_labels(examples) if label not in labels))


def check_known(examples: Iterable[Example], labels: Sequence[str], split: str) -> list[str]:
    """Return a warning if no training text has some of the labels, which count as errors; DataError if all are such."""
    places: dict[str, list[str]] = {}
    for example in examples:
        for tag in example.tags:
            places.setdefault(tag, []).append(example.where)
    unseen = {tag: where for tag, where in sorted(places.items()) if tag not in labels}
    if not unseen:
        return []
    marked = find_scheme(labels, ())[0] != NO_SPANS  # then B-X is never I-X, however near it is
    shown = []
    for tag, where in islice(unseen.items(), SHOWN):
        guess = nearest(tag, [label for label in labels if not marked or label[:2] == tag[:2]])
        shown.append(f"'{tag}': {len(where)} times, first at {where[0]}.{guess}")
    if len(unseen) > SHOWN:
        shown.append(f"and {len(unseen) - SHOWN:,} more.")
    found = " ".join(shown)
    respelling = respelled(dict.fromkeys(unseen, 0) | dict.fromkeys(labels, 1))
    merge = {old: new for old, new in respelling.items() if old in unseen and new in labels}
    merge = merge or ({} if marked else {next(iter(unseen)): labels[-1]})
    remedy = f"Merge them with data.label_map, such as {shown_map(merge)}; its key '*' is every other label."
    remedy = remedy if merge else "Add training texts that have them."
    if len(unseen) == len(places):
        problem = f"{split}: no label is one of those in training ({', '.join(labels)}): {found} {remedy}"
        raise DataError(problem, code="unknown-labels", split=split, labels=tuple(unseen))
    effect = "each counts as an error, and in macro-F1 as a class with an F1 of 0"
    return [f"{split} has labels that no training text has; {effect}: {found} {remedy}"]


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """Size of a split: its source, texts read from there, and texts, words and labels that are used."""

    source: str
    read: int
    texts: int
    words: int
    labels: dict[str, int]
    missing: int = 0  # texts of those read that `data.missing` leaves out


@dataclass(frozen=True, slots=True)
class DataReport:
    """The evidence about the data of a run."""

    task: str
    labels: tuple[str, ...]  # labels to learn, in the order of the classifier's outputs
    splits: dict[str, SplitCounts]  # train, validation and, if there is one, test
    hygiene: CleaningReport
    label_map: dict[str, tuple[Merge, ...]] = field(default_factory=dict)  # per split, what the map applied to
    warnings: tuple[str, ...] = ()  # each names the field to change
    decisions: tuple[Decision, ...] = ()  # on the form of the files

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        label_map = {
            name: [{"from": old, "to": new, "count": count} for old, new, count in merges]
            for name, merges in self.label_map.items()
        }
        report = asdict(self) | {"labels": list(self.labels), "label_map": label_map, "warnings": list(self.warnings)}
        del report["decisions"]  # they are with those on the model
        return report

    def lines(self) -> list[str]:
        """Return the report as lines to print."""
        lines = []
        for name, split in self.splits.items():
            labels = ", ".join(f"{label} {count:,}" for label, count in split.labels.items())
            missing = f"; left out as missing: {split.missing:,}" if split.missing else ""
            lines.append(f"{name}: {split.texts:,} texts, {split.words:,} words ({split.source}); {labels}{missing}")
        if merged := merged_labels(self.label_map):
            lines.append("label_map: " + ", ".join(f"{old} -> {new} ({count:,})" for old, new, count in merged))
        return [*lines, *self.hygiene.lines(), *(f"warning: {warning}" for warning in self.warnings)]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts to learn from and to score on."""

    task: str
    train: list[Example]  # in the order of their source
    validation: list[Example]  # these select the checkpoint
    test: list[Example]  # these score it; may be empty
    labels: tuple[str, ...]  # in the order of the classifier's outputs
    report: DataReport  # what was read, merged, removed and set aside
    spans: Spans | None = None  # how the labels mark entities; None if they do not

    @property
    def all_labels(self) -> tuple[str, ...]:
        """The labels, followed by those that only validation or test has."""
        return with_unseen(self.labels, chain(self.validation, self.test))

    def fingerprint(self) -> dict[str, str]:
        """Return a hash of each split's texts with their labels, and the labels."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        texts = {name: repr([(example.text, example.label) for example in part]) for name, part in parts.items()}
        hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        return {"labels": ", ".join(self.labels), **hashes}


def load_corpus(config: DataConfig, seed: int) -> Corpus:
    """Read, merge labels, clean, set validation aside, draw `max_train` texts; DataError if the data do not fit."""
    wanted: dict[str, tuple[SourceConfig, str]] = {"train": (config, config.train)}
    if isinstance(config.validation, str):
        wanted["validation"] = config, config.validation
    if (test := _test_of(config)) is not None:
        wanted["test"] = test
    sources = {name: _where(*place) for name, place in wanted.items()}
    _refuse_same_source(sources)

    decisions: list[Decision] = []
    read = {name: read_split(source, split, config.task, decisions) for name, (source, split) in wanted.items()}
    mapped = {name: apply_label_map(examples, config.label_map) for name, examples in read.items()}
    parts = {name: mapped[name][0] if name in mapped else [] for name in ("train", "validation", "test")}
    train, validation, cleaning = clean(**parts, mode=config.hygiene)
    labels = collect_labels(train) if train else ()
    if not train:
        problem = "cleaning left no training text: data.hygiene=report shows what would be removed, and keeps it"
        raise DataError(problem, code="nothing-left", split="train")
    if isinstance(config.validation, float):
        train, validation = carve(train, config.validation, seed)
        validation, cleaning = clean_share(train, validation, cleaning)
        sources["validation"] = f"a share of {config.validation:g} of train"
    if not validation:
        other = "a file" if isinstance(config.validation, float) else "another file, or a share of train such as 0.1,"
        problem = f"every validation text is also, or nearly, in test or train: name {other} in data.validation"
        problem += ", or keep such texts with data.hygiene=report"
        raise DataError(problem, code="nothing-left", split="validation")
    if config.max_train is not None:
        train = subset(train, config.max_train, seed)

    used = {"train": train, "validation": validation} | ({"test": parts["test"]} if test is not None else {})
    unknown = [warning for name, examples in used.items() for warning in check_known(examples, labels, name)]
    merges = {name: found for name, (_, found) in mapped.items()}
    splits = {}
    for name, examples in used.items():
        words = sum(len(example.words) for example in examples)
        size = len(read.get(name, examples))
        missing = size - len(mapped[name][0]) if name in mapped else 0
        splits[name] = SplitCounts(sources[name], size, len(examples), words, dict(count_labels(examples)), missing)
    everything = [example for examples, _ in mapped.values() for example in examples]
    strings = Counter(example.string for example in everything)
    warnings = (*unknown, *_warnings(config, merges, splits, count_labels(everything), strings))
    scheme: str = config.spans
    if scheme == "auto":
        per_word, texts = get_task(config.task).words_given, (example.tags for example in train)
        scheme, reason = find_scheme(labels, texts) if per_word else (NO_SPANS, "")
        decisions += [Decision("spans", scheme, reason)] if reason else []
    spans = None if scheme == NO_SPANS else Spans(scheme, labels)
    report = DataReport(config.task, labels, splits, cleaning, merges, warnings, tuple(decisions))
    return Corpus(config.task, train, validation, parts["test"], labels, report, spans)


def _test_of(config: DataConfig) -> tuple[SourceConfig, str] | None:
    """Return source and split of the test texts, or none."""
    source = config.test_source
    if config.test is None and source is not None:
        problem = "data.test is null, but data.test_source is set: name the split of that source in data.test"
        raise DataError(problem, code="no-test")
    if source is not None and source.path is not None and Path(source.path).expanduser().is_file():
        return source, Path(source.path).name
    return None if config.test is None else (source or config, config.test)


def _where(source: SourceConfig, split: str) -> str:
    """Name the place of a split: its files, Hub id or built-in split."""
    if source.path is not None:
        return ", ".join(str(file.resolve()) for file in find_files(source.path, split, source.format))
    if source.hub is not None:
        parts = [source.hub, source.hub_config, source.hub_revision]
        return " ".join(part for part in parts if part) + f" [{canonical(split)}]"
    return f"built-in [{canonical(split)}]"


def _refuse_same_source(sources: Mapping[str, str]) -> None:
    """Refuse a file or Hub split that serves two purposes."""
    share = "Set data.validation to a share of train such as 0.1."
    remedies = {
        ("validation", "test"): f"The texts that select the checkpoint would also score it. {share}",
        ("train", "validation"): share,
        ("train", "test"): "Name another file in data.test, or set it to null.",
    }
    for (one, other), remedy in remedies.items():
        if one in sources and sources[one] == sources.get(other):
            problem = f"data.{one} and data.{other} are the same texts ({sources[one]}). {remedy}"
            raise DataError(problem, code="same-texts", splits=(one, other))


def _warnings(
    config: DataConfig,
    merges: Mapping[str, Sequence[Merge]],
    splits: Mapping[str, SplitCounts],
    labels: Mapping[str, int],
    texts: Mapping[str, int],
) -> list[str]:
    """List what looks like a mistake but may be intended."""
    matched = {merge.old for found in merges.values() for merge in found} | {OTHERS}
    unmatched = [key for key in config.label_map or {} if key not in matched]
    warnings = [f"data.label_map: no label '{key}' in the data; the key has no effect" for key in unmatched]
    if config.missing in (None, ("",)):  # which is set for a file with empty cells
        odd = {
            "labels": {one: labels[one] for one in _like_missing(labels, named="." in str(config.label_column))},
            "texts": {one: count for one, count in texts.items() if one.casefold() in _LIKE_MISSING},
        }
        known = config.missing or ()
        remedy = f"set data.missing={json.dumps([*dict.fromkeys([*known, *odd['labels'], *odd['texts']])])}"
        remedy += " to leave these texts out, otherwise " + ("leave it as it is" if known else "data.missing=[]")
        for what, counts in odd.items():
            if found := ", ".join(f"'{one}' ({count:,})" for one, count in counts.items()):
                warnings.append(f"{what} that look like a missing value: {found}; if so, {remedy}")
    if new := respelled(labels):
        variants = ", ".join(f"'{old}' ({labels[old]:,}) and '{one}' ({labels[one]:,})" for old, one in new.items())
        label_map = shown_map({old: new.get(label, label) for old, label in (config.label_map or {}).items()} | new)
        problem = f"labels that differ only in spelling: {variants}"
        warnings.append(f"{problem}; if they are the same, set data.label_map={label_map}")
    for name, split in splits.items():
        absent = sorted(set(splits["train"].labels) - set(split.labels))
        if absent and split.texts:
            problem = f"{name} has no text with {', '.join(absent)}: its score says nothing about that label"
            warnings.append(f"{problem}; see data.{name}")
    return warnings
