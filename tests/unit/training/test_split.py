"""A split comes back from the Trainer's padded arrays in its own order, with every word accounted for."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import tiny_tokenizer

from tokmask_peft.examples import IGNORED, NO_PREDICTION, Example
from tokmask_peft.spans import Spans
from tokmask_peft.training.trainer import Split

LABELS = ("en", "es", "other")
WORDS = {"i": "en", "love": "en", "this": "en", "canción": "es", "mañana": "es", "tengo": "es", "#fiesta": "other"}
TEXTS = [
    "tengo this canción i love mañana i love this",
    "i",
    "mañana tengo #fiesta",
    "love",
    "this #fiesta i love canción " * 6,
    "canción mañana",
]
TOKENIZERS = ["wordpiece", "bytelevel", "unigram"]


def token_split(tokenizer="wordpiece", max_length=64):
    examples = [Example(tuple(text.split()), tuple(WORDS[word] for word in text.split()), "") for text in TEXTS]
    return Split(examples, tiny_tokenizer(tokenizer), "token", LABELS, max_length)


def padded(split, value=None):
    """What the Trainer hands back: gold as the model saw it, and predictions, which are right unless `value` is given.

    Positions without a label hold nonsense predictions, as an argmax there does.
    """
    rows = split.dataset["labels"]
    width = max(map(len, rows)) + 3
    gold = np.array([[*row, *[IGNORED] * (width - len(row))] for row in rows])
    return np.where(gold == IGNORED, 1, gold if value is None else value), gold


def metrics(split, value=None):
    predicted, gold = padded(split, value)
    return split.metrics(SimpleNamespace(predictions=predicted, label_ids=gold))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_right_predictions_come_back_in_the_order_of_the_texts(tokenizer):
    split = token_split(tokenizer, max_length=512)
    lengths = split.dataset["length"]
    assert list(lengths) == sorted(lengths)
    assert split.order.tolist() != list(range(len(TEXTS)))
    found = split.cut_predictions(*padded(split))
    for text, gold, predicted in zip(TEXTS, found.gold, found.predicted, strict=True):
        assert [LABELS[i] for i in gold] == [WORDS[word] for word in text.split()]
        assert predicted.tolist() == gold.tolist()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_words_beyond_the_cut_are_kept_as_gold_without_a_prediction(tokenizer):
    split = token_split(tokenizer, max_length=12)
    found = split.cut_predictions(*padded(split))
    lost = 0
    for text, gold, predicted, kept in zip(TEXTS, found.gold, found.predicted, split.encoded.kept, strict=True):
        assert len(gold) == len(predicted) == len(text.split())
        assert np.flatnonzero(predicted != NO_PREDICTION).tolist() == kept
        assert predicted[kept].tolist() == gold[kept].tolist()
        lost += len(gold) - len(kept)
    assert lost == split.encoded.truncation.words_cut > 20


def test_a_prediction_belongs_to_its_word():
    split = token_split()
    wrong = split.cut_predictions(*padded(split, value=2))
    assert {int(i) for row in wrong.predicted for i in row} == {2}
    right, gold = padded(split)
    row = split.order.tolist().index(2)  # "mañana tengo #fiesta"
    first = np.flatnonzero(gold[row] != IGNORED)
    right[row, first[1]] = 0
    found = split.cut_predictions(right, gold)
    assert [LABELS[i] for i in found.predicted[2]] == ["es", "en", "other"]
    assert sum((a != b).sum() for a, b in zip(found.gold, found.predicted, strict=True)) == 1


def test_one_label_per_text():
    examples = [Example(text, LABELS[number % 3], "") for number, text in enumerate(TEXTS)]
    split = Split(examples, tiny_tokenizer("wordpiece"), "sequence", LABELS, 64)
    gold = np.array(split.dataset["labels"])
    found = split.cut_predictions((gold + 1) % 3, gold)
    assert [row.tolist() for row in found.gold] == [[0], [1], [2], [0], [1], [2]]
    assert [row.tolist() for row in found.predicted] == [[1], [2], [0], [1], [2], [0]]
    assert split.dataset[0]["length"] <= split.dataset[5]["length"]


def test_the_trainers_metric_counts_words_beyond_the_cut_as_errors():
    whole, cut = token_split(max_length=512), token_split(max_length=12)
    assert metrics(whole) == {"f1_macro": 1.0, "f1_weighted": 1.0, "accuracy": 1.0}
    words = sum(len(text.split()) for text in TEXTS)
    assert metrics(cut)["accuracy"] == pytest.approx(1 - cut.encoded.truncation.words_cut / words)


def test_entities_go_on_over_windows_and_are_legal_for_the_trainer_too():
    spans = Spans("bio", ("O", "B-x", "I-x"))
    words = ("tengo", "canción", "mañana") * 6
    example = Example(words, ("B-x",) + ("I-x",) * 17, "")
    split = Split([example], tiny_tokenizer("wordpiece"), "token", spans.labels, 24, spans=spans)
    assert len(split.windows) > 1
    count = sum(len(window.words) for window in split.windows)
    logits = np.tile(np.float32([0, 0, 1]), (count, 1))  # every word is I-x, in every window
    found = split.joined(logits)[0]
    assert found.predicted[0].tolist() == found.gold[0].tolist() == [1] + [2] * 17

    cut = split.cut_predictions(*padded(split, value=2)).predicted[0].tolist()
    kept = len(split.encoded.kept[0])
    assert cut == [1] + [2] * (kept - 1) + [NO_PREDICTION] * (18 - kept)
    assert metrics(split, value=2)["f1_entities"] == 0.0  # the entity is cut
