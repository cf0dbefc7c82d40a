"""Read splits from the Hugging Face Hub, without running code that comes with a dataset."""

from __future__ import annotations

from typing import Any

from tokmask_peft.data.example import Example
from tokmask_peft.data.tabular import LABEL_NAMES, examples
from tokmask_peft.errors import DataError
from tokmask_peft.recipe import SourceConfig, Task

PARQUET_BRANCH = "refs/convert/parquet"


def read_hub(source: SourceConfig, split: str, task: Task) -> list[Example]:
    """Read a split of a Hub dataset.

    Class labels that are stored as numbers come back as names. When no label column is set, the configuration's prefix
    chooses it (`lid_spaeng` -> `lid`), as LinCE names them.

    Raises:
        DataError: the dataset cannot be reached, does not exist, is closed, or has no such configuration or split.
    """
    dataset = _load(source, split)
    name = f"{source.hub} [{split}]"
    names = {column: _class_names(feature) for column, feature in dataset.features.items()}
    rows = (
        (f"{name}[{index}]", {column: _decode(cell, names[column]) for column, cell in row.items()})
        for index, row in enumerate(dataset)
    )
    label = source.label_column
    if label is None and source.hub_config:
        prefix = source.hub_config.split("_")[0]
        label = prefix if prefix in dataset.features and prefix in LABEL_NAMES[task] else None
    return list(examples(rows, name, task, source.text_column, label))


def _load(source: SourceConfig, split: str) -> Any:
    """Load the split, and turn what can go wrong into one error with a remedy."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return datasets.load_dataset(source.hub, source.hub_config, revision=source.hub_revision, split=split)
    except (DatasetNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, OSError) as error:
        raise _error(source, split, error) from error
    except (ValueError, RuntimeError) as error:
        raise _error(source, split, error) from error


def _error(source: SourceConfig, split: str, error: Exception) -> DataError:
    """Say what went wrong and what to do."""
    return DataError(f"{source.hub} [{split}]: cannot be read from the Hub: {error}")


def _class_names(feature: Any) -> list[str] | None:
    """Names of a class-label column, also inside a list."""
    feature = getattr(feature, "feature", feature)
    return getattr(feature, "names", None)


def _decode(cell: Any, names: list[str] | None) -> Any:
    """Turn class numbers into names; -1 marks a label that is kept back."""
    if names is None:
        return cell
    if isinstance(cell, list):
        return [_decode(item, names) for item in cell]
    return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else ""
