from dataclasses import asdict

import numpy as np
import pytest
from confounds_analysis import analyse
from confounds_protocol import runs
from confounds_report import section

from tokmask_peft.training.metrics import scores

SEEDS = (1, 2, 3)
LABELS = ["a", "b"]
TEXTS = 400


def made_up(run, lost=0.0):
    """Return a record of two epochs, of which test prefers the first and validation the second."""
    gold = [[number % 2] for number in range(TEXTS)]
    epochs = []
    for number in range(2):
        wrong = 40 + run.seed + 4 * number + round(TEXTS * lost)
        predicted = [[1 - row[0]] if text < wrong else row for text, row in enumerate(gold)]
        found = scores(np.ravel(gold), np.ravel(predicted), LABELS)["f1_macro"]
        test = {"loss": 1.0 - number, "f1_macro": found, "f1_macro_all": found, "predictions": predicted}
        epochs.append({"learning_rate": 1e-3, "test": test, "validation": {"loss": 1.0 - number, "f1_macro": number}})
    rest = {
        "labels": LABELS,
        "texts": {},
        "scored_share": 1.0,
        "masked_share": run.p,
        "moved_share": 0.6 if run.p else 0,
    }
    return {**asdict(run), **rest, "gold": gold, "epochs": epochs, "seconds": 1.0}


@pytest.fixture
def records():
    """Masking loses a tenth of the texts, but nothing where padding is never masked."""
    lost = {"padding": 0.0, "all": 0.0}
    return {run.name: made_up(run, lost.get(run.arm, 0.1) if run.p else 0.0) for run in runs(SEEDS)}


def arm(result, group, name):
    return next(row for row in result["groups"][group]["arms"] if row["arm"] == name)


def test_differences_are_paired_and_a_change_is_told_from_the_authors_one(records):
    result = analyse(records, SEEDS)
    theirs, padding = (arm(result, "causal", name)["rates"]["0.3"] for name in ("authors", "padding"))
    assert theirs["difference"]["by_seed"] == pytest.approx([-0.1] * 3, abs=1e-3)
    assert theirs["difference"]["clear"]
    assert padding["difference"]["mean"] == 0
    assert not padding["difference"]["clear"]
    assert padding["change"]["by_seed"] == pytest.approx([0.1] * 3, abs=1e-3)
    assert padding["change"]["clear"]
    low, high = padding["change"]["bootstrap"]
    assert low < padding["change"]["mean"] < high
    assert arm(result, "causal", "row")["rates"]["0.3"]["change"]["mean"] == 0


def test_the_checkpoint_is_the_one_that_the_arms_rule_chooses(records):
    result = analyse(records, SEEDS)
    theirs, selection = (arm(result, "encoder", name)["rates"]["0"] for name in ("authors", "selection"))
    assert theirs["epoch"]["by_seed"] == [1, 1, 1]
    assert selection["epoch"]["by_seed"] == [2, 2, 2]
    assert theirs["score"]["mean"] - selection["score"]["mean"] == pytest.approx(0.01, abs=1e-3)
    assert result["groups"]["encoder"]["selection"]["mean"] == pytest.approx(0.01, abs=1e-3)


def test_what_was_not_run_with_every_seed_is_left_out_and_said(records):
    for name in [name for name in records if "-p0.1-s3" in name or name.startswith("words-")]:
        del records[name]
    result = analyse(records, SEEDS)
    assert set(result["groups"]) == {"encoder", "causal"}
    assert set(arm(result, "encoder", "authors")["rates"]) == {"0", "0.3"}


def test_the_section_begins_with_what_was_found_and_names_what_is_clear(records):
    model = {"shape": {"num_hidden_layers": 4, "hidden_size": 128}, "rows": 9, "texts": 8, "epochs": 4}
    model |= {"loss_by_epoch": [3.0, 2.0], "id_0": "!", "texts_with_id_0": 7}
    result = {**analyse(records, SEEDS), "command": "c", "precision": "fp32", "language_model": model}
    text = section(result)
    found = text.split("\n\n")[1]
    assert "causal, padding never masked, p = 0.3: +0.100" in found
    assert "clearly raised macro-F1 in 0 of" in found
    assert "clearly lowered it in " in found
    assert "causal, nothing: the authors' protocol, p = 0.3: -0.1" in found
    assert "60% at p = 0.1" in text
    assert "not run" not in text
    for row in result["groups"]["causal"]["arms"]:
        row["rates"].pop("0.1", None) if row["arm"] == "row" else None
    assert "not run" in section(result)
