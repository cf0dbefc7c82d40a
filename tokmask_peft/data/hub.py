"""Splits that are not local files: of the Hugging Face Hub, without running its code, and of the built-in corpus."""

import functools
import gzip
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokmask_peft.data.conll import Columns, ConllReader, Row, readable
from tokmask_peft.data.opening import DataFile, damaged
from tokmask_peft.data.split import NAME_A_SPLIT, SPLITS, aliases, canonical
from tokmask_peft.data.tables import class_names, examples, name_classes, parquet_rows
from tokmask_peft.errors import DataError, as_ours, nearest
from tokmask_peft.examples import Example
from tokmask_peft.recipe.data import SourceConfig
from tokmask_peft.tasks import get_task

PARQUET_BRANCH = "refs/convert/parquet"
_COMMIT = re.compile("[0-9a-f]{40}")
_FLAT_SPLIT = re.compile(r"(?:.*-)?(?P<split>train|validation|dev|test)(?:-\d{5}-of-\d{5})?$")
Opened = Callable[[], tuple[Iterator[Row], list[str]]]
"""Opens a split: its rows, which are read as they are used, and its columns."""


def read_hub(source: SourceConfig, split: str, wanted: Columns) -> list[Example]:
    """Read a split of a Hub dataset; DataError if it cannot be reached, or has no such configuration or split.

    Class labels that are stored as numbers come back as names. If no label column is set, the prefix of the
    configuration chooses it (`lid_spaeng` -> `lid`), as LinCE names them.
    """
    splits = hub_splits(source)
    rows, columns = splits[choose_split(source, split, list(splits))]()
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
    if source.hub_revision == PARQUET_BRANCH and source.hub_config:
        return source, [source.hub_config]  # its files may be in the cache; a list of the others never is
    scripted: DataError | None = None
    if source.hub_revision != PARQUET_BRANCH:
        try:
            found = _builder(source)
            commit = found.hash if _COMMIT.fullmatch(found.hash or "") else None
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


def hub_splits(source: SourceConfig) -> dict[str, Opened]:
    """Return what opens each split; DataError as `read_hub`."""
    return (_converted if source.hub_revision == PARQUET_BRANCH and source.hub_config else _dataset)(source)


def _converted(source: SourceConfig) -> dict[str, Opened]:
    """Return what opens the splits of the branch that the Hub converts to parquet.

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

    def opened(split: str, paths: list[Path]) -> tuple[Iterator[Row], list[str]]:
        files = [DataFile(path, f"{source.hub} {split}" + f" {path.name}" * (len(paths) > 1)) for path in paths]
        with damaged(files[0], "parquet", "not-parquet"):
            columns = pq.read_schema(files[0].path).names
        return (row for file in files for row in parquet_rows(file)), columns

    return {split: functools.partial(opened, split, paths) for split, paths in splits.items()}


def _configurations(source: SourceConfig) -> list[str]:
    """Return the configurations on the parquet branch; DataError if it cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFolder

    def entries() -> list[Any]:
        return list(HfApi().list_repo_tree(str(source.hub), revision=PARQUET_BRANCH, repo_type="dataset"))

    return [entry.path for entry in _reach(source, entries) if isinstance(entry, RepoFolder)]


def _dataset(source: SourceConfig) -> dict[str, Opened]:
    """Return what opens the splits through the `datasets` library."""
    place = SourceConfig(hub=source.hub, hub_config=source.hub_config, hub_revision=source.hub_revision)
    load = _commit if _COMMIT.fullmatch(source.hub_revision or "") else _load
    return {split: functools.partial(_rows, one, f"{source.hub} {split}") for split, one in load(place).items()}


def _load(place: SourceConfig) -> Any:
    """Return the splits of `datasets`; a DataError if they cannot be loaded."""
    builder = _builder(place)
    _reach(place, builder.download_and_prepare)
    return _reach(place, builder.as_dataset)


_commit = functools.lru_cache(maxsize=1)(_load)  # the same, once for all splits: what a commit holds never changes


def _builder(source: SourceConfig) -> Any:
    """Return the builder of `datasets`, for the revision that is set.

    If the Hub cannot be reached, `datasets` takes the newest copy in its cache, whichever revision it is of.

    Raises:
        DataError: the dataset cannot be reached, and the cache has copies of other revisions only.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    hub, wanted, verbosity = str(source.hub), source.hub_revision, datasets.logging.get_verbosity()
    if wanted is not None:
        datasets.logging.set_verbosity_error()  # it says which copy is the newest, which may not be the one to read
    try:
        found = _reach(source, lambda: datasets.load_dataset_builder(hub, name=source.hub_config, revision=wanted))
    finally:
        datasets.logging.set_verbosity(verbosity)
    if wanted is None or not isinstance(found, Cache):
        return found
    known = Path(HF_HUB_CACHE, repo_folder_name(repo_id=hub, repo_type="dataset"), "refs", wanted)  # a branch, a tag
    place = {"config_name": found.config.name, "version": str(found.config.version)}
    place["hash"] = known.read_text(encoding="utf-8").strip() if known.is_file() else wanted
    kept = Cache(repo_id=hub, dataset_name=hub.rpartition("/")[2], **place)
    if Path(kept.cache_dir).is_dir():
        return kept
    problem = f"{hub} cannot be reached, and the local cache has no copy of the revision {wanted}"
    remedy = f"Connect (and unset HF_HUB_OFFLINE), or take the newest copy: set data.hub_revision to {found.hash}"
    raise DataError(f"data.hub_revision: {problem}. {remedy}.", code="hub-revision", hub=hub, revision=wanted)


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
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        return load()
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        where = " ".join(part for part in (source.hub, source.hub_config, source.hub_revision) if part)
        cause: Any = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        ours = as_ours(cause or error, f"reading {source.hub}", DataError, hub=source.hub)
        if ours.code in ("no-space", "no-access"):
            raise ours from error
        text = " ".join(str(cause or error).partition("Example of usage")[0].split()).rstrip(".")  # which is of Python
        code, remedy = _remedy(error, text.lower())
        raise DataError(f"data.hub: {where} cannot be read: {text}. {remedy}", code=code, hub=source.hub) from error


def _remedy(error: Exception, text: str) -> tuple[str, str]:
    """Return a code for what went wrong, and what to do about it."""
    if (
        isinstance(error, ConnectionError)
        or type(error).__name__ in {"LocalEntryNotFoundError", "ConnectError"}
        or ("couldn't find cache" in text)
    ):
        problem = "The Hub cannot be reached and the dataset is not in the local cache."
        return "hub-unreachable", f"{problem} Connect (and unset HF_HUB_OFFLINE), or set data.path to a local copy."
    if "gated" in text or "authenticated" in text:
        return "hub-gated", "Ask for access on the dataset's page, then log in with: hf auth login"
    if "scripts are no longer supported" in text:
        remedy = f"Most such datasets have a parquet copy: set data.hub_revision to {PARQUET_BRANCH}."
        return "hub-script", f"Code that comes with a dataset is never run here. {remedy}"
    if any(part in text for part in ("builderconfig", "config name is missing", "configurations in the cache")):
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
