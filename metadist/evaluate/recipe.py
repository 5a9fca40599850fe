"""A distilled set as the training it stands for, and the same training on other images.

Design choices
- A baseline gets what the distilled set has but for the images: as many of them, in batches of the same size and order, as many
  steps, the same optimizer and momentum. Its rate is chosen on validation, from a grid and from the set's own learned rates.
- Random images are drawn anew for each network, so that n accuracies are n independent values and the interval of their mean
  covers the luck of the draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metadist import draw
from metadist.data.splits import Split
from metadist.metagrad.mixed import Batch
from metadist.metagrad.optimizers import Optimizer
from metadist.synthetic.distilled import DistilledSet

RATES = {
    "sgd": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "momentum": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    "adam": (0.0003, 0.001, 0.003, 0.01, 0.03),
}  # the grid that rates of baselines and of ordinary training are chosen from


@dataclass(frozen=True, eq=False)
class Recipe:
    """Training by ordered steps."""

    x: Tensor  # [S, B, C, H, W], or [n, S, B, C, H, W] where each network has its own images
    y: Tensor  # [S, B] or [S, B, K], or with [n, ...] in front
    order: tuple[int, ...]  # batch of each of the T steps
    lr: Tensor  # [T]
    momentum: Tensor | None  # [T]
    optimizer: Optimizer

    @staticmethod
    def of(dset: DistilledSet, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Recipe:
        """The recorded training of a distilled set."""
        x, y = dset.batches()
        y = y.to(device, dtype) if y.is_floating_point() else y.to(device)
        momentum = None if dset.momentum is None else dset.momentum.to(device, dtype)
        optimizer = Optimizer(**dset.optimizer)
        return Recipe(x.to(device, dtype), y, tuple(dset.order.tolist()), dset.lr.to(device, dtype), momentum, optimizer)

    @property
    def shared(self) -> bool:
        """Whether all networks see the same images."""
        return self.x.dim() == 5

    @property
    def batches(self) -> Batch:
        """(x, y) as ``Inner`` takes them."""
        return self.x, self.y

    @property
    def h(self) -> Tensor:
        """The optimizer's table [T, K]."""
        return self.optimizer.schedule(self.lr, self.momentum)

    @property
    def images(self) -> Batch:
        """All images [N, C, H, W] and their labels, of a shared recipe."""
        return self.x.flatten(0, 1), self.y.flatten(0, 1)

    def on(self, x: Tensor, y: Tensor) -> Recipe:
        """The same training on other images [N, C, H, W] with labels [N], or on each network's own [n, N, ...].

        Where classes don't divide the set's number of images, a few images too many are left out.
        """
        shape, lead = self.x.shape[-5:-3], x.dim() - 4
        count = math.prod(shape)
        x, y = x.narrow(lead, 0, count).to(self.x), y.narrow(lead, 0, count).to(self.y.device)
        return replace(
            self,
            x=x.reshape(*x.shape[:lead], *shape, *x.shape[lead + 1 :]),
            y=y.reshape(*y.shape[:lead], *shape, *y.shape[lead + 1 :]),
        )

    def at(self, rate: float | None) -> Recipe:
        """The same training at one constant rate; None: at the recorded ones."""
        return self if rate is None else replace(self, lr=torch.full_like(self.lr, rate))

    def candidates(self) -> tuple[float | None, ...]:
        """The rates a baseline is tried at: the recorded ones (None) and the grid."""
        return (None, *RATES[self.optimizer.kind])


def random_indices(split: Split, classes: int, ipc: int, keys: Tensor) -> Tensor:
    """For each key, ipc random images of every class: int64 [n, classes * ipc], entry i of class i % classes.

    Drawn without replacement.
    split: where they are taken from; a class with fewer than ipc images gives some of them more than once.
    keys: int64 [n, 2].
    """
    columns = []
    for c in range(classes):
        members = (split.y == c).nonzero()[:, 0]
        picks = draw.permutation(draw.split(keys, c), len(members))
        picks = picks.repeat(1, -(-ipc // len(members)))[:, :ipc]
        columns.append(members[picks.to(members.device)])
    return torch.stack(columns, dim=2).flatten(1)
