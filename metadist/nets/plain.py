"""Plain CNNs of 2, 4, 6, 8, 10 convolutions: teachers, assistants and students of arXiv 1902.03393, one rule for all sizes."""

from __future__ import annotations

from torch import nn

from metadist.errors import UserError
from metadist.nets.sizes import at_least

WIDEST = 8  # times the first width


def plain(channels: int, size: int, classes: int, width: int = 16, depth: int = 4) -> nn.Module:
    """``depth`` convolutions in pairs of one width (3x3 pad 1, BatchNorm, ReLU), max-pool 2 after each pair, then linear.

    width: of the first pair; every pair doubles it, at most to 8 times the first. Maps of one pixel are not pooled any more.
    Returns [B, C, H, W] -> [B, classes]. Raises UserError for an odd depth and for images below 2 x 2.
    """
    if depth % 2:
        raise UserError(
            f"net.depth={depth}: net=plain has its convolutions in pairs; give an even number, such as 2, 4, 6, 8, 10"
        )
    at_least("plain", size, 2)
    layers: list[nn.Module] = []
    for i in range(depth):
        wide = width * min(2 ** (i // 2), WIDEST)
        layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        channels = wide
        if i % 2 and size > 1:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, classes))
