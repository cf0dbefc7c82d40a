"""Which keys of `data` read files, or a Hub dataset, without a recipe: found by a sample, counted in the whole."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import islice
from pathlib import Path
from typing import Any

from tokmask_peft.console import Decision
from tokmask_peft.data import tables
from tokmask_peft.data.columns import MOST_LABELS, SAMPLED, TASK_QUESTION, Ask, Findings, Table, likeliest, some
from tokmask_peft.data.conll import CONLLU_COLUMNS, Columns, ConllReader, is_conll, split_columns
from tokmask_peft.data.corpus import Corpus, count_labels, load_corpus, respelled, shown_map
from tokmask_peft.data.hub import PARQUET_BRANCH, choose_split, hub_splits, locate
from tokmask_peft.data.opening import PACKED, DataFile
from tokmask_peft.data.readers import READERS, TABLES, read_split
from tokmask_peft.data.split import SHARD, SPLITS, canonical
from tokmask_peft.data.tables import separator_of
from tokmask_peft.errors import DataError
from tokmask_peft.examples import Example
from tokmask_peft.recipe.data import DataConfig, SourceConfig
from tokmask_peft.tasks import TASKS, get_task

ENGLISH = 0.15  # share of function words above which texts are taken for English; code-switched texts have less
_ENGLISH = set(
    "the and of that with this you for is it was are what have not they from but on when how which your there".split()  # noqa: SIM905
)
_NOT_DATA = re.compile(r"(?i)readme|licen[cs]e|~\$")  # or what Excel keeps next to an open workbook
_LINES = (".tagged", ".labelled")  # formats with a text in each line


def detect(
    paths: Sequence[Path], given: Mapping[str, Any], ask: Ask = likeliest, seed: int = 42
) -> tuple[Findings, Corpus]:
    """Find the keys of `data` that read files (or one folder; none for `hub` in `given`), and read them.

    Keys in `given` stay; `ask` decides what is not sure; `seed` is that of the share that is set aside for validation.
    A DataError says why there is nothing to learn from.
    """
    given = {key: one for key, one in given.items() if one != "auto" or DataConfig.model_fields[key].default != "auto"}
    found = Findings(given, ask)
    if paths:
        if len(paths) == 1 and (train := paths[0] / str(given.get("train", ""))).is_file():
            paths = [train]
        splits = find_splits(paths, found)
        find_form(splits["train"], found)
        _place_splits(splits, found)
    else:
        _place_splits(_find_hub(found), found)
    return found, _read_whole(found, seed)


# -- which file is which split --


def find_splits(paths: Sequence[Path], found: Findings) -> dict[str, Path]:
    """Return the file of each split, `train` among them, by names: of files, of those in a folder, or next to one."""
    for path in paths:
        if not (path.is_file() or path.is_dir()):
            problem = "is neither a file nor a folder" if path.exists() else f"does not exist (seen from {Path.cwd()})"
            raise DataError(f"'{path}' {problem}. Give a file, several, or a folder.", code="no-path", path=str(path))
    files = [path for path in paths if path.is_file()]
    if len(paths) == 1 and not files:
        files = _data_files(paths[0])
    elif len(files) < len(paths):
        raise DataError("give one folder, or files, but not both", code="files-and-folders")
    elif len(files) == 1:
        role, rest = _role(files[0])
        there = sorted(file for file in files[0].parent.iterdir() if file.is_file()) if role else []
        files += [file for file in there if _role(file)[1] == rest and _role(file)[0] != role]
    groups: dict[str, dict[str, Path]] = defaultdict(dict)
    for file in files:
        role, rest = _role(file)
        if role is None:
            groups[str(file)] = {"train": file}
        elif (other := groups[rest].setdefault(role, file)) != file and not SHARD.search(file.name):
            problem = f"{other} and {file} both look like {role}"
            raise DataError(f"{problem}: give the files that belong together", code="several-files", split=role)
    if len(paths) > 1 and len(groups) > 1:  # files of one corpus, whatever else is in their names
        parts = [(role or "train", file) for file in files for role, _ in [_role(file)]]
        if len({role for role, _ in parts}) == len(parts):
            groups = defaultdict(dict, {"": dict(parts)})
    alone = len(files) == 1 or (len(paths) == 1 and paths[0].is_file())
    if alone and not any("train" in group for group in groups.values()):
        groups = {"": {"train": files[0]}}
        why = f"its name says {_role(files[0])[0]}, but no file here is train: all of it is used"
        found.decisions.append(Decision("FILE", files[0].name, why))
    sets = sorted((group for group in groups.values() if "train" in group), key=lambda group: -len(group))
    if not sets or (len(sets) > 1 and not any(_role(group["train"])[0] for group in sets)):
        names = ", ".join(sorted(file.name for file in files))
        problem = f"no name says which of {names} is the training data"
        remedy = "give one file, or name them train, dev (or validation) and test"
        raise DataError(f"{problem}: {remedy}", code="no-train", files=tuple(map(str, files)))
    named = [group for group in sets if _role(group["train"])[0]] or sets
    if len(paths) > 1 and len(groups) > 1:
        spare = ", ".join(file.name for group in groups.values() if group is not named[0] for file in group.values())
        problem = f"{spare} would not be used: no name says how it belongs to {named[0]['train'].name}"
        remedy = "leave it out, or name the files alike, with train, dev (or validation) and test"
        raise DataError(f"{problem}; {remedy}", code="several-files", files=tuple(map(str, files)))
    trains = [str(group["train"].name) for group in named]
    chosen = found.pick("FILE", "Several sets of files are there. Which is train?", dict.fromkeys(trains, ""))
    group = named[trains.index(chosen)]
    used, others = {_role(file) for file in group.values()}, [name for name in trains if name != chosen]
    if unused := [file.name for file in files if _role(file) not in used]:
        why = f"or is it {', '.join(others)}? Then give that file" if others else "give all files that belong together"
        found.decisions.append(Decision("FILE", chosen, f"not used: {', '.join(unused[:10])}; {why}"))
    return {split: group[split] for split in SPLITS if split in group}


def _data_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    endings = {*READERS, *PACKED}
    if known := [file for file in files if file.suffix.lower() in endings and not _NOT_DATA.match(file.name)]:
        return known
    folders = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())[:10])
    more = f" It has the folders {folders}: give one of them." if folders else ""
    listing = ", ".join(file.name for file in files[:10]) or "no file"
    problem = f"{folder}: the folder contains {listing}; data files end in {', '.join(sorted(endings))}.{more}"
    raise DataError(problem, code="no-data-file", path=str(folder))


def _role(file: Path) -> tuple[str | None, str]:
    """Return the split that a file's name says, and the rest of the name; none if it says none."""
    parts = re.split(r"([^A-Za-z]+)", SHARD.sub("", file.name.lower()))
    roles = [(at, canonical(part)) for at, part in enumerate(parts) if canonical(part) in SPLITS]
    if len(roles) != 1:
        return None, file.name
    at, role = roles[0]
    return role, str(file.parent / "".join([*parts[:at], "*", *parts[at + 1 :]]))


