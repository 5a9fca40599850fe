"""ConvNet, the learner of gradient and trajectory matching (Zhao et al. 2020, arXiv 2006.05929; Gidaris and Komodakis 2018)."""

from __future__ import annotations

from torch import nn

from metadist.errors import UserError, unknown
from metadist.nets.sizes import at_least

NORMS = ("none", "batch", "layer", "instance", "group")
ACTIVATIONS = ("sigmoid", "relu", "leaky")
POOLINGS = ("none", "max", "avg")
GROUPS = 4


def activation(name: str) -> nn.Module:
    """A layer by name: sigmoid, relu or leaky (slope .01). Raises UserError for any other."""
    if name not in ACTIVATIONS:
        raise unknown("net.activation", name, ACTIVATIONS)
    return {"sigmoid": nn.Sigmoid(), "relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.01)}[name]


def normalization(name: str, width: int, size: int) -> list[nn.Module]:
    """The layer of that name for maps [B, width, size, size], or none. Raises UserError for a name or a size it can't take."""
    if name not in NORMS:
        raise unknown("net.norm", name, NORMS)
    if name == "group" and width % GROUPS:
        raise UserError(f"net.width={width} can't be split into {GROUPS} groups: net.norm=group needs a multiple of {GROUPS}")
    if name == "instance" and size < 2:
        raise UserError(
            "net.norm=instance on maps of one pixel gives zeros: take fewer layers (net.depth) or larger images (data.size)"
        )
    if name == "batch":
        return [nn.BatchNorm2d(width)]
    if name == "layer":
        return [nn.LayerNorm([width, size, size])]
    groups = {"none": 0, "instance": width, "group": GROUPS}[name]
    return [nn.GroupNorm(groups, width)] if groups else []


def convnet(
    channels: int,
    size: int,
    classes: int,
    width: int = 128,
    depth: int = 3,
    norm: str = "instance",
    act: str = "relu",
    pooling: str = "avg",
) -> nn.Module:
    """``depth`` x [conv 3x3 pad 1, normalization, activation, pooling 2], then linear: [B, C, H, W] -> [B, classes].

    norm: none | batch | layer | instance (GroupNorm(C, C)) | group (4 groups), all affine; pooling: none | max | avg.
    One-channel 28-pixel images are padded by 3 in the first convolution (28 -> 32), as published.
    Raises UserError for an unknown option or images smaller than 2^depth pixels (with pooling).
    """
    if pooling not in POOLINGS:
        raise unknown("net.pooling", pooling, POOLINGS)
    at_least("convnet", size, 1 if pooling == "none" else 2**depth)
    layers: list[nn.Module] = []
    for i in range(depth):
        wide = i == 0 and channels == 1 and size == 28
        layers.append(nn.Conv2d(channels, width, 3, padding=3 if wide else 1))
        size, channels = size + 4 * wide, width
        layers += [*normalization(norm, width, size), activation(act)]
        if pooling != "none":
            layers.append(nn.MaxPool2d(2) if pooling == "max" else nn.AvgPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size * size, classes))
