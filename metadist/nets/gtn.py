"""The learner of Generative Teaching Networks (Such et al. 2019, arXiv 1912.07768)."""

from __future__ import annotations

from torch import nn

from metadist.errors import UserError
from metadist.nets.layers import MeanOnlyBatchNorm
from metadist.nets.sizes import at_least

SLOPE = 0.1
# depth: output channels in widths, and after which convolutions there is a pooling
PLANS: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {2: ((1, 2), (0, 1)), 5: ((1, 2, 2, 4, 4), (0, 2, 4))}


def gtn(channels: int, size: int, classes: int, width: int = 64, depth: int = 2, widest: bool = False) -> nn.Module:
    """[conv 3x3, (max-pool 3/2), mean-only batch normalization, LeakyReLU .1] x depth, fc 4 width, fc: [B, C, H, W] -> [B, K].

    depth 2: 64-128 channels at width 64, as for MNIST; 5: 64-128-128-256-256, as for CIFAR-10, pooled after 1, 3 and 5.
    widest: convolutions of twice the width, the last layers as they are: what ``widths.narrowed`` draws learners from.
    Raises UserError for another depth or images below 4 x 4 pixels.
    """
    if depth not in PLANS:
        raise UserError(f"net.depth={depth} is not possible for net.name=gtn; allowed: {', '.join(map(str, PLANS))}")
    at_least("gtn", size, 4)
    widths, pooled = PLANS[depth]
    layers: list[nn.Module] = []
    for i, times in enumerate(widths):
        wide = times * width * (2 if widest else 1)
        layers.append(nn.Conv2d(channels, wide, 3, padding=1, bias=False))
        channels = wide
        if i in pooled:
            layers.append(nn.MaxPool2d(3, 2, padding=1))
            size = -(-size // 2)
        layers += [MeanOnlyBatchNorm(channels), nn.LeakyReLU(SLOPE)]
    hidden = 4 * width
    layers += [nn.Flatten(), nn.Linear(channels * size * size, hidden), MeanOnlyBatchNorm(hidden), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))
