"""A network's weights after every epoch, in half the bytes of float32.

Design choices
- Snapshot 0 is float32, each later one a float16 difference. A difference is taken from the DECODED snapshot before it, so that
  what one rounding lost the next difference brings back: errors don't add up.
- A power of two for each row puts its largest entry just below 2^15; what float16 would then hold as a subnormal is below 2^-29
  of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_TOP = 15  # the largest entry of a scaled row lies below 2^15; float16 ends just below 2^16
_LEAST = -100  # of an exponent: 2^100 is a float32, too


class Trajectory:
    """One expert as it is trained: its snapshots, coded.

    theta0: weights [P] before the first epoch.
    Attributes: ``decoded`` [P], what the newest snapshot reads as; ``error``, the largest relative error of the difference
    between two neighbouring snapshots so far.
    """

    def __init__(self, theta0: Tensor) -> None:
        """Snapshot 0."""
        self.first = theta0.detach().to("cpu", torch.float32, copy=True)
        self.decoded, self.before = self.first.clone(), self.first.clone()
        self.codes: list[Tensor] = []
        self.exponents: list[int] = []
        self.error = 0.0

    def add(self, theta: Tensor) -> None:
        """The snapshot after one more epoch: weights [P], finite."""
        theta = theta.detach().to("cpu", torch.float32, copy=True)
        difference = theta - self.decoded
        exponent = max(math.frexp(float(difference.abs().max()))[1] - _TOP, _LEAST)
        code = (difference * 2.0**-exponent).to(torch.float16)
        earlier = self.decoded.clone()
        self.decoded.add_(code.float(), alpha=2.0**exponent)
        moved = theta - self.before
        lost = (self.decoded - earlier - moved).norm() / moved.norm().clamp(min=torch.finfo(torch.float32).tiny)
        self.error, self.before = max(self.error, float(lost)), theta
        self.codes.append(code)
        self.exponents.append(exponent)

    def tensors(self) -> dict[str, Tensor]:
        """What an expert's file holds: first [P] float32, codes [E, P] float16, exponents [E] int16."""
        codes = torch.stack(self.codes) if self.codes else torch.zeros(0, len(self.first), dtype=torch.float16)
        return {"first": self.first, "codes": codes, "exponents": torch.tensor(self.exponents, dtype=torch.int16)}

    def rest(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides ``tensors``."""
        return {"decoded": self.decoded, "before": self.before, "error": torch.tensor(self.error, dtype=torch.float64)}

    @classmethod
    def of(cls, saved: Mapping[str, Tensor]) -> Trajectory:
        """From ``tensors`` and ``rest``, to go on."""
        out = cls(saved["first"])
        out.codes, out.exponents = list(saved["codes"].unbind(0)), saved["exponents"].tolist()
        out.decoded, out.before, out.error = saved["decoded"], saved["before"], float(saved["error"])
        return out
