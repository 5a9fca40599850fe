"""Malicious distillation (Wang et al. 2018, section 3.6): a few images that make trained networks read class K as T.

The judge is cross-entropy on real data whose label K is replaced by T; the victims are pre-trained networks, those judged at
the end were never seen in training. One or many steps, as inner.steps x inner.epochs say.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metadist.methods.dd import Relabel


def relabelled(attack: int, target: int) -> Relabel:
    """Labels in which every ``attack`` is a ``target``."""
    return lambda y: torch.where(y == attack, torch.full_like(y, target), y)


class Figures(NamedTuple):
    """What a poisoned set does to n victims, each float64 [n]."""

    accuracy: Tensor  # on all images, by their true labels
    attacked_accuracy: Tensor  # on images of class K
    success: Tensor  # fraction of class K that is read as T


def figures(predictions: Tensor, y: Tensor, attack: int, target: int) -> Figures:
    """The three figures of the paper. predictions: int64 [n, N]; y: true labels int64 [N]."""
    right = (predictions == y).to(torch.float64)
    attacked = predictions[:, y == attack]
    return Figures(
        right.mean(1),
        (attacked == attack).to(torch.float64).mean(1),
        (attacked == target).to(torch.float64).mean(1),
    )
