"""A multi-layer perceptron on flattened images."""

from __future__ import annotations

from torch import nn

from metadist.nets.convnet import activation


def mlp(channels: int, size: int, classes: int, width: int = 256, depth: int = 2, act: str = "relu") -> nn.Module:
    """``depth`` hidden layers of ``width`` units, then a linear layer: [B, C, H, W] -> [B, classes]."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = channels * size * size
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), activation(act)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))
