"""Ordinary training of networks, alone (method=train) or with teachers' soft targets: knowledge distillation (method=kd).

    theta_s* = argmin  E_(x, y)  (1 - alpha) CE(theta_s; x, y) + alpha T^2 KL(p_T(x) || q_T(theta_s; x))

Hinton et al. 2015, arXiv 1503.02531. The meta-parameters are the weights of S networks, a task is one micro-batch for each.

Design choices
- Each network has an initialization and an order of its own: shuffled passes, all drawn by counter. The last images of a pass
  that fill no micro-batch are left out of it.
- An image's augmentation is a function of (row, pass), the same for all networks: what teachers say of it can be kept.
- A task's loss has the value of the mean over the networks and the gradient of the sum: each network is trained as if alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import cross_entropy

from metadist import draw
from metadist.config import Config
from metadist.data import Data
from metadist.data.augment import augment
from metadist.errors import UserError
from metadist.metagrad.execution import accelerate, lowered
from metadist.methods.advice import Advice
from metadist.nets import Learner
from metadist.nets.dropout import masks
from metadist.nets.loss import distillation
from metadist.synthetic.images import Phi

_CHUNK = 2000  # images augmented at once


class Task(NamedTuple):
    """Micro-batches of one group of tasks, for each of S networks.

    x: [G, S, B, C, H, W]; y: [G, S, B] classes, or [G, S, B, K] probabilities.
    soft: [G, S, B, K] teachers' probabilities; K = 0 where there is no soft term.
    kept: [G, S, B, U] dropout's masks.
    """

    x: Tensor
    y: Tensor
    soft: Tensor
    kept: Tensor


class Training:
    """The method.

    config: tasks, real_batch, seed, data.augment, train.*, kd.*.
    data: real data, or a distilled set's images in the place of its training split.
    advice: soft targets; None: hard labels alone.
    """

    def __init__(self, config: Config, data: Data, learner: Learner, advice: Advice | None, compile: bool = False) -> None:
        """Keep the pieces. Raises UserError for micro-batches larger than the training split."""
        if config.real_batch > len(data.train):
            raise UserError(f"real_batch={config.real_batch} is more than the {len(data.train)} training images; give fewer")
        self.config, self.data, self.learner, self.advice, self.compiled = config, data, learner, advice, compile
        self.batches = len(data.train) // config.real_batch  # of a pass
        self._orders: dict[int, Tensor] = {}
        self._values = accelerate(self.values, compile, graph=False)

    def parameters(self) -> Phi:
        """The weights before the first step: {"theta": [S, P]}."""
        numbers = torch.arange(self.config.train.networks, device=self.learner.device)
        return {"theta": self.learner.init(draw.key(self.config.seed, "theta0", 0, numbers))}

    def figures(self) -> dict[str, float]:
        """Nothing to log beside the loss."""
        return {}

    # --- what a task draws

    def place(self, step: int, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """(pass, micro-batch of it) of these tasks [G]."""
        number = step * self.config.tasks + tasks
        return number // self.batches, number % self.batches

    def order(self, turn: int) -> Tensor:
        """The order [S, N] in which each network sees the images in one pass."""
        if turn not in self._orders:
            numbers = torch.arange(self.config.train.networks, device=self.learner.device)
            keys = draw.key(self.config.seed, "order", turn, numbers)
            recent = list(self._orders.items())[-1:]  # a group of tasks may lie on both sides of a pass's end
            self._orders = dict(recent) | {turn: draw.permutation(keys, len(self.data.train))}
        return self._orders[turn]

    def draw(self, step: int, tasks: Tensor) -> Task:
        """The micro-batches of these tasks [G]: a function of (seed, step, task) alone."""
        turns, places = self.place(step, tasks)
        guided = self.guided(step)
        parts = [self._one(int(t), int(p), guided) for t, p in zip(turns.tolist(), places.tolist(), strict=True)]
        x, y, soft = (torch.stack(values) for values in zip(*parts, strict=True))
        keys = draw.split(
            draw.key(self.config.seed, "dropout", step, tasks)[:, None], torch.arange(x.shape[1], device=x.device)
        )
        return Task(x, y, soft, masks(self.learner.dropouts, keys, x.shape[2]))

    def guided(self, step: int) -> bool:
        """Whether the soft term is in the loss of this step."""
        until = self.config.kd.until
        return self.advice is not None and (not until or step * self.config.tasks < until * self.batches)

    def _one(self, turn: int, place: int, guided: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One micro-batch: x [S, B, C, H, W], y [S, B], soft [S, B, K or 0]."""
        size = self.config.real_batch
        rows = self.order(turn)[:, place * size : (place + 1) * size]
        split, variants = self.data.train, self.config.kd.variants
        variant = turn % variants if variants else turn
        x = self.augmented(rows, variant)
        if not guided:
            return x, split.y[rows], x.new_zeros(*rows.shape, 0)
        assert self.advice is not None
        if variants:
            return x, split.y[rows], self.advice.looked_up(rows, variant, lambda: self.everything(variant))
        return x, split.y[rows], self.advice.soft(x)

    def augmented(self, rows: Tensor, variant: int) -> Tensor:
        """Images of these rows [...], in one variant of their augmentation: [..., C, H, W]."""
        x, kind = self.data.train.x[rows], self.config.data.augment
        if kind == "none":
            return x
        keys = draw.split(draw.key(self.config.seed, "augment", variant).to(rows.device), rows.flatten())
        return augment(kind, keys, x.flatten(0, -4).unsqueeze(1)).view(x.shape)

    def everything(self, variant: int) -> Tensor:
        """All training images in one variant of their augmentation: [N, C, H, W]."""
        rows = torch.arange(len(self.data.train), device=self.data.train.x.device)
        return torch.cat([self.augmented(part, variant) for part in torch.split(rows, _CHUNK)])

    # --- the loss

    def loss(self, phi: Phi, task: Task) -> Tensor:
        """The loss of each micro-batch [G]: its value the mean over the networks, its gradient that of their sum."""
        each: Tensor = self._values(phi["theta"], task.x, task.y, task.soft, task.kept)
        total = each.sum(1)
        return total + (each.mean(1) - total).detach()

    def values(self, theta: Tensor, x: Tensor, y: Tensor, soft: Tensor, kept: Tensor) -> Tensor:
        """The loss [G, S] of each micro-batch and network; arguments as in ``Task``."""
        over_networks = vmap(self._value)
        with lowered(self.config.engine.precision, theta.device):
            out: Tensor = vmap(over_networks, in_dims=(None, 0, 0, 0, 0))(theta, x, y, soft, kept)
        return out

    def _value(self, theta: Tensor, x: Tensor, y: Tensor, soft: Tensor, kept: Tensor) -> Tensor:
        kd, decay = self.config.kd, self.config.train.weight_decay
        logits = self.learner(theta, x, kept if kept.shape[-1] else None)
        guided = soft.shape[-1] > 0
        value = distillation(logits, soft, y, kd.alpha, kd.T, kd.scale) if guided else cross_entropy(logits, y)
        return value + 0.5 * decay * theta.square().sum() if decay else value

    # --- the constraint on the weights

    def project(self, phi: Phi) -> None:
        """Scale the weights into each hidden unit back to squared length train.max_square, in place (arXiv 1207.0580)."""
        most = self.config.train.max_square
        if not most:
            return
        sizes = [shape.numel() for shape in self.learner.shapes]
        parts = torch.split(phi["theta"].detach(), sizes, dim=1)
        weights = [(part, shape) for part, shape in zip(parts, self.learner.shapes, strict=True) if len(shape) > 1]
        for part, shape in weights[:-1]:  # the last are the output's
            rows = part.view(len(part), shape[0], -1)
            rows.mul_((most / rows.square().sum(-1, keepdim=True).clamp(min=most)).sqrt())
