"""Pairs of texts: as the tokenizer joins them, cut alike everywhere, compared as a whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, TEXTS, real_tokenizer, tiny_tokenizer

from tokmask_peft.data.cleaning import clean
from tokmask_peft.data.columns import PAIRS
from tokmask_peft.data.detect import detect
from tokmask_peft.data.encoding import Encoder
from tokmask_peft.data.readers import read_split
from tokmask_peft.errors import DataError, RecipeError
from tokmask_peft.examples import BETWEEN, Example, Pair
from tokmask_peft.recipe.data import SourceConfig
from tokmask_peft.recipe.loading import check
from tokmask_peft.training.scoring import pair_grams

WORDS = [word for text in TEXTS for word in text.split()]
_some = st.lists(st.sampled_from([*WORDS, "\u200b", BETWEEN, "[SEP]"]), min_size=1, max_size=20).map(" ".join)


@given(
    st.lists(st.builds(Pair, _some, _some), min_size=1, max_size=4), st.integers(8, 60), st.sampled_from(list(FAMILIES))
)
@settings(max_examples=40, deadline=None)
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
        assert words[len(pair.first.split())] == BETWEEN
        specials = np.array([part is None for part in expected.sequence_ids()])
        assert (window.owners[specials] == -1).all()
        assert len(pair.first.split()) not in window.owners
        for word in {*window.owners.tolist()} - {-1}:
            piece = tokenizer.decode(np.array(window.ids)[window.owners == word]).replace(" ", "").strip("#")
            assert piece in words[word] or "�" in piece or (tokenizer.unk_token and tokenizer.unk_token in piece)
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
    assert (error.value.code, error.value.fields["max_length"]) == ("no-room", 5)


@pytest.mark.parametrize("name", ["bert-base-multilingual-cased", "Qwen2.5-0.5B"])
def test_real_tokenizers_join_a_pair_in_their_own_way(name):
    types = name.startswith("bert")
    tokenizer = real_tokenizer(name)
    (window,) = Encoder(tokenizer, "sequence", 40).windows([Pair("me gusta", "la casa")], owners=True)
    assert window.ids == tokenizer("me gusta", "la casa")["input_ids"]
    assert (window.types is not None) == types
    assert {*window.owners.tolist()} - {-1} == {0, 1, 3, 4}


LONG = "a man in a red coat plays the old guitar for a crowd of people near the station"


@pytest.mark.parametrize(
    ("train", "test", "kinds"),
    [
        ([("One", "two")], [("one ", "TWO")], {"train_in_test": 1}),
        ([("one", "two")], [("two", "one")], {}),  # the order counts
        ([("a b", "c")], [("a", "b c")], {}),  # the words are the same, the texts are not
        ([(LONG, "he sleeps")], [(LONG, "he eats")], {}),  # one half in common is no leak
        ([(LONG, "")], [(LONG, "👍")], {}),
        ([(LONG, "he sleeps!")], [(f"{LONG} http://x.y", "he sleeps")], {"train_near_test": 1}),
        ([(LONG, f"{LONG} now")], [(f"{LONG} too", LONG)], {"train_near_test": 1}),
        ([("ok", "no"), ("ok", "no")], [], {"duplicates": 1}),
        ([("ok", "no"), ("ok", "si")], [], {}),
    ],
)
def test_cleaning_compares_both_texts(train, test, kinds):
    parts = [[Example(Pair(*texts), "x", "f:1") for texts in part] for part in (train, test)]
    _, _, report = clean(parts[0], [], parts[1])
    found = {kind: getattr(report, kind) for kind in ("train_in_test", "train_near_test", "duplicates", "conflicting")}
    assert {kind: count for kind, count in found.items() if count} == kinds


def test_n_grams_of_a_pair_do_not_cross_and_are_told_apart():
    found = pair_grams(Example(Pair("ab", "bc"), None, "x").string, list)
    assert found == ["a", "b", "second b", "second c", "both b"]


def write(folder, *lines, name="train.csv"):
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("columns", "lines", "code"),
    [
        (("a", "z"), ["a,b,label", "x,y,1"], "column"),
        (("a", "0"), ["a,b,label", "x,y,1"], "column"),
        (("a", "b"), ["a,b,label", " ,y,1", "x,y,1"], "empty-text"),
        (("a", "b"), ['{"a": "x", "b": "y", "label": 1}', '{"a": "x", "label": 1}'], "missing-column"),
        (("a", "b"), ['{"a": "x", "b": null, "label": 1}'], "empty-text"),
        (("a", "b"), ['{"a": "x", "b": 3, "label": 1}'], "cell-type"),
        (("a", "b"), ["positive x y", "negative z", "positive y"], "format"),
        (("a", "b"), ["# sent_enum = 1 good", "x\tA", "", "# sent_enum = 2 bad", "y\tB"], "format"),
    ],
)
def test_a_pair_that_is_not_whole_is_one_error(tmp_path, columns, lines, code):
    kind = {"{": "jsonl", "p": "labelled", "#": "conll"}.get(lines[0][0], "csv")
    path = write(tmp_path, *lines, name=f"train.{kind}")
    with pytest.raises(DataError) as error:
        read_split(SourceConfig(path=str(path), text_column=columns), "train", "sequence")
    assert error.value.code == code


def test_rows_become_pairs_and_a_missing_half_can_be_left_out(tmp_path):
    path = write(tmp_path, "0,x y,yes,z", "1,x,no,", "2,,no,z", "3,x,no,-1")
    source = {"path": str(path), "header": False, "label_column": 2, "missing": ["", -1]}
    found = read_split(SourceConfig(**source, text_column=[1, 3]), "train", "sequence")
    assert [(one.text, one.label) for one in found][:1] == [(Pair("x y", "z"), "yes")]
    assert [one.label for one in found[1:]] == [None, None, None]


@pytest.mark.parametrize(("task", "data"), [("token", {"path": "."}), ("sequence", {"builtin": True}), ("sequence", {"path": ".", "test_source": {"path": "."}})])  # fmt: skip  # noqa: E501
def test_a_recipe_with_pairs_that_cannot_be_is_refused(task, data):
    content = {"name": "x", "model": {"backbone": "b"}, "data": {"task": task, **data, "text_column": ["a", "b"]}}
    with pytest.raises(RecipeError) as error:
        check(content, [], "x")
    assert len(error.value.problems) == 1
    assert "text_column" in error.value.problems[0]


@pytest.mark.parametrize("names", [PAIRS[0], PAIRS[6]])
def test_columns_of_usual_pairs_are_found(tmp_path, names):
    rows = [f"{n},the place {n} is here,so it is {n} here too,{'yes' if n % 3 else 'no'}" for n in range(60)]
    found, corpus = detect([write(tmp_path, f"id,{names[0]},{names[1].upper()},label", *rows)], {})
    assert (found.data["text_column"], found.data["task"]) == ([names[0], names[1].upper()], "sequence")
    assert all(isinstance(example.text, Pair) for example in corpus.train)


def test_a_label_is_not_half_of_a_pair(tmp_path):
    rows = [f"{n},is the place {n} here,{'of course' if n % 3 else 'not yet'}" for n in range(60)]
    for keys in ({}, {"label_column": "answer"}):
        found, _ = detect([write(tmp_path, "id,question,answer", *rows)], keys)
        assert (found.data["text_column"], found.data["label_column"]) == ("question", "answer")