def _place_splits(splits: Mapping[str, Path] | Mapping[str, str], found: Findings) -> None:
    """Set `train`, `validation` and `test` (and `path`), so that what chooses the checkpoint does not score it."""
    train, data, kind = splits["train"], found.data, "split"
    names = {split: str(one) for split, one in splits.items()}
    explicit = len(splits) > 1 or train != "train"
    if isinstance(train, Path):
        sharded, kind = SHARD.search(train.name), "file"
        root = train if len(splits) == 1 and not sharded else train.parent
        data["path"] = str(root)
        names = {split: split if sharded else os.path.relpath(file, root) for split, file in splits.items()}
        explicit = len(splits) > 1 or sharded is not None

    def count(split: str) -> int:
        """Return the texts of a split that have labels; none may have one in the test set of a shared task."""
        one, keys = splits[split], {key: value for key, value in data.items() if key in SourceConfig.model_fields}
        keys |= {"path": str(one)} if isinstance(one, Path) else {}
        name = one.name if isinstance(one, Path) else one
        try:
            try:
                texts = read_split(SourceConfig(**keys), name, data["task"])
            except DataError as error:
                if not error.code.startswith("empty-"):  # which can be left out
                    raise
                keys["missing"] = [*(data.get("missing") or ()), ""]
                texts = read_split(SourceConfig(**keys), name, data["task"])
            return sum(text.label is not None for text in texts)
        except DataError as error:
            withheld = error.code in ("no-labels", "empty-column") or error.fields.get("field") == "label_column"
            if not withheld or split == "train":
                raise
            found.decisions.append(Decision(f"data.{split}", "not used", f"no text in {name} has a label"))
            return 0

    size = count("train")
    here = {split: names[split] for split in splits if split != "train" and count(split)}
    if explicit:
        is_named = not isinstance(train, Path) or _role(train)[0] == "train"
        found.decide("train", names["train"], "its name says so" if is_named else "the only other file")
    if len(here) == 2:
        found.decide("validation", here["validation"], "its name says so; it chooses the checkpoint")
    share = 0.2 if size < 1000 else 0.1 if size < 20_000 else 0.05
    why = f"{share:.0%} of train are set aside to choose the checkpoint: stratified, near-duplicates on one side"
    found.decide("validation", share, why)
    taken = str(data["validation"])
    rest = [name for split, name in here.items() if name != taken and canonical(taken) != split][::-1]  # test first
    if rest:
        why = "its name says so" if rest[0] == here.get("test") else f"the only other {kind} with labels"
        found.decide("test", rest[0], f"{why}; it scores what was chosen")
    why = f"no test {kind} with labels is used: the score is of validation, which also chose the checkpoint"
    found.decide("test", None, why)


