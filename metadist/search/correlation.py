"""How well one order of candidates agrees with another: Spearman's rho and Kendall's tau-b, with bootstrap intervals.

Design choices
- Both statistics are written for a bootstrap: a resample of n candidates is a row of whole weights (how often each was drawn),
  so that thousands of resamples are a few matrix operations; a row of ones is the sample itself. scipy's, which take one
  sample at a time, are the yardstick of the tests.
- Rho is Pearson's correlation of mean ranks; a rank is the weight below plus half the weight of the ties. Tau-b counts pairs:
  (concordant - discordant) / sqrt(pairs untied in x * pairs untied in y). Ranks and counts are whole numbers and halves, exact
  in floating point: an order without any difference is noticed as exactly zero and gives nan, never an error.
- Intervals are percentile bootstrap over candidates, 95 %: they say how far the figure depends on which candidates were drawn
  (the noise of training is in the scores). Resamples in which a statistic is undefined are left out; under three candidates
  there is no interval.
- Resamples are drawn by the counter-based generator: the same table has the same interval everywhere, and two proxies are
  compared on the same resamples, which makes the interval of their difference a paired one.
- Only order counts, so -inf is a score like another: the last. nan has no place in an order: the statistic is nan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from metadist import draw

Values = NDArray[np.float64]
Weights = NDArray[np.int64]
Statistic = Callable[[Values, Values, Weights], Values]

MOST, LEAST = 4000, 500  # bootstrap samples of up to 1000 candidates, and of many more, where intervals are narrow
_TAIL = 0.025
_BLOCK = 512  # candidates whose pairs with all others are held at once


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; nan where it is undefined."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, nan as None."""
        return {k: None if math.isnan(v) else v for k, v in asdict(self).items()}


@functools.lru_cache(maxsize=8)
def resamples(n: int, count: int, seed: int = 0) -> Weights:
    """How often each of n candidates occurs in each of ``count`` bootstrap samples: int64 [count, n], read-only."""
    keys = draw.key(seed, "bootstrap", torch.arange(count))
    drawn = draw.integers(keys, (n,), n).numpy() + n * np.arange(count)[:, None]
    weights: Weights = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
    weights.flags.writeable = False
    return weights


def spearman(x: Values, y: Values, weights: Weights) -> Values:
    """Spearman's rho of each weighted sample.

    x, y: scores of the same candidates, float64 [n].
    weights: how often each occurs in each sample, int64 [B, n].
    Returns float64 [B]; nan where x or y is the same for all candidates of the sample.
    """
    a, b = _ranks(x, weights)[0], _ranks(y, weights)[0]
    wa = weights * a
    return _ratio((wa * b).sum(1), (wa * a).sum(1), (weights * b * b).sum(1))


def kendall(x: Values, y: Values, weights: Weights) -> Values:
    """Kendall's tau-b of each weighted sample; arguments and result as of ``spearman``."""
    pairs = weights.sum(1, dtype=np.float64) ** 2
    untied = [pairs - np.square(_ranks(v, weights)[1]).sum(1) for v in (x, y)]
    i, j = (np.unique(v, return_inverse=True)[1].astype(np.int32) for v in (x, y))
    single = weights.astype(np.float32)  # products are whole numbers below 2**24: exact
    score = np.zeros(len(weights))
    for start in range(0, len(x), _BLOCK):
        here = slice(start, start + _BLOCK)
        signs = np.sign(i[here, None] - i) * np.sign(j[here, None] - j)
        score += (weights[:, here] * (single @ signs.T.astype(np.float32))).sum(1)
    return _ratio(score, *untied)


def estimate(statistic: Statistic, x: ArrayLike, y: ArrayLike, count: int | None = None, seed: int = 0) -> Estimate:
    """``spearman`` or ``kendall`` of n candidates with its percentile interval over candidates.

    x, y: [n] scores of the same candidates, n >= 0.
    count, seed: of the bootstrap samples; None: 4000, fewer above 1000 candidates.
    """
    return _bootstrap(lambda w: statistic(*_pair(x, y), w), np.asarray(y), (x, y), count, seed)


def difference(first: ArrayLike, second: ArrayLike, y: ArrayLike, count: int | None = None, seed: int = 0) -> Estimate:
    """Spearman of ``first`` with y less that of ``second`` with y: paired, every resample takes both at the same candidates.

    first, second, y: [n] scores of the same candidates.
    """

    def less(weights: Weights) -> Values:
        return spearman(*_pair(first, y), weights) - spearman(*_pair(second, y), weights)

    return _bootstrap(less, np.asarray(y), (first, second, y), count, seed)


def top_half(truth: ArrayLike) -> NDArray[np.int64]:
    """Positions of the better half, ceil(n / 2) of n, best first; of equals those drawn first."""
    order = np.argsort(-np.asarray(truth, dtype=np.float64), kind="stable")
    return order[: (len(order) + 1) // 2]


def _bootstrap(
    statistic: Callable[[Weights], Values], sample: NDArray[Any], given: tuple[ArrayLike, ...], count: int | None, seed: int
) -> Estimate:
    n = len(sample)
    count = max(LEAST, MOST * 1000 // max(1000, n)) if count is None else count
    if n < 2 or any(np.isnan(np.asarray(v, dtype=np.float64)).any() for v in given):
        return Estimate(math.nan, math.nan, math.nan)
    value = float(statistic(np.ones((1, n), dtype=np.int64))[0])
    found = statistic(resamples(n, count, seed)) if n > 2 and not math.isnan(value) else np.empty(0)
    found = found[~np.isnan(found)]
    low, high = np.quantile(found, (_TAIL, 1 - _TAIL)) if len(found) else (math.nan, math.nan)
    return Estimate(value, float(low), float(high))


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[Values, Values]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two rows of scores of the same candidates are compared, not {a.shape} and {b.shape}")
    return a, b


def _ranks(x: Values, weights: Weights) -> tuple[Values, Weights]:
    """Mean ranks less their mean [B, n], and the weight of each distinct value [B, m]."""
    _, inverse, held = np.unique(x, return_inverse=True, return_counts=True)
    counts: Weights = np.add.reduceat(weights[:, np.argsort(inverse, kind="stable")], np.cumsum(held) - held, axis=1)
    ranks = np.cumsum(counts, axis=1) - 0.5 * counts - 0.5 * weights.sum(1, keepdims=True)
    return ranks[:, inverse], counts


def _ratio(score: Values, x: Values, y: Values) -> Values:
    """score / sqrt(x y), nan where x or y is zero."""
    size = np.sqrt(x * y)
    out = np.full(len(score), math.nan)
    np.divide(score, size, out=out, where=size > 0)
    clipped: Values = np.clip(out, -1.0, 1.0)
    return clipped
