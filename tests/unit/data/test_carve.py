"""Setting a validation share aside, and drawing a smaller training set."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokmask_peft.data.cleaning import normalise
from tokmask_peft.data.split import carve, subset
from tokmask_peft.errors import DataError
from tokmask_peft.examples import Example


def posts(count=200, labels=("a", "b", "c"), weights=(6, 3, 1)):
    drawn = random.Random(1).choices(labels, weights, k=count)
    return [Example(f"post {n}", label, f"f:{n}") for n, label in enumerate(drawn)]


def tagged_posts(count=200):
    source = random.Random(2)
    kinds = [("en", "en", "es"), ("es", "es"), ("en", "ne"), ("es", "en", "ne")]
    drawn = source.choices(kinds, (6, 3, 2, 1), k=count)
    return [Example(tuple(f"w{n}.{i}" for i in range(len(t))), t, f"f:{n}") for n, t in enumerate(drawn)]


def test_carve_is_stratified_and_a_partition():
    train = posts()
    rest, validation = carve(train, 0.1, seed=1)
    assert sorted(e.where for e in [*rest, *validation]) == sorted(e.where for e in train)
    whole, part = Counter(e.label for e in train), Counter(e.label for e in validation)
    assert len(validation) == 20
    assert all(abs(part[label] - whole[label] / 10) <= 1 for label in whole)
    assert [e.where for e in rest] == [e.where for e in train if e in rest]


def test_carve_stratifies_by_the_tags_of_a_text():
    train = tagged_posts()
    _, validation = carve(train, 0.2, seed=1)
    whole, part = Counter(frozenset(e.label) for e in train), Counter(frozenset(e.label) for e in validation)
    assert all(abs(part[tags] - whole[tags] / 5) <= 1 for tags in whole)


def test_the_seed_decides_and_the_order_does_not():
    train = posts()
    shuffled = random.Random(3).sample(train, len(train))
    drawn = {e.where for e in carve(train, 0.1, seed=1)[1]}
    assert drawn == {e.where for e in carve(shuffled, 0.1, seed=1)[1]}
    assert drawn != {e.where for e in carve(train, 0.1, seed=2)[1]}
    chosen = {e.where for e in subset(train, 50, seed=1)}
    assert chosen == {e.where for e in subset(shuffled, 50, seed=1)}
    assert chosen != {e.where for e in subset(train, 50, seed=2)}


def test_the_same_text_never_straddles():
    train = [Example(text, "x" if n % 3 else "y", f"f:{n}") for n, text in enumerate(["Same", "same ", "b", "c"] * 10)]
    train += posts(60)
    rest, validation = carve(train, 0.3, seed=5)
    keys = [{normalise(e.string) for e in part} for part in (rest, validation)]
    assert not keys[0] & keys[1]
    assert len(rest) + len(validation) == len(train)


def test_a_label_never_leaves_train():
    train = [*posts(40, ("a", "b"), (1, 1)), Example("the only one", "rare", "f:x")]
    for seed in range(5):
        rest, validation = carve(train, 0.5, seed)
        assert {e.label for e in rest} == {"a", "b", "rare"}
        assert validation


def test_too_few_texts_to_carve():
    for second in (Example("A", "x", "f:2"), Example("b", "y", "f:2")):  # one distinct text; one text for each label
        with pytest.raises(DataError) as caught:
            carve([Example("a", "x", "f:1"), second], 0.5, 1)
        assert caught.value.code == "too-few-texts"


def test_subset_is_stratified_in_its_order():
    train, drawn = posts(), subset(posts(), 100, seed=4)
    assert [e.where for e in drawn] == [e.where for e in train if e in drawn]
    whole, part = (Counter(e.label for e in texts) for texts in (train, drawn))
    assert all(abs(part[label] - whole[label] / 2) <= 1 for label in whole)
    assert subset(train, 200, seed=4) == train


def test_subset_too_small_for_its_labels():
    with pytest.raises(DataError) as caught:
        subset(posts(), 2, seed=1)
    assert (caught.value.code, caught.value.fields) == ("max-train", {"count": 2, "labels": 3})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=40), st.integers(4, 40), st.integers(0, 5))
def test_every_label_survives_any_subset(labels, count, seed):
    train = [Example(f"t{n % 7}", label, f"f:{n}") for n, label in enumerate(labels)]
    drawn = subset(train, count, seed)
    assert len(drawn) == min(count, len(train))
    assert {e.label for e in drawn} == set(labels)
