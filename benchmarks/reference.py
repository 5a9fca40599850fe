"""The training loops that the engine is measured against: what published code does, written as well as it is written there.

Design choices
- Two references, because the field has two habits. ``kept_graphs``: every inner step keeps the graph of its own gradient and
  the backward pass walks the steps (dataset distillation's style). ``one_graph``: one autograd graph through all steps (the
  style of trajectory matching and truncated back-propagation). Both train one network after another.
- Same flat weights, same learner, same optimizer formulas, same work as the engine; nothing is slowed down on purpose: no
  copies, no synchronisation, graphs freed as soon as they are used.
- ``train_one_by_one``: evaluation as it is commonly written, ``torch.optim`` on one module after another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metadist.metagrad import Batch, Loss, Optimizer, State
from metadist.nets import Learner

Meta = tuple[Tensor, Tensor]


def _step(loss: Loss, optimizer: Optimizer, state: State, batch: Batch, h: Tensor) -> State:
    """One inner step whose result has a graph down to the state, the batch and h."""
    (gradient,) = torch.autograd.grad(loss(state[0], batch), state[0], create_graph=True)
    return optimizer.update(state, gradient, h)


def _warm_up(loss: Loss, optimizer: Optimizer, theta0: Tensor, batches: Batch, order: Sequence[int], h: Tensor) -> State:
    """The steps before a truncated window; nothing is kept."""
    x, y = (b.detach() for b in batches)
    state = optimizer.init(theta0)
    for t, s in enumerate(order):
        theta = state[0].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(theta, (x[s], y[s])), theta)
        state = optimizer.update((theta.detach(), *state[1:]), gradient, h[t].detach())
    return state


def one_graph(
    loss: Loss, optimizer: Optimizer, theta0: Tensor, batches: Batch, order: Sequence[int], h: Tensor, real: Batch, start: int
) -> Meta:
    """Meta-gradient in images [S, B, ...] and table h [T, K], mean over networks; theta0 [G, P], real [G, R, ...]."""
    x, y = batches
    total = [torch.zeros_like(x), torch.zeros_like(h)]
    for g in range(len(theta0)):
        leaves = (x.detach().requires_grad_(), h.detach().requires_grad_())
        state = _warm_up(loss, optimizer, theta0[g], batches, order[:start], h)
        state = (state[0].requires_grad_(), *state[1:])
        for t in range(start, len(order)):
            state = _step(loss, optimizer, state, (leaves[0][order[t]], y[order[t]]), leaves[1][t])
        meta = loss(state[0], tuple(r[g] for r in real))
        for whole, part in zip(total, torch.autograd.grad(meta, leaves), strict=True):
            whole.add_(part)
    return total[0] / len(theta0), total[1] / len(theta0)


def kept_graphs(
    loss: Loss, optimizer: Optimizer, theta0: Tensor, batches: Batch, order: Sequence[int], h: Tensor, real: Batch, start: int
) -> Meta:
    """The same as ``one_graph``: each step's graph ends at its own state, and the backward loop joins them."""
    x, y = batches
    total = [torch.zeros_like(x), torch.zeros_like(h)]
    for g in range(len(theta0)):
        images, table = [b.detach().requires_grad_() for b in x], [row.detach().requires_grad_() for row in h]
        state = _warm_up(loss, optimizer, theta0[g], batches, order[:start], h)
        steps: list[tuple[State, State]] = []
        for t in range(start, len(order)):
            before = tuple(s.detach().requires_grad_() for s in state)
            state = _step(loss, optimizer, before, (images[order[t]], y[order[t]]), table[t])
            steps.append((before, state))
        theta = state[0].detach().requires_grad_()
        lam = torch.autograd.grad(loss(theta, tuple(r[g] for r in real)), theta)
        lam += tuple(torch.zeros_like(theta) for _ in range(optimizer.buffers))
        for t in reversed(range(start, len(order))):
            before, after = steps.pop()
            *lam_state, part, lam_h = torch.autograd.grad(after, (*before, images[order[t]], table[t]), lam)
            lam = tuple(lam_state)
            total[0][order[t]].add_(part)
            total[1][t].add_(lam_h)
    return total[0] / len(theta0), total[1] / len(theta0)


def train_one_by_one(learner: Learner, theta0: Tensor, batches: Batch, order: Sequence[int], lr: float) -> Tensor:
    """Weights [G, P] of networks trained one after another by ``torch.optim.SGD``."""
    x, y = batches
    out = []
    for theta in theta0:
        module = learner.module(theta)
        optimizer = torch.optim.SGD(module.parameters(), lr=lr)
        for s in order:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x[s]), y[s]).backward()
            optimizer.step()
        out.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    return torch.stack(out)
