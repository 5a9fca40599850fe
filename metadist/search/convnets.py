"""720 ConvNets: depth x width x normalization x activation x pooling (the space of Zhao et al. 2020, arXiv 2006.05929).

Design choices
- Each is ``metadist.nets.convnet``'s ordinary module.
- Activation, and whether the maximum or the mean is pooled, change no parameter's shape: such candidates are one ``Switched``
  module, whose layers are chosen by a parameter, ``choice``: by which of its numbers are zero. torch.where passes it no
  gradient, and weight decay leaves a zero at zero. A one it shrinks, and with much momentum swings to the other sign, so signs
  would not do; but nothing takes it onto zero, save a rate x decay of exactly 1 or, in float32, one of about 90 summed over
  the steps. So vmap trains all of them as one tensor of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, leaky_relu, max_pool2d

from metadist.errors import UserError
from metadist.nets.convnet import ACTIVATIONS, GROUPS, NORMS, POOLINGS, convnet

DEPTHS, WIDER = (1, 2, 3, 4), (1, 2, 4, 8)
WIDTH = 32  # published: 32, 64, 128, 256
_SIZES = (len(DEPTHS), len(WIDER), len(NORMS), len(ACTIVATIONS), len(POOLINGS))
# Is it sigmoid, is it leaky (neither: ReLU); then: is the maximum pooled.
_ACTIVATION = {"sigmoid": (1.0, 0.0), "leaky": (0.0, 1.0), "relu": (0.0, 0.0)}


class Convnets:
    """The space. width: the least, a multiple of 4; the others are 2, 4 and 8 times as wide; 0: 32, as published."""

    name = "convnets"

    def __init__(self, width: int = 0) -> None:
        """Raises UserError for a width that four groups can't share."""
        if width < 0 or width % GROUPS:
            raise UserError(f"search.width={width} can't be split into {GROUPS} groups, as some candidates do; give a multiple "
                            f"of {GROUPS}, or 0 for {WIDTH}")  # fmt: skip
        self.width = width or WIDTH

    def __len__(self) -> int:
        """720."""
        return int(torch.tensor(_SIZES).prod())

    def options(self, index: int) -> tuple[int, int, str, str, str]:
        """(depth, width, norm, activation, pooling) of a candidate, the last changing fastest."""
        places = []
        for size in reversed(_SIZES):
            index, place = divmod(index, size)
            places.append(place)
        pooling, act, norm, wide, depth = places
        return DEPTHS[depth], self.width * WIDER[wide], NORMS[norm], ACTIVATIONS[act], POOLINGS[pooling]

    def key(self, index: int) -> str:
        """Such as d3-w64-instance-relu-avg."""
        depth, width, *words = self.options(index)
        return "-".join([f"d{depth}", f"w{width}", *words])

    def module(self, index: int, channels: int, size: int, classes: int) -> nn.Module:
        """The candidate. Raises UserError for images of fewer than 2^depth pixels (with pooling)."""
        depth, width, *words = self.options(index)
        return convnet(channels, size, classes, width, depth, *words)

    def shape(self, index: int) -> str:
        """Equal for candidates that one ``Switched`` module can be."""
        depth, width, norm, _, pooling = self.options(index)
        return f"d{depth}-w{width}-{norm}-{'none' if pooling == 'none' else 'pooled'}"

    def shared(self, index: int, channels: int, size: int, classes: int) -> nn.Module:
        """The module that all candidates of this one's shape are."""
        depth, width, norm, _, pooling = self.options(index)
        pooling = "none" if pooling == "none" else "avg"
        return Switched(convnet(channels, size, classes, width, depth, norm, "relu", pooling))

    def choice(self, index: int) -> tuple[float, ...]:
        """The numbers that make this candidate of the shared module."""
        *_, act, pooling = self.options(index)
        return (*_ACTIVATION[act], 1.0 if pooling == "max" else 0.0)


class Switched(nn.Module):
    """A ConvNet whose every ReLU and average pooling may be others: see the design choices.

    body: layers in order. ``choice`` [3] comes first among the parameters.
    """

    def __init__(self, body: nn.Module) -> None:
        """Begin as ReLU and average."""
        super().__init__()
        self.choice = nn.Parameter(torch.zeros(3))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]."""
        sigmoid, leaky, most = self.choice != 0
        for layer in self.body.children():
            if isinstance(layer, nn.ReLU):
                x = torch.where(sigmoid, x.sigmoid(), torch.where(leaky, leaky_relu(x, 0.01), x.relu()))
            elif isinstance(layer, nn.AvgPool2d):
                x = torch.where(most, max_pool2d(x, 2), avg_pool2d(x, 2))
            else:
                x = layer(x)
        return x
