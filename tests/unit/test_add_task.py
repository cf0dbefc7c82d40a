"""A task that is added from outside the package: stars of a review, from 1 to 5."""

import json

import numpy as np
import pytest
from tiny_models import build

from tokmask_peft import Recipe, evaluate, load, train
from tokmask_peft.tasks import TASKS, SequenceTask

WORDS = {1: "awful", 2: "poor", 3: "fair", 4: "good", 5: "superb"}


# example: begin
class StarsTask(SequenceTask):
    """Stars of a review, which are in an order: 4 for 5 is a smaller mistake than 1 for 5."""

    name = "stars"
    description = "stars of a review, from 1 to 5"
    text_columns = ("review", *SequenceTask.text_columns)
    label_columns = ("stars", "rating")

    def more_scores(self, gold, predicted, labels):
        """Return how many stars the answers are off on average."""
        stars = np.array([int(label) for label in labels])
        return {"mean_error": float(np.abs(stars[gold] - stars[predicted]).mean())}


@pytest.fixture
def stars(monkeypatch):
    monkeypatch.setitem(TASKS, StarsTask.name, StarsTask())  # in a program: TASKS["stars"] = StarsTask()


# example: end


@pytest.fixture
def recipe(tmp_path, stars):
    model, tokenizer = build("bert")
    model.base_model.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    (tmp_path / "data").mkdir()
    for split, count in (("train", 40), ("validation", 10), ("test", 10)):
        rows = [f"{split} {number} {WORDS[number % 5 + 1]}\t{number % 5 + 1}" for number in range(count)]
        (tmp_path / f"data/{split}.tsv").write_text("\n".join(["review\tstars", *rows]) + "\n", encoding="utf-8")
    content = {
        "name": "stars",
        "output_dir": str(tmp_path),
        "model": {"backbone": str(tmp_path / "backbone"), "quantization": "none", "precision": "fp32"},
        "data": {"task": "stars", "path": str(tmp_path / "data"), "max_length": 64},
        "training": {"max_steps": 3, "batch_size": 8, "learning_rate": 3e-3},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content), encoding="utf-8")
    return Recipe.load(tmp_path / "recipe.yaml")


def test_it_trains_scores_and_predicts(recipe):
    run = train(recipe, quiet=True)
    matrix = np.array(run.result.test["confusion"]["matrix"])
    assert run.result.labels == ["1", "2", "3", "4", "5"]
    off = np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    assert run.result.test["mean_error"] == pytest.approx((matrix * off).sum() / matrix.sum())
    assert {"mean_error"} <= run.result.validation.keys()
    assert run.result.baseline["f1_macro"] == 1.0
    assert evaluate(run.folder.root)["mean_error"] == run.result.test["mean_error"]
    (answer,) = load(run.folder.root).predict(["a good phone"])
    assert answer.label in run.result.labels


def test_only_recipes_after_it_know_the_task(recipe):
    del TASKS["stars"]
    with pytest.raises(Exception, match="there is no 'stars'") as caught:
        Recipe.model_validate(recipe.model_dump())
    assert "sequence" in str(caught.value)
    TASKS["stars"] = StarsTask()
