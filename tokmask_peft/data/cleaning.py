"""Find texts that would make a score look better, or learning worse, than it is.

Two texts are the same if they agree after normalisation: Unicode NFC, lower case, white space collapsed. Texts of
different splits are nearly the same if they agree without users (`@name`), URLs, everything else that is neither a
letter nor a number, and case; or if what remains is at least `SHORTEST` characters long, and of their distinct pieces
of `PIECE` characters more than `SHARED` are common. MinHash (Broder 1997) finds 95% of those that share .80 to .85 of
their pieces, and 99% of those that share more. Two pairs are the same, or nearly, if both of their texts are.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from tokmask_peft.examples import Example, Label

EXAMPLES_SHOWN = 3
WIDTH = 60
PIECE, SHORTEST, SHARED = 5, 16, 0.8
BANDS, ROWS = 8, 5  # texts with a band of `ROWS` equal hashes are compared: more bands find more, more rows less
CHUNK = 10_000  # texts that are hashed at once, which bounds the memory
_PRIME = np.uint64(0x100000001B3)
_ADDRESS = re.compile(r"https?\S*|www\.\S+|(?<!\w)@\s?\w+|[<\[](?:user|url|link|mention|httpurl)[>\]]")


def normalise(text: str) -> str:
    """Normalise a text for comparison."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


class _Kept(dict[int, str | None]):
    """For `str.translate`: letters with their marks, and numbers; without the selectors of an emoji's variant."""

    def __missing__(self, point: int) -> str | None:
        kept = unicodedata.category(chr(point))[0] in "LMN" and not 0xFE00 <= point <= 0xFE0F and point != 0x20E3
        self[point] = chr(point) if kept else None
        return self[point]


_KEPT = _Kept()