# -- a dataset of the Hub --


def _find_hub(found: Findings) -> dict[str, str]:
    """Set configuration, revision, task and columns of a dataset of the Hub, and return the name of each split."""
    data = found.data
    data.pop("path", None)
    try:
        asked = {key: data[key] for key in ("hub", "hub_config", "hub_revision") if key in data}
        source, configs = locate(SourceConfig(**asked))
        splits = hub_splits(source)
    except DataError as error:
        if error.code not in ("hub", "hub-unreachable"):
            raise
        problem = f"no file or folder here is named {data['hub']}, and on the Hub: {error}"
        raise DataError(problem, code=error.code, **error.fields) from error
    others = [name for name in configs if name != source.hub_config][:10]
    why = f"the default; or is it {', '.join(others)}?" if others else "the only one"
    found.decide("hub_config", source.hub_config, why)
    why = "its version, so that later ones do not change the run"
    if source.hub_revision == PARQUET_BRANCH:
        why = "the dataset comes with code, which is never run: this is the Hub's own copy of the texts"
    found.decide("hub_revision", source.hub_revision, why)
    names = list(splits)
    train = choose_split(source, data.get("train") or (names[0] if len(names) == 1 else "train"), names)
    if canonical(train) != "train":
        found.decide("train", train, "no split is named train: all of this one is used")
    there = {"train": train}
    for split in SPLITS[1:]:
        fitting = [name for name in names if canonical(name) == split and name != train]
        there |= {split: split if split in fitting else fitting[0]} if fitting else {}
    if spare := ", ".join(name for name in names if name not in there.values()):
        found.decisions.append(Decision("data.train", train, f"other splits are not used: {spare}"))
    rows, columns = splits[train]()
    prefix = str(source.hub_config).split("_")[0]
    if prefix in columns and any(prefix in task.label_columns for task in TASKS.values()):  # as LinCE names them
        found.decide("label_column", prefix, f"the name of the configuration, {source.hub_config}, begins with it")
    Table(rows, Path(str(source.hub)), found).find()
    return there


# -- the form of a file --


