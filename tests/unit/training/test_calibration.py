"""The temperature: never worse than none, the known optimum, and no change of any label."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from tokmask_peft.console import calibration_line
from tokmask_peft.errors import RunError
from tokmask_peft.training import metrics
from tokmask_peft.training.metrics import (
    HIGHEST,
    LOWEST,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
    reliability_bins,
)


def drawn(items, classes, scale, seed):
    """Logits that are `scale` times too sure of labels drawn from their softmax."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(items, classes)) * 2
    shares = probabilities(logits)
    gold = (shares.cumsum(1) > draw.random((items, 1))).argmax(1)
    return (logits * scale).astype(np.float32), gold


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_factor_that_logits_were_scaled_by_is_found(scale):
    logits, gold = drawn(20_000, 4, scale, seed=1)
    assert fit_temperature(logits, gold) == pytest.approx(scale, rel=0.05)


@given(st.integers(2, 60), st.integers(2, 6), st.floats(0.01, 30), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_it_is_the_optimum_and_never_worse_than_one(items, classes, scale, seed):
    draw = np.random.default_rng(seed)
    logits, gold = (draw.normal(size=(items, classes)) * scale).astype(np.float32), draw.integers(0, classes, items)
    temperature = fit_temperature(logits, gold)
    assert LOWEST <= temperature <= HIGHEST
    nll = negative_log_likelihood(logits, gold, temperature)
    assert nll <= negative_log_likelihood(logits, gold) + 1e-12
    if not (logits.argmax(-1) == gold).all():
        other = minimize_scalar(
            lambda log: negative_log_likelihood(logits, gold, np.exp(log)), bounds=np.log([LOWEST, HIGHEST])
        )
        assert nll <= other.fun + 1e-9
    assert (probabilities(logits, temperature).argmax(-1) == logits.argmax(-1)).all()


def test_without_an_error_there_is_nothing_to_fit():
    logits = np.eye(3, dtype=np.float32)
    assert fit_temperature(logits, np.arange(3)) == 1.0
    assert fit_temperature(np.zeros((0, 3), dtype=np.float32), np.zeros(0, dtype=np.int64)) == 1.0


def test_likelihood_is_that_of_torch():
    logits, gold = drawn(200, 5, 3.0, seed=3)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits).double() / 1.7, torch.tensor(gold)).item()
    assert negative_log_likelihood(logits, gold, 1.7) == pytest.approx(expected, abs=1e-12)


def error_of(probability, gold):
    return expected_calibration_error(reliability_bins(np.array(probability), np.array(gold)))


def test_calibration_error_by_hand():
    # bins of width 1/15: .95 twice (one right: gap |.5 - .95|), .55 once (right: gap .45)
    assert error_of([[0.95, 0.05], [0.05, 0.95], [0.55, 0.45]], [0, 0, 0]) == pytest.approx((2 * 0.45 + 0.45) / 3)
    # a confidence on a border belongs below it, and full confidence to the last bin
    assert error_of([[1.0, 0.0]], [0]) == 0.0
    one_bin = error_of([[0.6, 0.4], [0.55, 0.45]], [0, 1])
    assert one_bin == pytest.approx(abs(1 - 0.6 - 0.55) / 2), "9/15 = .6 and .55 share a bin, where gaps cancel"


def test_the_report_is_of_every_part_and_refuses_nan():
    validation, test = drawn(2000, 3, 4.0, seed=4), drawn(2000, 3, 4.0, seed=5)
    report = calibrate({"validation": validation, "test": test})
    for part in ("validation", "test"):
        assert report[part]["items"] == 2000
        assert report[part]["after"]["nll"] < report[part]["before"]["nll"]
        assert report[part]["after"]["ece"] < report[part]["before"]["ece"] / 3
    validation[0][7, 1] = np.nan
    with pytest.raises(RunError, match=r"training\.learning_rate") as caught:
        calibrate({"validation": validation})
    assert (caught.value.code, caught.value.fields["split"]) == ("not-finite", "validation")


@pytest.mark.parametrize(
    ("scales", "left_out"), [((2, 2), None), ((2, 0.5), None), ((30, 30), "between"), ((0.02, 0.02), "between")]
)
def test_a_temperature_that_does_not_help_or_cannot_be_trusted_is_left_out(scales, left_out):
    validation, test = (drawn(2000, 3, scale, seed=seed) for seed, scale in enumerate(scales))
    report = calibrate({"validation": validation, "test": test})
    assert report["test"]["after"] != report["test"]["before"]
    if left_out is None:
        assert (report["temperature"], "left_out" in report) == (pytest.approx(2, rel=0.1), False)
    else:
        assert (report["temperature"], left_out in report["left_out"]) == (1.0, True)
        assert report["fitted"] == fit_temperature(*validation) != 1.0
    # test decides nothing, and the sentence on it says what the temperature did there
    decided = {key: value for key, value in report.items() if key != "test"}
    assert decided == calibrate({"validation": validation})
    worse = report["test"]["after"]["ece"] > report["test"]["before"]["ece"]
    assert worse == (scales == (2, 0.5))
    assert ("did not help on test" in calibration_line(report)) == worse


def test_a_temperature_that_makes_the_error_on_validation_larger_is_left_out(monkeypatch):
    validation = drawn(2000, 3, 1.0, seed=1)
    monkeypatch.setattr(metrics, "fit_temperature", lambda *_: 1.5)
    report = calibrate({"validation": validation, "test": drawn(2000, 3, 2, seed=2)})
    assert (report["temperature"], "does not help on validation" in report["left_out"]) == (1.0, True)


def test_items_whose_label_the_model_cannot_give_are_left_out():
    logits, gold = drawn(500, 3, 2.0, seed=6)
    more = np.concatenate([logits, logits[:9]]), np.concatenate([gold, np.full(9, 3)])
    assert calibrate({"validation": more}) == calibrate({"validation": (logits, gold)})


def test_reliability_bins_by_hand():
    probability = np.array([[0.9, 0.1], [0.95, 0.05], [0.45, 0.55], [0.8, 0.2]])
    gold = np.array([0, 1, 1, 0])
    rows = reliability_bins(probability, gold, 5)
    assert [row["items"] for row in rows] == [1, 1, 2]
    assert [row["confidence"] for row in rows] == pytest.approx([0.55, 0.8, 0.925])  # .8 belongs to the bin below it
    assert [row["accuracy"] for row in rows] == [1.0, 1.0, 0.5]
    assert reliability_bins(np.zeros((0, 2)), np.zeros(0, dtype=int)) == []
