"""The bias of a run's meta-gradient: as configured, against the exact one.

Exact means: float64, full precision, every inner step differentiated. Both see the same meta-parameters, tasks, initial weights
and real images and take the meta-loss at the same steps (a window's own end). What differs is truncation and arithmetic, and
what a server's narrow wire (exchange.wire) rounds away.

Beside it, for methods that differentiate training: the first-order shortcut, the exact gradient less its Hessian products. Each
inner gradient is then taken as if the weights it is taken at were constants (what remains is also what TESLA, Cui et al. 2023,
arXiv 2211.10586, computes in constant memory).
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from metadist import methods, nets
from metadist.config import Config
from metadist.data import Data, Split
from metadist.metagrad.inner import Adjoint, Inner
from metadist.metagrad.mixed import Batch, floats, gradients, pullback, refill
from metadist.metagrad.optimizers import State
from metadist.methods.starts import Starts
from metadist.methods.trajectory import Guide, Segments
from metadist.nets.loss import cross_entropy_loss, distillation_loss, judging_loss
from metadist.run.compute import Compute
from metadist.run.folder import RunFolder
from metadist.run.setup import Setup, build, synthetic_of
from metadist.synthetic.images import CARRIED, Phi

EXACT_TERMS = 200
_GROUP = 8  # tasks at once, where the run has not fixed a number


@dataclass(frozen=True)
class Bias:
    """How far one meta-gradient is from the exact one."""

    parameter: str  # images | rate | momentum | labels | all
    cosine: float
    relative_error: float  # |configured - exact| / |exact|
    norm: float  # |exact|


class FirstOrder(Inner):
    """Training whose adjoint leaves out H lambda."""

    def adjoint(self, state: State, batch: Batch, h: Tensor, lam: State) -> Adjoint:
        """See ``Inner``."""
        g, pull = pullback(lambda *v: gradients(self.loss, state[0], refill(batch, v), self.shared), *floats(batch))
        lam, lam_g, lam_h = self._pull_update(state, g, h, lam)
        return lam, pull(lam_g), lam_h


class _Wide:
    """The same starts in float64."""

    def __init__(self, starts: Starts) -> None:
        self.starts = starts

    def segments(self, step: int, tasks: Tensor) -> tuple[Tensor, Tensor]:
        start, end = cast(Segments, self.starts).segments(step, tasks)
        return start.to(torch.float64), end.to(torch.float64)

    def sample(self, step: int, tasks: Tensor) -> Tensor:
        return self.starts.sample(step, tasks).to(torch.float64)

    def held_out(self, count: int, purpose: str = "evaluation") -> Tensor:
        return self.starts.held_out(count, purpose).to(torch.float64)


def exact(setup: Setup) -> Setup:
    """The run without approximations: float64, fp32 units out of play, the whole unroll."""
    config = copy.deepcopy(setup.config)
    if config.method.gradient == "truncated":
        config.method.gradient, config.inner.window = "unrolled", 0
    if config.method.gradient == "implicit":  # the same learners, their systems solved by many more products
        config.implicit.solver, config.implicit.terms = "cg", EXACT_TERMS
    config.engine.dtype, config.engine.precision, config.engine.mixed = "float64", "fp32", "reverse"
    data, wide = _widened(setup.data), torch.float64
    classes = len(data.classes)
    learner = nets.build(config.net, data.channels, data.size, classes, wide, setup.device)
    synthetic = synthetic_of(config, data, wide, setup.device)
    judge = judging_loss(learner) if learner.buffers_size else None
    inner, starts = Inner(cross_entropy_loss(learner), synthetic.optimizer, judge_loss=judge), _Wide(setup.starts)
    guide = setup.guide
    if guide is not None:
        guide = Guide(guide.teacher.to(wide), distillation_loss(learner, config.kd.alpha, config.kd.T, config.kd.scale))
    method = methods.build(config, data, synthetic, inner, starts, learner, guide)
    if config.method.gradient == "unrolled":
        method.window = lambda step: (0, setup.method.window(step)[1])
    return Setup(config, setup.device, data, learner, synthetic, starts, inner, method, guide)


def _widened(data: Data) -> Data:
    # Only the training split is drawn from.
    return dataclasses.replace(data, train=Split(data.train.x.to(torch.float64), data.train.y))


def gradient(setup: Setup, phi: Phi, step: int) -> dict[str, Tensor]:
    """The meta-gradient of one meta-step, by parameter, in float64 on the CPU: mean over all its tasks."""
    tasks = torch.arange(setup.config.tasks)
    group = min(setup.config.engine.group or _GROUP, len(tasks))
    total = Compute(setup.method, group, setup.device, static=False)(phi, step, tasks).to("cpu", torch.float64)
    parts = torch.split(total[:-2] / total[-1], [p.numel() for p in phi.values()])
    return {k: v for k, v in zip(phi, parts, strict=True) if not k.startswith(CARRIED)}


def compare(given: dict[str, Tensor], right: dict[str, Tensor]) -> list[Bias]:
    """One line for each parameter and one for all together."""
    pairs = [(name, given[name], right[name]) for name in right]
    pairs.append(("all", torch.cat([given[n] for n in right]), torch.cat(list(right.values()))))
    out = []
    for name, a, b in pairs:
        norm = float(torch.linalg.vector_norm(b))
        scale = max(float(torch.linalg.vector_norm(a)) * norm, 1e-300)
        error = float(torch.linalg.vector_norm(a - b)) / max(norm, 1e-300)
        out.append(Bias(name, float(a @ b) / scale, error, norm))
    return out


def state_of(folder: RunFolder, setup: Setup) -> tuple[Phi, int]:
    """Meta-parameters and step of the newest checkpoint; those at the start if there is none."""
    found = folder.checkpoints.load_newest()
    if found is None:
        return setup.method.parameters(), 0
    step, tensors, _ = found
    phi = {k.removeprefix("phi/"): v.to(setup.device) for k, v in tensors.items() if k.startswith("phi/")}
    return phi, step


class Found(NamedTuple):
    """Biases of one meta-step's gradient: as configured, and of the first-order shortcut (none if no training is unrolled)."""

    step: int
    configured: list[Bias]
    first_order: list[Bias]


