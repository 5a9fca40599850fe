"""15,625 cells: the space of NAS-Bench-201 (Dong and Yang 2020, arXiv 2001.00326), as ordinary modules.

Design choices
- A cell has four nodes; each of its six edges carries one of five operations. Node 0 is the input, node i the sum over j < i of
  operation (j, i) of node j, node 3 the output.
- The key is the published string: |op~0|+|op~0|op~1|+|op~0|op~1|op~2|, the operations into nodes 1, 2, 3.
- The skeleton: 3x3 convolution and BatchNorm to C channels; three stages of N cells at C, 2C, 4C; a residual block that halves
  the maps between two stages; BatchNorm, ReLU, mean over the map, linear. Published: C = 16, N = 5.
- Convolutions have no bias, BatchNorm has its affine terms; average pooling does not count the border.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metadist.errors import UserError
from metadist.nets.sizes import at_least

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # in the order of the key
WIDTH, CELLS, STAGES = 16, 5, 3


class Cells:
    """The space. width: C, channels of the stem; cells: N, of each stage; 0: as published."""

    name = "cells"

    def __init__(self, width: int = 0, cells: int = 0) -> None:
        """Raises UserError for sizes below 0."""
        for key, value in (("width", width), ("cells", cells)):
            if value < 0:
                raise UserError(f"search.{key}={value} must be 1 or more, or 0 for the published size")
        self.width, self.cells = width or WIDTH, cells or CELLS

    def __len__(self) -> int:
        """5 ** 6."""
        return int(len(OPERATIONS) ** len(EDGES))

    def operations(self, index: int) -> tuple[str, ...]:
        """The operation of each edge, in the order of the key; the last changes fastest."""
        names = []
        for _ in EDGES:
            index, place = divmod(index, len(OPERATIONS))
            names.append(OPERATIONS[place])
        return tuple(reversed(names))

    def key(self, index: int) -> str:
        """Such as |nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|."""
        into: dict[int, list[str]] = {1: [], 2: [], 3: []}
        for (source, target), name in zip(EDGES, self.operations(index), strict=True):
            into[target].append(f"{name}~{source}")
        return "+".join(f"|{'|'.join(names)}|" for names in into.values())

    def module(self, index: int, channels: int, size: int, classes: int) -> nn.Module:
        """The network of a candidate. Raises UserError for images below 4 pixels, which can't be halved twice."""
        at_least("cells", size, 2 ** (STAGES - 1))
        names, width = self.operations(index), self.width
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        for stage in range(STAGES):
            if stage:
                layers.append(Reduction(width, 2 * width))
                width *= 2
            layers += [Cell(names, width) for _ in range(self.cells)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
        return nn.Sequential(*layers)


class Zero(nn.Module):
    """The operation `none`."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the same shape."""
        return torch.zeros_like(x)


def _conv(inside: int, outside: int, kernel: int, stride: int = 1) -> nn.Module:
    """ReLU, convolution, BatchNorm."""
    convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(outside))


def operation(name: str, width: int) -> nn.Module:
    """An edge's module, [B, width, H, W] -> the same shape; name: one of OPERATIONS."""
    if name.startswith("nor_conv"):
        return _conv(width, width, int(name[-1]))
    kinds = {"none": Zero, "skip_connect": nn.Identity}
    return kinds[name]() if name in kinds else nn.AvgPool2d(3, 1, 1, count_include_pad=False)


class Cell(nn.Module):
    """One cell. names: the operation of each edge; width: channels."""

    def __init__(self, names: tuple[str, ...], width: int) -> None:
        """Build the edges."""
        super().__init__()
        self.edges = nn.ModuleList(operation(name, width) for name in names)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] -> the same shape."""
        nodes = [x]
        for target in (1, 2, 3):
            into = [edge(nodes[s]) for (s, t), edge in zip(EDGES, self.edges, strict=True) if t == target]
            nodes.append(torch.stack(into).sum(0))
        return nodes[-1]


class Reduction(nn.Module):
    """A basic residual block of stride 2: two 3x3 convolutions beside average pooling and a 1x1 convolution."""

    def __init__(self, inside: int, outside: int) -> None:
        """inside, outside: channels."""
        super().__init__()
        self.long = nn.Sequential(_conv(inside, outside, 3, 2), _conv(outside, outside, 3))
        self.short = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(inside, outside, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inside, H, W] -> [B, outside, ceil(H / 2), ceil(W / 2)]."""
        out: Tensor = self.long(x) + self.short(x)
        return out
