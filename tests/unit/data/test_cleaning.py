"""Duplicates, conflicting labels and leaked evaluation texts."""

from dataclasses import replace

from tokmask_peft.data.cleaning import clean, normalise
from tokmask_peft.tasks import Example


def texts(*pairs):
    return [Example(text, label, f"f:{line}") for line, (text, label) in enumerate(pairs, start=1)]


TRAIN = texts(
    ("one", "x"),
    ("One ", "x"),  # repeats the first
    ("two", "x"),
    ("TWO", "y"),  # conflicts with its twin
    ("two", "x"),
    ("three", "y"),  # in validation
    ("four", "y"),  # in test, twice
    ("four", "y"),
    ("five", "x"),
)
VALIDATION = texts(("three", "y"), ("six", "x"), ("seven", "y"))
TEST = texts(("Four", "y"), ("seven", "y"), ("eight", "x"), ("eight", "x"))


def test_normalise_composes_lowers_and_collapses():
    assert normalise("  CAFE\u0301\t y\u00a0TE\n") == "caf\u00e9 y te"
    assert normalise("no") != normalise("nó")


def test_remove_counts_and_removes():
    train, validation, report = clean(TRAIN, VALIDATION, TEST, "remove")
    assert [e.text for e in train] == ["one", "five"]
    assert [e.text for e in validation] == ["three", "six"]
    assert (report.duplicates, report.conflicting, report.conflicting_rows) == (4, 1, 3)
    assert (report.train_in_validation, report.train_in_test, report.validation_in_test) == (1, 2, 1)
    assert (report.validation_shared, report.test_shared) == (1, 1)
    assert (report.removed_from_train, report.removed_from_validation) == (7, 1)
    assert report.examples["train_in_test"] == ["four"]
    assert report.examples["conflicting"] == ["two"]


def test_report_counts_the_same_and_keeps_all():
    *_, removed = clean(TRAIN, VALIDATION, TEST, "remove")
    train, validation, kept = clean(TRAIN, VALIDATION, TEST, "report")
    assert (train, validation) == (TRAIN, VALIDATION)
    assert kept == replace(removed, mode="report", removed_from_train=0, removed_from_validation=0)


def test_no_more_than_three_examples_of_a_kind():
    train = texts(*((f"text {n}", "x") for n in range(9)))
    *_, report = clean(train, [], train)
    assert report.train_in_test == 9
    assert report.examples == {"train_in_test": ["text 0", "text 1", "text 2"]}


def test_in_token_tasks_other_tags_are_a_conflict():
    words = ("no", "me")
    same = [Example(words, ("lang2", "lang2"), "f:1"), Example(words, ("lang2", "lang2"), "f:4")]
    other = [*same, Example(words, ("lang1", "lang2"), "f:7")]
    assert [e.where for e in clean(same, [], [])[0]] == ["f:1"]
    assert clean(other, [], [])[0] == []


def test_clean_data_stay_as_they_are():
    train, _, report = clean(texts(("a", "x"), ("b", "y")), texts(("c", "x")), texts(("d", "y")))
    assert [e.text for e in train] == ["a", "b"]
    assert report.lines() == []
    assert report.examples == {}