def check(folder: RunFolder, config: Config) -> Found:
    """The biases of a run folder's next meta-step."""
    setup = build(config)
    phi, step = state_of(folder, setup)
    wide, best = {k: v.to(torch.float64) for k, v in phi.items()}, exact(setup)
    right = gradient(best, wide, step)
    given = gradient(setup, as_on_the_wire(phi, config), step)
    return Found(step, compare(as_on_the_wire(given, config), right), compare_shortcut(best, wide, step, right))


def compare_shortcut(best: Setup, phi: Phi, step: int, right: dict[str, Tensor]) -> list[Bias]:
    """Biases of the first-order shortcut; best: from ``exact``, phi: in float64, right: its gradient."""
    if best.config.method.gradient not in ("unrolled", "trajectory"):
        return []
    best.method.inner = first_order(best.method.inner)
    return compare(gradient(best, phi, step), right)


def first_order(inner: Inner) -> Inner:
    """The same training, not compiled, with the shortcut for an adjoint."""
    return FirstOrder(
        inner.loss, inner.optimizer, shared=inner.shared, judge_group=inner.judge_group, judge_loss=inner.judge_loss
    )


def as_on_the_wire(values: Phi, config: Config) -> Phi:
    """Parameters or gradients as they come out of exchange.wire: rounded, if it is narrower than the numbers."""
    if config.exchange.name != "server" or config.exchange.wire == "full":
        return values
    return {k: v.to(torch.bfloat16).to(v.dtype) for k, v in values.items()}
