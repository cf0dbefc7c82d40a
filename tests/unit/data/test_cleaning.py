"""Duplicates, conflicting labels, and evaluation texts that leaked, exactly or nearly."""

import random
from dataclasses import replace

import pytest

from tokmask_peft.data.cleaning import clean, clean_share, normalise
from tokmask_peft.examples import Example


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


LONG = "we waited for two hours and nobody came to fix the heating in our flat on the third floor"
NEAR = {
    "users": ("@ana qué día tan lindo", "@luis @eva qué día tan lindo"),
    "URLs": ("mirá esto https://t.co/a1b2", "mirá esto www.example.org/x?y=1"),
    "punctuation": ("no , no quiero ...", "¡No, no quiero!"),
    "emoji": ("good night 😀", "good night 🙎🏽\u200d♂️ ❤️"),
    "case and width": ("GOOD Night", "good ｎｉｇｈｔ"),
    "tokenization": ("I do n't know , @ ana", "I don't know"),
    "one word more": (LONG, f"{LONG} again"),
    "one letter less": (LONG, LONG.replace("heating", "heatin")),
}
APART = {
    "accents": ("mi papa", "mi papá"),
    "vowel signs": ("की", "के"),
    "numbers": ("post 1", "post 2"),
    "nothing left": ("😀 @ana", "😡 https://t.co/a"),
    "short": ("jajaja", "jajajaja"),
    "half": (LONG, LONG.replace("heating in our flat", "lift of the new house")),
}


@pytest.mark.parametrize("pair", NEAR.values(), ids=NEAR)
def test_near_duplicates_between_splits_are_counted_and_removed(pair):
    (one, other), rest = (texts((text, "x")) for text in pair), texts(("something else", "y"))
    train, _, report = clean([*one, *rest], rest[:0], other)
    assert (train, report.train_in_test) == (rest, 0)
    assert (report.train_near_test, report.test_near_shared, report.removed_from_train) == (1, 1, 1)
    assert report.examples == {"train_near_test": [normalise(pair[0])]}
    assert "nearly repeat test: 1 (1 there)" in report.lines()[0]
    train, validation, report = clean([*rest, *one], other, one, "report")
    assert (train, validation) == ([*rest, *one], other)
    assert (report.train_near_validation, report.validation_near_shared, report.validation_near_test) == (1, 1, 1)
    assert clean(rest, [*one, *rest[:0]], other)[1] == []


@pytest.mark.parametrize("pair", APART.values(), ids=APART)
def test_other_texts_are_no_near_duplicates(pair):
    one, other = (texts((text, "x")) for text in pair)
    train, _, report = clean(one, [], other)
    assert (train, report.lines(), report.examples) == (one, [], {})


def test_near_duplicates_leave_the_share_that_is_set_aside():
    train, share = texts((LONG, "x"), ("b", "y")), texts((f"RT {LONG}", "x"), ("c", "y"))
    report = clean(train, [], [])[2]
    assert clean_share(train, share, replace(report, mode="report"))[0] == share
    kept, report = clean_share(train, share, report)
    assert kept == share[1:]
    assert (report.train_near_validation, report.validation_near_shared, report.removed_from_validation) == (1, 1, 1)


def test_most_texts_that_share_their_pieces_are_found_among_many():
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(1000)]
    posts = [draw.choices(words, k=25) for _ in range(400)]
    train = texts(*((" ".join(post), "x") for post in posts))
    test = texts(*((" ".join([*post[:12], draw.choice(words), *post[13:]]), "x") for post in posts))
    report = clean(train, [], test)[2]
    assert report.train_near_test == report.test_near_shared > 390