def find_form(path: Path, found: Findings) -> None:
    """Set the keys that read a file: task, format, separator, header, columns; DataError without texts or labels."""
    file = DataFile(path, tolerant=True, encoding=found.data.get("encoding", "auto"))
    asked, wanted = found.data.get("format"), _asked(found)
    ending = f".{asked}" if asked else file.inner.suffix.lower()
    if file.workbook or (ending in TABLES and ending not in (".csv", ".tsv")):
        _table(file, ending, found).find()
        return
    lines = _sample(file)
    named, tasks = ending in (".conll", ".conllu"), [TASKS["sequence"], TASKS["token"]]
    if named or (not asked and any(is_conll(lines, replace(wanted, task=task)) for task in tasks)):
        if not named:
            found.decide("format", "conll", "a word a line, a blank line between texts")
        _find_tags(path, lines, found)
        return
    separator = wanted.mark or ("\t" if ending == ".tsv" else separator_of(file))
    rows = [cells for _, cells in tables.records(iter([f"{line}\n" for line in lines]), separator) if cells != [""]]
    width, fitting = Counter(len(cells or ()) for cells in rows).most_common(1)[0]
    if ending in (".csv", ".tsv") or (width > 1 and fitting > 0.9 * len(rows) and ending not in _LINES):
        if ending not in (".csv", ".tsv"):
            ending = ".tsv" if separator == "\t" else ".csv"
            found.decide("format", ending[1:], f"{width} columns separated by {separator!r}")
        if ending == ".csv" and separator != ",":
            shown = "tab" if separator == "\t" else separator
            found.decide("separator", shown, f"it gives {width} columns, a comma does not")
        _table(file, ending, found).find()
        return
    _find_labels_in_lines(path, lines, ending, found)


def _asked(found: Findings) -> Columns:
    """Return what the user says of columns."""
    header, separator = (found.data.get(key, "auto") for key in ("header", "separator"))
    text, label, group = (found.data.get(f"{key}_column") for key in ("text", "label", "group"))
    text, second = text if isinstance(text, list | tuple) else (text, None)
    label = tuple(label) if isinstance(label, list) else label
    return Columns(TASKS["sequence"], text, label, True, header, group, separator, second=second)


def _table(file: DataFile, ending: str, found: Findings) -> Table:
    return Table(TABLES[".xlsx" if file.workbook else ending](file, _asked(found)), file.path, found)


def _sample(file: DataFile) -> list[str]:
    """Return the first lines of a text file; DataError if it is empty, or not a text."""
    lines = list(islice(file.lines(), SAMPLED))  # says what a workbook or an archive is
    characters = Counter("".join(lines))
    odd = sum(count for one, count in characters.items() if unicodedata.category(one) in ("Cc", "Cs") and one != "\t")
    if odd > 0.1 * characters.total():
        problem = f"{file.name}: not a text file, and not in a format that is known ({', '.join(READERS)})"
        raise DataError(f"{problem}. If it is a text, set data.encoding.", code="not-text", kind="unknown")
    if not any(line.strip() for line in lines):
        raise DataError(f"{file.name}: the file is empty", code="no-texts", source=file.name)
    return lines


def _find_labels_in_lines(path: Path, lines: Sequence[str], ending: str, found: Findings) -> None:
    """Set the format of a file with a text in each line, in which the words have tags or the first word is a label."""
    texts = [split_columns(line) for line in lines if line.strip(" \t")]
    for mark in _asked(found).mark or "/_":
        tags = Counter(word.rpartition(mark)[2] for words in texts for word in words if mark in word[1:-1])
        if tags.total() == sum(map(len, texts)) and 1 < len(tags) <= MOST_LABELS:
            found.decide("format", "tagged", f"each word has a tag behind {mark!r}: {some(tags)}")
            found.decide("separator", mark, "it stands between word and tag")
            found.decide("task", "token", "each word has a label")
            return
    labels = Counter(words[0] for words in texts if len(words) > 1)
    few = 1 < len(labels) <= min(MOST_LABELS, len(texts) / 3) and min(labels.values()) > 1
    if ending == ".labelled" or (few and labels.total() == len(texts)):
        found.decide("format", "labelled", f"each line begins with one of a few words: {some(labels)}")
        found.decide("task", "sequence", "each text has a label")
        return
    problem = f"{path}: there are texts, but no labels were found (a line is “{' '.join(texts[0])[:60]}”)"
    remedy = "a column of texts and one of labels, a label before each text, or a label for each word"
    raise DataError(f"{problem}. Needed: {remedy}.", code="no-labels", source=str(path))


