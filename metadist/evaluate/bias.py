"""Raising the bias of classes that a student never saw (arXiv 1503.02531, where 3s were left out of the transfer set).

Two ways to choose it, which must not be mixed up
- ``by_prior``: until the class is predicted as often as it is known to occur, on images without labels. Honest.
- ``by_labels``: where errors are fewest on labelled images of all classes, which is what the paper did with its test set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ROUNDS = 20  # over the classes, where several are missing: each moves the others a little


def _margins(logits: Tensor, c: int) -> Tensor:
    """What class c is short of being predicted: [n]."""
    others = logits.clone()
    others[:, c] = -torch.inf
    return others.max(1).values - logits[:, c]


def _each(logits: Tensor, missing: Sequence[int], choose: Callable[[Tensor, int], float]) -> Tensor:
    """Biases [K], zero but for the missing classes; choose: (logits with the biases so far, class) -> what to add."""
    bias = torch.zeros_like(logits[0])
    for _ in range(_ROUNDS if len(missing) > 1 else 1):
        before = bias.clone()
        for c in missing:
            bias[c] += choose(logits + bias, c)
        if torch.equal(bias, before):
            break
    return bias


def by_prior(logits: Tensor, missing: Sequence[int], prior: Tensor) -> Tensor:
    """Biases [K] at which each missing class is predicted for round(prior * n) of the images.

    logits: [n, K] of images of all classes. prior: [K], how often each class occurs.
    """

    def choose(z: Tensor, c: int) -> float:
        ranked = _margins(z, c).sort().values
        count = min(max(round(float(prior[c]) * len(z)), 1), len(z) - 1)
        return float((ranked[count - 1] + ranked[count]) / 2)

    return _each(logits.double(), missing, choose).to(logits.dtype)


def by_labels(logits: Tensor, missing: Sequence[int], y: Tensor) -> Tensor:
    """Biases [K] at which the fewest of these images [n, K] are misread; y: their labels [n]."""

    def choose(z: Tensor, c: int) -> float:
        margins = _margins(z, c)
        right = (z.where(torch.arange(z.shape[1], device=z.device) != c, -torch.inf).argmax(1) == y).long()
        order = margins.argsort()
        # Raised past its margin, an image is read as c: right if it is one, and no longer right as what it was.
        gain = ((y == c).long() - right)[order].cumsum(0)
        best = int(gain.argmax())
        ranked = margins[order]
        above = ranked[best + 1] if best + 1 < len(ranked) else ranked[best] + 1
        return float((ranked[best] + above) / 2) if int(gain[best]) > 0 else float(ranked[0] - 1)

    return _each(logits.double(), missing, choose).to(logits.dtype)
