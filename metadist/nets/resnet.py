"""ResNet (He et al. 2015, arXiv 1512.03385) for small images: torchvision's, with a 3x3 stem and no first pooling."""

from __future__ import annotations

from torch import nn


def _small(block: str, layers: list[int], channels: int, classes: int) -> nn.Module:
    from torchvision.models import resnet  # two seconds that runs with other nets do without

    net = resnet.ResNet(getattr(resnet, block), layers, num_classes=classes)
    net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    module: nn.Module = net
    return module


def resnet18(channels: int, size: int, classes: int) -> nn.Module:
    """18 layers, BatchNorm, any image size: [B, C, H, W] -> [B, classes]."""
    return _small("BasicBlock", [2, 2, 2, 2], channels, classes)


def resnet50(channels: int, size: int, classes: int) -> nn.Module:
    """50 layers, BatchNorm, any image size: [B, C, H, W] -> [B, classes]."""
    return _small("Bottleneck", [3, 4, 6, 3], channels, classes)
