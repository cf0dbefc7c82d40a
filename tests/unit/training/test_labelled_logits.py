"""Logits of the final evaluation: labelled positions only, in the order of the texts, from any number of processes."""

import numpy as np
import pytest
import torch

from tokmask_peft.training import trainer as trainer_module
from tokmask_peft.training.trainer import LabelledLogits


def batches(task, texts=7, size=2, classes=3):
    """Batches of a split of 7 texts, padded to their own lengths, and the last one filled up from the first."""
    draw = torch.Generator().manual_seed(0)
    lengths = [1, 2, 2, 3, 4, 4, 5, 1]
    made = []
    for start in range(0, texts + 1, size):
        rows = lengths[start : start + size]
        if task == "sequence":
            made.append((torch.randn(len(rows), classes, generator=draw), torch.zeros(len(rows), dtype=torch.long)))
            continue
        labels = torch.full((len(rows), max(rows) + 2), -100)
        for row, length in enumerate(rows):
            labels[row, 1 : 1 + length] = 1
        made.append((torch.randn(*labels.shape, classes, generator=draw), labels))
    return made


@pytest.mark.parametrize("task", ["sequence", "token"])
@pytest.mark.parametrize("processes", [1, 2])
def test_order_and_shape(monkeypatch, task, processes):
    made = batches(task)
    every = torch.cat([logits[labels != -100] for logits, labels in made]).numpy()
    items = len(every) - 1  # the last text only fills the last batch up
    kept = [LabelledLogits() for _ in range(processes)]
    for number, (logits, labels) in enumerate(made):
        # models with further outputs give a tuple
        predicted = kept[number % processes]((logits, None) if number % 2 else logits, labels)
        assert torch.equal(predicted, logits.argmax(-1))
    shares = [one._batches for one in kept]
    monkeypatch.setattr(trainer_module, "gather_object", lambda _: shares)
    found = kept[0].in_order(items)
    assert found.dtype == np.float32
    assert np.array_equal(found, every[:items])
