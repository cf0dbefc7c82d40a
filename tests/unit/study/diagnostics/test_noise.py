import unicodedata

import numpy as np
import pytest

from tokmask_peft.study.diagnostics.robustness import (
    alphabet,
    clusters,
    edit,
    misspell,
    misspell_text,
    normal,
    unseen_words,
)

WORDS = ["Hello", "मराठी", "Привет", "qué", "no", "3.14", "…", "@ana", "I"]
LETTERS = alphabet(WORDS)


def edits(word, times=300):
    return {edit(word, np.random.default_rng(seed), LETTERS) for seed in range(times)}


@pytest.mark.parametrize("word", ["Hello", "मराठी", "Привет", "qué", "no", "@ana", "I"])
def test_an_edit_changes_a_word_and_never_empties_it(word):
    found = edits(word)
    assert word not in found
    assert "" not in found
    assert all(abs(len(clusters(one)) - len(clusters(word))) <= 1 for one in found)
    scripts = {unicodedata.name(one).split()[0] for one in word if one.isalpha()}
    assert {unicodedata.name(one).split()[0] for text in found for one in text if one.isalpha()} <= scripts


def test_each_kind_of_edit_happens():
    found = edits("abcd", 2000)
    assert {"bacd", "abdc", "bcd", "abc"} <= found
    assert {len(one) for one in found} == {3, 4, 5}
    assert any(sum(a != b for a, b in zip(one, "abcd", strict=True)) == 1 for one in found if len(one) == 4)


def test_case_is_that_of_the_place_and_marks_stay_with_their_letter():
    assert all(one.isupper() for one in edits("LOUD"))
    assert not any(unicodedata.category(one[0])[0] == "M" for one in edits("मराठी"))
    assert clusters("e\u0301a") == ["e\u0301", "a"]


@pytest.mark.parametrize("word", ["3.14", "…", "!!", "😀"])
def test_words_without_a_letter_stay(word):
    assert edits(word, 20) == {word}


def test_shares_nest_and_the_seed_decides():
    words = ["word"] * 2000
    low, high = (misspell(words, share, (1, 2), LETTERS) for share in (0.1, 0.4))
    assert low == misspell(words, 0.1, (1, 2), LETTERS) != misspell(words, 0.1, (1, 3), LETTERS)
    changed = [number for number, word in enumerate(low) if word != "word"]
    assert [high[number] for number in changed] == [low[number] for number in changed]
    for share, found in ((0.1, low), (0.4, high)):
        assert np.mean([word != "word" for word in found]) == pytest.approx(share, abs=0.04)
    assert misspell(words, 0.0, (1,), LETTERS) == words
    assert "word" not in misspell(words, 1.0, (1,), LETTERS)


def test_white_space_stays():
    text = " hello\t my  friend\n"
    found = misspell_text(text, 1.0, (0,), LETTERS)
    assert [part for part in found if part.isspace()] == [part for part in text if part.isspace()]
    assert all(a != b for a, b in zip(found.split(), text.split(), strict=True))
    assert misspell_text(text, 0.0, (0,), LETTERS) == text


def test_unseen_words_are_those_without_case_and_punctuation():
    known = set(map(normal, ["Who", "wrote", "“Hamlet”", "Don't", "GO"]))
    assert known == {"who", "wrote", "hamlet", "don't", "go"}
    words = ["HAMLET,", "don't", "dont", "?", "go", "1999"]
    assert [word for word, is_unseen in zip(words, unseen_words(words, known), strict=True) if is_unseen] == [
        "dont",
        "1999",
    ]
    assert (normal("¿Qué?!"), normal("...")) == ("qué", "")
