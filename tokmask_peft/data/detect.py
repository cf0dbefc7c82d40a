"""Files that nobody described: which keys of `data` read them, and why.

The form (which file is which split, columns, task) is decided from a sample. What is counted is counted in the whole
data, read and cleaned as a training would.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import islice
from pathlib import Path
from typing import Any

from tokmask_peft.console import Decision
from tokmask_peft.data import tables
from tokmask_peft.data.columns import (
    LABEL_NAMES,
    MOST_LABELS,
    SAMPLED,
    SPLITS,
    TASK_QUESTION,
    TEXT_NAMES,
    Ask,
    Findings,
    Table,
    likeliest,
    some,
)
from tokmask_peft.data.conll import CONLLU_COLUMNS, Columns, ConllReader
from tokmask_peft.data.corpus import Corpus, count_labels, load_corpus, respelled
from tokmask_peft.data.readers import READERS, read_split, separator_of
from tokmask_peft.data.split import canonical
from tokmask_peft.data.tables import DataFile
from tokmask_peft.errors import DataError
from tokmask_peft.recipe.schema import DataConfig, SourceConfig
from tokmask_peft.tasks import TASKS, Example, get_task

ENGLISH = 0.15
"""Share of function words above which texts are taken for English; code-switched texts have less."""
_ENGLISH = set(
    "the and of that with this you for is it was are what have not they from but on when how which your there".split()  # noqa: SIM905
)
_COMMENT = re.compile(r"# ?[A-Za-z_][\w.\-]*(?:\[\w+\])? ?[=:]|# newdoc|# newpar|-DOCSTART-|meta[ \t]\S+[ \t]\S+$")


def detect(
    paths: Sequence[Path], given: Mapping[str, Any], ask: Ask = likeliest, seed: int = 42
) -> tuple[Findings, Corpus]:
    """Find the keys of `data` that read files, and read them.

    Args:
        paths: files, or one folder.
        given: keys of `data` that are set already, and stay.
        ask: decides what is not sure.
        seed: of the share that is set aside for validation.

    Raises:
        DataError: there is nothing to learn from; says what was found and what to do.
    """
    found = Findings(dict(given), ask)
    splits = find_splits(paths, found)
    find_form(splits["train"], found)
    _place_splits(splits, found)
    return found, _read_whole(found, seed)


# -- which file is which split --


def find_splits(paths: Sequence[Path], found: Findings) -> dict[str, Path]:
    """Return the file of each split by the names of the files; `train` is always there.

    A folder, or files; next to a single file that is named as a split, those of its other splits are looked for.
    """
    for path in paths:
        if not path.exists():
            problem = f"'{path}' does not exist (seen from {Path.cwd()})"
            raise DataError(f"{problem}. Give a file, several, or a folder.", code="no-path", path=str(path))
    files = [path for path in paths if path.is_file()]
    if len(paths) == 1 and not files:
        files = _data_files(paths[0])
    elif len(files) < len(paths):
        raise DataError("give one folder, or files, but not both", code="files-and-folders")
    elif len(files) == 1:
        role, rest = _role(files[0])
        alike = [file for file in _data_files(files[0].parent) if _role(file)[1] == rest] if role else []
        files = [*files, *(file for file in alike if role != _role(file)[0])]
    groups: dict[str, dict[str, Path]] = defaultdict(dict)
    for file in files:
        role, rest = _role(file)
        if role is None:
            groups[str(file)] = {"train": file}
        elif (other := groups[rest].setdefault(role, file)) != file:
            problem = f"{other} and {file} both look like {role}"
            raise DataError(f"{problem}: give the files that belong together", code="several-files", split=role)
    if len(paths) > 1 and len(groups) > 1:  # files of one corpus, whatever else is in their names
        parts = [(role or "train", file) for file in files for role, _ in [_role(file)]]
        if len({role for role, _ in parts}) == len(parts):
            groups = defaultdict(dict, {"": dict(parts)})
    sets = sorted((group for group in groups.values() if "train" in group), key=lambda group: -len(group))
    if not sets or (len(sets) > 1 and not any(_role(group["train"])[0] for group in sets)):
        names = ", ".join(sorted(file.name for file in files))
        problem = f"no name says which of {names} is the training data"
        remedy = "give one file, or name them train, dev (or validation) and test"
        raise DataError(f"{problem}: {remedy}", code="no-train", files=tuple(map(str, files)))
    named = [group for group in sets if _role(group["train"])[0]] or sets
    trains = [str(group["train"].name) for group in named]
    chosen = found.pick("FILE", "Several sets of files are there. Which is train?", trains)
    if len(trains) > 1:
        others = ", ".join(name for name in trains if name != chosen)
        found.decisions.append(Decision("FILE", chosen, f"or is it {others}? Then give that file"))
    return named[trains.index(chosen)]


def _data_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    known = [file for file in files if file.suffix.lower() in READERS and file.name.lower() != "readme.txt"]
    if known:
        return known
    folders = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())[:10])
    more = f" It has the folders {folders}: give one of them." if folders else ""
    listing = ", ".join(file.name for file in files[:10]) or "no file"
    endings = ", ".join(READERS)
    problem = f"{folder}: the folder contains {listing}; data files end in {endings}.{more}"
    raise DataError(problem, code="no-data-file", path=str(folder))


def _role(file: Path) -> tuple[str | None, str]:
    """Return the split that a file's name says, and the rest of the name; none if it says none."""
    parts = re.split(r"([^A-Za-z]+)", file.name.lower().removesuffix(file.suffix.lower()))
    roles = [(at, canonical(part)) for at, part in enumerate(parts) if canonical(part) in SPLITS]
    if len(roles) != 1:
        return None, file.name
    at, role = roles[0]
    return role, str(file.parent / "".join([*parts[:at], "*", *parts[at + 1 :], file.suffix]))


