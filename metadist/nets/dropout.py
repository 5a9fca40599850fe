"""Dropout (Hinton et al. 2012, arXiv 1207.0580) whose masks are drawn up front, by counter, and passed in.

Design choices
- A layer that draws could be neither resumed bit for bit nor computed twice. Here the mask is a buffer, all ones, that a
  training step replaces by the mask it drew (``Learner.__call__``): a pure function, and the identity wherever nobody does.
- What is kept is divided by the probability of being kept, so that evaluation needs no factor.
- Masks are drawn from 8 random bits a unit: probabilities are rounded to 1/256.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metadist import draw

_STEPS = 256


class Dropout(nn.Module):
    """x [B, units] times a mask. units: of the layer before; p: probability that a unit is dropped, in (0, 1)."""

    mask: Tensor

    def __init__(self, units: int, p: float) -> None:
        """A mask of ones."""
        super().__init__()
        self.units, self.p = units, min(max(round(p * _STEPS), 1), _STEPS - 1) / _STEPS
        self.register_buffer("mask", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, units] -> [B, units]."""
        return x * self.mask


def slots(module: nn.Module) -> dict[str, Dropout]:
    """The dropout layers of a net, by name, in the order of the net."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Dropout)}


def masks(layers: dict[str, Dropout], keys: Tensor, images: int) -> Tensor:
    """Masks of all layers beside each other: bool [..., images, U], U the sum of their units (0 without layers); kept: True.

    keys: int64 [..., 2], one a batch of ``images``.
    """
    out = []
    for i, layer in enumerate(layers.values()):
        count = images * layer.units
        words = draw.bits(draw.split(keys, i), -(-count // 4)).unsqueeze(-1)
        parts = (words >> torch.tensor([0, 8, 16, 24], device=keys.device)) & (_STEPS - 1)
        drawn = parts.flatten(-2)[..., :count].view(*keys.shape[:-1], images, layer.units)
        out.append(drawn >= round(layer.p * _STEPS))
    if not out:
        return torch.ones(*keys.shape[:-1], images, 0, dtype=torch.bool, device=keys.device)
    return torch.cat(out, -1)


def placed(layers: dict[str, Dropout], kept: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """One batch's masks [B, U] as the layers' buffers, with their factors: {name.mask: [B, units]}."""
    parts = torch.split(kept, [layer.units for layer in layers.values()], dim=-1)
    return {f"{name}.mask": part.to(dtype) / (1 - layer.p) for (name, layer), part in zip(layers.items(), parts, strict=True)}
