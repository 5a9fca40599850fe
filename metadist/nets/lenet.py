"""LeNet (LeCun et al. 1998) as Dataset Distillation (Wang et al. 2018, arXiv 1811.10959) uses it on MNIST."""

from __future__ import annotations

from torch import nn

from metadist.nets.sizes import at_least


def lenet(channels: int, size: int, classes: int) -> nn.Module:
    """Conv 6@5x5 pad 2, max-pool 2, conv 16@5x5, max-pool 2, fc 120-84-classes, ReLU: [B, C, H, W] -> [B, classes].

    Raises UserError below 12 x 12 pixels, where the second pooling leaves nothing.
    """
    at_least("lenet", size, 12)
    side = (size // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * side * side, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )
