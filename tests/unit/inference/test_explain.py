"""Explaining: influences are what masking in training would make of the label, for every word, in any company."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TEXTS, assert_typical, tiny_tokenizer

from tokmask_peft import TokenMaskConfig, TokenMasker
from tokmask_peft.data.encoding import words_of
from tokmask_peft.errors import DataError
from tokmask_peft.inference.explain import log_odds
from tokmask_peft.masking.embedding import embedding_weight, find_embedding
from tokmask_peft.masking.replacement import used_rows

LONG = " ".join(TEXTS * 2)


def masked_in_training(model, ids, hidden):
    """Return the logits of `ids` with those of `hidden` masked by the masker itself, in train mode."""
    rows = embedding_weight(find_embedding(model.model)).shape[0]
    protect = tuple(number for number in range(rows) if number not in hidden)
    config = TokenMaskConfig(p=0.9999999, protect=protect)
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    with TokenMasker.attach(model.model, model.tokenizer, config):
        found = model.model.train()(**batch).logits[0].detach()
    model.model.eval()
    return found.double().numpy()


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "sequence"), ("qwen2", "sequence"), ("xlm-r", "token"), ("modernbert", "token")]
)
def test_an_influence_is_what_masking_in_training_does_to_the_label(classifier, family, task):
    model = classifier(family, task, max_length=64, temperature=1.7)
    tested = 0
    for text in TEXTS[1:4]:
        (answer,) = model.predict([text])
        (explanation,) = model.explain([text])
        assert model.predict([text]) == [answer], "explaining left a trace"
        assert (explanation.words, explanation.unmasked) == (tuple(text.split()), ())
        if task == "sequence":
            assert explanation.label == answer.label
            assert explanation.probability == pytest.approx(answer.probabilities[answer.label], abs=1e-5)
        else:
            assert explanation.labels == answer.labels
        (window,) = model.encoder.windows(model.checked([text]), owners=True)
        plain = masked_in_training(model, window.ids, set())
        for index, influence in enumerate(explanation.influences):
            places = np.flatnonzero(window.owners == index)
            hidden = {window.ids[place] for place in places}
            if hidden & {window.ids[place] for place in np.flatnonzero(window.owners != index)}:
                continue  # the masker would hide these ids elsewhere, too
            left = masked_in_training(model, window.ids, hidden)
            before, after = (plain, left) if task == "sequence" else (plain[places[0]], left[places[0]])
            label = int(before.argmax())
            expected = log_odds(before, label, 1.7) - log_odds(after, label, 1.7)
            assert influence == pytest.approx(float(expected), abs=1e-4)
            assert explanation.without[index] == pytest.approx(softmax(after / 1.7)[label], abs=1e-4)
            assert influence != 0.0
            tested += 1
    assert tested >= 4


def softmax(values):
    grown = np.exp(values - values.max())
    return grown / grown.sum()


def test_a_spare_row_is_filled_with_a_typical_one(classifier):
    model = classifier("qwen2", max_length=64)
    weight = embedding_weight(find_embedding(model.model))
    used = used_rows(model.tokenizer)
    assert model.occlusion.mask_token.kind == "spare"
    assert_typical(weight[-1], weight[:used])
    assert "does not record how it was masked" in model.occlusion.note
    model = classifier("qwen2")
    model.masking = TokenMaskConfig(p=0.0)
    assert "never seen a masked word" in model.occlusion.note
    assert "rows 332 to 347" in model.occlusion.note
    for replace in ("drop", "random"):  # words are masked by a token that training never used
        model = classifier("bert")
        model.masking = TokenMaskConfig(p=0.3, replace=replace)
        assert f"replace: {replace}" in model.occlusion.note
        assert "as in training" not in model.occlusion.note


@pytest.mark.parametrize(("family", "task"), [("bert", "sequence"), ("qwen2", "token")])
def test_influences_depend_on_neither_batches_nor_other_texts(classifier, family, task, monkeypatch):
    from tokmask_peft.inference import explain

    model = classifier(family, task)
    texts = [*TEXTS, LONG]
    together = model.explain(texts)
    monkeypatch.setattr(explain, "_QUESTIONS", 7)
    for one, other in zip(together, model.explain(texts, batch_size=3), strict=True):
        assert one.influences == pytest.approx(other.influences, abs=1e-4)
        assert (one.words, one.labels, one.label) == (other.words, other.labels, other.label)
    assert len({round(value, 3) for one in together for value in one.influences}) > 30


def test_a_word_of_a_long_text_counts_by_the_size_of_its_window(classifier):
    model = classifier(max_length=24, temperature=2.0)
    text = LONG.replace("weather", "aeo" * 20)  # more sub-tokens than a window holds
    (explanation,) = model.explain([text])
    windows = list(model.encoder.windows([text], owners=True))
    assert len(windows) > 3
    weights = np.array([window.size for window in windows]) / sum(window.size for window in windows)
    rows = np.array([masked_in_training(model, window.ids, set()) for window in windows])
    label = int((rows * weights[:, None]).sum(0).argmax())
    assert explanation.label == model.labels[label]
    in_two = 0
    for index in range(len(explanation.words)):
        changed = rows.copy()
        seen = [number for number, window in enumerate(windows) if (window.owners == index).any()]
        in_two += len(seen) > 1
        for number in seen:
            ids = torch.tensor([windows[number].ids])
            ids[0, torch.from_numpy(windows[number].owners == index)] = model.tokenizer.mask_token_id
            with torch.no_grad():
                changed[number] = model.model(input_ids=ids).logits[0].double().numpy()
        odds = [log_odds((part * weights[:, None]).sum(0), label, 2.0) for part in (rows, changed)]
        assert explanation.influences[index] == pytest.approx(float(odds[0] - odds[1]), abs=1e-4)
    assert in_two, "no word lies across two windows; change the text"


def test_a_word_is_explained_by_its_context(classifier):
    model = classifier("bert", "token", max_length=64)
    words = TEXTS[0].split()
    (own,) = model.explain([words])
    (row,) = model.explain([words], word=-2)
    target = len(words) - 2
    assert row.word == target
    assert [row] == model.explain([words], word=words[target])
    assert row.label == row.labels[target] == own.labels[target]
    assert row.probability == pytest.approx(own.probabilities[target])
    assert row.influences[target] == pytest.approx(own.influences[target], abs=1e-5)
    assert own.label == ""
    (window,) = model.encoder.windows([words], owners=True)
    ids = torch.tensor([window.ids])
    ids[0, torch.from_numpy(window.owners == 0)] = model.tokenizer.mask_token_id
    with torch.no_grad():
        left = model.model(input_ids=ids).logits[0, int(window.positions[target])].double().numpy()
    assert row.without[0] == pytest.approx(softmax(left)[model.labels.index(row.label)], abs=1e-5)
    assert row.without[0] != pytest.approx(own.without[0])


def test_words_out_of_reach_have_no_influence(classifier):
    model = classifier("bert", "token", max_length=24)
    (row,) = model.explain([LONG], word=0)
    assert row.influences[0] != 0.0
    assert row.influences[-1] == 0.0
    assert len(row.influences) == len(LONG.split())


def test_what_training_never_masks_is_not_masked(classifier):
    model = classifier(max_length=64)
    model.masking = TokenMaskConfig(p=0.3, protect=tuple(model.tokenizer("love", add_special_tokens=False).input_ids))
    (explanation,) = model.explain(["i love [SEP] canción \u200b"])
    names = [explanation.words[index] for index in explanation.unmasked]
    assert names[:2] == ["love", "[SEP]"]
    assert all(explanation.influences[index] == 0.0 for index in explanation.unmasked)
    assert explanation.influences[3] != 0.0
    assert "as in training" in model.occlusion.note


@given(st.lists(st.sampled_from(["mi", "boss", "canción", "😀", "a.b", "#yo", "ñ"]), min_size=1, max_size=8), st.data())
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bytelevel", "metaspace"])
def test_every_sub_token_belongs_to_the_word_it_is_of(kind, words, data):
    spaces = st.sampled_from([" ", "  ", "\t", "\u00a0", " \n"])
    text = words[0] + "".join(data.draw(spaces) + word for word in words[1:])
    tokenizer = tiny_tokenizer(kind)
    encoding = tokenizer(text, add_special_tokens=False).encodings[0]
    owners = words_of(text, encoding.offsets)
    assert text.split() == words
    pieces = [text[start:stop].split() for start, stop in encoding.offsets]
    fused = {word for piece in pieces for word in piece[:-1]}  # unknown characters around a tab become one token
    assert {words[number] for number in set(range(len(words))) - set(owners)} <= fused
    assert sorted(owners[owners >= 0]) == list(owners[owners >= 0])
    for owner, piece in zip(owners, pieces, strict=True):
        assert piece[-1] in words[owner] if owner >= 0 else not piece


def test_other_threads_predict_undisturbed(classifier):
    model = classifier(max_length=64)
    expected, found = model.predict(TEXTS[:1]), []
    with model.occlusion.at(torch.ones(1, 1, dtype=torch.bool)):
        thread = threading.Thread(target=lambda: found.extend(model.predict(TEXTS[:1])))
        thread.start()
        thread.join()
    assert found == expected


def test_mistakes_are_named(classifier):
    for task, texts, word, code in (
        ("sequence", ["a text"], 0, "word-not-applicable"),
        ("sequence", "a text", None, "not-a-list"),
        ("sequence", ["ok", "  "], None, "empty-text"),
        ("token", ["ok", "two words"], 1, "no-such-word"),
        ("token", ["two words", "ok"], "words", "no-such-word"),
        ("sequence", ["ok", "so " * 10_001], None, "text-too-long"),
        ("token", ["ok", ["so"] * 10_001], None, "text-too-long"),
        ("token", ["so so so"], "so", "ambiguous-word"),
    ):
        with pytest.raises(DataError) as caught:
            classifier("bert", task).explain(texts, word=word)
        assert caught.value.code == code
    assert caught.value.fields == {"word": "so", "places": [0, 1, 2]}
    assert "'so' is word 0, 1 and 2 of texts[0]: give one of these numbers" in str(caught.value)
    assert classifier().explain([]) == []
    with pytest.raises(DataError) as caught:
        classifier().explain(["ok", "so so"], label=["good"])
    assert (caught.value.code, caught.value.fields) == ("label-count", {"texts": 2, "labels": 1})
