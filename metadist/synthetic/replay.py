"""Training ANY module by a recorded recipe: ordered batches, one learned rate (and momentum) a step.

Design choices
- A plain loop over the module's own parameters: what the module does inside (dropout, BatchNorm in train mode, tied or
  frozen weights) is its own affair. The update is the engine's `Optimizer`, so a rate means here what it meant in the
  meta-gradient; `torch.optim.Adam` puts its epsilon elsewhere and would train another network.
- BatchNorm's running statistics are re-estimated on the distilled images after the last step: after a handful of steps a
  moving average is still mostly its initial value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

from metadist.errors import UserError
from metadist.metagrad.optimizers import Optimizer


def put(net: nn.Module, theta: Tensor) -> None:
    """Copy the flat weights ``theta`` [P] into ``net``'s trainable parameters, in the order of `named_parameters`.

    Raises UserError if the module has another number of weights.
    """
    parameters = [p for p in net.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    if count != len(theta):
        raise UserError(
            f"the set was made for one initialization of {len(theta)} weights, this {type(net).__name__} has {count}; "
            'use the net it was made for, or start="own" to keep this module\'s own weights'
        )
    with torch.no_grad():
        at = 0
        for p in parameters:
            p.copy_(theta[at : at + p.numel()].reshape(p.shape))
            at += p.numel()


def _logits(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The first forward pass, whose failures are the user's mistakes."""
    shape = " x ".join(map(str, x.shape[1:]))
    classes = y.shape[1] if y.is_floating_point() else int(y.max()) + 1
    want = f"it must take images of {shape} and answer [batch, {classes}]"
    try:
        logits: Tensor = net(x)
    except (RuntimeError, ValueError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"this {type(net).__name__} cannot be trained on the set ({reason}); {want}") from e
    fits = logits.dim() == 2 and (logits.shape[1] == classes if y.is_floating_point() else logits.shape[1] >= classes)
    if not fits:
        raise UserError(f"this {type(net).__name__} answers {list(logits.shape)} to the set's {len(x)} images; {want}")
    return logits


def train(net: nn.Module, x: Tensor, y: Tensor, order: Tensor, h: Tensor, optimizer: Optimizer) -> None:
    """Train ``net`` in place, step by step; it is left in evaluation mode.

    x: [S, B, C, H, W] images, of the module's type and device.
    y: [S, B] int64 classes or [S, B, K] probabilities.
    order: [T] which batch is used at which step.
    h: [T, K] of ``optimizer.schedule``.
    Raises UserError if the module cannot take the images or does not answer a logit a class.
    """
    net.train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    if not parameters:
        raise UserError(f"this {type(net).__name__} has no weights to train")
    states = [optimizer.init(p.detach().clone()) for p in parameters]
    with torch.enable_grad():
        for t, s in enumerate(order.tolist()):
            logits = net(x[s]) if t else _logits(net, x[s], y[s])
            loss = cross_entropy(logits, y[s])
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                states = [optimizer.update(state, g, h[t]) for state, g in zip(states, grads)]
                for p, state in zip(parameters, states):
                    p.copy_(state[0])
    update_bn([(batch,) for batch in x], net)
    net.eval()
