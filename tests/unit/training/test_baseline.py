"""The floor: perfect where it can be, and the same as scikit-learn on every row."""

import random

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from tokmask_peft.tasks import Example
from tokmask_peft.training.metrics import scores
from tokmask_peft.training.scoring import baseline_scores


def post(words, tags):
    return Example(tuple(words.split()), tuple(tags.split()), "here")


def test_a_separable_set_is_learnt_perfectly():
    train = [
        Example(f"{word} number {i}", label, "") for i in range(9) for word, label in (("good", "+"), ("bad", "-"))
    ]
    test = [Example("such a good day", "+", ""), Example("a bad one", "-", ""), Example("bad bad bad", "-", "")]
    found = baseline_scores(train, test, ("+", "-"), "sequence")
    assert (found["f1_macro"], found["accuracy"], found["items"]) == (1.0, 1.0, 3)
    assert "logistic regression" in found["method"]
    assert found["seconds"] >= 0


def test_words_are_items_in_token_tasks():
    train = [post("the house the dog", "en en en en"), post("la casa el perro", "es es es es")] * 3
    found = baseline_scores(train, [post("the casa", "en es"), post("la", "es")], ("en", "es"), "token")
    assert (found["items"], found["f1_macro"]) == (3, 1.0)
    assert found["per_class"]["es"]["support"] == 2


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


def test_counting_equal_words_predicts_as_repeating_them():
    train, test = made_up(60, 0), made_up(40, 1)
    pairs = [pair for example in train for pair in zip(example.text, example.label, strict=True)]
    assert len(set(pairs)) < len(pairs) / 5
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), lowercase=False, sublinear_tf=True)
    vectorizer.fit([word for word, _ in dict.fromkeys(pairs)])
    model = LogisticRegression(C=10.0, max_iter=300)
    model.fit(vectorizer.transform([word for word, _ in pairs]), [label for _, label in pairs])
    words = [word for example in test for word in example.text]
    expected = model.predict(vectorizer.transform(words))
    gold = [tag for example in test for tag in example.label]
    labels = ("en", "es")
    theirs = scores(*(np.array([labels.index(tag) for tag in tags]) for tags in (gold, expected)), labels)
    found = baseline_scores(train, test, labels, "token")
    assert found["confusion"] == theirs["confusion"]
    assert 0.5 < found["accuracy"] < 1.0
    unweighted = LogisticRegression(C=10.0, max_iter=300)  # else the comparison would say nothing
    distinct = list(dict.fromkeys(pairs))
    unweighted.fit(vectorizer.transform([word for word, _ in distinct]), [label for _, label in distinct])
    assert (unweighted.predict(vectorizer.transform(words)) != expected).any()


@pytest.mark.parametrize("labels", [("b", "a"), ("a", "b")])
def test_label_ids_follow_the_order_given(labels):
    train = [Example("xx xx", "a", ""), Example("yy yy", "b", "")]
    found = baseline_scores(train, [Example("xx", "a", "")], labels, "sequence")
    assert found["per_class"]["a"]["recall"] == 1.0
    assert found["confusion"]["labels"] == list(labels)


def test_empty_texts_and_unseen_characters_are_predicted_too():
    train = [Example("xx", "a", ""), Example("yy", "b", ""), Example("xx x", "a", "")]
    found = baseline_scores(train, [Example("", "a", ""), Example("日本", "b", "")], ("a", "b"), "sequence")
    assert (found["items"], found["without_prediction"]) == (2, 0)
