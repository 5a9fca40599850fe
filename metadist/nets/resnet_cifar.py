"""The ResNets of 6n + 2 layers for CIFAR (He et al. 2015, arXiv 1512.03385, section 4.2): 8, 20, 32, 56, 110."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metadist.errors import UserError


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut that has no parameters: every second pixel, missing channels zero (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """stride: of the first convolution and of the shortcut."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        out = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        short = x[..., :: self.stride, :: self.stride]
        return torch.relu(out + nn.functional.pad(short, (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2)))


class Mean(nn.Module):
    """The mean of each map: [B, C, H, W] -> [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.mean((2, 3))


def resnet_cifar(channels: int, size: int, classes: int, width: int = 16, depth: int = 20) -> nn.Module:
    """3 stages of (depth - 2) / 6 blocks with ``width``, 2 and 4 times as many channels: [B, C, H, W] -> [B, classes].

    Raises UserError for a depth that is not 6n + 2.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise UserError(f"net.depth={depth}: net=resnet_cifar has 6n + 2 layers; give 8, 14, 20, 32, 44, 56, 110...")
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(3):
        for i in range(blocks):
            layers.append(Block(inputs, width * 2**stage, 2 if stage and not i else 1))
            inputs = width * 2**stage
    return nn.Sequential(*layers, Mean(), nn.Linear(inputs, classes))
