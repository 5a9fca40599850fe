"""The work that is measured: five cases, each in a CPU, a GPU and a quick size, and the ways each can be done.

Numbers are drawn, not loaded: the time of a step does not depend on what the images show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import reference
import torch
from torch import Tensor

from metadist import draw
from metadist.config import NetConfig
from metadist.evaluate.train import at_once, in_chunks
from metadist.metagrad import Batch, Inner, Loss, Optimizer
from metadist.metagrad.execution import Captured, compiler_at_hand
from metadist.nets import Learner, build
from metadist.nets.loss import cross_entropy_loss

Work = Callable[[], tuple[Tensor, ...]]
CLASSES = 10


@dataclass(frozen=True)
class Size:
    """How much work: a net, T = len(order) inner steps of which the last T - start are differentiated, G networks."""

    title: str
    net: NetConfig
    channels: int
    pixels: int
    tasks: int  # networks, G
    batches: int  # distinct inner batches, S
    batch: int  # images in one
    passes: int  # T = batches * passes
    real: int  # real images of the meta-loss, each network its own
    optimizer: str = "sgd"
    start: int = 0
    repeats: int = 9


def _convnet(width: int) -> NetConfig:
    return NetConfig(name="convnet", width=width)


_LENET = Size("LeNet 10 x 3 steps, {tasks} initializations", NetConfig(), 1, 28, 8, 10, 10, 3, 250)
_CONVNET = Size("ConvNet-3 width {net.width}, 10 steps, {tasks} initializations", _convnet(32), 3, 32, 2, 10, 10, 1, 64)
_WINDOW = Size(
    "random window, Adam, ConvNet-3 width {net.width}, {diff} steps after {start}",
    _convnet(16), 3, 32, 1, 2, 50, 10, 250, "adam", start=10, repeats=5,
)  # fmt: skip
_EVALUATION = Size(
    "evaluation: {tasks} ConvNet-3 width {net.width}, {steps} steps", _convnet(16), 3, 32, 20, 1, 100, 3, 0, repeats=5
)
_MEMORY = Size("memory", _convnet(32), 3, 32, 1, 5, 10, 2, 10, repeats=1)

# name: (on a CPU, on a GPU, quick)
CASES: dict[str, tuple[Size, Size, Size]] = {
    "lenet": (_LENET, replace(_LENET, tasks=32), replace(_LENET, tasks=2, batches=3, passes=1, real=20, repeats=3)),
    "convnet": (
        _CONVNET,
        replace(_CONVNET, net=_convnet(128), tasks=4, real=256),
        replace(_CONVNET, net=_convnet(4), batches=2, real=8, repeats=3),
    ),
    "window": (
        _WINDOW,
        replace(_WINDOW, net=_convnet(128), batch=100, batches=1, passes=130, start=70, real=5000),
        replace(_WINDOW, net=_convnet(4), batch=8, passes=2, start=2, real=8, repeats=3),
    ),
    "evaluation": (
        _EVALUATION,
        replace(_EVALUATION, net=_convnet(128), passes=50),
        replace(_EVALUATION, net=_convnet(4), tasks=3, batch=8, repeats=3),
    ),
    "memory": (_MEMORY, replace(_MEMORY, net=_convnet(128)), replace(_MEMORY, net=_convnet(4))),
}


@dataclass(frozen=True)
class Problem:
    """One case's tensors. batches: images [S, B, C, H, W], labels [S, B]; real: [G, R, C, H, W], [G, R]; h: [T, K]."""

    size: Size
    learner: Learner
    loss: Loss
    optimizer: Optimizer
    theta0: Tensor
    batches: Batch
    order: tuple[int, ...]
    h: Tensor
    real: Batch

    @property
    def title(self) -> str:
        """The case in words, with its numbers."""
        steps = len(self.order)
        return self.size.title.format(**vars(self.size), steps=steps, diff=steps - self.size.start)


