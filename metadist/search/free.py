"""Proxies that train nothing: parameters, FLOPs, synflow. They stand beside every proxy that costs something.

- params: trainable numbers.
- flops: floating-point operations of one image's forward pass as torch counts them, two a multiply-add; of convolutions and
  matrix products alone.
- synflow (Tanaka et al. 2020, arXiv 2006.05467, as a score of architectures: Abdelfattah et al. 2021, arXiv 2101.08134):
  R = sum of the logits of an image of ones, through the absolute values of weights drawn anew; the score is log(1 + S) of
  S = sum |theta dR/dtheta|. The logarithm changes no rank. Normalizations are left out: the sources have batch normalization by
  fresh statistics, which is the identity; instance, group and layer normalization would make zeros of an image of ones.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.flop_counter import FlopCounterMode

from metadist import draw
from metadist.config_search import FREE
from metadist.errors import unknown
from metadist.nets.learner import Learner
from metadist.search.space import Space, build


def score(
    kind: str, space: Space, index: int, channels: int, size: int, classes: int, seed: int, init: str = "default"
) -> float:
    """One candidate's score, for images [channels, size, size].

    kind: params | flops | synflow. seed, init: of synflow's weights.
    Raises UserError for another kind and for images that the candidate can't take.
    """
    if kind not in FREE:
        raise unknown("free proxy", kind, FREE)
    learner = build(space, (index,), channels, size, classes, init, torch.float64).learner
    if kind == "params":
        return float(learner.size)
    x = torch.ones(1, channels, size, size, dtype=torch.float64)
    return _flops(learner, x) if kind == "flops" else _synflow(learner, x, draw.key(seed, "search synflow", 0, index)[None])


@torch.no_grad()
def _flops(learner: Learner, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        learner.template.eval()(x)
    return float(counter.get_total_flops())


def _synflow(learner: Learner, x: Tensor, key: Tensor) -> float:
    plain = Learner(_without_norms(learner.template), learner.kind, learner.factory, torch.float64)
    theta = plain.init(key)[0].abs().requires_grad_()
    (gradient,) = torch.autograd.grad(plain.predict(theta, theta.new_zeros(0), x).sum(), theta)
    return math.log1p(float((theta.detach() * gradient).abs().sum()))


def _without_norms(module: nn.Module) -> nn.Module:
    """A copy whose normalizations are identities."""
    out = copy.deepcopy(module)
    for parent in list(out.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
                setattr(parent, name, nn.Identity())
    return out