class _Texts:
    """The texts of a split as they are compared."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.keys = [normalise(example.string) for example in examples]
        self.plain = ["\0".join(map(_plain, example.parts)) for example in examples]  # for near-duplicates
        chunks = [_bands(self.plain[at : at + CHUNK]) for at in range(0, len(examples), CHUNK)]
        self.bands = np.concatenate([np.empty((0, BANDS), np.uint64), *chunks])  # texts with an equal one are compared

    def near(self, other: Self) -> set[int]:
        """Return the index of each text that is nearly the same as one of `other`, but the same as none."""
        same, exact = {text for text in other.plain if all(text.split("\0"))}, set(other.keys)
        found = {index for index, text in enumerate(self.plain) if text in same}
        tried: set[tuple[int, int]] = set()
        for band in range(BANDS if other.keys else 0):
            keys, places = np.unique(other.bands[:, band], return_index=True)
            at = np.searchsorted(keys, self.bands[:, band]).clip(max=len(keys) - 1)
            alike = np.flatnonzero(keys[at] == self.bands[:, band])
            for pair in zip(alike.tolist(), places[at[alike]].tolist(), strict=True):
                if pair[0] not in found and pair not in tried:
                    tried.add(pair)
                    if _similar(self.plain[pair[0]], other.plain[pair[1]]):
                        found.add(pair[0])
        return {index for index in found if self.keys[index] not in exact}


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", normalise(text)).casefold()
    return _ADDRESS.sub(" ", folded).translate(_KEPT)


def _similar(one: str, other: str) -> bool:
    parts = zip(one.split("\0"), other.split("\0"), strict=True)  # of pairs, two each
    return all((first and first == second) or _alike(first, second) for first, second in parts)


def _alike(one: str, other: str) -> bool:
    if min(len(one), len(other)) < SHORTEST:
        return False
    first, second = ({text[at : at + PIECE] for at in range(len(text) - PIECE + 1)} for text in (one, other))
    return len(first & second) > SHARED * len(first | second)


def _bands(texts: list[str]) -> NDArray[np.uint64]:
    """Return the MinHash signatures of texts, a number for each band: [texts, BANDS]."""
    padded = [text.ljust(PIECE, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    ends = np.cumsum([len(text) for text in padded])
    starts = ends - [len(text) for text in padded]
    pieces = np.zeros(len(codes), np.uint64)
    for shift in range(PIECE):
        pieces = pieces * _PRIME + np.roll(codes, -shift)
    mixed = (pieces ^ (pieces >> np.uint64(32))).astype(np.uint32)
    bands = np.zeros((len(texts), BANDS), np.uint64)
    for index, factor in enumerate(np.random.default_rng(0).integers(1 << 32, size=BANDS * ROWS, dtype=np.uint32)):
        hashes = mixed * (factor | np.uint32(1))
        hashes ^= hashes >> np.uint32(15)
        for shift in range(1, PIECE):
            hashes[ends - shift] = np.iinfo(np.uint32).max  # a piece of two texts
        bands[:, index // ROWS] = bands[:, index // ROWS] * _PRIME + np.minimum.reduceat(hashes, starts)
    return bands


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
    train_near_validation: int = 0  # texts of the first that are only nearly the same as one of the second
    train_near_test: int = 0
    validation_near_test: int = 0
    validation_near_shared: int = 0  # validation texts that are only nearly the same as one in train
    test_near_shared: int = 0
    removed_from_train: int = 0
    removed_from_validation: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)  # up to three normalised texts of each kind

    def lines(self) -> list[str]:
        """Return the report as lines to print; none if nothing was found."""
        there = " ({:,} there)".format
        kinds = {
            "duplicates": ("train that repeat an earlier one", ""),
            "conflicting": ("train with different labels", f" ({self.conflicting_rows:,} copies)"),
            "train_in_validation": ("train that are also in validation", there(self.validation_shared)),
            "train_in_test": ("train that are also in test", there(self.test_shared)),
            "validation_in_test": ("validation that are also in test", ""),
            "train_near_validation": ("train that nearly repeat validation", there(self.validation_near_shared)),
            "train_near_test": ("train that nearly repeat test", there(self.test_near_shared)),
            "validation_near_test": ("validation that nearly repeat test", ""),
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
            outcome = f"texts removed: {train} from train, {validation} from validation"
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
    of a text, and texts that are also, or nearly, in validation or test. Removed from validation: texts that are also,
    or nearly, in test. Test stays as it is, so that scores can be compared with those of others.
    """
    texts, in_validation, in_test = (_Texts(examples) for examples in (train, validation, test))
    keys, validation_keys, test_keys = (set(part.keys) for part in (texts, in_validation, in_test))
    near_validation, near_test = texts.near(in_validation), texts.near(in_test)
    labels: dict[str, set[Label]] = defaultdict(set)
    for key, example in zip(texts.keys, train, strict=True):
        labels[key].add(example.label)
    conflicting = {key for key, found in labels.items() if len(found) > 1}

    counts: Any = Counter()
    shown: dict[str, list[str]] = defaultdict(list)

    def is_clean(key: str, kinds: dict[str, bool]) -> bool:
        for kind in (kind for kind, applies in kinds.items() if applies):
            counts[kind] += 1
            if len(shown[kind]) < EXAMPLES_SHOWN and key not in shown[kind]:
                shown[kind].append(key)
        return not any(kinds.values())

    kept, seen = [], set()
    for index, (key, example) in enumerate(zip(texts.keys, train, strict=True)):
        kinds = {
            "conflicting": key in conflicting and key not in seen,
            "duplicates": key in seen,
            "train_in_validation": key in validation_keys,
            "train_in_test": key in test_keys,
            "train_near_validation": index in near_validation,
            "train_near_test": index in near_test,
        }
        if is_clean(key, kinds):
            kept.append(example)
        seen.add(key)
    near_test, kept_validation = in_validation.near(in_test), []
    for index, (key, example) in enumerate(zip(in_validation.keys, validation, strict=True)):
        if is_clean(key, {"validation_in_test": key in test_keys, "validation_near_test": index in near_test}):
            kept_validation.append(example)
    remove = mode == "remove"
    report = CleaningReport(
        mode=mode,
        **counts,
        conflicting_rows=sum(key in conflicting for key in texts.keys),
        validation_shared=sum(key in keys for key in in_validation.keys),
        test_shared=sum(key in keys for key in in_test.keys),
        validation_near_shared=len(in_validation.near(texts)),
        test_near_shared=len(in_test.near(texts)),
        removed_from_train=len(train) - len(kept) if remove else 0,
        removed_from_validation=len(validation) - len(kept_validation) if remove else 0,
        examples=dict(shown),
    )
    return (kept, kept_validation, report) if remove else (list(train), list(validation), report)


def clean_share(
    train: Sequence[Example], share: Sequence[Example], report: CleaningReport
) -> tuple[list[Example], CleaningReport]:
    """Compare the share set aside for validation with train; return what is kept of it, and the report."""
    texts, aside = _Texts(train), _Texts(share)
    near = aside.near(texts)
    examples = {"train_near_validation": [aside.keys[index] for index in sorted(near)[:EXAMPLES_SHOWN]]} if near else {}
    report = replace(
        report,
        train_near_validation=len(texts.near(aside)),
        validation_near_shared=len(near),
        removed_from_validation=len(near) if report.mode == "remove" else 0,
        examples=report.examples | examples,
    )
    kept = [example for index, example in enumerate(share) if index not in near or report.mode == "report"]
    return kept, report
