"""The inner loss of a learner: mean cross-entropy, of hard or soft labels, as a pure function of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import cross_entropy

from metadist.metagrad.mixed import Batch, Loss

if TYPE_CHECKING:
    from metadist.nets.learner import Learner


def cross_entropy_loss(learner: Learner, weight_decay: float = 0.0) -> Loss:
    """The loss (theta [P], (x [B, C, H, W], y)) -> mean cross-entropy + weight_decay / 2 * |theta|^2.

    learner: the network, called in its training mode (BatchNorm uses the batch's own statistics).
    weight_decay: coupled l2, over all weights, as torch.optim's SGD and Adam have it.
    y: int64 [B] class numbers, or float [B, K] probabilities.
    """

    def loss(theta: Tensor, batch: Batch) -> Tensor:
        x, y = batch
        value = cross_entropy(learner(theta, x), y)
        return value + 0.5 * weight_decay * theta.square().sum() if weight_decay else value

    return loss