def _place_splits(splits: Mapping[str, Path], found: Findings) -> None:
    """Set `path`, `train`, `validation` and `test`."""
    train, data = splits["train"], found.data
    root = train if len(splits) == 1 else train.parent
    data["path"] = str(root)

    def count(split: str) -> int:
        """Return the texts of a split; 0 if no text has a label, as in the test set of a shared task."""
        keys = {key: value for key, value in data.items() if key in SourceConfig.model_fields}
        try:
            return len(
                read_split(SourceConfig(**{**keys, "path": str(splits[split])}), splits[split].name, data["task"])
            )
        except DataError as error:
            if error.code.startswith("empty-"):
                return 1
            if error.code != "no-labels" or split == "train":
                raise
            found.decisions.append(
                Decision(f"data.{split}", "not used", f"no text in {splits[split].name} has a label")
            )
            return 0

    size = count("train")
    here = {split: os.path.relpath(splits[split], root) for split in splits if split != "train" and count(split)}
    if len(splits) > 1:
        found.decide("train", train.name, "its name says so")
    share = 0.2 if size < 1000 else 0.1 if size < 20_000 else 0.05
    kept_together = f"{share:.0%} of train are set aside: stratified, near-duplicates on one side"
    if "validation" in here and "test" in here:
        found.decide("validation", here["validation"], "its name says so; it chooses the checkpoint")
        found.decide("test", here["test"], "its name says so; it scores what was chosen")
    elif "test" in here:
        found.decide("validation", share, kept_together)
        found.decide("test", here["test"], "its name says so; it scores what was chosen")
    elif "validation" in here:
        found.decide("validation", share, f"{kept_together}; they choose the checkpoint")
        found.decide("test", here["validation"], "scored on what did not choose the checkpoint")
    else:
        found.decide("validation", share, kept_together)
        found.decide("test", None, "there is no test file: the score is of validation, which also chose the checkpoint")


# -- the form of a file --


