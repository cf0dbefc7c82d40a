"""Logits of the final evaluation: labelled positions only, in the order of the texts, from any number of processes."""

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from tokmask_peft.training.trainer import OrderedEvalTrainer, in_order


def batches(task, texts=7, size=2, classes=3):
    """Batches of a split of 7 texts, padded to their own lengths, and the last one filled up from the first."""
    lengths = [1, 2, 2, 3, 4, 4, 5, 1]
    made = []
    for start in range(0, texts + 1, size):
        rows = lengths[start : start + size]
        labels = torch.zeros(len(rows), dtype=torch.long)
        if task == "token":
            labels = torch.full((len(rows), max(rows) + 2), -100)
            for row, length in enumerate(rows):
                labels[row, 1 : 1 + length] = 1
        made.append((torch.randn(*labels.shape, classes), labels))
    return made


@pytest.mark.parametrize("task", ["sequence", "token"])
@pytest.mark.parametrize("processes", [1, 2])
def test_order_and_shape(tmp_path, task, processes):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainers = [OrderedEvalTrainer(torch.nn.Linear(1, 1), arguments) for _ in range(processes)]
    made = batches(task)
    every = torch.cat([logits[labels != -100] for logits, labels in made]).numpy()
    items = len(every) - 1  # the last text only fills the last batch up
    for trainer in trainers:
        trainer._logits = []
    for number, (logits, labels) in enumerate(made):
        # models with further outputs give a tuple
        given = (logits, None) if number % 2 else logits
        predicted = trainers[number % processes].preprocess_logits_for_metrics(given, labels)
        assert torch.equal(predicted, logits.argmax(-1))
    found = in_order([trainer._logits for trainer in trainers], items)
    assert found.dtype == np.float32
    assert np.array_equal(found, every[:items])
