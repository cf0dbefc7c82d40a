"""Splits that are not local files: of the Hugging Face Hub, without running its code, and of the built-in corpus."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokmask_peft.data.conll import Columns, ConllReader, Row, readable
from tokmask_peft.data.opening import DataFile
from tokmask_peft.data.split import NAME_A_SPLIT, SPLITS, aliases, canonical
from tokmask_peft.data.tables import class_names, examples, name_classes, parquet_rows
from tokmask_peft.errors import DataError, nearest
from tokmask_peft.examples import Example
from tokmask_peft.recipe.data import SourceConfig
from tokmask_peft.tasks import get_task

PARQUET_BRANCH = "refs/convert/parquet"
_FLAT_SPLIT = re.compile(r"(?:.*-)?(?P<split>train|validation|dev|test)(?:-\d{5}-of-\d{5})?$")


def read_hub(source: SourceConfig, split: str, wanted: Columns) -> list[Example]:
    """Read a split of a Hub dataset; DataError if it cannot be reached, or has no such configuration or split.

    Class labels that are stored as numbers come back as names. If no label column is set, the prefix of the
    configuration chooses it (`lid_spaeng` -> `lid`), as LinCE names them.
    """
    splits = hub_splits(source)
    rows, columns = splits[choose_split(source, split, list(splits))]
    prefix = (source.hub_config or "").split("_")[0]
    if wanted.label is None and prefix in columns and prefix in wanted.task.label_columns:
        wanted = replace(wanted, label=prefix)
    return readable(examples(rows, f"{source.hub} [{split}]", wanted))


def locate(source: SourceConfig) -> tuple[SourceConfig, list[str]]:
    """Return a dataset's source with its configuration and revision set, and the names of all configurations.

    The revision is the present commit; if the dataset comes with code, it is the branch that the Hub converts.

    Raises:
        DataError: as `read_hub`; or the dataset has several configurations, and neither the source nor the dataset
            chooses one.
    """
    import datasets

    if source.hub_revision == PARQUET_BRANCH and source.hub_config:
        return source, [source.hub_config]  # its files may be in the cache; a list of the others never is
    scripted: DataError | None = None
    if source.hub_revision != PARQUET_BRANCH:
        place = {"name": source.hub_config, "revision": source.hub_revision}
        try:
            found = _reach(source, lambda: datasets.load_dataset_builder(source.hub, **place))
            commit = found.hash if re.fullmatch("[0-9a-f]{40}", found.hash or "") else None
            update = {"hub_config": found.config.name, "hub_revision": source.hub_revision or commit}
            return source.model_copy(update=update), list(found.builder_configs)
        except DataError as error:
            if error.code != "hub-script" or source.hub_revision:
                raise
            scripted = error
    try:
        names = _configurations(source)
    except DataError as error:
        raise scripted or error from None
    if scripted is not None and not names:
        raise scripted
    config = source.hub_config or (names[0] if len(names) == 1 else None)
    if config is None:
        problem = f"data.hub: {source.hub} has {len(names)} configurations: {', '.join(names)}"
        raise DataError(f"{problem}. Set data.hub_config to one of them.", code="no-config", configs=tuple(names))
    return source.model_copy(update={"hub_config": config, "hub_revision": PARQUET_BRANCH}), names


def hub_splits(source: SourceConfig) -> dict[str, tuple[Iterator[Row], list[str]]]:
    """Return the rows, which are read as they are used, and the columns of each split; DataError as `read_hub`."""
    return (_converted if source.hub_revision == PARQUET_BRANCH and source.hub_config else _dataset)(source)


def _converted(source: SourceConfig) -> dict[str, tuple[Iterator[Row], list[str]]]:
    """Return rows and columns of the splits from the branch that the Hub converts to parquet.

    That branch has no card, so `datasets` finds no configurations there, and none of its folders again when offline.
    huggingface_hub's own cache works offline once the files have been downloaded.
    """
    import pyarrow.parquet as pq
    from huggingface_hub import snapshot_download

    config = source.hub_config
    wanted: dict[str, Any] = {"revision": PARQUET_BRANCH, "allow_patterns": [f"{config}/*"]}
    folder = _reach(source, lambda: snapshot_download(str(source.hub), repo_type="dataset", **wanted))
    root = Path(folder) / str(config)
    splits: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*.parquet")):
        flat = _FLAT_SPLIT.match(file.stem)
        name = file.parent.name if file.parent != root else flat["split"] if flat else file.stem
        splits.setdefault(name, []).append(file)
    if not splits:
        problem = f"data.hub_config: {source.hub} has no parquet files for '{config}' on the branch {PARQUET_BRANCH}."
        with suppress(DataError):
            names = _configurations(source)
            problem += f" It has {', '.join(names)}.{nearest(str(config), names)}"
        raise DataError(problem, code="no-config", config=config)

    def rows(split: str, files: list[Path]) -> Iterator[Row]:
        for file in files:
            yield from parquet_rows(DataFile(file, f"{source.hub} {split}" + f" {file.name}" * (len(files) > 1)))

    return {split: (rows(split, files), pq.read_schema(files[0]).names) for split, files in splits.items()}


def _configurations(source: SourceConfig) -> list[str]:
    """Return the configurations on the parquet branch; DataError if it cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFolder

    def entries() -> list[Any]:
        return list(HfApi().list_repo_tree(str(source.hub), revision=PARQUET_BRANCH, repo_type="dataset"))

    return [entry.path for entry in _reach(source, entries) if isinstance(entry, RepoFolder)]


