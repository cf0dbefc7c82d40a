"""Tokenizing: every word has one labelled position or is counted as lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import real_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from tokmask_peft.data.encoding import Encoder, foreign_words
from tokmask_peft.errors import DataError
from tokmask_peft.examples import IGNORED, Example

WORDPIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] me gusta la fi ##esta very ##y # a b".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def bert():
    """A WordPiece tokenizer with its real special tokens."""
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDPIECES)})


@pytest.mark.parametrize(
    ("text", "size", "found"),
    [
        ("me gusta la fiesta! @baaabbb #abab https://ab.ab/abba 2 2 2", 12_000, None),
        ("abba baab", 12_000, "4.0 pieces"),
        ("abba baab", 70_000, None),  # of many languages
        ("abba baab", 20, None),  # of a test
        ("ab ab gusta ሰላም", 12_000, "does not know 17%"),
        ("😀 12", 12_000, None),
        ("", 12_000, None),
    ],
)
def test_words_of_another_language(text, size, found):
    words = [*WORDPIECES, "##a", "##b", *(f"unused{at}" for at in range(size - len(WORDPIECES) - 2))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    why = foreign_words(tokenizer, [text] * 3)
    assert (why is None) if found is None else (found in why)


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE tokenizer without a prefix space, as Qwen and GPT have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["me gusta la fiesta , we saw the house and the fiesta"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


REAL = ["Qwen2.5-0.5B", "TinyLlama-1.1B-Chat-v1.0", "bert-base-multilingual-cased"]


@pytest.fixture(scope="module", params=["bert", "bpe", *REAL])
def tokenizer(request):
    return real_tokenizer(request.param) if request.param in REAL else request.getfixturevalue(request.param)


def encode(examples, tokenizer, task, labels, max_length):
    return Encoder(tokenizer, task, max_length).cut(examples, labels)


def tagged(*pairs, where="f:1"):
    words, tags = zip(*pairs, strict=True)
    return Example(words, tags, where)


def test_the_first_sub_token_carries_the_label(bert):
    encoded = encode([tagged(("me", "es"), ("fiesta", "es"), ("very", "en"))], bert, "token", ("en", "es"), 16)
    row = encoded.dataset[0]
    assert bert.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "me", "fi", "##esta", "very", "[SEP]"]
    assert row["labels"] == [IGNORED, 1, 1, IGNORED, 0, IGNORED]
    assert row["length"] == 6
    assert encoded.kept == [[0, 1, 2]]


def test_the_last_sub_token_carries_the_label_or_the_last_one_kept(bert):
    long, short = [("fiesta", "es"), ("very", "en")], [("me", "en"), ("fiesta", "es")]
    texts = [tagged(("me", "es"), *words) for words in (long, short)]
    encoded = Encoder(bert, "token", 5, "last").cut(texts, ("en", "es"))
    assert encoded.dataset["labels"][:] == [[IGNORED, 1, IGNORED, 1, IGNORED], [IGNORED, 1, 0, 1, IGNORED]]
    assert encoded.kept == [[0, 1], [0, 1, 2]]
    assert encoded.truncation.words_cut == 1


def test_real_tokenizers_see_running_text(tokenizer):
    words = ("la", "fiesta", "a", "b", "la", "gusta", "me")
    encoded = encode([Example(words, ("x",) * 7, "f:1")], tokenizer, "token", ("x", "y"), 64)
    assert encoded.dataset[0]["input_ids"] == tokenizer(" ".join(words))["input_ids"]
    assert encoded.kept == [list(range(7))]


def test_truncation_is_counted_and_what_is_kept_is_known(bert):
    long = tagged(*[("fiesta", "es")] * 5)
    short = tagged(("me", "es"))
    encoded = encode([long, short], bert, "token", ("en", "es"), 7)
    assert encoded.kept == [[0, 1, 2], [0]]
    assert [len(row) for row in encoded.dataset["input_ids"]] == [7, 3]
    counts = encoded.truncation
    assert (counts.texts, counts.words, counts.texts_cut, counts.words_cut) == (2, 6, 1, 2)
    assert counts.sub_tokens == 10
    assert encoded.dataset[0]["labels"] == [IGNORED, 1, IGNORED, 1, IGNORED, 1, IGNORED]


@pytest.mark.parametrize(
    ("text", "cut", "words_cut"),
    [
        ("me gusta la fiesta", 0, 0),
        ("me gusta la me fiesta", 1, 0),
        ("me gusta la fiesta me me", 1, 2),
        ("  me  ", 0, 0),
    ],
)
def test_truncation_of_texts(bert, text, cut, words_cut):
    encoded = encode([Example(text, "x", "f:1")], bert, "sequence", ("x", "y"), 7)
    assert (encoded.truncation.texts_cut, encoded.truncation.words_cut) == (cut, words_cut)
    assert encoded.truncation.words == len(text.split())
    assert encoded.kept is None
    assert encoded.dataset[0]["labels"] == 0


@pytest.mark.parametrize("invisible", ["\u200b", "\x07"])
def test_a_word_that_the_tokenizer_drops_keeps_its_label(bert, invisible):
    example = tagged(("me", "es"), (invisible, "other"), ("la", "es"))
    encoded = encode([example], bert, "token", ("es", "other"), 16)
    tokens = bert.convert_ids_to_tokens(encoded.dataset[0]["input_ids"])
    assert tokens == ["[CLS]", "me", "[UNK]", "la", "[SEP]"]
    assert encoded.dataset[0]["labels"] == [IGNORED, 0, 1, 0, IGNORED]
    assert (encoded.truncation.words_replaced, encoded.truncation.words_without_tokens) == (1, 0)


def test_order_and_many_batches(bert):
    examples = [tagged(("a", "xy"[n % 2]), *[("b", "x")] * (n % 3), where=f"f:{n}") for n in range(1050)]
    encoded = encode(examples, bert, "token", ("x", "y"), 16)
    assert [row[1] for row in encoded.dataset["labels"]] == [n % 2 for n in range(1050)]
    assert [len(words) for words in encoded.kept] == [1 + n % 3 for n in range(1050)]


def test_texts_to_predict_have_no_labels(bert):
    encoded = encode([Example(("me", "la"), None, "f:1")], bert, "token", ("x", "y"), 16)
    assert set(encoded.dataset.column_names) == {"input_ids", "length"}
    assert encoded.kept == [[0, 1]]
    with pytest.raises(DataError) as caught:
        encode([Example("me", "x", "f:1"), Example("la", None, "f:2")], bert, "sequence", ("x", "y"), 16)
    assert (caught.value.code, caught.value.fields["places"]) == ("some-labels", ("f:2",))
    with pytest.raises(DataError) as caught:
        encode([Example("me", "z", "f:9")], bert, "sequence", ("x", "y"), 16)
    assert (caught.value.code, caught.value.fields["label"]) == ("unknown-label", "z")


anything = st.text(st.characters(exclude_categories=("Cs",), codec="utf-8"), min_size=1, max_size=8)
post = st.lists(anything | st.sampled_from(["me", "fiesta", "\u200b"]), min_size=1, max_size=8)
texts = st.lists(post, min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(texts=texts, max_length=st.integers(4, 24))
def test_every_word_has_one_labelled_position_or_is_counted(tokenizer, texts, max_length):
    names = [f"L{n}" for n in range(8)]
    examples = [Example(tuple(words), tuple(names[: len(words)]), "f:1") for words in texts]
    encoded = encode(examples, tokenizer, "token", names, max_length)
    kept = 0
    for words, row, indices in zip(texts, encoded.dataset, encoded.kept, strict=True):
        labels = [label for label in row["labels"] if label != IGNORED]
        assert labels == indices  # word i carries label i: order kept, once each
        assert indices == sorted(set(indices))
        assert set(indices) <= set(range(len(words)))
        assert len(row["input_ids"]) == len(row["labels"]) == row["length"] <= max_length
        assert all(0 <= token < len(tokenizer) for token in row["input_ids"])
        kept += len(indices)
    counts = encoded.truncation
    assert counts.words == sum(map(len, texts))
    assert counts.words - kept == counts.words_cut + counts.words_without_tokens
    assert counts.words_without_tokens == 0
    assert counts.sub_tokens == sum(encoded.dataset["length"])
