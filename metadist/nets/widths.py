"""Learners of randomly drawn width, as Generative Teaching Networks (arXiv 1912.07768) may be trained for, in one flat vector.

Design choices
- All learners are the widest one; a drawn width silences the other channels: no weight leads out of them, and with a
  normalized weight their gain is zero. Then no gradient arrives in them or behind them, and training keeps them silent: what is
  computed is exactly the narrow net. It holds where a silent channel stays zero (net=gtn: LeakyReLU, mean-only normalization).
- What is left is scaled to the fan-in that it really has, so that p(theta0) is the narrow net's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metadist import draw
from metadist.nets.learner import Learner
from metadist.nets.weight_norm import norms


def widths(keys: Tensor, full: int) -> Tensor:
    """Drawn channels of a convolution of ``full`` channels, uniform on full/4 ... full - 1: int64 [G]. keys: [G, 2]."""
    return full // 4 + draw.integers(keys, (), full - full // 4)


def narrowed(learner: Learner, theta: Tensor, keys: Tensor) -> Tensor:
    """Weights theta [G, P] of the widest net as those of nets whose convolutions have drawn widths; keys: [G, 2]."""
    count = len(theta)
    shapes = dict(zip(learner.names, learner.shapes, strict=True))
    parts = dict(zip(shapes, torch.split(theta, [s.numel() for s in learner.shapes], 1), strict=True))
    before: tuple[Tensor, int] | None = None  # widths drawn for the layer before, and its full one
    for i, name in enumerate(n for n, s in shapes.items() if n.endswith("weight") and len(s) > 1):
        weight, rest = parts[name].view(count, *shapes[name]), (1,) * (len(shapes[name]) - 2)
        if before is not None:
            drawn, full = before
            inputs = torch.arange(weight.shape[2], device=theta.device) // (weight.shape[2] // full)
            kept = (inputs < drawn[:, None]).to(theta.dtype) * (full / drawn[:, None]).sqrt()
            weight = weight * kept.view(count, 1, -1, *rest)
        speaks = weight.new_ones(count, weight.shape[1])
        before = None
        if weight.dim() == 5:
            before = widths(draw.split(keys, i), weight.shape[1]), weight.shape[1]
            speaks = (torch.arange(weight.shape[1], device=theta.device) < before[0][:, None]).to(theta.dtype)
        gain = name.removesuffix("weight") + "gain"
        if gain in parts:
            parts[gain] = norms(weight) * speaks
        else:
            weight = weight * speaks.view(count, -1, 1, *rest)
        parts[name] = weight.flatten(1)
    return torch.cat(list(parts.values()), 1)
