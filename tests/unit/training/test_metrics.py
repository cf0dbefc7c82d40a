"""Averages against scikit-learn; words without a prediction; the code-mixing index by hand."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from tokmask_peft.examples import NO_PREDICTION
from tokmask_peft.training.metrics import (
    MIXING_BINS,
    Predictions,
    code_mixing_index,
    entity_gain,
    entity_scores,
    scores,
    scores_by_mixing,
)

LABELS = ("lang1", "lang2", "other", "mixed")
PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


def arrays(pairs):
    gold, predicted = zip(*pairs, strict=True)
    return np.array(gold, dtype=np.int64), np.array(predicted, dtype=np.int64)


class TestScores:
    @given(pairs=PAIRS)
    @settings(deadline=None, max_examples=30)
    def test_against_scikit_learn(self, pairs):
        gold, predicted = arrays(pairs)
        found = scores(gold, predicted, LABELS)
        assert found["f1_macro"] == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0))
        assert found["f1_weighted"] == pytest.approx(f1_score(gold, predicted, average="weighted", zero_division=0))
        assert found["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
        assert (found["items"], found["without_prediction"]) == (len(pairs), 0)
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    @given(pairs=PAIRS, data=st.data())
    @settings(deadline=None, max_examples=30)
    def test_a_word_without_a_prediction_costs_recall_and_not_precision(self, pairs, data):
        gold, predicted = arrays(pairs)
        right = np.flatnonzero(gold == predicted)
        assume(len(right))
        lost = int(data.draw(st.sampled_from(right.tolist())))
        before = scores(gold, predicted, LABELS)
        predicted[lost] = NO_PREDICTION
        after = scores(gold, predicted, LABELS)
        label = LABELS[gold[lost]]
        assert after["per_class"][label]["recall"] < before["per_class"][label]["recall"]
        assert after["per_class"][label]["support"] == before["per_class"][label]["support"]
        assert after["accuracy"] == pytest.approx(before["accuracy"] - 1 / len(gold))
        assert after["f1_macro"] < before["f1_macro"]
        for other in set(LABELS) - {label}:
            assert after["per_class"][other] == before["per_class"][other]
        assert (after["items"], after["without_prediction"]) == (len(gold), 1)

    def test_a_lost_wrong_word_raises_the_precision_of_the_class_it_was_taken_for(self):
        gold = np.array([0, 0, 1])
        assert scores(gold, np.array([0, 1, 1]), LABELS)["per_class"]["lang2"]["precision"] == 0.5
        lost = scores(gold, np.array([0, NO_PREDICTION, 1]), LABELS)["per_class"]
        assert lost["lang2"]["precision"] == lost["lang1"]["precision"] == 1.0
        assert lost["lang1"]["recall"] == 0.5

    @given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), max_size=40))
    @settings(deadline=None, max_examples=30)
    def test_the_confusion_matrix_counts_every_item_once(self, pairs):
        gold, predicted = arrays(pairs) if pairs else (np.zeros(0, np.int64), np.zeros(0, np.int64))
        found = scores(gold, predicted, LABELS)
        matrix = np.array(found["confusion"]["matrix"])
        missing = int((predicted == NO_PREDICTION).sum())
        assert matrix.shape == (4, 5 if missing else 4)
        assert found["confusion"]["labels"] == [*LABELS, *(["(none)"] if missing else [])]
        assert matrix.sum(axis=1).tolist() == [found["per_class"][label]["support"] for label in LABELS]
        assert matrix.sum() == len(pairs)
        if missing:
            assert matrix[:, -1].sum() == missing

    def test_no_items_is_zero_without_a_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = scores(*Predictions([], []).flat(), LABELS)
        assert (found["f1_macro"], found["f1_weighted"], found["accuracy"], found["items"]) == (0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("tags", "index"),
    [
        ("en en en", 0.0),
        ("en es", 50.0),
        ("en en en es", 25.0),
        ("en en en es other other", 25.0),  # words in no language leave the count
        ("en es hi", 100 * (1 - 1 / 3)),
        ("other other", 0.0),
        ("", 0.0),
    ],
)
def test_code_mixing_index_by_hand(tags, index):
    assert code_mixing_index(tags.split(), ("en", "es", "hi")) == pytest.approx(index)


POSTS = st.lists(st.lists(st.integers(0, 3), max_size=25), min_size=1, max_size=12)


class TestScoresByMixing:
    @given(posts=POSTS)
    @settings(deadline=None, max_examples=30)
    def test_every_post_is_in_one_bin(self, posts):
        gold = [np.array(post, dtype=np.int64) for post in posts]
        rows = scores_by_mixing(Predictions(gold, [(post + 1) % 4 for post in gold]), LABELS, ("lang1", "lang2"))
        assert sum(row["posts"] for row in rows) == len(posts)
        assert sum(row["words"] for row in rows) == sum(map(len, posts))
        assert len({row["cmi"] for row in rows}) == len(rows)
        expected = {}
        for post in posts:
            first, second = post.count(0), post.count(1)
            less = 100 * min(first, second)
            name = next(
                f"{low:g} to {high:g}" if high else "0"
                for low, high in MIXING_BINS
                if less <= high * (first + second)  # in whole numbers
            )
            expected[name] = expected.get(name, 0) + 1
        assert {row["cmi"]: row["posts"] for row in rows} == expected

    @pytest.mark.parametrize(("few", "words", "name"), [(3, 20, "0 to 15"), (3, 10, "15 to 30"), (9, 20, "30 to 45")])
    def test_a_bound_belongs_to_the_bin_below(self, few, words, name):
        post = np.array([1] * few + [0] * (words - few))
        (row,) = scores_by_mixing(Predictions([post], [post]), LABELS, ("lang1", "lang2"))
        assert row == {"cmi": name, "posts": 1, "words": words, "f1_macro": 1.0, "f1_weighted": 1.0}

    def test_each_bin_is_scored_by_itself(self):
        pure, mixed = np.array([0, 0, 2]), np.array([0, 1])
        found = Predictions([mixed, pure, pure], [mixed, pure, np.array([2, 2, 0])])
        rows = {row["cmi"]: row for row in scores_by_mixing(found, LABELS, ("lang1", "lang2"))}
        assert rows["45 to 100"]["f1_macro"] == 1.0
        both = scores(np.concatenate([pure, pure]), np.array([0, 0, 2, 2, 2, 0]), LABELS)
        assert rows["0"]["f1_macro"] == both["f1_macro"] < 1.0
        assert rows["0"]["f1_weighted"] == both["f1_weighted"]


class TestEntities:
    LABELS = ("O", "B-x", "I-x", "B-y", "I-y")
    GOLD, FOUND = ["Bx Ix O By", "O O", "Bx Bx Iy"], ["Bx O O By", "Bx O", "Bx Bx By"]

    def ids(self, texts):
        names = {"O": 0, "Bx": 1, "Ix": 2, "By": 3, "Iy": 4, "-": NO_PREDICTION}
        return [np.array([names[word] for word in text.split()]) for text in texts]

    def scored(self, gold, predicted):
        return entity_scores(Predictions(self.ids(gold), self.ids(predicted)), self.LABELS)

    def test_by_hand(self):
        found = self.scored(self.GOLD, self.FOUND)
        part = found["entities"]["per_type"]  # x: 0-1, 0-0 and 1-1 in the data; 0-0, 0-0, 0-0 and 1-1 found
        assert (part["x"]["precision"], part["x"]["recall"]) == (2 / 4, 2 / 3)
        assert (part["y"]["precision"], part["y"]["recall"], part["y"]["support"]) == (1.0, 1.0, 2)
        assert found["f1_entities"] == found["entities"]["f1"] == 2 * 4 / (5 + 6)
        low, high = found["entities"]["interval"]
        assert 0 <= low < found["f1_entities"] < high <= 1
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    @pytest.mark.parametrize(
        ("gold", "predicted", "f1"),
        [(["O"], ["O"], 0.0), (["Bx"], ["O"], 0.0), (["O"], ["Bx"], 0.0), (["Bx Ix"], ["Bx -"], 0.0),
         (["Bx O"], ["Bx -"], 1.0), (["Bx", "Ix"], ["Bx", "Ix"], 1.0)],
    )  # fmt: skip
    def test_words_without_a_prediction_are_outside_and_texts_do_not_run_into_each_other(self, gold, predicted, f1):
        assert self.scored(gold, predicted)["f1_entities"] == f1

    def test_a_gain_is_paired(self):
        gold, other = self.ids(self.GOLD * 20), self.ids(self.FOUND * 20)
        better, worse = Predictions(gold, gold), Predictions(gold, other)
        low, high = entity_gain(better, worse, self.LABELS)
        assert 0 < low < 1 - 8 / 11 < high
        assert entity_gain(worse, worse, self.LABELS) == [0.0, 0.0]
