"""Implicit gradients (Lorraine et al. 2020, arXiv 1911.02590): differentiate where training ends, not how it got there.

A learner is trained on the synthetic data, with an l2 term, until it hardly moves; there the implicit function theorem gives
the gradient of the real loss from Hessian products alone. What training did on its way has no part in it: learned rates,
orders and curricula would get no gradient, and are refused (see metadist.run.validate).

Design choices
- Warm start: each task goes on from where its learner stood after the meta-step before, for implicit.restart meta-steps. The
  weights travel as a meta-parameter that is set, not optimized: the gradient's slot of task i holds its new weights, so that
  checkpoints and both exchanges carry them without knowing it.
- Hessian products see implicit.batches of the synthetic batches, drawn for each task anew; 0: all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metadist import draw
from metadist.config import Config
from metadist.data import Data
from metadist.metagrad.implicit import Solve, fixed_point
from metadist.metagrad.inner import Inner
from metadist.metagrad.mixed import Batch, Loss
from metadist.methods.dd import Distillation, whole
from metadist.methods.starts import Starts
from metadist.synthetic.images import CARRIED, Phi, Synthetic

WEIGHTS = f"{CARRIED}theta"


class ImplicitTask(NamedTuple):
    """What the tasks of one group draw.

    theta0: [G, P] initial weights. x: [G, R, C, H, W] real images. y: [G, R]. drawn: as of ``Task``. numbers: [G] of the tasks.
    chosen: [G, n], the batches that Hessian products see. fresh: start from theta0 even if weights are carried.
    """

    theta0: Tensor
    x: Tensor
    y: Tensor
    drawn: Tensor | None
    numbers: Tensor
    chosen: Tensor
    fresh: bool


def over_batches(loss: Loss) -> Loss:
    """A loss of one batch [B, ...] as the mean over several, [S, B, ...]."""

    def mean(theta: Tensor, batches: Batch) -> Tensor:
        return torch.stack([loss(theta, parts) for parts in zip(*(b.unbind(0) for b in batches), strict=True)]).mean()

    return mean


class Implicit(Distillation):
    """The method. Arguments as ``Distillation``; penalized: the inner training with its l2 term."""

    def __init__(
        self, config: Config, data: Data, synthetic: Synthetic, inner: Inner, starts: Starts, penalized: Inner, relabel: Any
    ) -> None:
        """Keep the pieces."""
        super().__init__(config, data, synthetic, inner, starts, whole(1, 0), relabel)
        self.penalized, self.settings = penalized, config.implicit
        self.solved: Solve | None = None

    def parameters(self) -> Phi:
        """The meta-parameters before the first meta-step; with a warm start the learners' weights [tasks, P] among them."""
        phi = super().parameters()
        if self.settings.warm_start:
            everyone = torch.arange(self.config.tasks, device=self.synthetic.device)
            phi[WEIGHTS] = self.starts.sample(0, everyone).clone()
        return phi

    def draw(self, step: int, tasks: Tensor) -> Any:
        """Everything random of these tasks [G] of this meta-step."""
        base = super().draw(step, tasks)
        total = self.config.inner.steps
        count = min(self.settings.batches or total, total)
        chosen = draw.permutation(draw.key(self.config.seed, "hessian", step, tasks), total)[:, :count]
        fresh = not self.settings.warm_start or step % self.settings.restart == 0
        return ImplicitTask(base.theta0, base.x[0], base.y[0], base.drawn, tasks, chosen, fresh)

    def loss(self, phi: Phi, task: Any) -> Tensor:
        """The loss on real data [G] of learners at the end of their training."""
        batches, order = self.synthetic.batches(phi, task.drawn), self._order()
        rate = torch.full((len(order),), self.config.inner.lr, dtype=batches[0].dtype, device=batches[0].device)
        momentum = None if self.config.inner.optimizer == "sgd" else torch.full_like(rate, self.config.inner.momentum)
        theta0 = task.theta0 if task.fresh else phi[WEIGHTS].detach()[task.numbers]
        inner, s = self.penalized, self.settings
        kept = tuple(b.detach() for b in batches)
        theta = inner.train(theta0, kept, order, inner.optimizer.schedule(rate, momentum))
        step = s.step if s.solver == "neumann" else None
        seen, loss = self._chosen(batches, task.chosen), over_batches(inner.loss)
        star = fixed_point(loss, theta, seen, s.solver, s.terms, step, s.damping, inner.form, False, self._report)
        value = self.inner.judge(star, (task.x, task.y), self.inner.pick(batches, order[-1])[0])
        if not s.warm_start:
            return value
        return value + handed_on(phi[WEIGHTS][task.numbers], theta)

    def _order(self) -> tuple[int, ...]:
        return tuple(t % self.config.inner.steps for t in range(self.settings.steps))

    def _chosen(self, batches: Batch, chosen: Tensor) -> Batch:
        """[G, n, B, ...] of each task."""
        if self.synthetic.shared:
            return tuple(b[chosen] for b in batches)
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        return tuple(b[rows, chosen] for b in batches)

    def _report(self, solved: Solve) -> None:
        self.solved = solved

    def figures(self) -> dict[str, float]:
        """Of the last tasks: how well their systems were solved, how far from stationary their learners are."""
        if self.solved is None:
            return {}
        return {"residual": float(self.solved.residual.mean()),
                "inner_gradient_norm": float(self.solved.gradient_norm.mean())}  # fmt: skip


def handed_on(slot: Tensor, value: Tensor) -> Tensor:
    """Zero [G], whose gradient in ``slot`` [G, P] is ``value`` [G, P] itself."""
    product = (slot * value.detach()).sum(1)
    return product - product.detach()
