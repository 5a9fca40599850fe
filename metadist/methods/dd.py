"""Dataset distillation (Wang et al. 2018, arXiv 1811.10959): learn the images, by the gradient of the loss they lead to.

    phi* = argmin  E_theta0 E_(x, y)  loss( train(theta0; images, labels, rates), x, y )

One task is (theta0, a real batch): train on the distilled images from theta0, judge on the batch. The variants are points of
one space: theta0 fixed, random or pre-trained (``starts``); real or malicious judge (``poison``); the whole training
differentiated, or a window of it (``truncated``); at the last step only or at every k-th.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metadist import draw
from metadist.config import Config
from metadist.data import Data
from metadist.data.augment import augment
from metadist.metagrad.inner import Inner
from metadist.methods.starts import Starts
from metadist.synthetic.images import Phi, Synthetic

Relabel = Callable[[Tensor], Tensor]
Window = Callable[[int], tuple[int, tuple[int, ...]]]


class Task(NamedTuple):
    """What the tasks of one group draw.

    theta0: [G, P] initial weights.
    x: [A, G, R, C, H, W] real images, one batch for each point of the meta-loss.
    y: [A, G, R] their labels.
    drawn: what its synthetic batches depend on beside the parameters, if anything: [G, ...].
    start: inner steps that are run but not differentiated.
    at: the A step counts at which the meta-loss is taken.
    """

    theta0: Tensor
    x: Tensor
    y: Tensor
    drawn: Tensor | None
    start: int
    at: tuple[int, ...]


def whole(steps: int, every: int) -> Window:
    """The whole training: differentiated from its first step, judged at every ``every``-th and the last (0: the last)."""
    at = tuple(t for t in range(1, steps + 1) if t == steps or (every and t % every == 0))
    return lambda _step: (0, at)


class Distillation:
    """The method: what a task draws and its loss.

    config: tasks, real_batch, seed, data.augment.
    data: real data; tasks draw from its training split.
    synthetic: what is learned: images, or a generator of them.
    inner: the inner training.
    starts: p(theta0).
    window: meta-step -> (start, at).
    relabel: the judge's labels of real labels (identity unless poisoned).
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        synthetic: Synthetic,
        inner: Inner,
        starts: Starts,
        window: Window,
        relabel: Relabel | None = None,
    ) -> None:
        """Keep the pieces."""
        self.config, self.data, self.synthetic, self.inner = config, data, synthetic, inner
        self.starts, self.window, self.relabel = starts, window, relabel

    def parameters(self) -> Phi:
        """The meta-parameters before the first meta-step."""
        return self.synthetic.parameters()

    def draw(self, step: int, tasks: Tensor) -> Task:
        """Everything random of these tasks [G] of this meta-step: a function of (seed, step, task) alone."""
        split, config = self.data.train, self.config
        start, at = self.window(step)
        key = draw.key(config.seed, "batch", step, tasks)
        index = draw.integers(key, (len(at), config.real_batch), len(split.y)).movedim(0, 1)
        x, y = split.x[index], split.y[index]
        if config.data.augment != "none":
            keys = draw.key(config.seed, "augment", step, tasks)
            x = torch.stack([augment(config.data.augment, draw.split(keys, a), x[a]) for a in range(len(at))])
        drawn = self.synthetic.draw(draw.key(config.seed, "curriculum", step, tasks))
        return Task(self.starts.sample(step, tasks), x, self.relabel(y) if self.relabel else y, drawn, start, at)

    def figures(self) -> dict[str, float]:
        """What to log of the last tasks besides their loss."""
        return {}

    def loss(self, phi: Phi, task: Task) -> Tensor:
        """The meta-loss of each task [G]: mean over the points ``at`` of the loss on real data."""
        batches, h = self.synthetic.batches(phi, task.drawn), self.synthetic.schedule(phi)
        thetas = self.inner.unroll(task.theta0, batches, self.synthetic.order, h, task.at, task.start)
        seen = [self.inner.pick(batches, self.synthetic.order[t - 1])[0] for t in task.at]
        points = zip(thetas, task.x, task.y, seen, strict=True)
        return torch.stack([self.inner.judge(theta, (x, y), z) for theta, x, y, z in points]).mean(0)
