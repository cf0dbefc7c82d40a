"""The floor: perfect where it can be, chosen by validation, and compared with the adapter on the same texts."""

import random

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tokmask_peft.data.cleaning import CleaningReport
from tokmask_peft.data.corpus import Corpus, DataReport, collect_labels
from tokmask_peft.examples import Example
from tokmask_peft.training.metrics import Predictions, compared, scores
from tokmask_peft.training.scoring import baseline_scores


def corpus(train, validation, test=(), task="sequence"):
    report = DataReport(task, (), {}, CleaningReport("report"))
    return Corpus(task, train, validation, list(test), collect_labels(train), report)


def post(words, tags):
    return Example(tuple(words.split()), tuple(tags.split()), "here")


def floor(found, weights=None):
    """Score the baseline against an adapter that gives the first label to everything."""
    gold = [np.array([found.all_labels.index(tag) for tag in one.tags]) for one in found.test or found.validation]
    return baseline_scores(found, weights, Predictions(gold, [np.zeros_like(row) for row in gold]))


def test_a_separable_set_is_learnt_perfectly():
    train = [
        Example(f"{word} number {i}", label, "") for i in range(9) for word, label in (("good", "+"), ("bad", "-"))
    ]
    test = [Example("such a good day", "+", ""), Example("a bad one", "-", ""), Example("bad bad bad", "-", "")]
    found = floor(corpus(train, train, test))
    assert (found["f1_macro"], found["accuracy"], found["items"]) == (1.0, 1.0, 3)
    assert "logistic regression" in found["method"]
    assert found["confusion"]["labels"] == ["+", "-"]


def test_words_are_items_in_token_tasks():
    train = [post("the house the dog", "en en en en"), post("la casa el perro", "es es es es")] * 3
    found = floor(corpus(train, train, [post("the casa", "en es"), post("la", "es")], "token"))
    assert (found["items"], found["f1_macro"]) == (3, 1.0)
    assert found["per_class"]["es"]["support"] == 2


def test_validation_chooses_the_case():
    draw = random.Random(0)

    def texts(words, count):
        chosen = [draw.choice(words) for _ in range(count)]
        labels = ["+" if word in ("HOUSE", "casa") else "-" for word in chosen]
        return [
            Example(f"{word} {n % 5}", label, "") for n, (word, label) in enumerate(zip(chosen, labels, strict=True))
        ]

    cased = corpus(texts(["house", "HOUSE"], 60), texts(["house", "HOUSE"], 40))
    assert "(cased" in floor(cased)["method"]
    upper = [Example(one.text.upper(), one.label, "") for one in texts(["casa", "perro"], 40)]
    assert "(lower-cased" in floor(corpus(texts(["casa", "perro"], 60), upper))["method"]


def test_validation_chooses_the_class_weights():
    train = [Example(f"{'xy'[n % 4 == 0]} {n % 7}", "often", "") for n in range(80)]
    train += [Example(f"y {n % 7}", "rare", "") for n in range(8)]
    balanced = [Example("x 1", "often", "")] * 8 + [Example("y 2", "rare", "")] * 8
    assert "weights balanced" in floor(corpus(train, balanced), weights=[2.0, 0.1])["method"]
    assert "weights of the run" in floor(corpus(train, train[:80]), weights=[2.0, 0.1])["method"]


def made_up(count, seed):
    """Words that are ambiguous, with counts that matter."""
    draw = random.Random(seed)
    common, rare = ["no", "me", "a", "son", "he"], ["casa", "house", "perro", "horse", "canción", "song"]
    posts = []
    for _ in range(count):
        words = draw.choices(common, k=5) + draw.choices(rare, k=2)
        tags = [draw.choices(["en", "es"], [1, 1 + len(word)])[0] if word in common else "en" for word in words]
        tags = ["es" if word in ("casa", "perro", "canción") else tag for word, tag in zip(words, tags, strict=True)]
        posts.append(Example(tuple(words), tuple(tags), ""))
    return posts


def test_equal_words_count_as_often_as_they_occur(monkeypatch):
    train, test = made_up(60, 0), made_up(40, 1)
    rows, fit = [], LogisticRegression.fit

    def watched(self, features, gold, sample_weight):
        rows.append((features.shape[0], sample_weight.sum()))
        return fit(self, features, gold, sample_weight)

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    found = floor(corpus(train, made_up(20, 2), test, "token"))
    words = [pair for one in train for pair in zip(one.text, one.label, strict=True)]
    assert [round(weight) for _, weight in rows] == [len(words)] * len(rows)
    assert {count for count, _ in rows} == {len(set(words))}
    assert 0.5 < found["accuracy"] < 1.0


def test_texts_with_unseen_characters_and_unseen_labels_are_predicted_too():
    train = [Example("xx", "a", ""), Example("yy", "b", ""), Example("xx x", "a", "")]
    found = floor(corpus(train, train, [Example("日本", "b", ""), Example("xx", "new", "")]))
    assert (found["items"], found["without_prediction"], found["per_class"]["new"]["f1"]) == (2, 0, 0.0)


@pytest.mark.parametrize(
    ("texts", "right", "verdict"), [(150, 0.9, "beats"), (150, 0.1, "does not beat"), (20, 0.6, "cannot tell")]
)
def test_the_verdict_is_that_of_a_paired_bootstrap(texts, right, verdict):
    draw = np.random.default_rng(0)
    gold = [draw.integers(0, 2, 1) for _ in range(texts)]

    def answers(share):
        return Predictions(gold, [np.where(draw.random(1) < share, row, 1 - row) for row in gold])

    ours, theirs = answers(right), answers(0.5)
    found = compared(ours, theirs, 2)
    gain = scores(*ours.flat(), ("a", "b"))["f1_macro"] - scores(*theirs.flat(), ("a", "b"))["f1_macro"]
    assert found["interval"][0] < gain < found["interval"][1]
    assert found["verdict"] == verdict
    assert compared(ours, ours, 2) == {"interval": [0.0, 0.0], "verdict": "cannot tell"}
