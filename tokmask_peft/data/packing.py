"""Put the texts of a batch one after the other into one row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from tokmask_peft.recipe import Task


class PackedCollator:
    """Pack a batch into one row, for a model that takes packed rows (`model.padding_free`).

    Args:
        task: in token tasks the labels are packed too, else there is one for each text.
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build the batch; other columns than `input_ids` and `labels` are dropped.

        Returns:
            `input_ids` [1, total]; `cu_seqlens` int32 [texts + 1], where each text begins and the last one ends;
            `max_length`, of the longest text; and, if given, `labels` of [texts] or [1, total].
        """
        import torch

        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        lengths = [len(text) for text in ids]
        batch: dict[str, Any] = {
            "input_ids": torch.cat(ids).unsqueeze(0),
            "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            "max_length": max(lengths),
        }
        if "labels" in rows[0] and self._task == "token":
            labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
            batch["labels"] = torch.cat(labels).unsqueeze(0)
        elif "labels" in rows[0]:
            batch["labels"] = torch.tensor([int(row["labels"]) for row in rows], dtype=torch.long)
        return batch
