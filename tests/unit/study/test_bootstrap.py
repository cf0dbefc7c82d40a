import numpy as np
import pytest
from sklearn.metrics import f1_score

from tokmask_peft.training.metrics import bootstrap_differences, f1_of, percentile_interval, scores, text_counts

CLASSES = 3


def made_up_texts(seed, accuracy, texts=30, longest=4):
    """Return gold and predicted ids of texts with one to a few items; the gold ones are the same for all seeds."""
    lengths = np.random.default_rng(99).integers(1, longest + 1, texts)
    gold = [np.random.default_rng([5, i]).integers(0, CLASSES, n) for i, n in enumerate(lengths)]
    random = np.random.default_rng(seed)
    predicted = [np.where(random.random(len(g)) < accuracy, g, random.integers(-1, CLASSES, len(g))) for g in gold]
    return gold, predicted


def counts_of(runs):
    return [text_counts(gold, predicted, CLASSES) for gold, predicted in runs]


def test_f1_is_that_of_the_run_and_of_sklearn():
    gold, predicted = made_up_texts(0, 0.7)
    found = f1_of(counts_of([(gold, predicted)])[0].sum(1))
    gold, predicted = np.concatenate(gold), np.concatenate(predicted)
    of_run = scores(gold, predicted, list("abc"))
    for average in ("macro", "weighted"):
        of_sklearn = f1_score(gold, predicted, labels=range(CLASSES), average=average, zero_division=0)
        assert float(found[f"f1_{average}"]) == pytest.approx(of_run[f"f1_{average}"]) == pytest.approx(of_sklearn)


def test_a_class_that_a_draw_lacks_does_not_count():
    found = f1_of(np.array([[2, 0, 0], [2, 1, 0], [3, 0, 0]]))
    assert float(found["f1_macro"]) == pytest.approx((0.8 + 0.0) / 2)


def test_replicates_are_those_of_a_plain_loop():
    arms = {
        name: [made_up_texts(10 * seed + number, accuracy) for seed in range(3)]
        for number, (name, accuracy) in enumerate({"none": 0.6, "mask": 0.8}.items())
    }
    found = bootstrap_differences({name: counts_of(runs) for name, runs in arms.items()}, "none", 15, seed=3)["mask"]
    random = np.random.default_rng(3)
    chosen = random.integers(0, 3, (15, 3))
    draws = random.multinomial(30, np.full(30, 1 / 30), 15)
    for replicate in range(15):
        expected = {"none": [], "mask": []}
        for name, runs in arms.items():
            for run in chosen[replicate]:
                texts = np.repeat(np.arange(30), draws[replicate])
                gold = np.concatenate([runs[run][0][i] for i in texts])
                guess = np.concatenate([runs[run][1][i] for i in texts])
                expected[name].append(scores(gold, guess, list("abc"))["f1_macro"])
        difference = np.mean(expected["mask"]) - np.mean(expected["none"])
        assert found["f1_macro"][replicate] == pytest.approx(difference)


def test_pieces_are_the_whole(monkeypatch):
    arms = {name: counts_of([made_up_texts(10 * i + j, 0.7) for i in range(2)]) for j, name in enumerate("ab")}
    whole = bootstrap_differences(arms, "a", 50)["b"]["f1_weighted"]
    monkeypatch.setattr("tokmask_peft.training.metrics._WEIGHTS_AT_ONCE", 30 * 7)
    assert np.array_equal(bootstrap_differences(arms, "a", 50)["b"]["f1_weighted"], whole)


def test_intervals_cover_no_difference_when_there_is_none():
    random = np.random.default_rng(0)
    gold = random.integers(0, 2, 150)
    covered = []
    for _ in range(60):
        arms = {}
        for name in "ab":  # a run's accuracy varies from seed to seed, its errors from text to text
            runs = []
            for _ in range(8):
                right = random.random(150) < 0.8 + random.normal(0, 0.02)
                runs.append((gold[:, None], np.where(right, gold, 1 - gold)[:, None]))
            arms[name] = [text_counts(one, two, 2) for one, two in runs]
        low, high = percentile_interval(bootstrap_differences(arms, "a", 300)["b"]["f1_macro"])
        covered.append(low <= 0 <= high)
    assert np.mean(covered) >= 0.9
