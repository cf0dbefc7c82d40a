"""Masking curves and their areas: right orders, the same texts and orders for every run, honest intervals."""

import numpy as np
import pytest
from scipy.stats import norm
from tiny_models import TEXTS

from tokmask_peft.inference import explain
from tokmask_peft.inference.explain import Occluded, Question
from tokmask_peft.study.diagnostics import faithfulness
from tokmask_peft.study.diagnostics.faithfulness import SHARES, interval, masking_curves, report_text
from tokmask_peft.training.metrics import probabilities


@pytest.mark.parametrize(("family", "task"), [("qwen2", "sequence"), ("bert", "token")])
def test_curves_begin_at_the_prediction_and_end_where_all_is_masked(classifier, family, task):
    model = classifier(family, task, max_length=64, temperature=1.5)
    found = masking_curves(model, TEXTS, seed=3)
    assert sorted(found) == [n for n, text in enumerate(TEXTS) if len(text.split()) > 1]
    answers = model.predict(TEXTS)
    for number, curves in found.items():
        assert curves.shape == (3, len(SHARES))
        assert np.ptp(curves[:, 0]) < 1e-6
        assert np.ptp(curves[:, -1]) < 1e-6
        if task == "sequence":
            assert curves[0, 0] == pytest.approx(max(answers[number].probabilities.values()), abs=1e-5)
        else:
            best = [max(row.values()) for row in answers[number].probabilities]
            assert np.abs(np.array(best) - curves[0, 0]).min() < 1e-5
    again = masking_curves(model, TEXTS, seed=3, batch_size=5)
    assert all(np.allclose(found[number], again[number], atol=1e-5) for number in found)
    other = masking_curves(model, TEXTS, seed=4)
    if task == "sequence":
        assert all(np.allclose(found[n][:2], other[n][:2], atol=1e-5) for n in found), "only the random orders change"
    assert any(not np.allclose(found[n][2], other[n][2], atol=1e-3) for n in found)


def test_words_are_masked_in_the_order_of_their_influence(classifier):
    model = classifier(max_length=64)
    text = "she said que no quería to go #fiesta 2025 ok"  # ten words: each step is a share
    curves = masking_curves(model, [text])[0]
    (explanation,) = model.explain([text])
    order = np.argsort(explanation.influences)
    occluded = Occluded(model, [text])
    label = model.labels.index(explanation.label)
    for row, words in ((0, order[::-1]), (1, order)):
        asked = [Question(0, frozenset(words[:count].tolist())) for count in range(11)]
        assert curves[row] == pytest.approx(probabilities(occluded.logits(asked, 8))[:, label], abs=1e-5)


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_a_text_too_long_to_explain_is_left_out(classifier, task, monkeypatch):
    monkeypatch.setattr(explain, "MOST_WORDS", 8)
    monkeypatch.setattr(faithfulness, "MOST_WORDS", 8)
    found = masking_curves(model := classifier(task=task, max_length=64), TEXTS)
    assert sorted(found) == [n for n, text in enumerate(TEXTS) if 1 < len(text.split()) <= 8]
    monkeypatch.undo()
    whole = masking_curves(model, TEXTS)
    assert all(np.allclose(found[n], whole[n], atol=1e-5) for n in found), "the draws stay those of the text"


def test_intervals_are_those_of_large_samples_and_paired():
    draw = np.random.default_rng(0)
    texts, one = draw.normal(1.0, 3.0, 1000), np.ones(1000)
    found = interval((texts, one), None, 0)
    half = norm.ppf(0.975) * texts.std() / np.sqrt(len(texts))
    assert found["mean"] == pytest.approx(texts.mean())
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.1)
    shifted = interval((texts + draw.normal(0.5, 0.01, 1000), one), (texts, one), 0)
    assert shifted["low"] == pytest.approx(0.5, abs=0.01), "pairing takes the spread of the texts out"
    ratio = interval((texts, 2 * one), None, 0)
    assert ratio["mean"] == pytest.approx(texts.mean() / 2)
    assert interval((one, one), (one, one), 0) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_areas_are_those_under_the_curves():
    line = np.linspace(1.0, 0.2, len(SHARES))
    curves = np.stack([[line, np.ones_like(line), 0.5 + line / 2]])
    parts = {key: values[0] / values[1] for key, values in faithfulness.areas(curves).items()}
    assert parts["least_minus_most"] == pytest.approx(0.4)
    assert parts["random_minus_most"] == pytest.approx(0.2)
    assert parts["least_minus_random"] == pytest.approx(0.2)
    assert parts["relative"] == pytest.approx(0.2 / 0.6)
    assert parts["random_fall"] == pytest.approx(0.2)


def part(low, high, p):
    measures = {key: {"mean": (low + high) / 2, "low": low, "high": high} for key in faithfulness.MEASURES}
    curves = dict.fromkeys(("most", "least", "random"), SHARES.tolist())
    return {"path": f"runs/p{p}", "p": p, "mask": "note", "curves": curves, "measures": measures}


@pytest.mark.parametrize(
    ("low", "high", "alone", "paired"),
    [
        (0.1, 0.2, "faster than random", "is larger than"),
        (-0.2, -0.1, "worse than chance", "is smaller than"),
        (-0.1, 0.1, "not shown to do better", "is not shown to be larger or smaller than"),
    ],
)
def test_the_verdict_is_that_of_the_interval(low, high, alone, paired):
    result = {"texts": 9, "left_out": 1, "split": "test", "shares": SHARES.tolist(), "run": part(low, high, 0.1)}
    said = report_text(result)
    assert alone in said
    assert "(without 1 that have more than 10,000 words)" in report_text(result | {"too_long": 1})
    assert "First run" not in said
    other = {"against": part(0.1, 0.2, 0), "difference": part(low, high, 0)["measures"], "other_differences": ["seed"]}
    said = report_text(result | other)
    assert f"The separation of its curves {paired} the second's" in said
    assert "The runs differ in more than masking: seed." in said
