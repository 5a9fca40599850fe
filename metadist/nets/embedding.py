"""What a net sees in an image before it decides: the activations in front of its last linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from metadist import draw
from metadist.errors import UserError
from metadist.nets.learner import Learner
from metadist.nets.weight_norm import normalized

Embed = Callable[[Tensor, Tensor], Tensor]


def embedding(learner: Learner, shape: torch.Size) -> Embed:
    """The function (theta [P], x [B, C, H, W]) -> activations [B, F] before the last linear layer. Pure, as the learner is.

    learner: its training-time forward pass is taken (BatchNorm uses the batch).
    shape: [C, H, W] of an image.
    Raises UserError for a net without a linear layer, or whose last one doesn't make the logits.
    """
    what = type(learner.template).__name__
    layers = [(name, m) for name, m in learner.net.named_modules() if isinstance(m, nn.Linear)]
    if not layers or not layers[-1][0]:
        raise UserError(
            f"the net {what} has no linear layer behind its features, and distribution matching compares what comes before it; "
            "choose another net"
        )
    name, last = layers[-1]
    body = copy.deepcopy(learner.net, {id(p): p for p in learner.net.parameters()})
    path, _, local = name.rpartition(".")
    setattr(body.get_submodule(path), local, nn.Identity())
    known = {n for n, _ in body.named_parameters()}

    def embed(theta: Tensor, x: Tensor) -> Tensor:
        features: Tensor = functional_call(body, {n: v for n, v in learner.views(theta).items() if n in known}, (x,))
        return features

    if not _decides(learner, embed, name, last, shape):
        raise UserError(
            f"layer {name}, the last linear one of the net {what}, doesn't make its logits of its features, and distribution "
            "matching compares what comes before it; choose another net, or put that layer last"
        )
    return embed


@torch.no_grad()
def _decides(learner: Learner, embed: Embed, name: str, last: nn.Linear, shape: torch.Size) -> bool:
    """Whether the layer, applied to the embedding, gives the logits."""
    key = torch.zeros(1, dtype=torch.int64, device=learner.device)
    theta = learner.init(draw.key(0, "theta0", 0, key))[0]
    x = draw.normal(draw.key(0, "check", 0, key[0]), (4, *shape), learner.dtype)
    features, views, logits = embed(theta, x), learner.views(theta), learner(theta, x)
    weight, bias = views.get(f"{name}.weight", last.weight), views.get(f"{name}.bias", last.bias)
    if (gain := views.get(f"{name}.gain")) is not None:
        weight = normalized(weight, gain)
    fits = features.dim() == 2 and features.shape[1] == weight.shape[1] and weight.shape[0] == logits.shape[1]
    return fits and torch.allclose(linear(features, weight, bias), logits, rtol=1e-3, atol=1e-4)
