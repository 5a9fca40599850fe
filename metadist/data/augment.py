"""Augmentation of real batches: random crops of reflect-padded images, horizontal flips, small shifts, drawn by counter.

Design choices
- Every pixel of the result is a pixel of the source, so one gather does crop and flip together, for all images of all tasks.
- Parameters come from the task's key alone: the same in any group, on any worker and device.
- Recipe of Dataset Distillation (arXiv 1811.10959) and Generative Teaching Networks (arXiv 1912.07768) for CIFAR-10: reflect
  pad 4, crop, flip with probability 1/2. Jitter: shifts by up to 2 pixels each way (arXiv 1503.02531, on MNIST).
"""

from __future__ import annotations

import torch
from torch import Tensor

from metadist import draw, errors
from metadist.errors import UserError

KINDS = ("none", "crop", "flip", "crop_flip", "jitter")
PAD, JITTER = 4, 2  # pixels


def augment(kind: str, keys: Tensor, x: Tensor) -> Tensor:
    """Augmented images of the same shape.

    kind: none | crop | flip | crop_flip | jitter.
    keys: int64 [G, 2], one key a task.
    x: [G, R, C, H, W], R images a task; each image is drawn for on its own.
    Raises UserError if the kind is unknown, or images are too small (4 pixels or less; jitter: 2) to be padded by reflection.
    """
    if kind not in KINDS:
        raise errors.unknown("data.augment", kind, KINDS)
    if kind == "none":
        return x
    tasks, images, _, height, width = x.shape
    rows = torch.arange(height, device=x.device).expand(tasks, images, -1)
    columns = torch.arange(width, device=x.device).expand(tasks, images, -1)
    if "flip" in kind:
        flipped = draw.integers(draw.split(keys, 1), (images, 1), 2)
        columns = torch.where(flipped == 1, width - 1 - columns, columns)
    if pad := JITTER if kind == "jitter" else PAD * ("crop" in kind):
        if min(height, width) <= pad:
            raise UserError(
                f"data.augment={kind} pads by {pad} pixels, too many for {width}x{height} images; enlarge data.size"
            )
        shift = draw.integers(draw.split(keys, 0), (images, 2), 2 * pad + 1) - pad
        rows = _reflect(rows + shift[..., :1], height)
        columns = _reflect(columns + shift[..., 1:], width)
    index = (rows.unsqueeze(-1) * width + columns.unsqueeze(-2)).flatten(-2).unsqueeze(2)
    return x.flatten(-2).gather(-1, index.expand(-1, -1, x.shape[2], -1)).reshape(x.shape)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices outside [0, size) mirrored at the border pixel, which is not repeated."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
