"""The estimates against explicit vectors, exact enumeration and simulation."""

import itertools

import numpy as np
import pytest

from tokmask_peft.study.diagnostics.estimates import MEANING, Grams, crossing, estimate, interval, of_batches, summarise


def grams(masked, unmasked):
    """Inner products of masked gradients [batches, draws, size] and unmasked ones [batches, size]."""
    w = masked - unmasked[:, None]
    rows = np.concatenate([w, unmasked[:, None]], axis=1)
    means = np.concatenate([w.mean(1), unmasked])
    return Grams(rows @ rows.transpose(0, 2, 1), means @ means.T)


def point(found):
    return {name: values[0] for name, values in estimate(found, np.ones((1, len(found.within)))).items()}


def test_against_explicit_vectors():
    random = np.random.default_rng(0)
    unmasked = random.normal(1.5, 1, (5, 7))
    masked = 0.8 * unmasked[:, None] + random.normal(0.1, 0.6, (5, 4, 7))
    found = point(grams(masked, unmasked))

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    mean = masked.mean(1)
    noise = masked.var(1, ddof=1).sum(-1).mean()
    assert found["mask_variance"] == pytest.approx(noise)
    assert found["batch_variance"] == pytest.approx(unmasked.var(0, ddof=1).sum())
    assert found["batch_variance_masked"] == pytest.approx(mean.var(0, ddof=1).sum() - noise / 4)
    assert found["ratio"] == pytest.approx(noise / unmasked.var(0, ddof=1).sum())
    pairs = [[cosine(b[i], b[j]) for i, j in itertools.combinations(range(4), 2)] for b in masked]
    assert found["agreement"] == pytest.approx(np.mean(pairs))
    shift = masked - unmasked[:, None]
    squared = np.mean([np.mean([b[i] @ b[j] for i, j in itertools.combinations(range(4), 2)]) for b in shift])
    length = (unmasked**2).sum(-1).mean()
    assert found["distance_squared"] == pytest.approx(squared / length)
    assert found["distance"] == pytest.approx(np.sqrt(squared / length))
    own = np.mean([np.mean([b[i] @ b[j] for i, j in itertools.combinations(range(4), 2)]) for b in masked])
    assert found["cosine"] == pytest.approx((mean * unmasked).sum(-1).mean() / np.sqrt(own * length))
    assert found["naive_cosine"] == pytest.approx(np.mean([cosine(a, b) for a, b in zip(mean, unmasked, strict=True)]))
    far = np.linalg.norm(mean - unmasked, axis=-1) / np.linalg.norm(unmasked, axis=-1)
    assert found["naive_distance"] == pytest.approx(far.mean())
    two = list(itertools.permutations(range(5), 2))
    across = np.mean([(mean[i] - unmasked[i]) @ (mean[j] - unmasked[j]) for i, j in two])
    both = np.mean([unmasked[i] @ unmasked[j] for i, j in two])
    assert found["shared_distance_squared"] == pytest.approx(across / both)
    product = np.mean([mean[i] @ unmasked[j] for i, j in two])
    alone = np.mean([mean[i] @ mean[j] for i, j in two])
    assert found["shared_cosine"] == pytest.approx(product / np.sqrt(alone * both))


class LinearModel:
    """Least squares on inputs of which each part is set to 0 with chance p: every mask can be enumerated."""

    def __init__(self, p, seed=3, parts=5):
        random = np.random.default_rng(seed)
        self.p, self.parts = p, parts
        self.weights, self.x, self.y = random.normal(size=parts), random.normal(size=parts), 1.5

    def gradient(self, kept):
        x = self.x * kept
        return x * (x @ self.weights - self.y)

    def exact(self):
        """Mean and trace of the covariance over all masks."""
        masks = np.array(list(itertools.product([0, 1], repeat=self.parts)))
        chances = np.prod(np.where(masks == 1, 1 - self.p, self.p), axis=1)
        gradients = np.array([self.gradient(kept) for kept in masks])
        mean = chances @ gradients
        return mean, chances @ ((gradients - mean) ** 2).sum(-1)


