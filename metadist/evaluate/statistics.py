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
        from scipy.special import stdtrit  # Student's t quantile; scipy.stats takes half a second to import

        sd = float(v.std(correction=1))
        return Summary(float(v.mean()), sd, n, float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """In percent: `79.50 +- 8.08 (n=200, mean known to 1.13)`."""
        known = "" if self.ci95 is None else f", 95% interval of the mean +-{100 * self.ci95:.2f}"
        return f"{100 * self.mean:.2f} +- {100 * self.sd:.2f} (n={self.n}{known})"
