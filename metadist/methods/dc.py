"""Dataset condensation (DC: Zhao et al. 2020, arXiv 2006.05929; with DSA: Zhao and Bilen 2021, arXiv 2102.08259).

The gradient that a class's distilled images give a network shall point where that of real images of the class points, for
networks at every stage of a training on the distilled images:

    sum over classes c    D( grad_theta loss(theta; distilled_c), grad_theta loss(theta; real_c) )

with D of ``distance``: for each layer and output, 1 - cosine. A meta-step matches all classes once. The network is drawn anew
every matching.outer meta-steps; before each of the others it makes matching.inner passes over the distilled images, as they are
then.

Design choices
- The network travels as a meta-parameter that is set, not optimized (see metadist.methods.implicit): task 0 hands it on. Every
  worker, and every group of tasks, does the same training of it before it matches; with outer=1 there is none.
- DSA: siamese for what is compared; in the network's own training one operation a batch, parameters of its own for each image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metadist import draw
from metadist.config import Config
from metadist.data import Data, dsa
from metadist.metagrad.inner import Inner
from metadist.metagrad.matching import inner_gradient
from metadist.metagrad.mixed import gradients
from metadist.metagrad.optimizers import Optimizer
from metadist.methods.by_class import ByClass
from metadist.methods.implicit import WEIGHTS, handed_on
from metadist.methods.matching import distance
from metadist.methods.starts import Starts
from metadist.nets import Learner
from metadist.synthetic.images import Images, Phi


class Matched(NamedTuple):
    """What the tasks of one group draw.

    numbers: [G] classes. x: [G, R, C, H, W] real images. siamese: [G, 1, WIDTH].
    theta0: [1, P], the learner if it is a new one. fresh: whether it is.
    rows: [passes, N] order of the distilled images in its training. augmentation: [passes, N, WIDTH], in that order.
    """

    numbers: Tensor
    x: Tensor
    siamese: Tensor
    theta0: Tensor
    rows: Tensor
    augmentation: Tensor
    fresh: bool


class Condensation(ByClass):
    """The method. Arguments as ``Distillation``; learner: its layers are compared one by one."""

    def __init__(self, config: Config, data: Data, synthetic: Images, inner: Inner, starts: Starts, learner: Learner) -> None:
        """Keep the pieces."""
        super().__init__(config, data, synthetic, inner.but(shared=False), starts)
        self.learner, self.settings = learner, config.matching
        self.training = inner.but(optimizer=Optimizer("sgd"), shared=True)

    def parameters(self) -> Phi:
        """The meta-parameters before the first meta-step; the learner [1, P] among them, if one lasts longer than that."""
        phi = super().parameters()
        if self.settings.outer > 1:
            phi[WEIGHTS] = self.fresh(0).clone()
        return phi

    def draw(self, step: int, tasks: Tensor) -> Any:
        """Everything random of these classes [G] of this meta-step."""
        fresh = step % self.settings.outer == 0
        none = torch.zeros(0, dtype=self.images.dtype, device=tasks.device)
        rows, augmentation = (none, none) if fresh else self._passes(step, tasks.device)
        theta0 = self.fresh(step) if fresh else none
        return Matched(tasks, self.real(step, tasks), self.siamese(step, tasks), theta0, rows, augmentation, fresh)

    def _passes(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Order and augmentation of the distilled images in the training before this meta-step."""
        s, count, strategy = self.settings, self.images.count, self.config.dsa
        task = torch.zeros((), dtype=torch.int64, device=device)
        passes = draw.split(draw.key(self.config.seed, "learner", step, task), torch.arange(s.inner, device=device))
        rows, batch = draw.permutation(draw.split(passes, 0), count), min(s.batch, count)
        batches = torch.arange(-(-count // batch), device=device)
        keys = draw.split(draw.split(passes, 1)[:, None], batches)
        made = dsa.parameters(strategy, keys, batch, self.images.shape[-1], self.images.dtype)
        return rows, made.flatten(1, 2)[:, :count]

    def loss(self, phi: Phi, task: Any) -> Tensor:
        """Distance [G] between the gradients of the two batches of each class."""
        theta = (task.theta0 if task.fresh else self._trained(phi, task)).detach()
        each, inner = theta.expand(len(task.numbers), -1), self.inner
        own, real = self.pair(phi, task.numbers, task.x, task.siamese)
        # Gradients of large batches: on a CPU one class after another (see evaluate.train.at_once), else all at once.
        size = inner.judge_group or len(each)
        pieces = zip(*(torch.split(v, size) for v in (each, *real)), strict=True)
        theirs = torch.cat([gradients(inner.loss, th, (x, y), shared=False) for th, x, y in pieces]).detach()
        ours = inner_gradient(inner.loss, each, own, inner.form, shared=False)
        value = distance(ours, theirs, self.learner, self.settings.distance)
        if self.settings.outer == 1:
            return value
        first = (task.numbers == 0).to(theta.dtype)[:, None]
        return value + handed_on(phi[WEIGHTS].expand(len(each), -1), first * theta)

    @torch.no_grad()
    def _trained(self, phi: Phi, task: Matched) -> Tensor:
        """The carried learner [1, P] after its passes over the distilled images."""
        x, y, batch = phi["images"].detach(), self.images.labels(phi).detach(), self.settings.batch
        h = torch.full((1, 1), self.settings.lr, dtype=x.dtype, device=x.device)
        state = self.training.optimizer.init(phi[WEIGHTS].detach())
        for order, augmentation in zip(task.rows, task.augmentation, strict=True):
            for rows, own in zip(order.split(batch), augmentation.split(batch), strict=True):
                seen = x[rows] if self.config.dsa == "none" else dsa.apply(own, x[rows])
                state = self.training.advance(state, (seen[None], y[rows][None]), (0,), h)
        return state[0]
