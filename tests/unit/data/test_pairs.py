"""Pairs of texts: as the tokenizer joins them, cut alike everywhere, compared as a whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, TEXTS, real_tokenizer, tiny_tokenizer

from tokmask_peft.data.encoding import Encoder
from tokmask_peft.errors import DataError
from tokmask_peft.examples import BETWEEN, Example, Pair

WORDS = [word for text in TEXTS for word in text.split()]
_some = st.lists(st.sampled_from([*WORDS, "\u200b", BETWEEN, "[SEP]"]), min_size=1, max_size=20).map(" ".join)


@given(st.lists(st.builds(Pair, _some, _some), min_size=1, max_size=4), st.integers(8, 60), st.sampled_from(list(FAMILIES)))
@settings(max_examples=60, deadline=None)
def test_pairs_are_joined_and_cut_by_the_tokenizer_in_training_and_prediction(pairs, max_length, family):
    tokenizer = tiny_tokenizer(FAMILIES[family].tokenizer)
    if family == "bert":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    encoder = Encoder(tokenizer, "sequence", max_length)
    found = encoder.cut([Example(pair, None, "x") for pair in pairs], ("a",))
    windows = list(encoder.windows(pairs, owners=True))
    for number, (pair, window, row) in enumerate(zip(pairs, windows, found.dataset, strict=True)):
        expected = tokenizer(pair.first, pair.second, truncation=True, max_length=max_length)
        assert window.ids == row["input_ids"] == expected["input_ids"]
        assert window.types == row.get("token_type_ids") == expected.get("token_type_ids")
        assert window.text == number
        words = pair.split()
        assert BETWEEN == words[len(pair.first.split())]
        specials = np.array([part is None for part in expected.sequence_ids()])
        assert (window.owners[specials] == -1).all() and len(pair.first.split()) not in window.owners
        for word in {*window.owners.tolist()} - {-1}:
            piece = tokenizer.decode(np.array(window.ids)[window.owners == word]).replace(" ", "").strip("#")
            assert piece in words[word] or "�" in piece or tokenizer.unk_token and tokenizer.unk_token in piece
    long = [len(tokenizer(*pair)["input_ids"]) > max_length for pair in pairs]
    assert found.truncation.texts_cut == sum(long)
    assert found.truncation.words == sum(len(pair.split()) - 1 for pair in pairs)


def test_what_is_cut_of_a_pair_is_counted_in_both_texts():
    encoder = Encoder(tiny_tokenizer("bytelevel"), "sequence", 12)
    assert encoder.cut([Example(Pair("ok " * 20, "ok " * 15), None, "x")], ("a",)).truncation.words_cut > 20
    (window,) = encoder.windows([Pair("ok " * 20, "no")])
    assert encoder._tokenizer.decode(window.ids).endswith("no")  # the longer text is cut first


def test_a_pair_needs_more_room_than_a_text():
    with pytest.raises(DataError) as error:
        list(Encoder(tiny_tokenizer("unigram"), "sequence", 5).windows([Pair("a", "b")]))
    assert error.value.code == "no-room" and error.value.fields["max_length"] == 5


@pytest.mark.parametrize(("name", "types"), [("bert-base-multilingual-cased", True), ("Qwen2.5-0.5B", False), ("TinyLlama-1.1B-Chat-v1.0", False)])
def test_real_tokenizers_join_a_pair_in_their_own_way(name, types):
    tokenizer = real_tokenizer(name)
    (window,) = Encoder(tokenizer, "sequence", 40).windows([Pair("me gusta", "la casa")], owners=True)
    assert window.ids == tokenizer("me gusta", "la casa")["input_ids"]
    assert (window.types is not None) == types and {*window.owners.tolist()} - {-1} == {0, 1, 3, 4}
