"""Small float64 problems for the engine's tests, and the same training written once more as one plain autograd graph.

The plain graph is written from the optimizers' published formulas, task by task and step by step, and shares no code with the
engine but the learner. Nets are smooth (sigmoid, average pooling) except LeNet, whose ReLUs and max-pools have kinks: its cases
work because no kink lies between the two ends of a finite difference at these seeds. A kink would show as an error of order 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metadist import draw
from metadist.config import NetConfig
from metadist.metagrad import Inner, Loss, Optimizer
from metadist.nets import Learner, build
from metadist.nets.loss import cross_entropy_loss

CLASSES, TASKS, STEPS, BATCH = 3, 2, 2, 6  # inner batches of 6 images, 2 of them, for 2 networks
ORDER = (0, 1, 1)  # three inner steps; the second batch is used twice
KINDS = ("sgd", "momentum", "adam")
NETS = {
    "mlp": (NetConfig(name="mlp", width=6, depth=1, activation="sigmoid"), 6),
    "lenet": (NetConfig(name="lenet"), 12),
    "convnet_instance": (NetConfig(name="convnet", width=3, depth=2, norm="instance", activation="sigmoid"), 8),
    "convnet_batch": (NetConfig(name="convnet", width=3, depth=2, norm="batch", activation="sigmoid"), 8),
}


@dataclass(frozen=True)
class Params:
    """What is learned: theta0 [G, P], pixels [S, B, C, H, W], logits of soft labels [S, B, K], rates [T], momenta [T]."""

    theta0: Tensor
    pixels: Tensor
    labels: Tensor
    rates: Tensor
    momenta: Tensor

    def leaves(self) -> Params:
        """The same numbers, as leaves that ask for gradients."""
        return Params(**{name: value.detach().clone().requires_grad_() for name, value in vars(self).items()})

    def moved(self, name: str, direction: Tensor) -> Params:
        """One of them moved by ``direction``."""
        return replace(self, **{name: getattr(self, name) + direction})

    def batches(self) -> tuple[Tensor, Tensor]:
        """Inner batches with soft labels."""
        return self.pixels, self.labels.softmax(-1)

    def grads(self) -> dict[str, Tensor]:
        """Gradients of the leaves (zeros where none arrived)."""
        return {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in vars(self).items()}


@dataclass(frozen=True)
class Case:
    """A learner, its loss, the point to differentiate at and real data for the meta-loss."""

    learner: Learner
    loss: Loss
    params: Params
    real: tuple[Tensor, Tensor]

    def meta_loss(self, thetas: Tensor) -> Tensor:
        """Sum over tasks and returned steps of the loss on real data; thetas [len(at), G, P]."""
        return torch.vmap(self.loss, (0, None))(thetas.flatten(0, 1), self.real).sum()


def normal(name: str, shape: Sequence[int], index: int = 0) -> Tensor:
    """Standard normal numbers of this name, float64."""
    # Summed uniforms would do; what matters is the full float64 mantissa, so that no two pixels tie in a max-pool.
    keys = draw.key(1, name, index)
    return draw.normal(keys, shape, torch.float64) + 1e-3 * draw.uniform(keys, shape, torch.float64)


def make(net: str, shared: bool = True) -> Case:
    """The case of one net; with shared=False every task owns its batches."""
    config, size = NETS[net]
    learner = build(config, 1, size, CLASSES, torch.float64)
    lead = (STEPS, BATCH) if shared else (TASKS, STEPS, BATCH)
    params = Params(
        theta0=learner.init(draw.key(2, "theta0", 0, torch.arange(TASKS))),
        pixels=normal("pixels", (*lead, 1, size, size)),
        labels=normal("labels", (*lead, CLASSES)),
        rates=torch.tensor([0.3, 0.2, 0.25], dtype=torch.float64),
        momenta=torch.tensor([0.6, 0.5, 0.7], dtype=torch.float64),
    )
    real = (normal("real", (8, 1, size, size)), torch.arange(8) % CLASSES)
    return Case(learner, cross_entropy_loss(learner), params, real)


def rates_of(kind: str, params: Params) -> Tensor:
    """Adam's steps are of size rate whatever the gradient: it gets a tenth."""
    return params.rates * (0.1 if kind == "adam" else 1.0)


def engine(
    case: Case, kind: str, params: Params, at: Sequence[int] = (3,), start: int = 0, form: str = "reverse", **options: bool
) -> Tensor:
    """Weights [len(at), G, P] by the engine."""
    optimizer = Optimizer(kind)
    h = optimizer.schedule(rates_of(kind, params), params.momenta)
    inner = Inner(case.loss, optimizer, form, **options)
    return inner.unroll(params.theta0, params.batches(), ORDER, h, at, start)


def plain(
    case: Case, kind: str, params: Params, at: Sequence[int] = (3,), start: int = 0, shared: bool = True, eps: float = 1e-4
) -> Tensor:
    """Weights [len(at), G, P] by one autograd graph per task through all steps; what precedes ``start`` is detached."""
    x, y = params.batches()
    rates = rates_of(kind, params)
    tasks = []
    for g in range(len(params.theta0)):
        theta, seen = params.theta0[g], []
        m = v = torch.zeros_like(theta)
        for t, s in enumerate(ORDER):
            if t == start > 0:
                theta, m, v = theta.detach(), m.detach(), v.detach()
            batch = (x[s], y[s]) if shared else (x[g, s], y[g, s])
            weights = theta if theta.requires_grad else theta.detach().requires_grad_()
            (grad,) = torch.autograd.grad(case.loss(weights, batch), weights, create_graph=True)
            mu = params.momenta[t]
            if kind == "sgd":
                theta = weights - rates[t] * grad
            elif kind == "momentum":
                m = mu * m + grad
                theta = weights - rates[t] * m
            else:
                m, v = mu * m + (1 - mu) * grad, 0.999 * v + 0.001 * grad**2
                unbiased = m / (1 - params.momenta[: t + 1].prod())
                theta = weights - rates[t] * unbiased / (v / (1 - 0.999 ** (t + 1)) + eps**2).sqrt()
            seen.append(theta)
        tasks.append(torch.stack([seen[a - 1] for a in at]))
    return torch.stack(tasks, 1)


def gradients_of(case: Case, run: Callable[..., Tensor], kind: str, **options: object) -> dict[str, Tensor]:
    """Meta-gradient of ``case.meta_loss`` in everything that is learned, through ``engine`` or ``plain``."""
    leaves = case.params.leaves()
    case.meta_loss(run(case, kind, leaves, **options)).backward()
    return leaves.grads()


def difference(a: Tensor, b: Tensor) -> float:
    """|a - b| relative to |b|."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm())
