"""Windows: a text that fits is what training saw; a long one loses nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, TEXTS, families, tiny_tokenizer, token_families

from tokmask_peft.data import encoding
from tokmask_peft.data.encoding import Encoder
from tokmask_peft.errors import DataError
from tokmask_peft.examples import Example

WORDS = [word for text in TEXTS for word in text.split()]
LABELS = ("a", "b")


@pytest.mark.parametrize("family", families)
def test_a_text_that_fits_is_encoded_as_in_training(family):
    tokenizer = tiny_tokenizer(FAMILIES[family].tokenizer)
    expected = Encoder(tokenizer, "sequence", 200).cut([Example(text, None, "x") for text in TEXTS], LABELS)
    found = list(Encoder(tokenizer, "sequence", 200).windows(TEXTS))
    assert [window.ids for window in found] == list(expected.dataset["input_ids"])


@pytest.mark.parametrize("label_on", ["first", "last", "mean"])
@pytest.mark.parametrize("family", token_families)
def test_words_that_fit_are_encoded_as_in_training(family, label_on):
    tokenizer = tiny_tokenizer(FAMILIES[family].tokenizer)
    # \u200b: dropped by some tokenizers, so that the unknown token stands in
    texts = [tuple(text.split()) for text in TEXTS] + [("hoy", "\u200b", "casa"), ("\u200b",)]
    labelled = [Example(words, ("b",) * len(words), "x") for words in texts]
    expected = Encoder(tokenizer, "token", 200, label_on).cut(labelled, LABELS)
    found = list(Encoder(tokenizer, "token", 200, label_on).windows(texts))
    assert [window.ids for window in found] == list(expected.dataset["input_ids"])
    for window, labels, words in zip(found, expected.dataset["labels"], texts, strict=True):
        assert window.positions.tolist() == [at for at, label in enumerate(labels) if label != -100]
        assert window.words.tolist() == list(range(len(words)))
    numbers = expected.dataset["words"] if label_on == "mean" else [None] * len(texts)
    assert [window.numbers for window in found] == list(numbers)


@given(
    st.lists(st.sampled_from([*WORDS, "\u200b", "sinpapeleríasobrenatural" * 6]), min_size=1, max_size=80),
    st.integers(6, 30),
    st.sampled_from(["bert", "xlm-r", "qwen2", "llama"]),
    st.sampled_from(["first", "last", "mean"]),
)
@settings(max_examples=30, deadline=None)
def test_every_word_belongs_to_one_window_and_has_its_sub_token_there(words, max_length, family, label_on):
    tokenizer = tiny_tokenizer(FAMILIES[family].tokenizer)
    (whole,) = Encoder(tokenizer, "token", 100_000, label_on).windows([words], owners=True)
    windows = list(Encoder(tokenizer, "token", max_length, label_on).windows([words]))
    owned = [np.flatnonzero(whole.owners == word) for word in range(len(words))]
    assert whole.positions.tolist() == [ids[-1 if label_on == "last" else 0] for ids in owned]
    assert sorted(word for window in windows for word in window.words.tolist()) == list(range(len(words)))
    for window in windows:
        assert len(window.ids) <= max_length
        for word, position in zip(window.words, window.positions, strict=True):
            at = whole.positions[word]
            assert window.ids[position : position + 2][:1] == whole.ids[at : at + 1]
            if label_on == "mean":
                of_word = np.flatnonzero(np.array(window.numbers) == window.numbers[position])
                assert of_word.tolist() == np.flatnonzero(window.owners == word).tolist()


@pytest.mark.parametrize("family", families)
def test_pieces_of_a_text_make_the_same_windows(family, monkeypatch):
    tokenizer, text = tiny_tokenizer(FAMILIES[family].tokenizer), " ".join(TEXTS * 3)
    for task, one, piece in (("sequence", text, 30), ("token", [*text.split(), "\u200b", "fin"], 5)):
        if task == "token" and family not in token_families:
            continue
        monkeypatch.undo()
        whole = list(Encoder(tokenizer, task, 20).windows([one, one[:9], one], owners=True))
        monkeypatch.setattr(encoding, "PIECE", piece)
        pieces = list(Encoder(tokenizer, task, 20).windows([one, one[:9], one], owners=True))
        for field in ("text", "ids", "size", "words", "positions", "owners"):
            for before, after in zip(whole, pieces, strict=True):
                assert np.array_equal(getattr(before, field), getattr(after, field)), field


@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("apart", ["", "\n", "。"])
def test_a_text_without_spaces_is_cut_into_pieces_too(family, apart, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 20)
    encoder, sizes = Encoder(tiny_tokenizer(FAMILIES[family].tokenizer), "sequence", 20), []
    whole = Encoder._tokenize
    monkeypatch.setattr(Encoder, "_tokenize", lambda self, texts: sizes.extend(map(len, texts)) or whole(self, texts))
    text = apart.join(["casa", "fiesta", "wow"] * 20) + "  bien casa"
    windows = list(encoder.windows([text], owners=True))
    assert len(text) - 2 <= sum(sizes) <= len(text)  # without the spaces that it is cut at
    assert max(sizes) <= 40
    owners = [owner for window in windows for owner in window.owners.tolist() if owner >= 0]
    assert owners == sorted(owners)
    assert set(owners) == set(range(len(text.split())))


def test_words_have_context_on_both_sides_in_long_texts():
    tokenizer = tiny_tokenizer("wordpiece")
    words = ["hoy"] * 200
    for window in (windows := list(Encoder(tokenizer, "token", 42).windows([words]))):
        size = window.size
        positions = window.positions - 1  # after [CLS]
        first, last = 0 in window.words, 199 in window.words
        assert first or positions.min() >= 4
        assert last or size - 1 - positions.max() >= 4
    assert len(windows) > 4


@given(st.integers(1, 300), st.integers(4, 40))
@settings(max_examples=25, deadline=None)
def test_long_texts_are_cut_into_even_parts_that_make_the_whole(count, max_length):
    tokenizer = tiny_tokenizer("wordpiece")
    text = " ".join(WORDS[number % len(WORDS)] for number in range(count))
    windows = list(Encoder(tokenizer, "sequence", max_length).windows([text]))
    assert [one for window in windows for one in window.ids[1:-1]] == tokenizer(text)["input_ids"][1:-1]
    sizes = [window.size for window in windows]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max_length - 2


def test_a_text_of_dropped_characters_is_the_unknown_token():
    tokenizer = tiny_tokenizer("wordpiece")
    (window,) = Encoder(tokenizer, "sequence", 20).windows(["\u200b"])
    assert window.ids[1:-1] == [tokenizer.unk_token_id]


def test_windows_without_room_are_refused():
    with pytest.raises(DataError) as caught:
        list(Encoder(tiny_tokenizer("wordpiece"), "sequence", 3).windows(["hoy"]))
    assert caught.value.code == "no-room"
