"""Merging, listing and checking labels."""

import pytest

from tokmask_peft.data.corpus import apply_label_map, check_known, collect_labels, count_labels, unmatched_keys
from tokmask_peft.errors import DataError
from tokmask_peft.tasks import Example


def tagged(*labels):
    return [Example(f"text {n}", label, f"f:{n}") for n, label in enumerate(labels, start=2)]


def test_label_map_with_a_default():
    words = Example(("a", "b", "c", "d"), ("lang1", "ne", "fw", "lang2"), "f:1")
    mapped = apply_label_map([words], {"lang1": "lang1", "lang2": "es", "*": "other"})
    assert mapped.examples[0].label == ("lang1", "other", "other", "es")
    assert mapped.effects == {
        ("lang1", "lang1"): 1,
        ("ne", "other"): 1,
        ("fw", "other"): 1,
        ("lang2", "es"): 1,
    }


def test_without_a_default_other_labels_stay():
    mapped = apply_label_map(tagged("a", "b", "a"), {"a": "c", "z": "c"})
    assert [e.label for e in mapped.examples] == ["c", "b", "c"]
    assert mapped.effects == {("a", "c"): 2}
    assert unmatched_keys({"a": "c", "z": "c", "*": "d"}, mapped.effects) == ["z"]
    assert unmatched_keys(None, {}) == []


def test_labels_are_in_natural_order():
    assert collect_labels(tagged("class10", "class2", "class1")) == ("class1", "class2", "class10")
    assert collect_labels(tagged("1", "-1", "0", "10", "2")) == ("0", "1", "2", "10", "-1")
    assert count_labels(tagged("b", "a", "b")) == {"a": 1, "b": 2}
    assert collect_labels([Example(("x", "y"), ("b", "a"), "f:1")]) == ("a", "b")


def test_one_label_is_too_few():
    with pytest.raises(DataError, match=r"1 label \(x\).*label_map"):
        collect_labels(tagged("x", "x"))


def test_labels_that_training_never_saw():
    with pytest.raises(DataError) as caught:
        check_known(tagged("positive", "possitive", "zzz", "possitive"), ("negative", "positive"), "test")
    text = str(caught.value)
    assert "'possitive': 2 times, first at f:3. Did you mean 'positive'?" in text
    assert "'zzz': 1 times, first at f:4." in text
    assert "data.label_map" in text
    check_known(tagged("positive"), ("negative", "positive"), "test")
