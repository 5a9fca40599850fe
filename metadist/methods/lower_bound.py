"""How many distilled examples linear regression needs (Wang et al. 2018, arXiv 1811.10959), shown by learning them.

    python launch/local.py method=lower_bound lower_bound.dimension=16

Real data d [N, D], t [N], loss L(theta) = |d theta - t|^2 / 2N with A = d^T d / N and optimum theta*. One step on M distilled
examples (d~, t~) at rate eta~ is an affine map

    theta1 = (I - B) theta0 + b,    B = (eta~ / M) d~^T d~,    b = (eta~ / M) d~^T t~,

and the columns of [s B, b] lie in the row space of d~, which has at most M dimensions. For theta0 ~ N(0, s^2 I)

    E L(theta1) - L(theta*) = 1/2 | A^(1/2) [s I, theta*] - A^(1/2) [s B, b] |_F^2.

The second matrix has rank M at most, so (Eckart & Young 1936) no M examples get below the ``bound``

    1/2 sum of the D - M smallest eigenvalues of A^(1/2) (s^2 I + theta* theta*^T) A^(1/2),

which is above 0 for M < rank(A), and 0 from there on: d~ = c I, t~ = c theta*, eta~ = D / c^2 has B = I, b = theta* and reaches
the optimum from any theta0. The bound leaves out only that B is symmetric; what is learned comes within a few percent of it.

Design choices
- The set (images, labels and rate alike) is learned through the project's own engine, in float64, by L-BFGS.
- The excess is quadratic in theta0, so its mean over the 2D starts +-s sqrt(D) q_i, q a random rotation, is exactly its
  expectation over N(0, s^2 I): learning and judging know no sampling error. s = 1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metadist import draw
from metadist.config import Config
from metadist.metagrad.inner import Inner
from metadist.metagrad.mixed import Batch
from metadist.metagrad.optimizers import Optimizer
from metadist.methods.lower_bound_plot import picture
from metadist.store import atomic_write

ITERATIONS = 400  # L-BFGS, at most
PRECISION = 1e-10  # of the excess, where learning ends
CHECKS = 10  # starts of the closed-form check


class Problem(NamedTuple):
    """One regression: real data d [N, D], t [N], the optimum theta* [D] (least norm), and the rank of d."""

    d: Tensor
    t: Tensor
    optimum: Tensor
    rank: int


class Regression(NamedTuple):
    """A distilled set: d [M, D], t [M] and the rate of its one step, a tensor []."""

    d: Tensor
    t: Tensor
    rate: Tensor


def problem(seed: int, trial: int, dimension: int, samples: int) -> Problem:
    """Gaussian features, targets by Gaussian weights and noise of deviation 1/2, float64; a function of (seed, trial)."""
    key = draw.key(seed, "regression", 0, trial)
    parts = [draw.split(key, i) for i in range(3)]
    d = draw.normal(parts[0], (samples, dimension), torch.float64)
    t = d @ draw.normal(parts[1], (dimension,), torch.float64) + draw.normal(parts[2], (samples,), torch.float64) / 2
    pseudo = torch.linalg.pinv(d)
    return Problem(d, t, pseudo @ t, int(torch.linalg.matrix_rank(d)))


def starts(seed: int, trial: int, dimension: int) -> Tensor:
    """[2D, D] starts whose mean of any quadratic function is its expectation over N(0, I); ``trial`` draws their rotation."""
    square = draw.normal(draw.key(seed, "regression starts", 0, trial), (dimension, dimension), torch.float64)
    q = torch.linalg.qr(square).Q * math.sqrt(dimension)
    return torch.cat((q, -q))


def squared_loss(theta: Tensor, batch: Batch) -> Tensor:
    """|d theta - t|^2 / 2M of a batch d [M, D], t [M]."""
    d, t = batch
    return (d @ theta - t).square().mean() / 2


def step(distilled: Regression, theta0: Tensor) -> Tensor:
    """Weights after the engine's one step on the set: [G, D] -> [G, D], differentiable in the set."""
    optimizer = Optimizer("sgd")
    batches = (distilled.d[None], distilled.t[None])
    h = optimizer.schedule(distilled.rate.reshape(1))
    return Inner(squared_loss, optimizer).unroll(theta0, batches, (0,), h)[0]


def excess(p: Problem, theta: Tensor) -> Tensor:
    """L(theta) - L(theta*) for each of theta [G, D]: [G], without cancellation (residual and features are orthogonal)."""
    return ((theta - p.optimum) @ p.d.T).square().mean(1) / 2


def bound(p: Problem, size: int) -> float:
    """What no set of ``size`` examples gets below, in expectation over theta0 ~ N(0, I). 0 where size >= rank."""
    if size >= p.rank:
        return 0.0
    # Squared singular values of d [I, theta*] / sqrt(N) are the eigenvalues of A^(1/2) (I + theta* theta*^T) A^(1/2).
    values = torch.linalg.svdvals(torch.cat((p.d, (p.d @ p.optimum)[:, None]), dim=1)).square() / len(p.d)
    return float(values[size:].sum()) / 2