def find_form(path: Path, found: Findings) -> None:
    """Set the keys that read a file: task, format, header and columns."""
    ending = path.suffix.lower()
    if ending in (".parquet", ".json", ".jsonl", ".ndjson"):
        Table(path, found).find()
        return
    lines = _sample(path)
    column_file = _split_columns(lines)
    if ending in (".conll", ".conllu") or (column_file and not _has_header(column_file)):
        if ending not in (".conll", ".conllu"):
            found.decide("format", "conll", "a word a line, a blank line between texts")
        _find_tags(path, lines, column_file or [], found)
        return
    if ending not in (".csv", ".tsv"):
        separator = separator_of(DataFile(path, tolerant=True))
        widths = {len(cells) for _, cells in tables.records(iter([f"{line}\n" for line in lines]), separator) if cells}
        if widths == {1} or len(widths) > 1:
            _refuse_plain(path, lines)
        found.decide("format", "tsv" if separator == "\t" else "csv", f"columns separated by {separator!r}")
    Table(path, found).find()


def _sample(path: Path) -> list[str]:
    """Return the first lines of a text file.

    Raises:
        DataError: the file is empty, or not a text.
    """
    with path.open("rb") as file:
        head = file.read(65536)
    lines = list(islice(DataFile(path, tolerant=True).lines(), SAMPLED))  # says what a workbook or an archive is
    odd = sum(
        unicodedata.category(char) == "Cc" and char not in "\t\r\n\x0b\x0c\x85" for line in lines for char in line
    )
    if odd > 0.02 * sum(map(len, lines)) and b"\x00" in head:
        problem = f"{path}: not a text file, and not in a format that is known ({', '.join(READERS)})"
        raise DataError(problem, code="not-text", kind="unknown")
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: the file is empty", code="no-texts", source=str(path))
    return lines


def _refuse_plain(path: Path, lines: Sequence[str]) -> None:
    example = next(line for line in lines if line.strip())[:60]
    problem = f"{path}: there are texts, but no labels were found (a line is “{example}”)"
    remedy = "Needed: a table with a column of texts and one of labels, or a word and its label in each line"
    raise DataError(f"{problem}. {remedy}.", code="no-labels", source=str(path))


def _split_columns(lines: Sequence[str]) -> list[list[str]] | None:
    """Return the rows of a column file: a word in each line, blank lines between texts; none if it is not one."""
    body = [line for line in lines if line.strip() and not _COMMENT.match(line)]
    tabs = any("\t" in line for line in body)
    rows = [line.split("\t") if tabs else line.split() for line in body]
    width, fitting = Counter(map(len, rows)).most_common(1)[0] if rows else (0, 0)
    texts = sum(bool(line.strip()) and not before.strip() for before, line in zip(["", *lines], lines, strict=False))
    rows = [row for row in rows if len(row) == width]
    single = sum(" " not in row[1 if width == len(CONLLU_COLUMNS) else 0].strip() for row in rows)
    fits = width > 1 and fitting > 0.9 * len(body) and single > 0.95 * fitting
    return rows if fits and texts > 1 and len(body) > 1.5 * texts else None


def _has_header(rows: Sequence[Sequence[str]]) -> bool:
    again = {row[-1] for row in rows[1:]}
    return rows[0][-1] not in again and any(cell.strip().lower() in (*TEXT_NAMES, *LABEL_NAMES) for cell in rows[0])


def _find_tags(path: Path, lines: Sequence[str], rows: Sequence[Sequence[str]], found: Findings) -> None:
    """Set task and label column of a column file."""
    answers: dict[str, str] = {}
    texts = list(ConllReader(iter(lines), path.name, Columns(TASKS["sequence"])))
    labels = count_labels(one for one in texts if isinstance(one, Example))
    if len(labels) > 1 and labels.total() > 0.9 * len(texts):
        answers["sequence"] = f"a comment before each text has its label ({some(labels)})"
    tags = _tag_columns(rows)
    if tags:
        answers["token"] = f"each word has a label ({some(next(iter(tags.values())))})"
    if not answers:
        problem = f"{path}: no column has labels that recur, and no comment has the label of a text"
        raise DataError(f"{problem}. Name the column in data.label_column.", code="no-labels", source=str(path))
    if "task" not in found.data:
        task = found.pick("data.task", TASK_QUESTION, list(answers))
        other = "".join(f"; or {name}: {why}" for name, why in answers.items() if name != task)
        found.decide("task", task, answers[task] + other)
    if get_task(found.data["task"]).words_given and "label_column" not in found.data and tags:
        column = found.pick("data.label_column", "Which column has the labels of the words?", list(tags))
        others = "".join(f"; or {name}: {some(values)}" for name, values in tags.items() if name != column)
        number = int(column) if column.isdecimal() else column
        found.decide("label_column", number, some(tags[column]) + others)


