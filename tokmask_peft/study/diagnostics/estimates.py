"""Unbiased estimates from inner products of gradients: variances, agreement, and how far masking shifts the mean.

Let u_b be the unmasked gradient of batch b and g_bd the gradient of the same batch under mask draw d. Everything here
needs inner products of the w_bd = g_bd - u_b and the u_b only. Squared lengths of a mean over draws contain the noise
of the draws; therefore they are U-statistics, means over pairs of *different* draws, whose expectation is right for any
number of draws (Hoeffding 1948). For the same reason products between batches leave out a batch's product with itself.

Intervals draw batches, the independent units (draws are nested in them), with U-statistics weighted by how often each
batch was drawn. With few batches percentile intervals are too short; their level is widened as by Student's t
(the expanded percentile interval of Hesterberg 2015, arXiv:1411.5279, section 5.3).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tokmask_peft.study.statistics import MEANINGS
from tokmask_peft.training.metrics import LEVEL

Array = NDArray[np.float64]
REPLICATES = 4000
MEANING: dict[str, str] = MEANINGS["gradients"]  # estimate -> what it is


@dataclass(frozen=True, slots=True)
class Grams:
    """Inner products of gradients at one masking rate.

    `within`, `[batches, draws + 1, draws + 1]`, are those of w_b1, …, w_bD and u_b of each batch; `between`,
    `[2 batches, 2 batches]`, those of the means of the w over draws, for each batch, and then of the u.
    """

    within: Array
    between: Array


def estimate(grams: Grams, weights: Array) -> dict[str, Array]:
    """Return every quantity of `MEANING`, `[replicates]`, by weights of batches, `[replicates, batches]`."""
    mean = {name: weights @ values / weights.sum(1) for name, values in of_batches(grams).items()}
    count, draws = len(grams.within), grams.within.shape[1] - 1
    (mean_w, cross), (_, unmasked) = grams.between.reshape(2, count, 2, count).swapaxes(1, 2)
    masked = mean_w + cross + cross.T + unmasked
    spread = _variance(unmasked, weights)
    shift_squared = _over(mean["shift_squared"], mean["squared"])
    found = {
        **mean,
        "batch_variance": spread,
        "batch_variance_masked": _variance(masked, weights) - mean["mask_variance"] / draws,
        "ratio": _over(mean["mask_variance"], spread),
        "cosine": _cosine(mean["product"], mean["masked_squared"], mean["squared"]),
        "distance": np.sqrt(np.maximum(shift_squared, 0.0)),
        "distance_squared": shift_squared,
        "shared_cosine": _cosine(_pairs(cross + unmasked, weights), _pairs(masked, weights), _pairs(unmasked, weights)),
        "shared_distance_squared": _over(_pairs(mean_w, weights), _pairs(unmasked, weights)),
    }
    return {name: found[name] for name in MEANING}


def of_batches(grams: Grams) -> dict[str, Array]:
    """Return the unbiased estimates of each batch on its own, `[batches]` each.

    `shift_squared` is the squared length of mean masked minus unmasked gradient, `masked_squared` and `squared` are
    those of the two, `product` is their inner product.
    """
    w, to_u, squared = grams.within[:, :-1, :-1], grams.within[:, :-1, -1], grams.within[:, -1, -1]
    own, draws = np.einsum("bdd->b", w), w.shape[1]
    pairs = draws * (draws - 1)
    shift_squared = (w.sum((1, 2)) - own) / pairs
    along = to_u.mean(1)
    g = w + to_u[:, :, None] + to_u[:, None, :] + squared[:, None, None]
    lengths = np.sqrt(np.maximum(np.einsum("bdd->bd", g), 0.0))
    cosines = _over(g, lengths[:, :, None] * lengths[:, None, :])
    mean_squared = w.mean((1, 2)) + 2 * along + squared
    return {
        "mask_variance": own / draws - shift_squared,
        "shift_squared": shift_squared,
        "masked_squared": shift_squared + 2 * along + squared,
        "squared": squared,
        "product": along + squared,
        "agreement": (cosines.sum((1, 2)) - np.einsum("bdd->b", cosines)) / pairs,
        "naive_cosine": _cosine(along + squared, mean_squared, squared),
        "naive_distance": np.sqrt(_over(np.maximum(w.mean((1, 2)), 0.0), squared)),
    }


def summarise(grams: Mapping[float, Grams], replicates: int = REPLICATES, seed: int = 0) -> dict[str, Any]:
    """Return estimates by rate, with intervals from the same draws, and where masking outweighs batches; JSON-able."""
    count = len(next(iter(grams.values())).within)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), replicates).astype(np.float64)
    rows, ratios = [], []
    for rate, one in sorted(grams.items()):
        point, drawn = estimate(one, np.ones((1, count))), estimate(one, weights)
        ratios.append(np.concatenate([point["ratio"], drawn["ratio"]]))
        values = {name: {"value": number(point[name][0]), "interval": interval(drawn[name], count)} for name in MEANING}
        by_batch = {name: [number(value) for value in values] for name, values in of_batches(one).items()}
        rows.append({"p": rate, **values, "by_batch": by_batch})
    crossings = crossing(sorted(grams), np.stack(ratios, axis=1))
    return {"rates": rows, "outweighs_at": {"value": number(crossings[0]), "interval": interval(crossings[1:], count)}}


def crossing(rates: Sequence[float], ratios: Array) -> Array:
    """Return where ratios, `[replicates, rates]`, reach 1, on straight lines from (0, 0), `[replicates]`, or inf."""
    x, y = np.array([0.0, *rates]), np.pad(ratios, ((0, 0), (1, 0)))
    at, rows = (y >= 1.0).argmax(1), np.arange(len(y))
    below, above = y[rows, at - 1], y[rows, at]
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = x[at - 1] + (1.0 - below) / (above - below) * (x[at] - x[at - 1])
    return np.where(at > 0, found, np.inf)


def interval(replicates: Array, units: int) -> list[float | None] | None:
    """Return the expanded percentile interval of replicates; None if a tenth are undefined, and for infinite bounds."""
    usable = replicates[~np.isnan(replicates)]
    if len(usable) <= 0.9 * len(replicates):
        return None
    reach = math.sqrt(units / (units - 1)) * float(stats.t.ppf((1 + LEVEL) / 2, units - 1))
    tail = float(stats.norm.cdf(-reach))
    # an order statistic, because between a number and infinity there is nothing to interpolate
    low, high = np.quantile(usable, [tail, 1 - tail], method="closest_observation")
    return [number(low), number(high)]


def number(value: float) -> float | None:
    """Return a finite number, otherwise none, for JSON."""
    return float(value) if math.isfinite(value) else None


def _pairs(products: Array, weights: Array) -> Array:
    """Return the weighted mean over pairs of different batches."""
    others = 1.0 - np.eye(len(products))
    total = ((weights @ (products * others)) * weights).sum(1)
    return _over(total, ((weights @ others) * weights).sum(1))


def _variance(products: Array, weights: Array) -> Array:
    """Return the trace of the covariance of vectors from their inner products: half the mean squared distance."""
    own = np.diagonal(products)
    return _pairs((own[:, None] + own - products - products.T) / 2.0, weights)


def _cosine(product: Array, one: Array, other: Array) -> Array:
    """Return a cosine from an inner product and squared lengths; nan if a length is not above 0."""
    return _over(product, np.sqrt(np.where((one > 0) & (other > 0), one * other, np.nan)))


def _over(part: Array, whole: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(whole > 0, part / whole, np.nan)
    return found
