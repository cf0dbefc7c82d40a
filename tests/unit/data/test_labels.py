"""Merging, listing and checking labels."""

import pytest

from tokmask_peft.data.corpus import (
    apply_label_map,
    check_known,
    collect_labels,
    count_labels,
    merged_labels,
    respelled,
)
from tokmask_peft.data.detect import typos
from tokmask_peft.errors import DataError
from tokmask_peft.examples import Example


def tagged(*labels):
    return [Example(f"text {n}", label, f"f:{n}") for n, label in enumerate(labels, start=2)]


def test_label_map_with_a_default():
    words = Example(("a", "b", "c", "d"), ("lang1", "ne", "fw", "lang2"), "f:1")
    mapped, merges = apply_label_map([words], {"lang1": "lang1", "lang2": "es", "*": "other"})
    assert mapped[0].label == ("lang1", "other", "other", "es")
    assert merges == (("lang1", "lang1", 1), ("ne", "other", 1), ("fw", "other", 1), ("lang2", "es", 1))


def test_without_a_default_other_labels_stay():
    mapped, merges = apply_label_map(tagged("a", "b", "a"), {"a": "c", "z": "c"})
    assert [e.label for e in mapped] == ["c", "b", "c"]
    assert merges == (("a", "c", 2),)
    assert apply_label_map(tagged("a"), None) == (tagged("a"), ())


@pytest.mark.parametrize(
    "stored",
    [
        {"train": [{"from": "a", "to": "b", "count": 2}, {"from": "b", "to": "b", "count": 9}]},
        {"train": {"a -> b": 2, "b -> b": 9}},  # as version 0.1 stored it
        {"train": (("a", "b", 1),), "test": (("a", "b", 1), ("b", "b", 3))},
    ],
)
def test_merges_in_every_form_that_was_ever_stored(stored):
    assert merged_labels(stored) == [("a", "b", 2)]


def test_labels_are_in_natural_order():
    assert collect_labels(tagged("class10", "class2", "class1")) == ("class1", "class2", "class10")
    assert collect_labels(tagged("1", "-1", "0", "10", "2")) == ("0", "1", "2", "10", "-1")
    assert count_labels(tagged("b", "a", "b")) == {"a": 1, "b": 2}
    assert collect_labels([Example(("x", "y"), ("b", "a"), "f:1")]) == ("a", "b")


def test_one_label_is_too_few():
    with pytest.raises(DataError) as caught:
        collect_labels(tagged("x", "x"))
    assert (caught.value.code, caught.value.fields["labels"]) == ("one-label", ("x",))


def test_labels_that_training_never_saw():
    known = ("negative", "positive")
    (text,) = check_known(tagged("positive", "possitive", "zzz", "possitive"), known, "test")
    assert "'possitive': 2 times, first at f:3. Did you mean 'positive'?" in text
    assert "data.label_map" in text
    assert not check_known(tagged("positive"), known, "test")
    with pytest.raises(DataError) as caught:
        check_known(tagged("possitive"), known, "test")
    assert (caught.value.code, caught.value.fields["labels"]) == ("unknown-labels", ("possitive",))


def test_the_beginning_of_an_entity_is_never_taken_for_its_inside():
    known = ("B-LOC", "I-LOC", "I-PER", "O")
    (text,) = check_known(tagged("B-PER", "O", "B-MISC", "b-loc"), known, "test")
    assert "Did you mean 'I-PER'" not in text
    assert '"B-PER": ' not in text
    assert 'data.label_map, such as {"b-loc": "B-LOC"}' in text
    (text,) = check_known(tagged("B-PER", "O"), known, "test")
    assert "data.label_map" not in text
    assert respelled({"B-PER": 3, "I-PER": 2, "b-PER": 1}) == {"b-PER": "B-PER"}
    assert typos({"B-PERSON": 300, "I-PERSON": 2, "B-PERSOM": 2}) == {}
