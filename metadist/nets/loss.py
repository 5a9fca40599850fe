"""Losses: mean cross-entropy of hard or soft labels as a pure function of a learner's weights; knowledge distillation's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

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


def distillation(z: Tensor, p: Tensor, y: Tensor, alpha: float, T: float, scale: float | None = None) -> Tensor:
    """Knowledge distillation's loss (Hinton et al. 2015, arXiv 1503.02531), means over the batch:

        (1 - alpha) CE(z, y) + alpha s KL(p || softmax(z / T)).

    z: [B, K], the student's logits.
    p: [B, K], the teacher's probabilities softmax(t / T), or the mean of several teachers'; differentiable, like z.
    y: int64 [B] class numbers, or float [B, K] probabilities; not looked at where alpha is 1.
    alpha: weight of the soft term, 0 to 1. T: temperature, above 0.
    scale: s; None: T^2, which keeps the size of the soft term's gradient, alpha T (softmax(z / T) - p), as T grows: T^2 KL then
        tends to |z - t|^2 / 2K, for logits of zero mean.
    """
    s = T**2 if scale is None else scale
    known = (p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)
    soft = (known - (p * log_softmax(z / T, dim=-1)).sum(-1)).mean()
    return alpha * s * soft if alpha == 1 else (1 - alpha) * cross_entropy(z, y) + alpha * s * soft


def distillation_loss(learner: Learner, alpha: float, T: float, scale: float | None = None) -> Loss:
    """``distillation`` as the loss (theta [P], (x [B, C, H, W], y, t)) of a student; t: float [B, K], the teacher's logits."""

    def loss(theta: Tensor, batch: Batch) -> Tensor:
        x, y, t = batch
        return distillation(learner(theta, x), softmax(t / T, dim=1), y, alpha, T, scale)

    return loss
