"""Read splits from the Hugging Face Hub, without running code that comes with a dataset."""

from __future__ import annotations

from typing import Any

from tokmask_peft.data.example import Example
from tokmask_peft.data.files import aliases
from tokmask_peft.data.tabular import LABEL_NAMES, class_names, examples, name_classes
from tokmask_peft.errors import DataError, nearest
from tokmask_peft.recipe import SourceConfig, Task

PARQUET_BRANCH = "refs/convert/parquet"


def read_hub(source: SourceConfig, split: str, task: Task) -> list[Example]:
    """Read a split of a Hub dataset.

    Class labels that are stored as numbers come back as names. When no label column is set, the configuration's prefix
    chooses it (`lid_spaeng` -> `lid`), as LinCE names them.

    Raises:
        DataError: the dataset cannot be reached, does not exist, is closed, or has no such configuration or split.
    """
    dataset = _split(_load(source), source, split)
    name = f"{source.hub} [{split}]"
    classes = {column: class_names(feature) for column, feature in dataset.features.items()}
    rows = (
        (f"{source.hub} {split}[{index}]", name_classes(row, classes))
        for index, row in enumerate(dataset.remove_columns(_unread(dataset)))
    )
    label = source.label_column
    if label is None and source.hub_config:
        prefix = source.hub_config.split("_")[0]
        label = prefix if prefix in dataset.features and prefix in LABEL_NAMES[task] else None
    return list(examples(rows, name, task, source.text_column, label))


def _unread(dataset: Any) -> list[str]:
    """Columns that hold neither text nor labels, and are slow to decode."""
    media = {"Image", "Audio", "Video"}
    return [name for name, feature in dataset.features.items() if type(feature).__name__ in media]


def _split(splits: Any, source: SourceConfig, split: str) -> Any:
    """Find a split by its name or an alias of it.

    Raises:
        DataError: there is none, or several; lists what there is.
    """
    if split in splits:
        return splits[split]
    fitting = [name for name in splits if name.lower() in aliases(split)]
    if len(fitting) == 1:
        return splits[fitting[0]]
    raise DataError(
        f"{source.hub}: no split '{split}'. It has {', '.join(splits)}.{nearest(split, splits)} Name one in data.train, "
        "data.validation or data.test; data.validation may be a share of train such as 0.1, and data.test may be null."
    )


def _load(source: SourceConfig) -> Any:
    """Load all splits of a configuration.

    On the branch that the Hub converts to parquet there is no card that lists configurations: each is a folder.

    Raises:
        DataError: with the remedy.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    folders = source.hub_revision == PARQUET_BRANCH
    try:
        return datasets.load_dataset(
            source.hub,
            name=None if folders else source.hub_config,
            data_dir=source.hub_config if folders else None,
            revision=source.hub_revision,
        )
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(_explain(source, error)) from error


def _explain(source: SourceConfig, error: Exception) -> str:
    """Say what went wrong and what to do."""
    where = " ".join(part for part in (source.hub, source.hub_config, source.hub_revision) if part)
    text = " ".join(str(error).split())
    lower = text.lower()
    if isinstance(error, ConnectionError):
        remedy = (
            "The Hub cannot be reached and the dataset is not in the local cache. Connect (and unset HF_HUB_OFFLINE), "
            "or set data.path to a local copy."
        )
    elif "gated" in lower or "authenticated" in lower:
        remedy = "Ask for access on the dataset's page, then log in with: hf auth login"
    elif "scripts are no longer supported" in lower:
        remedy = f"Its code is never run here. Most such datasets have a parquet copy: set data.hub_revision to {PARQUET_BRANCH}."
    elif "builderconfig" in lower or "config name is missing" in lower:
        remedy = "Set data.hub_config to one of its configurations."
    elif source.hub_revision == PARQUET_BRANCH and source.hub_config:
        remedy = f"Check data.hub_config: '{source.hub_config}' must be a folder on the branch {PARQUET_BRANCH}."
    else:
        remedy = "Check data.hub, data.hub_config and data.hub_revision; a private dataset needs: hf auth login"
    return f"data.hub: {where} cannot be read: {text}. {remedy}"
