"""Predicting: the same answers in any company, nothing lost, mistakes said."""

import itertools
import json
import math
import pickle
import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TEXTS, build

from tokmask_peft.errors import DataError, ModelError
from tokmask_peft.inference.classifier import Classifier

LONG = " ".join(TEXTS * 4)
TOKENIZERS = ["bert", "xlm-r", "modernbert", "qwen2", "llama"]  # a family for each kind


def close(one, other):
    rows = [(one, other)] if isinstance(one, dict) else zip(one, other, strict=True)
    return all(abs(mine[label] - yours[label]) < 1e-5 for mine, yours in rows for label in mine)


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_a_short_text_gets_the_softmax_of_the_model(classifier, family):
    model = classifier(family, max_length=64)
    for text, answer in zip(TEXTS, model.predict(TEXTS), strict=True):
        with torch.no_grad():
            expected = model.model(**model.tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert list(answer.probabilities) == list(model.labels)
        assert list(answer.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert answer.label == model.labels[int(expected.argmax())]
        assert answer.windows == 1


@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_word_gets_the_label_of_its_first_sub_token(classifier, family):
    model = classifier(family, "token", max_length=64)
    words = TEXTS[0].split()
    (answer,) = model.predict([words])
    (as_text,) = model.predict(["  " + "\t ".join(words)])
    assert answer == as_text
    spaced = [words[0], *(f" {word}" for word in words[1:])] if family in ("modernbert", "qwen2") else words
    inputs = model.tokenizer(spaced, is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.model(**inputs).logits.softmax(-1)[0]
    ids = inputs.word_ids()
    for number in range(len(words)):
        row = expected[ids.index(number)]
        assert list(answer.probabilities[number].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert answer.labels[number] == model.labels[int(row.argmax())]
    assert answer.words == tuple(words)


@pytest.mark.parametrize(("family", "task"), [("qwen2", "sequence"), ("llama", "token")])
def test_answers_do_not_depend_on_batch_size_or_order(classifier, family, task):
    model = classifier(family, task)
    texts = [*TEXTS, LONG, "ok ok", LONG[7:300]]
    alone = [model.predict([text])[0] for text in texts]
    assert max(answer.windows for answer in alone) > 3
    assert len({str(answer) for answer in alone}) > 5

    @given(st.integers(1, 40), st.integers(0, 10_000))
    @settings(max_examples=12, deadline=None)
    def check(batch_size, seed):
        order = random.Random(seed).choices(range(len(texts)), k=len(texts))
        found = model.predict([texts[n] for n in order], batch_size=batch_size)
        for number, answer in zip(order, found, strict=True):
            assert close(answer.probabilities, alone[number].probabilities)

    check()


def test_long_texts_are_the_mean_of_their_windows_weighted_by_size(classifier):
    model = classifier(max_length=24)
    ids = model.tokenizer(LONG)["input_ids"][1:-1]
    count = math.ceil(len(ids) / 22)
    borders = [part * len(ids) // count for part in range(count + 1)]
    total = torch.zeros(3)
    for start, stop in itertools.pairwise(borders):
        with torch.no_grad():
            logits = model.model(torch.tensor([[2, *ids[start:stop], 3]])).logits[0]
        total += logits * (stop - start) / len(ids)
    (answer,) = model.predict([LONG])
    assert model.tokenizer.cls_token_id == 2
    assert answer.windows == count > 2
    assert list(answer.probabilities.values()) == pytest.approx(total.softmax(-1).tolist(), abs=1e-5)


def test_no_word_of_a_long_text_is_lost(classifier):
    model = classifier("xlm-r", "token", max_length=12)
    words = (LONG + " \u200b fin").split()
    (answer,) = model.predict([words])
    assert answer.words == tuple(words)
    assert len(answer.labels) == len(answer.probabilities) == len(words)
    assert all(sum(row.values()) == pytest.approx(1) for row in answer.probabilities)
    assert answer.windows > 5


def test_the_answer_to_a_long_text_takes_little_more_memory_than_it_is_long(monkeypatch):
    model, tokenizer = build("bert", "token", labels=40)
    long = Classifier(model, tokenizer, "token", [f"l{number}" for number in range(40)], max_length=62)
    sizes, rows = [], np.random.default_rng(0).normal(size=(62, 40)).astype(np.float32)
    monkeypatch.setattr(long.forward, "logits", lambda windows, size: [
        sizes.append(len(windows)) or rows[: len(window.words)].copy() for window in windows
    ])  # fmt: skip
    words = ["casa"] * 60_000
    tracemalloc.start()
    try:
        (answer,) = long.predict([words])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(answer.labels) == len(answer.probabilities) == len(words)
    assert peak < 3.5 * len(words) * 40 * 8
    assert max(sizes) <= 1024


def test_probabilities_of_words_are_an_array_that_reads_as_a_tuple_of_dicts(classifier):
    one, other = classifier(task="token").predict(["wow great fiesta", "hoy"])
    rows = tuple(one.probabilities)
    assert [list(row) for row in rows] == [list(classifier(task="token").labels)] * 3
    assert one.probabilities == rows
    assert rows == one.probabilities
    assert one.probabilities != other.probabilities
    assert one.probabilities != list(rows)
    assert one.probabilities[-1] == rows[-1]
    assert one.probabilities[1:] == rows[1:]
    assert rows[1] in one.probabilities
    assert repr(one.probabilities) == repr(rows)
    assert len(pickle.dumps(one.probabilities)) < 500
    assert pickle.loads(pickle.dumps(one)) == one == replace(one, probabilities=rows)
    assert replace(one, probabilities=rows[::-1]) != one
    for use in (hash, json.dumps):
        with pytest.raises(TypeError):
            use(one.probabilities)
    with pytest.raises(IndexError):
        one.probabilities[3]


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_the_temperature_changes_probabilities_and_no_label(classifier, task):
    texts = [*TEXTS, LONG]
    plain, calm = classifier(task=task).predict(texts), classifier(task=task, temperature=7.0).predict(texts)
    for one, other in zip(plain, calm, strict=True):
        if task == "sequence":
            assert one.label == other.label
            assert one.probabilities[one.label] > other.probabilities[one.label]
        else:
            assert one.labels == other.labels


def test_mistakes_are_named(classifier):
    model = classifier()
    assert model.predict([]) == []
    cases = [
        ("a text", "not-a-list"),
        (["fine", " \t\n"], "empty-text"),
        ([[]], "empty-text"),
        ([["a", ""]], "empty-word"),
        (["half \ud83d"], "invalid-unicode"),
        ([["a", 3]], "not-a-text"),
        ([4], "not-a-text"),
    ]
    for texts, code in cases:
        with pytest.raises(DataError) as caught:
            model.predict(texts)
        assert caught.value.code == code
    assert caught.value.fields == {"index": 0}
    for ask in (model.predict, model.explain):
        with pytest.raises(DataError) as caught:
            ask(["a"], batch_size=0)
        assert caught.value.code == "batch-size"
    with torch.no_grad():
        model.model.classifier.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="precision='fp32'") as caught:
        model.predict(["a"])
    assert caught.value.code == "logits-not-finite"
