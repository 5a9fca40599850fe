"""A frozen network whose logits others learn from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.nets.learner import Learner


@dataclass(frozen=True, eq=False)
class Teacher:
    """A learner with its weights theta [P] and BatchNorm statistics buffers [Q]; callable, differentiable in the images."""

    learner: Learner
    theta: Tensor
    buffers: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B, K] of x [B, C, H, W], as the network is evaluated: each image's own, whatever is beside it."""
        return self.learner.predict(self.theta, self.buffers, x)

    def to(self, dtype: torch.dtype) -> Teacher:
        """The same network in another precision."""
        old = self.learner
        learner = Learner(old.template, old.kind, old.factory, dtype, old.device, old.classes)
        return Teacher(learner, self.theta.to(dtype), self.buffers.to(dtype))
