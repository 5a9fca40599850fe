"""Losses: mean cross-entropy of hard or soft labels as a pure function of a learner's weights; knowledge distillation's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from metadist.metagrad.mixed import Batch, Loss

if TYPE_CHECKING:
    from metadist.nets.learner import Learner


def judging_loss(learner: Learner) -> Loss:
    """The loss (theta [P], (z, x, y)) -> mean cross-entropy on x [R, C, H, W], y [R], of a net as it is evaluated.

    z: [B, C, H, W], the images that BatchNorm's statistics are taken from: synthetic ones, as in every evaluation. By the real
    batch's own statistics, the meta-loss would be that of another net than the one that is judged.
    """

    def loss(theta: Tensor, batch: Batch) -> Tensor:
        z, x, y = batch
        return cross_entropy(learner.predict(theta, learner.statistics(theta, z), x), y)

    return loss


def with_l2(loss: Loss, weight: float) -> Loss:
    """``loss`` + weight / 2 * |theta|^2."""
    return lambda theta, batch: loss(theta, batch) + 0.5 * weight * theta.square().sum()


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


def distillation(logits: Tensor, soft: Tensor, y: Tensor, alpha: float, T: float, scale: float | None = None) -> Tensor:
    """(1 - alpha) cross-entropy + alpha scale KL(soft || softmax(logits / T)), batch mean (arXiv 1503.02531).

    logits: the student's, [B, K].
    soft: the teacher's probabilities at the temperature, softmax(z / T), or the mean of several teachers', [B, K].
    y: int64 [B] class numbers, or float [B, K] probabilities; not looked at if alpha is 1.
    alpha: weight of the soft term, in [0, 1].
    T: temperature, above 0.
    scale: factor of the divergence; None: T^2, which keeps the size of its gradient, T (q - p) in a logit, as T grows: in the
        limit of high T the term is |z - v|^2 / (2 K), of logits centred to zero mean.
    """
    weight = T**2 if scale is None else scale
    p = soft.to(logits.dtype)
    entropy = (p * p.clamp(min=1e-38).log()).sum(-1)
    divergence = (entropy - (p * log_softmax(logits / T, -1)).sum(-1)).mean()
    if alpha == 1:
        return weight * divergence
    return (1 - alpha) * cross_entropy(logits, y) + alpha * weight * divergence
