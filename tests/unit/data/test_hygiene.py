"""Duplicates, conflicting labels and leaked evaluation texts."""

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
    cleaned = clean(TRAIN, VALIDATION, TEST, "remove")
    report = cleaned.report
    assert [e.text for e in cleaned.train] == ["one", "five"]
    assert [e.text for e in cleaned.validation] == ["three", "six"]
    assert cleaned.test == TEST
    assert (report.duplicates, report.conflicting, report.conflicting_rows) == (4, 1, 3)
    assert (report.train_in_validation, report.train_in_test, report.validation_in_test) == (1, 2, 1)
    assert (report.validation_shared, report.test_shared) == (1, 1)
    assert (report.removed_from_train, report.removed_from_validation) == (7, 1)
    assert report.examples["train_in_test"] == ["four"]
    assert report.examples["conflicting"] == ["two"]


def test_report_counts_the_same_and_keeps_all():
    removed = clean(TRAIN, VALIDATION, TEST, "remove").report.to_dict()
    cleaned = clean(TRAIN, VALIDATION, TEST, "report")
    assert (cleaned.train, cleaned.validation, cleaned.test) == (TRAIN, VALIDATION, TEST)
    kept = cleaned.report.to_dict()
    assert (kept["removed_from_train"], kept["removed_from_validation"]) == (0, 0)
    same = set(kept) - {"mode", "removed_from_train", "removed_from_validation"}
    assert all(kept[key] == removed[key] for key in same)


def test_no_more_than_three_examples_of_a_kind():
    train = texts(*((f"text {n}", "x") for n in range(9)))
    report = clean(train, [], train).report
    assert report.train_in_test == 9
    assert report.examples == {"train_in_test": ["text 0", "text 1", "text 2"]}


def test_in_token_tasks_other_tags_are_a_conflict():
    words = ("no", "me")
    same = [Example(words, ("lang2", "lang2"), "f:1"), Example(words, ("lang2", "lang2"), "f:4")]
    other = [*same, Example(words, ("lang1", "lang2"), "f:7")]
    assert [e.where for e in clean(same, [], []).train] == ["f:1"]
    assert clean(other, [], []).train == []


def test_clean_data_stay_as_they_are():
    cleaned = clean(texts(("a", "x"), ("b", "y")), texts(("c", "x")), texts(("d", "y")))
    assert [e.text for e in cleaned.train] == ["a", "b"]
    assert cleaned.report.removed_from_train == 0
    assert cleaned.report.examples == {}
