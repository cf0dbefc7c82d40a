"""What the end of a run warns of."""

import numpy as np
import pytest

from tokmask_peft.artifacts import Result
from tokmask_peft.tasks import get_task
from tokmask_peft.training.metrics import Predictions, scores, task_scores
from tokmask_peft.training.scoring import language_warnings, warnings_of

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
        assert "the label 'unsure'" in one["message"] or not one["code"].startswith("label-")
    assert Result.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(("answers", "code"), [([[1, 0], [1, 0]], "one-label"), ([[1, 0], [0, 0]], None)])
def test_one_of_several_labels_is_a_fault_if_every_text_gets_it(answers, code):
    task = get_task("multilabel")
    gold, given = ([task.ids_of(np.array([row])) for row in rows] for rows in ([[1, 0], [0, 0]], answers))
    found = task_scores(task, Predictions(gold, given), ["a", "b"])
    warned = [one["code"] for one in warnings_of(Result(task=task.name, labels=["a", "b"], validation=found))]
    assert [one for one in warned if one == "one-label"] == [code] * (code is not None)


@pytest.mark.parametrize(
    ("losses", "best", "warned"),
    [
        ([1.0, 1.4, 2.8], 3, True),
        ([1.0, 1.4, 2.8], 2, False),
        ([2.8, 1.0], 1, False),
        ([1.0, 1.2], 2, False),
        ([], 2, 0),
    ],
)
def test_a_loss_that_rose_before_the_checkpoint(losses, best, warned):
    log = [{"step": at, "epoch": at / 2, "eval_loss": loss} for at, loss in enumerate(losses, 1)] + [{"step": 9}]
    found = warnings_of(result(best_step=best), log)
    assert [(one["code"], one["key"]) for one in found] == ([("loss-rose", "training.epochs")] if warned else [])
    assert not found or "after epoch 0.5, from 1.00 to 2.80 at epoch 1.5" in found[0]["message"]


def test_a_backbone_of_another_language(monkeypatch):
    monkeypatch.setattr("tokmask_peft.training.scoring.foreign_words", lambda tokenizer, texts: tokenizer)
    assert language_warnings("a", None, []) == language_warnings("intfloat/multilingual-e5-small", "cuts", []) == []
    (found,) = language_warnings("a/b", "cuts a word into 2.7 pieces", [])
    assert (found["code"], found["key"]) == ("another-language", "model.backbone")
    assert "backbone a/b was" in found["message"]
    (found,) = language_warnings("/home/me/secret/mine", "cuts a word into 2.7 pieces", [])
    assert "backbone mine was" in found["message"], "it is on a page that may be sent to others"
    assert "model.backbone_path=e5-small" in found["message"]


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
