"""Every statistic against SciPy, brute force or a published figure."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from tokmask_peft.study.statistics import (
    hedges_gz,
    holm,
    paired_power,
    sd_interval,
    seeds_needed,
    seeds_to_reach,
    sign_flip_p,
    smallest_p,
    spread,
)

DIFFERENCES = [0.012, -0.003, 0.02, 0.011, 0.004, -0.001, 0.009]


def brute_sign_flip(values):
    observed = abs(np.mean(values))
    flips = itertools.product((1, -1), repeat=len(values))
    means = [abs(np.mean(np.multiply(flip, values))) for flip in flips]
    return np.mean([mean >= observed - 1e-12 for mean in means])


class TestSpread:
    def test_is_scipy_s(self):
        found = spread(DIFFERENCES)
        expected = stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.95)
        assert found["interval"] == pytest.approx([expected.low, expected.high])
        assert (found["n"], found["mean"]) == (7, pytest.approx(np.mean(DIFFERENCES)))
        assert found["sd"] == pytest.approx(np.std(DIFFERENCES, ddof=1))

    def test_one_value_has_no_spread(self):
        assert spread([0.5]) == {"n": 1, "mean": 0.5, "sd": None, "interval": None}


class TestSignFlip:
    @pytest.mark.parametrize(
        "values", [*(DIFFERENCES[:count] for count in (1, 2, 3, 5, 7)), [0.01, 0.01, -0.01, 0.01], [0.0, 0.0, 0.0]]
    )
    def test_is_the_count_of_all_sign_patterns(self, values):
        assert float(sign_flip_p(values)) == pytest.approx(brute_sign_flip(values))

    @pytest.mark.parametrize(("seeds", "p"), [(1, 1.0), (2, 0.5), (3, 0.25), (5, 0.0625), (6, 0.03125)])
    def test_smallest_p_is_what_all_on_one_side_give(self, seeds, p):
        assert smallest_p(seeds) == p
        assert float(sign_flip_p([0.01 + 0.001 * i for i in range(seeds)])) == p

    def test_seeds_to_reach_a_level(self):
        assert (seeds_to_reach(0.05), seeds_to_reach(0.05 / 4)) == (6, 8)
        assert smallest_p(6) <= 0.05 < smallest_p(5)

    @pytest.mark.parametrize("draw", ["normal", "skewed by seed", "heavy tails"])
    def test_false_positives_are_near_the_level_where_nothing_differs(self, draw):
        random = np.random.default_rng(1)
        arms = random.normal(size=(4000, 8, 2))
        if draw == "skewed by seed":  # what both arms of a seed share cancels
            arms = arms + random.exponential(5, (4000, 8, 1))
        if draw == "heavy tails":
            arms = random.standard_t(2, (4000, 8, 2))
        p_values = sign_flip_p(arms[..., 1] - arms[..., 0])
        # with 8 seeds p-values are multiples of 1/128: the largest up to .05 is 6/128
        expected, error = 6 / 128, math.sqrt(6 / 128 * (122 / 128) / 4000)
        assert abs(float((p_values <= 0.05).mean()) - expected) < 4 * error


class TestHolm:
    @pytest.mark.parametrize(
        ("raw", "adjusted"),
        [
            # Holm (1979) by hand: .01 * 4, .015 * 3 -> .045, .03 * 2 -> .06, .04 -> .06
            ([0.04, 0.01, 0.03, 0.015], [0.06, 0.04, 0.06, 0.045]),
            ([], []),
            ([0.02], [0.02]),
            ([0.9, 0.8], [1.0, 1.0]),
        ],
    )
    def test_examples(self, raw, adjusted):
        assert holm(raw) == pytest.approx(adjusted)

    def test_rejects_what_the_step_down_procedure_rejects(self):
        random = np.random.default_rng(0)
        for p_values in random.random((200, 5)) ** 3:
            adjusted = holm(p_values)
            for alpha in (0.01, 0.05, 0.2):
                rejected = set()
                for step, index in enumerate(np.argsort(p_values)):
                    if p_values[index] > alpha / (5 - step):
                        break
                    rejected.add(int(index))
                assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected


class TestEffectSize:
    def test_is_unbiased(self):
        samples = np.random.default_rng(0).normal(0.8, 1, (5000, 5))
        found = np.array([hedges_gz(sample) for sample in samples])
        assert found.mean() == pytest.approx(0.8, abs=5 * found.std() / math.sqrt(len(found)))

    @pytest.mark.parametrize("values", [[0.1], [0.1, 0.2], [0.1, 0.1, 0.1]])
    def test_is_not_given_where_it_means_nothing(self, values):
        assert hedges_gz(values) is None


class TestPower:
    def test_is_the_integral_over_the_standard_deviation(self):
        effect, n = 0.7, 9
        critical = stats.t.ppf(0.975, n - 1)

        def given(sd):  # the mean is normal, the sample's sd chi: brute force for the noncentral t
            z = critical * sd
            tails = stats.norm.sf(z - effect * math.sqrt(n)) + stats.norm.cdf(-z - effect * math.sqrt(n))
            return tails * stats.chi.pdf(sd * math.sqrt(n - 1), n - 1) * math.sqrt(n - 1)

        assert paired_power(effect, n) == pytest.approx(integrate.quad(given, 0, 6)[0], abs=1e-6)

    # two-sided paired t-test, level .05, power .8: as G*Power gives them
    @pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
    def test_seeds_needed_for_known_effects(self, effect, n):
        assert seeds_needed(effect, 1.0) == n
        assert seeds_needed(-effect / 100, 0.01) == n
        assert paired_power(effect, n) >= 0.8 > paired_power(effect, n - 1)

    def test_edges(self):
        assert seeds_needed(0.0, 0.01) is None
        assert seeds_needed(0.01, 0.0) == 2
        assert seeds_needed(1.0, 1e-3) == 2
        assert seeds_needed(1e-6, 1.0) is None
        assert paired_power(100.0, 5) == pytest.approx(1.0)
        assert paired_power(0.0, 5) == pytest.approx(0.05)

    def test_interval_of_a_standard_deviation_covers_it(self):
        samples = np.random.default_rng(0).normal(0, 2.0, (4000, 5))
        low, high = sd_interval(samples.std(axis=1, ddof=1), 5)
        assert ((low < 2) & (high > 2)).mean() == pytest.approx(0.95, abs=0.015)
