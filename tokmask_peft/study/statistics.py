"""Statistics of a sweep: intervals over seeds, paired tests, effect sizes and power."""

import bisect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import optimize, special, stats

from tokmask_peft.training.metrics import LEVEL

MEANINGS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("meanings.yaml").read_text(encoding="utf-8"))
"""What figures mean, by report; and `paper`: by task, the scores that the authors report."""
EXACT_UP_TO = 16  # seeds up to which all sign patterns are counted; for more, 99,999 random ones stand for them
_MOST_SEEDS = 2**20


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation (n - 1) and 95% interval (Student's t), the latter two none for one value."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return {"n": n, "mean": mean, "sd": None, "interval": None}
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
    return {"n": n, "mean": mean, "sd": sd, "interval": [mean - half, mean + half]}


def sign_flip_p(differences: Any, axis: int = -1) -> NDArray[np.float64]:
    """Return the two-sided p-value of the sign-flip test of a mean of 0 (Fisher 1935), exact up to 16 seeds.

    It assumes no distribution: if the arms do not differ, each seed's difference is as likely as its negative.
    `differences` has one per seed along `axis`.
    """
    sample = np.asarray(differences, dtype=np.float64)
    if sample.shape[axis] < 2:  # either sign is equally likely, and SciPy needs two
        return np.ones(np.delete(sample.shape, axis))
    resamples = np.inf if sample.shape[axis] <= EXACT_UP_TO else 99_999
    how = {"permutation_type": "samples", "n_resamples": resamples, "vectorized": True, "axis": axis, "batch": 2**12}
    return np.asarray(stats.permutation_test((sample,), np.mean, **how, rng=np.random.default_rng(0)).pvalue)


def smallest_p(seeds: int) -> float:
    """Return the smallest two-sided p-value that the sign-flip test can reach: 2 of the 2^n sign patterns."""
    return min(1.0, 2.0 ** (1 - seeds))


def seeds_to_reach(alpha: float) -> int:
    """Return the least number of seeds with which the sign-flip test can fall to `alpha`."""
    return math.ceil(1 - math.log2(alpha))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for all of them by Holm's step-down method (1979), in the given order."""
    raw = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(raw, kind="stable")
    stepped = np.maximum.accumulate(raw[order] * (len(raw) - np.arange(len(raw))))
    return [float(value) for value in np.minimum(stepped, 1.0)[np.argsort(order)]]


def hedges_gz(differences: Sequence[float]) -> float | None:
    """Return Cohen's d_z (mean over standard deviation of the differences) with Hedges' exact correction for few pairs.

    The correction is J(m) = Γ(m / 2) / (sqrt(m / 2) Γ((m - 1) / 2)) with m = n - 1 (Hedges 1981). None for fewer than
    three pairs, for which J is 0 or undefined, and if the differences do not vary.
    """
    sample = np.asarray(differences, dtype=np.float64)
    m = len(sample) - 1
    if m < 2 or float(sample.std()) <= 1e-12 * max(1.0, float(np.abs(sample).max())):
        return None
    correction = math.exp(special.gammaln(m / 2) - special.gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    return float(sample.mean() / sample.std(ddof=1)) * correction


def paired_power(effect: float, seeds: int, alpha: float = 0.05) -> float:
    """Return the exact power of the two-sided paired t-test (noncentral t), of an `effect` in standard deviations."""
    freedom, shift = seeds - 1, abs(effect) * math.sqrt(seeds)
    critical = stats.t.ppf(1 - alpha / 2, freedom)
    lower = stats.nct.cdf(-critical, freedom, shift)  # lost in rounding for a large shift, where it is 0
    return float(stats.nct.sf(critical, freedom, shift) + (lower if np.isfinite(lower) else 0.0))


def seeds_needed(gain: float, sd: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Return the least number of seeds with which a paired t-test detects a `gain`, of an `sd` over seeds, or None."""
    if gain == 0 or sd < 0 or not math.isfinite(sd):
        return None
    if sd == 0:
        return 2
    counts = range(2, _MOST_SEEDS + 1)
    place = bisect.bisect_left(counts, power, key=lambda seeds: paired_power(abs(gain) / sd, seeds, alpha))
    return counts[place] if place < len(counts) else None


def smallest_gain(sd: float, seeds: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the mean difference that a paired t-test detects with `power`: the inverse of `seeds_needed`."""
    return sd * float(optimize.brentq(lambda effect: paired_power(effect, seeds, alpha) - power, 1e-6, 1e3))


def sd_interval(sd: float, n: int) -> tuple[float, float]:
    """Return the 95% interval of a standard deviation that was estimated from `n` normal values (chi-square)."""
    low, high = stats.chi2.ppf([(1 + LEVEL) / 2, (1 - LEVEL) / 2], n - 1)
    return sd * math.sqrt((n - 1) / low), sd * math.sqrt((n - 1) / high)
