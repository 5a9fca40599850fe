"""VGG-11 (Simonyan and Zisserman 2014, arXiv 1409.1556) with a normalization, as gradient matching transfers to it."""

from __future__ import annotations

from torch import nn

from metadist.nets.convnet import normalization
from metadist.nets.sizes import at_least

BLOCKS = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # outputs of the convolutions between poolings


def vgg11(channels: int, size: int, classes: int, norm: str = "instance") -> nn.Module:
    """Eight times [conv 3x3 pad 1, normalization, ReLU] with max-pool 2 after five of them, linear: -> [B, classes].

    norm: none | batch | layer | instance (GroupNorm(C, C)) | group (4 groups), all affine.
    One-channel 28-pixel images are padded by 3 in the first convolution (28 -> 32), as published.
    Raises UserError for another norm, and below 32 x 32 pixels (28 in one channel), where the fifth pooling leaves nothing.
    """
    wide = channels == 1 and size == 28
    if not wide:
        at_least("vgg11", size, 32)
    side = 32 if wide else size
    layers: list[nn.Module] = []
    for i, block in enumerate(BLOCKS):
        for width in block:
            layers.append(nn.Conv2d(channels, width, 3, padding=3 if wide and not layers else 1))
            layers += [*normalization(norm, width, side >> i), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    side >>= len(BLOCKS)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, classes))
