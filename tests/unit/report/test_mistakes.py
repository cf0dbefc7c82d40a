"""Mistakes: the surest first, one per text."""

import pytest
from tiny_models import build

from tokmask_peft import Prediction, WordPredictions
from tokmask_peft.examples import Example
from tokmask_peft.inference.classifier import Classifier
from tokmask_peft.report import examples
from tokmask_peft.report.examples import Mistake, explained, mistakes_of, most_confident
from tokmask_peft.tasks import get_task

SEQUENCE, TOKEN = get_task("sequence"), get_task("token")


def test_a_text_is_right_or_one_mistake():
    answer = Prediction("bad", {"good": 0.2, "bad": 0.8})
    (wrong,) = mistakes_of(SEQUENCE, Example("so so", "good", "/home/me/test.tsv:7"), answer)
    assert wrong == Mistake(("so", "so"), "good", "bad", 0.8, 0.2, "test.tsv:7")
    assert not list(mistakes_of(SEQUENCE, Example("so so", "bad", "x:1"), answer))


def test_each_wrong_word_is_a_mistake_and_the_surest_stands_for_its_text():
    rows = ({"a": 0.9, "b": 0.1}, {"a": 0.6, "b": 0.4}, {"a": 0.7, "b": 0.3})
    answer = WordPredictions(("x", "y", "z"), ("a", "a", "a"), rows)
    wrong = list(mistakes_of(TOKEN, Example(("x", "y", "z"), ("a", "b", "b"), "t:1"), answer))
    assert [(mistake.word, mistake.probability) for mistake in wrong] == [(1, 0.6), (2, 0.7)]
    other = [wrong[0]]
    assert [mistake.word for mistake in most_confident([other, [], wrong])] == [2, 1]
    assert len(most_confident([wrong] * 30, count=4)) == 4


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_influences_are_those_of_the_word_in_question(task, monkeypatch):
    model, tokenizer = build("bert", task)
    model.config.pad_token_id = tokenizer.pad_token_id
    classifier = Classifier(model, tokenizer, task, ("a", "b", "c"), max_length=32)
    words = ("mañana", "meeting", "boss")
    (answer,) = classifier.predict([words])
    gold = "a" if "a" not in (answer.label if task == "sequence" else answer.labels) else "none"
    example = Example(" ".join(words), gold, "t:1") if task == "sequence" else Example(words, (gold,) * 3, "t:1")
    (shown,), why = explained(classifier, most_confident([list(mistakes_of(get_task(task), example, answer))]))
    assert not why
    assert len(shown.influences) == 3
    assert any(shown.influences)
    monkeypatch.setattr(examples, "MOST_WORDS", 2)
    assert explained(classifier, [shown]) == ((shown,), "")