def _find_tags(path: Path, lines: Sequence[str], found: Findings) -> None:
    """Set task and label column of a column file."""
    answers: dict[str, str] = {}
    reader = ConllReader(lines, path.name, replace(_asked(found), text=None, label=None, second=None))
    texts = list(reader)
    labels = count_labels(one for one in texts if isinstance(one, Example))
    if len(labels) > 1 and labels.total() > 0.9 * len(texts):
        answers["sequence"] = f"a comment before each text has its label ({some(labels)})"
    tags = _tag_columns(reader.sample)
    if tags:
        answers["token"] = f"each word has a label ({some(next(iter(tags.values())))})"
    if not answers:
        problem = f"{path}: no column has labels that recur, and no comment has the label of a text"
        raise DataError(f"{problem}. Name the column in data.label_column.", code="no-labels", source=str(path))
    if "task" not in found.data:
        task = found.pick("data.task", TASK_QUESTION, answers)
        other = "".join(f"; or {name}: {why}" for name, why in answers.items() if name != task)
        found.decide("task", task, answers[task] + other)
    if get_task(found.data["task"]).words_given and "label_column" not in found.data and tags:
        shown = {name: some(values) for name, values in tags.items()}
        column = found.pick("data.label_column", "Which column has the labels of the words?", shown)
        others = "".join(f"; or {name}: {values}" for name, values in shown.items() if name != column)
        number = int(column) if column.isdecimal() else column
        found.decide("label_column", number, shown[column] + others)


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
            if error.code not in ("empty-label", "empty-text", "empty-word") or "missing" in data:
                raise
            places = error.fields.get("places", (error.fields.get("where"),))
            what = error.code.removeprefix("empty-")
            found.decide("missing", [""], f"texts with an empty {what} are left out (first at {places[0]})")
            continue
        counts = count_labels([*corpus.train, *corpus.validation, *corpus.test])
        if "label_map" in data or not _merge(counts, found):
            return corpus


def _merge(counts: Mapping[str, int], found: Findings) -> bool:
    """Set `label_map` to other spellings of labels, and to typos if a person says so; return whether it is set."""
    merged = respelled(counts)
    labels: Counter[str] = Counter()
    for label, count in counts.items():
        labels[merged.get(label, label)] += count
    why = "the labels differ only in case, blanks, Unicode form or a trailing .0" if merged else ""
    if rare := typos(labels):
        whole = {old: rare.get(new, new) for old, new in (merged | rare).items()}
        shown = ", ".join(f"'{old}' ({labels[old]:,}) of '{new}' ({labels[new]:,})" for old, new in rare.items())
        answers = {"keep": "they are labels of their own", "merge": f"data.label_map={shown_map(whole)}"}
        if found.pick("data.label_map", f"Rare labels may be typos: {shown}. Merge them?", answers) == "merge":
            merged, why = whole, "; ".join([*filter(None, [why]), "the others are rare typos, as you say"])
        else:
            why = "; ".join([*filter(None, [why]), f"rare labels may be typos: {shown}. If so, set {answers['merge']}"])
    if merged:
        found.decide("label_map", merged, why)
    elif why:
        found.decisions.append(Decision("data.label_map", "not set", why))
    return bool(merged)


def typos(labels: Mapping[str, int]) -> dict[str, str]:
    """Map rare labels to the frequent one that they may be a typo of."""
    return {
        label: other
        for label, count in labels.items()
        for other, often in labels.items()
        if count <= 5 and often > 20 * count and _is_typo(label.casefold(), other.casefold())
    }


def _is_typo(one: str, other: str) -> bool:
    """Return whether two words of letters differ by one letter, or two that are swapped, after the first."""
    if min(len(one), len(other)) < 5 or one[0] != other[0] or not (one + other).isalpha():
        return False
    steps = SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    edits = sum(max(end - start, last - first) for kind, start, end, first, last in steps if kind != "equal")
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