def closed_form(p: Problem, scale: float = 1.0) -> Regression:
    """M = D examples that reach the optimum from any theta0: d~ = c I, t~ = c theta*, eta~ = D / c^2, c = scale."""
    dimension = p.d.shape[1]
    rate = torch.tensor(dimension / scale**2, dtype=p.d.dtype)
    return Regression(scale * torch.eye(dimension, dtype=p.d.dtype), scale * p.optimum, rate)


def learn(p: Problem, size: int, seed: int, trial: int) -> Regression:
    """The best set of ``size`` examples, from random ones: L-BFGS on the expected excess, by the engine's meta-gradient."""
    dimension = p.d.shape[1]
    start = draw.normal(draw.key(seed, "regression set", size, trial), (size, dimension + 1), torch.float64)
    values = [
        start[:, :dimension].clone(),
        start[:, dimension].clone(),
        torch.tensor(math.log(size / (size + dimension))).double(),
    ]
    phi = [v.requires_grad_() for v in values]
    theta0 = starts(seed, trial, dimension)
    optimizer = torch.optim.LBFGS(
        phi,
        max_iter=ITERATIONS,
        history_size=30,
        tolerance_grad=1e-9,
        tolerance_change=PRECISION,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = excess(p, step(Regression(phi[0], phi[1], phi[2].exp()), theta0)).mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    d, t, log_rate = (v.detach() for v in phi)
    return Regression(d, t, log_rate.exp())


def demonstrate(config: Config, path: Path) -> dict[str, Any]:
    """Learn sets of every lower_bound.set_sizes on every random problem; table in "text", plot in ``path``/lower_bound.png.

    Returns JSON-able figures: expected excess losses over theta0 ~ N(0, I), means over the problems and each of them.
    Raises RunError if the plot can't be written.
    """
    c = config.lower_bound
    problems = [problem(config.seed, i, c.dimension, c.samples) for i in range(c.trials)]
    # Judged on another rotation than learned on: the same expectation, if the set really is for any start.
    judges = [starts(config.seed, c.trials + i, c.dimension) for i in range(c.trials)]
    sets = []
    for size in sorted(set(c.set_sizes)):
        found = [learn(p, size, config.seed, i) for i, p in enumerate(problems)]
        reached = [float(excess(p, step(s, theta0)).mean()) for p, s, theta0 in zip(problems, found, judges)]
        least = [bound(p, size) for p in problems]
        sets.append(
            {"size": size, "reached": _mean(reached), "bound": _mean(least), "reached_each": reached, "bound_each": least}
        )
    most = max([*c.set_sizes, c.dimension])
    result = {
        "dimension": c.dimension,
        "samples": c.samples,
        "trials": c.trials,
        "rank": problems[0].rank,
        "sets": sets,
        "bounds": [_mean([bound(p, m) for p in problems]) for m in range(most + 1)],  # for M = 0 ... most
        "closed_form": {f"{scale:g}": _closed_form_excess(problems, config.seed, scale) for scale in (1.0, float(c.dimension))},
    }
    result["text"] = _text(result, path / "lower_bound.png")
    atomic_write(path / "lower_bound.png", picture(result))
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _closed_form_excess(problems: list[Problem], seed: int, scale: float) -> float:
    """The largest excess after the closed-form set's step, over problems and ``CHECKS`` starts a hundred times too far away."""
    out = []
    for i, p in enumerate(problems):
        theta0 = 100 * draw.normal(draw.key(seed, "regression check", 0, i), (CHECKS, p.d.shape[1]), torch.float64)
        out.append(float(excess(p, step(closed_form(p, scale), theta0)).max()))
    return max(out)


def _text(result: dict[str, Any], plot: Path) -> str:
    dimension, rank = result["dimension"], result["rank"]
    what = "D" if rank == dimension else f"rank {rank}"
    given = f"D = {dimension} features, N = {result['samples']} samples, {result['trials']} random problems"
    lines = [
        f"linear regression, {given}: excess loss after ONE step on M learned examples,",
        "expected over theta0 ~ N(0, I). Bound: no set of M examples gets below it (see metadist/methods/lower_bound.py).",
        f"{'M':>6} {'':>6} {'bound':>10} {'reached':>10} {'reached/bound':>14}",
        f"{0:>6} {'':>6} {result['bounds'][0]:>10.4g} {'no step':>10}",
    ]
    for s in result["sets"]:
        relation = "<" if s["size"] < rank else "=" if s["size"] == rank else ">"
        ratio = f"{s['reached'] / s['bound']:.4f}" if s["bound"] else "-"
        lines.append(f"{s['size']:>6} {relation + ' ' + what:>6} {s['bound']:>10.4g} {s['reached']:>10.3g} {ratio:>14}")
    for scale, value in result["closed_form"].items():
        rate = dimension / float(scale) ** 2
        what = f"d~ = {scale} I, t~ = {scale} theta*, eta~ = {rate:g}"
        lines.append(f"closed form, M = D: {what}: excess at most {value:.1e} from {CHECKS} theta0 ~ N(0, 100^2 I) a problem")
    return "\n".join([*lines, f"look at {plot}"])