def _tag_columns(rows: Sequence[Sequence[str]]) -> dict[str, Counter[str]]:
    """Return what may be the labels of words, the likeliest first: column -> labels."""
    if not rows:
        return {}
    if len(rows[0]) == len(CONLLU_COLUMNS):
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            for pair in row[9].split("|"):
                key, sign, value = pair.partition("=")
                if sign and not key.startswith("Space"):
                    found[f"misc.{key}"][value] += 1
        found["upos"] = Counter(row[3] for row in rows)
        found = {name: values for name, values in found.items() if 1 < len(values) <= MOST_LABELS}
        return dict(
            sorted(found.items(), key=lambda pair: (not pair[0].lower().startswith("misc.lang"), -pair[1].total()))
        )
    columns = {str(at): Counter(row[at].strip() for row in rows) for at in range(len(rows[0]) - 1, 0, -1)}
    return {at: tags for at, tags in columns.items() if 1 < len({*tags} - {"_", ""}) <= min(MOST_LABELS, len(rows) / 2)}


# -- the whole data --


def _read_whole(found: Findings, seed: int) -> Corpus:
    """Read the data as a training would, and set what only shows there: missing values and labels to merge."""
    data = found.data
    while True:
        try:
            corpus = load_corpus(DataConfig(**data), seed)
        except DataError as error:
            if error.code not in ("empty-label", "empty-text") or "missing" in data:
                raise
            what = error.code.removeprefix("empty-")
            found.decide("missing", [""], f"rows without a {what} are left out (first at {error.fields['places'][0]})")
            continue
        merged = merges(count_labels([*corpus.train, *corpus.validation, *corpus.test]))
        if not merged or "label_map" in data:
            break
        found.decide("label_map", merged, "the labels differ in case, blanks or one letter")
    return corpus


def merges(labels: Mapping[str, int]) -> dict[str, str]:
    """Map labels to the one that they are likely to be: another spelling of it, or a rare typo."""
    found = respelled(labels)
    for label, count in labels.items():
        others = [other for other, often in labels.items() if often > 50 * count and other not in found]
        for other in others if label not in found and count <= 5 else ():
            if _is_typo(label.casefold(), other.casefold()):
                found[label] = other
    return {old: found.get(new, new) for old, new in found.items()}


def _is_typo(one: str, other: str) -> bool:
    """Return whether two words of letters differ by one letter, or two that are swapped, after the first."""
    if min(len(one), len(other)) < 5 or one[0] != other[0] or not (one + other).isalpha():
        return False
    changes = [
        change for change in SequenceMatcher(None, one, other, autojunk=False).get_opcodes() if change[0] != "equal"
    ]
    edits = sum(max(end - start, last - first) for _, start, end, first, last in changes)
    return edits == 1 or (edits == 2 and sorted(one) == sorted(other))


# -- languages --


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """Return the share of letters in each script that has at least 1%, the most frequent first."""
    letters = Counter(char for text in texts for char in text if char.isalpha())
    counts: Counter[str] = Counter()
    for char, count in letters.items():
        counts[unicodedata.name(char, "unknown").split()[0].split("-")[0].capitalize()] += count
    return {name: count / letters.total() for name, count in counts.most_common() if count >= 0.01 * letters.total()}


def looks_english(texts: Sequence[str]) -> bool:
    """Return whether enough of the words are function words that only English has."""
    words = [word for text in texts for word in text.lower().split() if word.isalpha()]
    return sum(word in _ENGLISH for word in words) > ENGLISH * max(len(words), 1)
