"""Gradient matching along the learner's path (Zhao et al. 2020, arXiv 2006.05929), for images or a generator of them.

At points of a training on the synthetic batches the gradient of the synthetic batch shall point where that of a real batch
points. The path itself is not differentiated: memory holds one step, whatever their number, and learned rates, which act on
the path alone, would get no gradient and are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metadist.config import Config
from metadist.data import Data
from metadist.metagrad.inner import Inner
from metadist.metagrad.matching import inner_gradient
from metadist.metagrad.mixed import gradients
from metadist.methods.dd import Distillation, whole
from metadist.methods.starts import Starts
from metadist.nets import Learner
from metadist.synthetic.images import Phi, Synthetic

_EPS = 1e-6


class Matching(Distillation):
    """The method. Arguments as ``Distillation``; learner: its layers are compared one by one.

    The points are inner.loss_every steps apart, the first before the first step.
    """

    def __init__(
        self, config: Config, data: Data, synthetic: Synthetic, inner: Inner, starts: Starts, learner: Learner, relabel: Any
    ) -> None:
        """Keep the pieces."""
        every = config.inner.loss_every or 1
        points = len(range(0, len(synthetic.order), every))
        super().__init__(config, data, synthetic, inner, starts, whole(points, 1), relabel)
        self.every, self.learner = every, learner

    def loss(self, phi: Phi, task: Any) -> Tensor:
        """Mean distance [G] between the two gradients over the points of the path."""
        inner, synthetic = self.inner, self.synthetic
        batches = synthetic.batches(phi, task.drawn)
        kept, h = tuple(b.detach() for b in batches), synthetic.schedule(phi).detach()
        state, found = inner.optimizer.init(task.theta0), []
        points = range(0, len(synthetic.order), self.every)
        for point, start in enumerate(points):
            theta, real = state[0].detach(), (task.x[point], task.y[point])
            batch = inner.pick(batches, synthetic.order[start])
            ours = inner_gradient(inner.loss, theta, batch, inner.form, inner.shared)
            theirs = gradients(inner.loss, theta, real, shared=False).detach()
            found.append(distance(ours, theirs, self.learner, self.config.matching.distance))
            if start != points[-1]:  # nobody looks at the weights behind the last point
                end = start + self.every
                with torch.no_grad():
                    state = inner.advance(state, kept, synthetic.order[start:end], h[start:end])
        return torch.stack(found).mean(0)


def distance(ours: Tensor, theirs: Tensor, learner: Learner, kind: str) -> Tensor:
    """How far two gradients [G, P] are apart: [G].

    kind: "cosine": sum over layers and their outputs of 1 - cosine, as published; "l2": |ours - theirs|^2 / |theirs|^2.
    """
    if kind == "l2":
        return (ours - theirs).square().sum(1) / (theirs.square().sum(1) + _EPS)
    total = ours.new_zeros(len(ours))
    sizes = [shape.numel() for shape in learner.shapes]
    for shape, a, b in zip(learner.shapes, torch.split(ours, sizes, 1), torch.split(theirs, sizes, 1), strict=True):
        if len(shape) < 2:
            continue  # biases and gains: one number an output has no direction
        a, b = a.reshape(len(a), shape[0], -1), b.reshape(len(b), shape[0], -1)
        cosine = (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2) + _EPS)
        total = total + (1 - cosine).sum(1)
    return total
