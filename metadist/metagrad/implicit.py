"""Weights at a stationary point of the inner loss as a differentiable function of the batch: ``fixed_point``.

Design choices
- The implicit function theorem: with g(theta*, b) = 0, d theta*/db = -H^-1 dg/db. Backward solves H v = lambda with products
  alone, then takes minus the batch part of ``mixed(theta*, b, v)``. Nothing of the training that led to theta* is kept.
- A fixed count of products, no tolerance: no host synchronisation, static shapes, the same work on every machine. Every task
  is solved by itself; one that has converged stays where it is while others go on.
- The gradient is linearised once, and every product re-uses it; the last ``mixed`` yields the true residual for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp

from metadist.errors import unknown
from metadist.metagrad.mixed import Batch, Loss, floats, gradients, mixed, prepare, refill

SOLVERS = ("cg", "neumann")
Product = Callable[[Tensor], Tensor]


class Solve(NamedTuple):
    """How well one backward pass solved its systems; tensors on the device, so that looking is the caller's choice.

    residual: [G] |lambda - (H + damping) v| / |lambda|.
    gradient_norm: [G] |g(theta*)|: how far theta* is from the stationary point that the theorem assumes.
    """

    residual: Tensor
    gradient_norm: Tensor


class _Settings(NamedTuple):
    loss: Loss
    batch: Batch
    solver: str
    terms: int
    step: float | None
    damping: float
    form: str
    shared: bool
    report: Callable[[Solve], None] | None


def fixed_point(
    loss: Loss,
    theta_star: Tensor,
    batch: Batch,
    solver: str = "cg",
    terms: int = 20,
    step: float | None = None,
    damping: float = 0.0,
    form: str = "reverse",
    shared: bool = True,
    report: Callable[[Solve], None] | None = None,
) -> Tensor:
    """``theta_star`` itself, now differentiable in the batch by the implicit function theorem.

    loss: (theta [P], batch) -> scalar, strictly convex near theta_star: keep an l2 term in it. Rates and order of the steps
        that led there have no part in the gradient; tensors it closes over get none.
    theta_star: [G, P], stationary points of the loss; no gradient flows to it.
    batch: members [B, ...] if shared (their gradient is summed over tasks), else [G, B, ...].
    solver: "cg" (conjugate gradients) | "neumann" (step * sum over k < terms of (I - step H)^k lambda).
    terms: Hessian products of cg, terms of the Neumann series.
    step: Neumann's, below 2 / (largest eigenvalue of H + damping); its error shrinks by max |1 - step eigenvalue| a term.
    damping: added to the diagonal of H; not exact unless 0.
    form: form of ``mixed``, "reverse" | "forward".
    report: called in each backward pass with its ``Solve``.
    Raises UserError for an unknown solver or form, ValueError for terms < 1, damping < 0, or Neumann without a step > 0.
    Sources: Lorraine et al. 2020, arXiv 1911.02590 (Neumann); Hestenes & Stiefel 1952 (cg).
    """
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    prepare(form)
    if terms < 1 or damping < 0 or (solver == "neumann" and (step is None or step <= 0)):
        raise ValueError(f"need terms >= 1, damping >= 0 and Neumann's step > 0; got {terms=}, {damping=}, {step=}")
    kept = tuple(b.detach() for b in batch)
    settings = _Settings(loss, kept, solver, terms, step, damping, form, shared, report)
    out: Tensor = _FixedPoint.apply(settings, theta_star.detach(), *floats(batch))
    return out


def hessian(loss: Loss, theta: Tensor, batch: Batch, form: str = "reverse", shared: bool = True) -> Product:
    """The Hessian of every task's loss as a function v [G, P] -> H v [G, P]; arguments as for ``mixed``."""
    if form == "reverse":
        pull = vjp(lambda th: gradients(loss, th, batch, shared), theta)[1]
        return lambda v: pull(v)[0]
    theta = theta.contiguous()  # for a theta expanded over the tasks; see ``mixed``
    return lambda v: jvp(lambda th: gradients(loss, th, batch, shared), (theta,), (v,))[1]


def conjugate_gradients(product: Product, right: Tensor, terms: int) -> Tensor:
    """Solve A v = right for every task with ``terms`` products; A symmetric, positive definite.

    product: v [G, P] -> A v [G, P].
    right: [G, P].
    """
    v, residual, direction = torch.zeros_like(right), right, right
    square = _dot(residual, residual)
    for _ in range(terms):
        image = product(direction)
        # Where a task has converged (or meets no positive curvature) both quotients are 0 and it stays as it is.
        length = _quotient(square, _dot(direction, image))
        v, residual = v + length * direction, residual - length * image
        square, before = _dot(residual, residual), square
        direction = residual + _quotient(square, before) * direction
    return v


def neumann(product: Product, right: Tensor, terms: int, step: float) -> Tensor:
    """step * sum over k < terms of (I - step A)^k right, with terms - 1 products; arguments as ``conjugate_gradients``."""
    total, term = right, right
    for _ in range(terms - 1):
        term = term - step * product(term)
        total = total + term
    return step * total


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0)


class _FixedPoint(torch.autograd.Function):
    """Autograd's view of the theorem."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, theta: Tensor, *values: Tensor) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(theta, *values)
        return theta.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, lam: Tensor) -> tuple[Tensor | None, ...]:
        theta, *values = ctx.saved_tensors
        s: _Settings = ctx.settings
        batch = refill(s.batch, tuple(values))
        bare = hessian(s.loss, theta, batch, s.form, s.shared)

        def damped(v: Tensor) -> Tensor:
            return bare(v) + s.damping * v

        if s.step is not None and s.solver == "neumann":
            v = neumann(damped, lam, s.terms, s.step)
        else:
            v = conjugate_gradients(damped, lam, s.terms)
        product = mixed(s.loss, theta, batch, v, s.form, s.shared)
        if s.report is not None:
            rest = lam - product.hessian_lambda - s.damping * v
            s.report(Solve(_quotient(rest.norm(dim=-1), lam.norm(dim=-1)), product.gradient.norm(dim=-1)))
        return (None, None, *(-p for p in product.batch if p is not None))
