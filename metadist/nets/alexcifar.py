"""AlexCifarNet, the CIFAR-10 learner of Dataset Distillation (Wang et al. 2018, arXiv 1811.10959)."""

from __future__ import annotations

from torch import nn

from metadist.nets.layers import LocalResponseNorm
from metadist.nets.sizes import at_least


def _norm() -> nn.Module:
    return LocalResponseNorm(4, alpha=1e-3 / 9, beta=0.75, k=1.0)


def alexcifar(channels: int, size: int, classes: int) -> nn.Module:
    """Conv 64@5x5, ReLU, max-pool 3/2, LRN, conv 64@5x5, ReLU, LRN, max-pool 3/2, fc 384-192-classes: -> [B, classes].

    Raises UserError below 4 x 4 pixels.
    """
    at_least("alexcifar", size, 4)
    side = ((size + 1) // 2 + 1) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        _norm(),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.ReLU(),
        _norm(),
        nn.MaxPool2d(3, 2, 1),
        nn.Flatten(),
        nn.Linear(64 * side * side, 384),
        nn.ReLU(),
        nn.Linear(384, 192),
        nn.ReLU(),
        nn.Linear(192, classes),
    )
