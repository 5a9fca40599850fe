"""What n accuracies say: mean, standard deviation, and how well the mean is known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """n independent values."""

    mean: float
    sd: float  # of the values, with n - 1 in the denominator; 0 for a single value
    n: int
    ci95: float | None  # half width of Student's 95% interval of the mean; None for a single value

    @staticmethod
    def of(values: Tensor | Sequence[float]) -> Summary:
        """The summary of values [n], n >= 1. ValueError for none."""
        v = torch.as_tensor(values, dtype=torch.float64).flatten()
        n = len(v)
        if n == 0:
            raise ValueError("no values to summarise")
        if n == 1:
            return Summary(float(v[0]), 0.0, 1, None)
        sd = float(v.std(correction=1))
        return Summary(float(v.mean()), sd, n, _quantile(n) * sd / math.sqrt(n))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """In percent: `79.50 +- 8.08 (n=200, mean known to 1.13)`."""
        known = "" if self.ci95 is None else f", 95% interval of the mean +-{100 * self.ci95:.2f}"
        return f"{100 * self.mean:.2f} +- {100 * self.sd:.2f} (n={self.n}{known})"


def recovered(alone: Sequence[float], student: Sequence[float], teacher: Sequence[float]) -> Summary | None:
    """The part of a gap in errors that a student closes, (mean alone - mean student) / (mean alone - mean teacher).

    alone, student: errors [n], the same seeds in the same order. teacher: [m]; a single one is taken as known.
    The interval is the delta method's: `alone` stands above and below the line. None where there is no gap.
    """
    a, s, t = (torch.as_tensor(v, dtype=torch.float64) for v in (alone, student, teacher))
    gap = float(a.mean() - t.mean())
    if gap <= 0:
        return None
    part = float(a.mean() - s.mean()) / gap
    if len(a) == 1:
        return Summary(part, 0.0, 1, None)
    d = a * (1 - part) - s
    variance = float(d.var()) / len(d) + (part**2 * float(t.var()) / len(t) if len(t) > 1 else 0.0)
    return Summary(part, float(d.std()) / gap, len(d), _quantile(len(d)) * math.sqrt(variance) / gap)


def _quantile(n: int) -> float:
    """Student's t of n values, for a 95% interval."""
    from scipy.special import stdtrit  # scipy.stats takes half a second to import

    return float(stdtrit(n - 1, 0.975))
