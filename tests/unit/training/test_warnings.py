"""What the end of a run warns of."""

import numpy as np
import pytest

from tokmask_peft.artifacts import Result
from tokmask_peft.training.metrics import scores
from tokmask_peft.training.scoring import warnings_of

LABELS = ["no", "unsure", "yes"]
GOLD = np.array([0, 0, 1, 1, 2, 2, 2, 2])


def result(predicted=GOLD, validation=GOLD, **more):
    test = scores(GOLD, np.array(predicted), LABELS)
    return Result(labels=LABELS, validation=scores(validation, validation, LABELS), test=test, **more)


def floor(verdict):
    return scores(GOLD, GOLD, LABELS) | {"verdict": verdict, "interval": [-0.02, 0.01]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"predicted": [2] * 8}, {"one-label": "training.epochs"}),
        ({"predicted": [0, 0, 2, 2, 2, 2, 2, 2]}, {"label-never-predicted": "training.class_weights"}),
        ({"validation": np.array([0, 2])}, {"label-not-in-validation": "data.validation"}),
        ({"baseline": floor("beats"), "probe": floor("beats")}, {}),
        ({"baseline": floor("cannot tell")}, {"not-above-floor": "model.backbone"}),
        ({"probe": floor("does not beat")}, {"not-above-floor": "model.backbone"}),
    ],
)
def test_each_fault_is_said_with_the_key_to_change(given, expected):
    made = result(**given)
    found = warnings_of(made)
    assert {one["code"]: one["key"] for one in found} == expected
    for one in found:
        assert one["key"] in one["message"]
    assert Result.from_dict(made.to_dict()) == made


def test_the_labels_are_named():
    (never,) = warnings_of(result([0, 0, 2, 2, 2, 2, 2, 2]))
    assert "'unsure'" in never["message"]
    assert "'yes'" not in never["message"]


def test_labels_that_mark_entities_are_not_to_be_joined():
    for given in ({"predicted": [0, 0, 2, 2, 2, 2, 2, 2]}, {"validation": np.array([0, 2])}):
        made = result(**given)
        assert "data.label_map" in warnings_of(made)[0]["message"]
        made.test["entities"] = {}
        assert "data.label_map" not in warnings_of(made)[0]["message"]