def problem(size: Size, device: str) -> Problem:
    """Draw the tensors of a case."""
    learner = build(size.net, size.channels, size.pixels, CLASSES, device=device)
    theta0 = learner.init(draw.key(0, "theta0", 0, torch.arange(size.tasks)).to(device))
    image = (size.channels, size.pixels, size.pixels)
    images = draw.normal(draw.key(0, "images").to(device), (size.batches, size.batch, *image))
    real = draw.normal(draw.key(0, "real").to(device), (size.tasks, size.real, *image))
    labels = [torch.arange(n, device=device) % CLASSES for n in (size.batch, size.real)]
    order = tuple(range(size.batches)) * size.passes
    optimizer = Optimizer(size.optimizer)
    rates = torch.full((len(order),), 0.001 if size.optimizer == "adam" else 0.02, device=device)
    h = optimizer.schedule(rates, torch.full_like(rates, 0.9))
    batches = (images, labels[0].expand(size.batches, -1).contiguous())
    ours = (real, labels[1].expand(size.tasks, -1).contiguous())
    return Problem(size, learner, cross_entropy_loss(learner), optimizer, theta0, batches, order, h, ours)


def meta_gradient(p: Problem, compile: bool = False, graph: bool = False, form: str = "reverse") -> Work:
    """The engine's meta-gradient in images and h, executed as asked; a drawn window is captured step by step, else whole."""
    stepwise = graph and p.size.start > 0
    inner = Inner(p.loss, p.optimizer, form, compile, stepwise, judge_group=at_once(p.learner, 0, p.size.real))

    def meta_step(theta0: Tensor, x: Tensor, y: Tensor, h: Tensor, *real: Tensor) -> tuple[Tensor, ...]:
        leaves = (x.detach().requires_grad_(), h.detach().requires_grad_())
        theta = inner.unroll(theta0, (leaves[0], y), p.order, leaves[1], start=p.size.start)[0]
        return torch.autograd.grad(inner.judge(theta, real).mean(), leaves)

    run: Any = Captured(meta_step) if graph and not stepwise else meta_step
    return lambda: run(p.theta0, *p.batches, p.h, *p.real)


def training(p: Problem, compile: bool = False, graph: bool = False) -> Work:
    """The engine's training of many networks at once, without gradients; captured whole."""
    inner = Inner(p.loss, p.optimizer, compile=compile)
    several = at_once(p.learner, p.size.tasks, p.size.batch)
    run: Any = lambda theta0, x, y, h: (  # noqa: E731
        in_chunks(lambda theta: inner.train(theta, (x, y), p.order, h), len(theta0), several, theta0),
    )
    run = Captured(run) if graph else run
    return lambda: run(p.theta0, *p.batches, p.h)


def references(p: Problem, evaluation: bool) -> dict[str, Work]:
    """The loops to beat, by name."""
    if evaluation:
        lr = float(p.h[0, 0])
        return {"one network after another": lambda: (reference.train_one_by_one(p.learner, p.theta0, p.batches, p.order, lr),)}
    args = (p.loss, p.optimizer, p.theta0, p.batches, p.order, p.h, p.real, p.size.start)
    return {
        "one network after another, graph kept per step": lambda: reference.kept_graphs(*args),
        "one network after another, one graph": lambda: reference.one_graph(*args),
    }


def ours(p: Problem, evaluation: bool, device: str, quick: bool) -> dict[str, Work]:
    """The engine's ways, by name; those this machine can't do are left out, and the slow-to-compile last ones if quick."""
    make: Callable[..., Work] = training if evaluation else meta_gradient
    forms = ("reverse",) if evaluation or quick else ("reverse", "forward")
    ways: dict[str, Work] = {"engine": make(p)}
    for graph in (False, True) if device == "cuda" else (False,):
        suffix = ", CUDA graph" if graph else ""
        if graph:
            ways[f"engine{suffix}"] = make(p, graph=True)
        for form in forms if compiler_at_hand() else ():
            options = {} if evaluation else {"form": form}
            last = ", forward form" if form == "forward" else ""
            ways[f"engine, compiled{suffix}{last}"] = make(p, compile=True, graph=graph, **options)
    return ways
