"""The work of ``trajectory.py``: the gradient of trajectory matching by the plain loop and by the engine, in every way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from metadist import draw
from metadist.config import NetConfig
from metadist.metagrad import Inner, Optimizer
from metadist.metagrad.execution import Captured, compiler_at_hand
from metadist.nets import Learner, build
from metadist.nets.loss import cross_entropy_loss

CLASSES, PIXELS, CHANNELS = 10, 32, 3
LOOP = "plain loop, one graph"
Work = Callable[[int], tuple[Tensor, ...]]  # of a number of inner steps


@dataclass(frozen=True)
class Size:
    """images a class, inner steps, segments of a meta-step; ConvNet-3 of this width."""

    ipc: int
    steps: int
    segments: int
    width: int = 128
    pixels: int = PIXELS


CASES = {"ipc10": Size(10, 30, 1), "ipc1": Size(1, 50, 1), "ipc1x8": Size(1, 50, 8)}


@dataclass(frozen=True)
class Problem:
    """theta0, target: [J, P], ends of the expert's segments; x [B, C, H, W], y [B]: all distilled images, each step's batch."""

    size: Size
    learner: Learner
    theta0: Tensor
    target: Tensor
    x: Tensor
    y: Tensor
    rate: Tensor


def problem(size: Size, device: str, dtype: torch.dtype = torch.float32) -> Problem:
    """Drawn numbers: the time of a step does not depend on what the images show."""
    learner = build(NetConfig(name="convnet", width=size.width, init="default"), CHANNELS, size.pixels, CLASSES, dtype, device)
    tasks = torch.arange(size.segments, device=device)
    theta0 = learner.init(draw.key(0, "theta0", 0, tasks))
    target = theta0 + 0.01 * draw.normal(draw.key(0, "target", 0, tasks), (learner.size,), dtype)
    images = draw.normal(draw.key(0, "images").to(device), (size.ipc * CLASSES, CHANNELS, size.pixels, size.pixels), dtype)
    labels = torch.arange(size.ipc * CLASSES, device=device) % CLASSES
    return Problem(size, learner, theta0, target, images, labels, torch.tensor(0.01, dtype=dtype, device=device))


def loop(p: Problem, steps: int) -> tuple[Tensor, ...]:
    """Gradient in images and rate of |theta_N - target|^2 / |theta_0 - target|^2, mean over segments: one autograd graph."""
    module, names, total = p.learner.template, p.learner.names, [torch.zeros_like(p.x), torch.zeros_like(p.rate)]
    for start, target in zip(p.theta0, p.target):
        x, rate = p.x.detach().requires_grad_(), p.rate.detach().requires_grad_()
        weights = {name: part.detach().requires_grad_() for name, part in p.learner.views(start).items()}
        for _ in range(steps):
            loss = cross_entropy(functional_call(module, weights, (x,)), p.y)
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {name: w - rate * g for (name, w), g in zip(weights.items(), gradients)}
        end = torch.cat([weights[name].flatten() for name in names])
        distance = (end - target).square().sum() / (start - target).square().sum()
        for whole, part in zip(total, torch.autograd.grad(distance, (x, rate))):
            whole.add_(part)
    return tuple(t / len(p.theta0) for t in total)


def engine(p: Problem, form: str, compile: bool = False, graph: bool = False, group: int = 0) -> Work:
    """The same by ``Inner.unroll``, ``group`` segments at once (0: all)."""
    optimizer = Optimizer("sgd")
    inner = Inner(cross_entropy_loss(p.learner), optimizer, form, compile)
    y = p.y[None]

    def some(steps: int, theta0: Tensor, target: Tensor, images: Tensor, lr: Tensor) -> tuple[Tensor, ...]:
        order = (0,) * steps
        x, rate = images.detach().requires_grad_(), lr.detach().requires_grad_()
        end = inner.unroll(theta0, (x[None], y), order, optimizer.schedule(rate.expand(len(order))))[0]
        distance = (end - target).square().sum(1) / (theta0 - target).square().sum(1)
        return torch.autograd.grad(distance.sum() / len(p.theta0), (x, rate))

    captured = Captured(functools.partial(some, p.size.steps)) if graph else None
    pieces = list(zip(torch.split(p.theta0, group or len(p.theta0)), torch.split(p.target, group or len(p.theta0))))

    def work(steps: int) -> tuple[Tensor, ...]:
        run: Any = captured or functools.partial(some, steps)
        parts = [run(theta0, target, p.x, p.rate) for theta0, target in pieces]
        return tuple(torch.stack(part).sum(0) for part in zip(*parts))

    return work


def ways(p: Problem, device: str, compiled: bool) -> dict[str, Work]:
    """Every way of a case; those that this machine can't do are left out."""
    found: dict[str, Work] = {LOOP: functools.partial(loop, p)}
    groups = (0,) if len(p.theta0) == 1 else (0, 1)
    for compile in (False, True) if compiled and compiler_at_hand(device) else (False,):
        for graph in (False, True) if device == "cuda" else (False,):
            for form in ("reverse", "forward"):
                for group in groups:
                    words = ("engine", form, *["compiled"] * compile, *["CUDA graph"] * graph, *["one at a time"] * bool(group))
                    found[", ".join(words)] = engine(p, form, compile, graph, group)
    return found