@pytest.mark.parametrize("draws", [2, 5])
def test_unbiased_on_a_linear_model_whose_masks_are_enumerated(draws):
    model = LinearModel(0.3)
    mean, variance = model.exact()
    unmasked = model.gradient(np.ones(model.parts))
    random = np.random.default_rng(1)
    repeats = 10_000
    kept = random.random((repeats, draws, model.parts)) >= model.p
    x = model.x * kept
    masked = x * ((x @ model.weights) - model.y)[..., None]
    rows = np.concatenate([masked - unmasked, np.broadcast_to(unmasked, (repeats, 1, model.parts))], axis=1)
    found = of_batches(Grams(rows @ rows.transpose(0, 2, 1), np.zeros((0, 0))))
    for name, truth in {
        "mask_variance": variance,
        "shift_squared": ((mean - unmasked) ** 2).sum(),
        "masked_squared": (mean**2).sum(),
        "product": mean @ unmasked,
    }.items():
        values = found[name]
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(repeats), name
    naive = ((masked.mean(1) - unmasked) ** 2).sum(-1)  # what must not be used
    assert naive.mean() - found["shift_squared"].mean() == pytest.approx(variance / draws, rel=0.1)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(4)
    held = {"ratio": 0, "distance_squared": 0, "batch_variance": 0}
    truth = {"ratio": 1.44, "distance_squared": 0.25 / 1.25, "batch_variance": 20.0}
    runs = 200
    for run in range(runs):
        unmasked = random.normal(0.5, 1, (8, 20))
        masked = (unmasked + 0.5)[:, None] + random.normal(0, 1.2, (8, 6, 20))
        drawn = estimate(
            grams(masked, unmasked), np.random.default_rng(run).multinomial(8, np.full(8, 1 / 8), 600).astype(float)
        )
        for name in held:
            low, high = interval(drawn[name], 8)
            held[name] += low <= truth[name] <= high
    for name, count in held.items():
        assert 0.88 <= count / runs <= 0.995, (name, count / runs)


def test_the_bootstrap_leaves_pairs_of_a_batch_with_itself_out():
    random = np.random.default_rng(5)
    unmasked = random.normal(1.5, 1, (4, 6))
    found = grams(unmasked[:, None] + random.normal(size=(4, 3, 6)), unmasked)
    once, twice = np.array([[1.0, 1.0, 1.0, 0.0]]), np.array([[2.0, 2.0, 2.0, 0.0]])
    for name, value in estimate(found, once).items():
        assert value == pytest.approx(estimate(found, twice)[name]), name
    assert np.isnan(estimate(found, np.array([[4.0, 0.0, 0.0, 0.0]]))["batch_variance"]).all()


def test_the_crossing_is_between_two_rates():
    found = crossing([0.1, 0.2], np.array([[0.5, 1.5], [2.0, 3.0], [0.1, 0.9]]))
    assert found == pytest.approx([0.15, 0.05, np.inf])


def test_the_summary_is_the_same_each_time_and_has_none_for_a_crossing_that_is_not_reached():
    random = np.random.default_rng(6)
    unmasked, noise = random.normal(size=(5, 8)), random.normal(size=(5, 3, 8))
    small, large = (grams(unmasked[:, None] + scale * noise, unmasked) for scale in (0.01, 3))
    found = summarise({0.1: small, 0.2: small}, replicates=200)
    assert found["outweighs_at"] == {"value": None, "interval": [None, None]}
    assert [row["p"] for row in found["rates"]] == [0.1, 0.2]
    assert set(MEANING) <= set(found["rates"][0])
    first, second = (summarise({0.1: large}, replicates=200) for _ in range(2))
    assert first == second
    assert 0 < first["outweighs_at"]["value"] < 0.1


def test_an_interval_of_few_batches_is_wider_than_the_plain_percentiles():
    values = np.random.default_rng(8).normal(size=20_000)
    low, high = interval(values, 5)
    assert low < np.quantile(values, 0.025)
    assert high > np.quantile(values, 0.975)
    assert interval(values, 10_000) == pytest.approx(list(np.quantile(values, [0.025, 0.975])), abs=0.02)
    assert interval(np.where(values > 0, np.nan, values), 5) is None
