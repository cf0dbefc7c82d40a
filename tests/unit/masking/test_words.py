"""Where words begin, for each kind of tokenizer."""

import pytest
from tiny_models import real_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.pattern import word_start_table


def words(tokenizer, text):
    """Join the sub-tokens of `text` into words, by the table."""
    table = word_start_table(tokenizer, 1 + max(tokenizer.get_vocab().values()))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for token_id, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if table[token_id] or not found:
            found.append("")
        found[-1] += token.removeprefix("##").strip("▁ĠĊ")
    return found


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bytelevel", "metaspace"])
def test_words_of_a_text(kind):
    assert words(tiny_tokenizer(kind), "she said que no") == ["she", "said", "que", "no"]
    assert len(words(tiny_tokenizer(kind), "she it's")) == (4 if kind == "wordpiece" else 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert-base-multilingual-cased", ["Vamos", "mañanita", "a", "la", "playa", ",", "dude", "#", "beach"]),
        ("Qwen2.5-0.5B", 6),
        ("TinyLlama-1.1B-Chat-v1.0", ["Vamos", "mañanita", "a", "la", "playa,dude", "#beach"]),
    ],
)
def test_words_of_real_tokenizers(name, expected):
    found = words(real_tokenizer(name), "Vamos mañanita a la playa,dude #beach")
    assert (found if isinstance(expected, list) else len(found)) == expected


def test_added_tokens_and_rows_without_a_token_start_words():
    tokenizer = tiny_tokenizer("metaspace")
    tokenizer.add_tokens(["LOL"])
    table = word_start_table(tokenizer, len(tokenizer) + 4)
    assert table[tokenizer.convert_tokens_to_ids("LOL")]
    assert table[len(tokenizer) :].all()


def test_tokenizers_without_marks_are_refused():
    letters = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(MaskTokenError, match="marks no word borders; use unit: token"):
        word_start_table(PreTrainedTokenizerFast(tokenizer_object=letters), 2)
    clip = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    with pytest.raises(MaskTokenError, match="marks where words end"):
        word_start_table(PreTrainedTokenizerFast(tokenizer_object=clip), 2)
    with pytest.raises(MaskTokenError, match="no Rust backend"):
        word_start_table(object(), 2)
