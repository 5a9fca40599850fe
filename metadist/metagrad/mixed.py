"""The one second-order product of this project: mixed(theta, b, lambda) = (g, H lambda, d/db <g, lambda>).

Two forms that agree to rounding: reverse-over-reverse (pull lambda back through the gradient) and forward-over-reverse
(push lambda forward through it). Both work on a group of tasks at once, each with its own weights, on batches that the tasks
share or own.

A loss is a function (theta [P], batch) -> scalar. A batch is a tuple of tensors; its floating-point members (images, soft
labels, weights) are differentiated, its integer members (hard labels) are not.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from metadist.errors import unknown

Batch = tuple[Tensor, ...]
Loss = Callable[[Tensor, Batch], Tensor]
FORMS = ("reverse", "forward")


class Mixed(NamedTuple):
    """The result of ``mixed``: gradient [G, P], Hessian product [G, P], one tensor (or None) per member of the batch."""

    gradient: Tensor
    hessian_lambda: Tensor
    batch: tuple[Tensor | None, ...]


def prepare(form: str) -> None:
    """Check a form's name, and load what it needs before a compiler or a warning filter meets it.

    Raises UserError for another form.
    """
    if form not in FORMS:
        raise unknown("engine.mixed", form, FORMS)
    if form == "forward":
        # PyTorch's rules for forward mode are jit scripts and say so in a warning, which no user of ours can mend.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torch._decomp.decompositions_for_jvp")


def floats(batch: Batch) -> Batch:
    """The members of a batch that can be differentiated."""
    return tuple(b for b in batch if b.is_floating_point())


def refill(batch: Batch, values: Batch) -> Batch:
    """``batch`` with its floating-point members replaced, in order, by ``values``."""
    it = iter(values)
    return tuple(next(it) if b.is_floating_point() else b for b in batch)


def pullback(function: Callable[..., Any], *args: Any) -> tuple[Any, Callable[..., Any]]:
    """``torch.func.vjp`` without auxiliary output: (value, function from the value's adjoint to the arguments' adjoints)."""
    result: Any = vjp(function, *args)
    value, pull = result
    return value, pull


def gradients(loss: Loss, theta: Tensor, batch: Batch, shared: bool = True) -> Tensor:
    """Gradient of every task's loss in its own weights: [G, P].

    loss: (theta [P], batch) -> scalar.
    theta: [G, P].
    batch: members [B, ...] if shared, else [G, B, ...].
    """
    # Members are passed one by one so that a batch of None axes is never an empty tree for vmap.
    axis = None if shared else 0
    one = vmap(grad(lambda th, *b: loss(th, b)), in_dims=(0, *(axis,) * len(batch)))
    result: Tensor = one(theta, *batch)
    return result


def one_by_one(loss: Loss, theta: Tensor, batch: Batch, shared: bool = True) -> Tensor:
    """``gradients`` by one backward pass a task: the same numbers, not to be differentiated again."""
    out = []
    with torch.enable_grad():
        for number, own in enumerate(theta):
            own = own.detach().requires_grad_()
            out.append(torch.autograd.grad(loss(own, batch if shared else tuple(b[number] for b in batch)), own)[0])
    return torch.stack(out)


def _expand(batch: Batch, parts: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    it = iter(parts)
    return tuple(next(it) if b.is_floating_point() else None for b in batch)


def mixed(loss: Loss, theta: Tensor, batch: Batch, lam: Tensor, form: str = "reverse", shared: bool = True) -> Mixed:
    """mixed(theta, b, lambda) for a group of tasks.

    loss: (theta [P], batch) -> scalar.
    theta, lam: [G, P] weights and directions.
    batch: members [B, ...] if shared (their part of the result is summed over tasks), else [G, B, ...].
    form: "reverse" | "forward".
    Raises UserError for another form.
    """
    if not torch.compiler.is_compiling():
        prepare(form)
    if form == "forward":
        return _forward(loss, theta, batch, lam, shared)
    g, pull = pullback(lambda th, *v: gradients(loss, th, refill(batch, v), shared), theta, *floats(batch))
    hvp, *parts = pull(lam)
    return Mixed(g, hvp, _expand(batch, tuple(parts)))


def _forward(loss: Loss, theta: Tensor, batch: Batch, lam: Tensor, shared: bool) -> Mixed:
    """Differentiate the gradient in weights AND batch along lambda: the second part is what we want, by symmetry."""
    index = tuple(i + 1 for i, b in enumerate(batch) if b.is_floating_point())
    axis = None if shared else 0
    both = vmap(grad(lambda th, *b: loss(th, b), argnums=(0, *index)), in_dims=(0, *(axis,) * len(batch)))
    # Forward mode writes beside its primal: one weight vector expanded over the tasks must become G vectors first.
    pushed: Any = jvp(lambda th: both(th, *batch), (theta.contiguous(),), (lam,))
    (g, *_), (hvp, *parts) = pushed
    parts = [p.sum(0) for p in parts] if shared else parts
    return Mixed(g, hvp, _expand(batch, tuple(parts)))
