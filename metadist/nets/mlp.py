"""A multi-layer perceptron on flattened images."""

from __future__ import annotations

from torch import nn

from metadist.nets.convnet import activation
from metadist.nets.dropout import Dropout


def mlp(
    channels: int,
    size: int,
    classes: int,
    width: int = 256,
    depth: int = 2,
    act: str = "relu",
    dropout: float = 0.0,
    input_dropout: float = 0.0,
) -> nn.Module:
    """``depth`` hidden layers of ``width`` units, then a linear layer: [B, C, H, W] -> [B, classes].

    dropout, input_dropout: probabilities for hidden units and for pixels (see ``Dropout``).
    """
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = channels * size * size
    layers += [Dropout(inputs, input_dropout)] if input_dropout else []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), activation(act)]
        layers += [Dropout(width, dropout)] if dropout else []
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))
