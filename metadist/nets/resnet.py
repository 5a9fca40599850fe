"""ResNet (He et al. 2015, arXiv 1512.03385) for small images: torchvision's, with a 3x3 stem and no first pooling."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


def _small(net: ResNet, channels: int) -> nn.Module:
    net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    module: nn.Module = net
    return module


def resnet18(channels: int, size: int, classes: int) -> nn.Module:
    """18 layers, BatchNorm, any image size: [B, C, H, W] -> [B, classes]."""
    return _small(ResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes), channels)


def resnet50(channels: int, size: int, classes: int) -> nn.Module:
    """50 layers, BatchNorm, any image size: [B, C, H, W] -> [B, classes]."""
    return _small(ResNet(Bottleneck, [3, 4, 6, 3], num_classes=classes), channels)
