"""AlexNet (Krizhevsky et al. 2012) for small images, as gradient matching transfers to it (Zhao et al., arXiv 2006.05929)."""

from __future__ import annotations

from torch import nn

from metadist.nets.sizes import at_least


def alexnet(channels: int, size: int, classes: int) -> nn.Module:
    """Conv 128@5x5, pool, conv 192@5x5, pool, convs 256, 192, 192@3x3, pool, linear; ReLU, max-pool 2: -> [B, classes].

    One-channel 28-pixel images are padded by 4 in the first convolution (28 -> 32), others by 2.
    Raises UserError below 8 x 8 pixels, where the third pooling leaves nothing.
    """
    at_least("alexnet", size, 8)
    wide = channels == 1 and size == 28
    side = (32 if wide else size) // 8
    return nn.Sequential(
        nn.Conv2d(channels, 128, 5, padding=4 if wide else 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(128, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(192, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 192, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(192, 192, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(192 * side * side, classes),
    )