def _dataset(source: SourceConfig) -> dict[str, tuple[Iterator[Row], list[str]]]:
    """Return rows and columns of the splits through the `datasets` library."""
    import datasets

    place = {"name": source.hub_config, "revision": source.hub_revision}
    splits = _reach(source, lambda: datasets.load_dataset(source.hub, **place))
    return {split: _rows(dataset, f"{source.hub} {split}") for split, dataset in splits.items()}


def _rows(dataset: Any, name: str) -> tuple[Iterator[Row], list[str]]:
    """Return rows and columns of a split of `datasets`, without pictures and sound, and with the names of classes."""
    kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    dataset = dataset.remove_columns([name for name, kind in kinds.items() if kind in {"Image", "Audio", "Video"}])
    classes = class_names(dataset.features)
    rows = ((f"{name}[{index}]", name_classes(row, classes)) for index, row in enumerate(dataset))
    return rows, list(dataset.features)


def choose_split(source: SourceConfig, split: str, splits: list[str]) -> str:
    """Find a split by its name or an alias of it; DataError if there is none."""
    if split in splits:
        return split
    fitting = [name for name in splits if name.lower() in aliases(split)]
    if len(fitting) == 1:
        return fitting[0]
    problem = f"{source.hub}: no split '{split}'. It has {', '.join(splits)}.{nearest(split, splits)} {NAME_A_SPLIT}"
    raise DataError(problem, code="no-split", split=split)


def _reach(source: SourceConfig, load: Callable[[], Any]) -> Any:
    """Call the Hub, and turn what can go wrong into one error with a remedy."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        return load()
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        where = " ".join(part for part in (source.hub, source.hub_config, source.hub_revision) if part)
        text = " ".join(str(error).partition("Example of usage")[0].split()).rstrip(".")  # which is of Python
        code, remedy = _remedy(error, text.lower())
        raise DataError(f"data.hub: {where} cannot be read: {text}. {remedy}", code=code, hub=source.hub) from error


def _remedy(error: Exception, text: str) -> tuple[str, str]:
    """Return a code for what went wrong, and what to do about it."""
    if isinstance(error, ConnectionError) or type(error).__name__ in {"LocalEntryNotFoundError", "ConnectError"}:
        problem = "The Hub cannot be reached and the dataset is not in the local cache."
        return "hub-unreachable", f"{problem} Connect (and unset HF_HUB_OFFLINE), or set data.path to a local copy."
    if "gated" in text or "authenticated" in text:
        return "hub-gated", "Ask for access on the dataset's page, then log in with: hf auth login"
    if "scripts are no longer supported" in text:
        remedy = f"Most such datasets have a parquet copy: set data.hub_revision to {PARQUET_BRANCH}."
        return "hub-script", f"Code that comes with a dataset is never run here. {remedy}"
    if "builderconfig" in text or "config name is missing" in text:
        return "no-config", "Set data.hub_config to one of its configurations."
    return "hub", "Check data.hub, data.hub_config and data.hub_revision; a private dataset needs: hf auth login"


def builtin_examples(task: str, split: str) -> list[Example]:
    """Return a split of the built-in corpus: 4,500 made-up Spanish-English posts, to try things out with.

    The posts have a sentiment; their words are tagged lang1 (English), lang2 (Spanish), ne or other. It is not a
    benchmark, but hard in the ways that matter here: sentiment depends on negation, contrast, questions, other people's
    opinions and sarcasm rather than on one word; emoji, hashtags and names agree with the label in train more than in
    test; every fifth word and some patterns occur in test only; 6% of the training sentiments are wrong. Many words are
    spelled alike in both languages (`pan`, `red`, `no`, `come`), and English stems take Spanish endings.
    """
    name = canonical(split)
    if name not in SPLITS:
        problem = f"the built-in corpus has no split '{split}': {', '.join(SPLITS)}.{nearest(split, SPLITS)}"
        raise DataError(problem, code="no-split", split=split)
    path = Path(__file__).with_name("builtin") / f"{name}.conll.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        found = readable(ConllReader((line.removesuffix("\n") for line in file), name, Columns(get_task(task))))
        return [replace(example, where=f"built-in {name}[{index}]") for index, example in enumerate(found)]
