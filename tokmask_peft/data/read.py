"""Read a split from wherever the recipe says: local files, the Hub, or the built-in corpus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokmask_peft.data import tabular
from tokmask_peft.data.conll import ConllReader
from tokmask_peft.data.example import Example
from tokmask_peft.data.files import file_format, find_files, read_lines
from tokmask_peft.errors import DataError
from tokmask_peft.recipe import SourceConfig, Task

SHOWN = 5
_PLACEHOLDERS = {"", "-", "_", "?", "-1", "none", "null"}


def read_split(source: SourceConfig, split: str, task: Task) -> list[Example]:
    """Read a labelled split.

    Args:
        source: local path, Hub dataset or built-in corpus; the first that is set wins, in this order.
        split: name of the split, or of a file.
        task: `sequence` or `token`.

    Raises:
        DataError: the split is missing, empty, unlabelled or malformed.
    """
    if source.path is not None:
        found = find_files(source.path, split, source.format)
        name = ", ".join(str(file) for file in found)
        examples = [example for file in found for example in iter_rows(file, source, task)]
    elif source.hub is not None:
        from tokmask_peft.data.hub import read_hub

        name = f"{source.hub} [{split}]"
        examples = read_hub(source, split, task)
    else:
        from tokmask_peft.data.builtin import builtin_examples

        name = f"built-in corpus [{split}]"
        examples = builtin_examples(task, split)
    check_complete(examples, name, task)
    return examples


def iter_rows(path: str | Path, source: SourceConfig, task: Task, labelled: bool = True) -> Iterator[Example]:
    """Stream the texts of one local file, in order and without keeping them.

    Args:
        path: the file.
        source: gives format and columns.
        task: `sequence` or `token`.
        labelled: without, labels are neither needed nor read, as for prediction.

    Raises:
        DataError: a line is malformed, or a column is missing.
    """
    path = Path(path)
    kind = file_format(path, source.format)
    if kind == "conll":
        lines = read_lines(path)
        yield from ConllReader(lines, str(path), task, source.text_column, source.label_column, labelled)
        return
    if kind == "csv":
        rows = tabular.csv_rows(read_lines(path, keep_ends=True), str(path))
    elif kind == "tsv":
        rows = tabular.tsv_rows(read_lines(path), str(path))
    elif kind == "jsonl":
        rows = tabular.jsonl_rows(read_lines(path), str(path))
    else:
        rows = tabular.parquet_rows(path, str(path))
    yield from tabular.examples(rows, str(path), task, source.text_column, source.label_column, labelled)


def check_complete(examples: list[Example], name: str, task: Task) -> None:
    """Refuse a split in which a text or a label is missing.

    Raises:
        DataError: with the first places and the count; or the split has no labels at all.
    """
    if not examples:
        raise DataError(f"{name}: no texts in it")
    if all(_unlabelled(example) for example in examples):
        hint = ""
        if task == "sequence" and ".conll" in name:
            hint = (
                " A CoNLL file carries the label of a text in a comment, '# sent_enum = 7 positive'; for one label per "
                "word set data.task to token."
            )
        raise DataError(
            f"{name}: no text has a label.{hint} If this is the test set of a shared task, whose labels are kept back, "
            "set data.test to validation (or dev) and data.validation to a share of train such as 0.1, so that what "
            "selects the checkpoint is not what scores it."
        )
    _refuse("an empty text", [e.where for e in examples if not e.words or "" in e.words], name)
    _refuse("an empty label", [e.where for e in examples if not e.tags or "" in e.tags], name)


def _unlabelled(example: Example) -> bool:
    """Whether an example has no label, or only placeholders."""
    return all(tag.strip().lower() in _PLACEHOLDERS for tag in example.tags)


def _refuse(what: str, places: list[str], name: str) -> None:
    """Raise for the places found, if any."""
    if places:
        more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        raise DataError(
            f"{name}: {what} at {', '.join(places[:SHOWN])}{more} ({len(places)} in all). Nothing is dropped in "
            "silence: remove these lines or fill them in."
        )
