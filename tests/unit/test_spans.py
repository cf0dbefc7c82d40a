"""Entities from the labels of words: read as seqeval's default mode does, legal in predictions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokmask_peft.errors import DataError
from tokmask_peft.spans import Spans, find_scheme, read

SCHEMES = {"bio": "BI", "iob1": "BI", "bioes": "BIES", "bilou": "BILU"}


def known(scheme, kinds="xy"):
    return ("O", *(f"{letter}-{kind}" for kind in kinds for letter in SCHEMES[scheme]))


def words(text):
    return tuple(label if label == "O" else f"{label[0]}-{label[1:]}" for label in text.split())


# Worked out by hand, and the same in seqeval 1.2.2 (`get_entities`), whose L is E and whose U is S.
@pytest.mark.parametrize(
    ("labels", "entities"),
    [
        ("", ""),
        ("O O", ""),
        ("Bx Ix O By", "x0-1 y3-3"),
        ("Bx Bx Ix", "x0-0 x1-2"),
        ("Ix Ix O Iy", "x0-1 y3-3"),  # without a beginning
        ("Bx Iy Iy", "x0-0 y1-2"),  # another type begins another entity
        ("Ix Bx", "x0-0 x1-1"),
        ("Sx Bx Ix Ex Sy", "x0-0 x1-3 y4-4"),
        ("Bx Ex Ex Ix", "x0-1 x2-2 x3-3"),  # nothing goes on after an end
        ("Sx Ix Ex", "x0-0 x1-2"),
        ("Bx Sx", "x0-0 x1-1"),
        ("Bx O Ex", "x0-0 x2-2"),
        ("Ux Bx Lx O", "x0-0 x1-2"),
    ],
)
def test_entities_of_a_sequence(labels, entities):
    assert " ".join(f"{kind}{first}-{last}" for kind, first, last in read(words(labels))) == entities


def test_a_type_may_hold_hyphens_and_other_labels_are_outside():
    assert read(["B-a-b", "I-a-b", "odd", "I-a"]) == [("a-b", 0, 1), ("a", 3, 3)]
    assert read(["B", "I", "O", "I"]) == [("", 0, 1), ("", 3, 3)]


@pytest.mark.parametrize(
    ("scheme", "labels", "legal"),
    [
        ("bio", "O Ix Ix By Ix", "O Bx Ix By Bx"),
        ("iob1", "O Bx Ix Bx Iy", "O Ix Ix Bx Iy"),
        ("bioes", "Bx O Ix Ix Ix O By Ex", "Sx O Bx Ix Ex O Sy Sx"),
        ("bilou", "Bx O Ix Ix O By Lx", "Ux O Bx Lx O Uy Ux"),
    ],
)
def test_illegal_sequences_are_written_again(scheme, labels, legal):
    spans = Spans(scheme, known(scheme))
    assert spans.repaired(words(labels)) == words(legal)
    ids = [spans.labels.index(label) for label in words(labels)]
    assert [spans.labels[number] for number in spans.repaired_ids(ids)] == list(words(legal))


def test_a_label_that_the_classifier_lacks_is_not_given():
    spans = Spans("bioes", ("O", "B-x", "I-x", "E-x"))  # no training text has an x of one word
    assert spans.repaired(("B-x", "O", "I-x", "I-x")) == ("B-x", "O", "B-x", "E-x")
    assert spans.repaired_ids([-1, 2, -1]) == [-1, 2, -1]  # words that were cut away


def slow(labels):
    """Entities by their definition: the longest runs in which every word continues the one before it."""

    def continues(one, two):
        same = one[1:] == two[1:]
        return same and one[0] in "BI" and two[0] in "IEL"

    found = []
    for first in range(len(labels)):
        for last in range(first, len(labels)):
            inside = all(label != "O" for label in labels[first : last + 1])
            run = all(continues(labels[at], labels[at + 1]) for at in range(first, last))
            more = last + 1 < len(labels) and continues(labels[last], labels[last + 1])
            before = first > 0 and continues(labels[first - 1], labels[first])
            if inside and run and not more and not before:
                found.append((labels[first][2:], first, last))
    return found


def legal(labels, scheme):
    """Return whether a sequence breaks no rule of a scheme, pair by pair."""
    letter, kind = [label[0] for label in labels], [label[2:] for label in labels]
    for at in range(len(labels)):
        same = at > 0 and kind[at - 1] == kind[at]
        opened = same and letter[at - 1] in ("BI" if scheme in ("bioes", "bilou") else "BIO")
        if scheme == "iob1" and letter[at] == "B" and not same:
            return False
        if scheme == "bio" and letter[at] == "I" and not opened:
            return False
        if scheme in ("bioes", "bilou"):
            if letter[at] in "IEL" and not opened:
                return False
            follows = at + 1 < len(labels) and kind[at + 1] == kind[at] and letter[at + 1] in "IEL"
            if letter[at] in "BI" and not follows:
                return False
    return True


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_sequence_is_read_as_defined_and_repaired_once_and_for_all(scheme):
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(known(scheme)), max_size=9), st.sets(st.sampled_from(known(scheme))))
    def check(labels, missing):
        found = read(labels)
        assert found == slow(labels)
        spans = Spans(scheme, known(scheme))
        new = spans.repaired(labels)
        assert read(new) == found
        assert legal(new, scheme)
        assert spans.repaired(new) == new
        assert new == tuple(labels) or not legal(labels, scheme)
        fewer = Spans(scheme, tuple(label for label in known(scheme) if label in labels or label not in missing))
        assert read(fewer.repaired(labels)) == found
        assert {*fewer.repaired(labels)} <= {*fewer.labels, *labels}

    check()


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        ("O B-PER I-PER B-LOC", "bio"),
        ("O B-PER", "bio"),
        ("B-PER I-PER", "bio"),
        ("B I O", "bio"),
        ("O B-a I-a E-a S-a", "bioes"),
        ("O B-a S-a", "bioes"),
        ("O B-a I-a L-a U-a", "bilou"),
        ("O I-PER I-LOC", "none"),  # nothing begins: languages, or parts of speech, may look like it
        ("lang1 lang2 other", "none"),
        ("O B-PER I-PER ADV", "none"),
        ("B O", "none"),
        ("B I", "none"),
        ("B I O B-PER", "none"),
        ("O B-a E-a U-a", "none"),
        ("NOUN VERB O B-", "none"),
        ("S B", "none"),
    ],
)
def test_the_labels_say_the_scheme(labels, scheme):
    assert find_scheme(labels.split(), [])[0] == scheme


@pytest.mark.parametrize(
    ("texts", "scheme"),
    [
        (["Ix Ix O", "Ix Bx"], "iob1"),
        (["Bx Ix O", "Bx Bx"], "bio"),
        (["Bx Ix O", "Bx O Ix", "By"], "bio"),  # a slip is not a scheme
    ],
)
def test_sequences_tell_iob1_from_bio(texts, scheme):
    found, reason = find_scheme(known("bio"), [words(text) for text in texts])
    assert found == scheme
    assert "data.spans" in reason


def test_a_scheme_that_the_labels_do_not_have_is_refused():
    with pytest.raises(DataError, match=r"data\.spans") as caught:
        Spans("bio", ("O", "B-x", "E-x", "lang1"))
    assert (caught.value.code, caught.value.fields["labels"]) == ("span-labels", ("E-x", "lang1"))
    assert Spans("iob1", ("O", "I-x")).repaired(("I-x", "O")) == ("I-x", "O")
