"""What a proxy's pick costs, and from how many candidates on making a distilled set pays.

Design choices
- Regret at budget B: B of the n candidates are drawn at random, the one that the proxy likes best is taken; regret is the best
  truth among the B less the truth of the pick, in points of accuracy. Its mean over all C(n, B) draws is exact, not sampled:
  all of the draw are among the m worst with probability C(m, B) / C(n, B).
- Among equals by the proxy each is as likely to be taken: they count with their mean truth. The proxy that gives all candidates
  one score is thus a blind guess, and its regret is what a search gains at most.
- The pay-off compares one search of n candidates with training all of them once in full:
  set + n * proxy + best * full < n * full. Where the proxy costs as much as full training there is no such n.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BUDGETS = (10, 20, 50, 100)


def taken(scores: ArrayLike, truth: ArrayLike, budget: int) -> float:
    """Mean truth of the best by ``scores`` among ``budget`` candidates drawn at random, without replacement.

    scores, truth: [n] of the same candidates, without nan; 1 <= budget <= n (ValueError otherwise).
    """
    values, group = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
    n = len(group)
    if not 1 <= budget <= n:
        raise ValueError(f"a budget of {budget} among {n} candidates")
    counts = np.bincount(group, minlength=len(values))
    means = np.bincount(group, weights=np.asarray(truth, dtype=np.float64), minlength=len(values)) / counts
    ways = [math.comb(int(m), budget) for m in (0, *np.cumsum(counts))]
    chance = [(upto - below) / ways[-1] for below, upto in itertools.pairwise(ways)]
    return math.fsum(p * m for p, m in zip(chance, means, strict=True) if p)


def regret(scores: ArrayLike, truth: ArrayLike, budget: int) -> float:
    """Points by which the pick among ``budget`` random candidates is worse than the best of them; arguments as of ``taken``."""
    return max(0.0, 100 * (taken(truth, truth, budget) - taken(scores, truth, budget)))


def budgets(n: int) -> tuple[int, ...]:
    """Those of ``BUDGETS`` that n candidates allow, and n itself: the pick among all."""
    return tuple(sorted({b for b in (*BUDGETS, n) if 1 <= b <= n}))


def regrets(scores: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    """Regret in points by budget."""
    return {str(b): regret(scores, truth, b) for b in budgets(len(truth))}


@dataclass(frozen=True)
class Payoff:
    """What the distilled set costs and saves, in seconds."""

    set_seconds: float | None  # None: not known
    where: str | None  # where they were measured, in words
    proxy_seconds: float | None  # a candidate by the proxy, all its seeds
    full_seconds: float | None  # a candidate trained once in full; None: not measured
    best: int  # so many are trained in full after the proxy
    ratio: float | None  # set / (full - proxy): the candidates that pay for the set alone
    candidates: int | None  # the fewest for which set + n * proxy + best * full < n * full
    reason: str | None  # why there is no such number

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def payoff(set_seconds: float | None, where: str | None, proxy: float | None, full: float | None, best: int) -> Payoff:
    """From how many candidates on the search with the set is cheaper than training every candidate once in full.

    set_seconds: making the set; None if it is not known.
    proxy, full: seconds a candidate; None if not measured.
    best: candidates trained in full after the proxy.
    """

    def answer(ratio: float | None, candidates: int | None, reason: str | None) -> Payoff:
        return Payoff(set_seconds, where, proxy, full, best, ratio, candidates, reason)

    if set_seconds is None:
        return answer(None, None, "what the distilled set cost is not known")
    if not proxy or not full:
        return answer(None, None, f"the seconds of {'full training' if proxy else 'the proxy'} were not measured")
    if full <= proxy:
        return answer(None, None, "a candidate costs no less by the proxy than by full training")
    ratio = set_seconds / (full - proxy)
    needed = math.floor((set_seconds + best * full) / (full - proxy)) + 1
    return answer(ratio, needed, None)
