"""Gradients that do not differentiate the path: implicit ones where training ends, matching ones along it. All in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metadist import methods
from metadist.methods.implicit import WEIGHTS, Implicit
from metadist.methods.matching import Matching, distance
from metadist.nets import Learner
from metadist.run import gradient_check
from metadist.run.compose import compose
from metadist.run.compute import Compute
from metadist.run.setup import Setup, build
from metadist.run.state import MetaState
from metadist.store.files import pack, unpack
from metadist.synthetic.images import Phi

F64 = torch.float64
HERE = __name__.rpartition(".")[2]
TASKS = 3
# Softmax regression on 4 x 4 digits: 170 weights, strictly convex with its l2 term.
SMALL = [
    "data=digits", "data.size=4", "net=custom", f"net.target={HERE}.Regression", "net.init=xavier", f"tasks={TASKS}",
    "real_batch=24", "threads=1", "device=cpu", "engine.compile=off", "engine.dtype=float64", "meta.lr_rate=null",
    "meta.ema=0", "meta.clip=0", "meta.schedule=constant",
]  # fmt: skip
IMPLICIT = ["inner.optimizer=sgd", "inner.lr=0.3", "implicit.l2=0.1", "implicit.solver=cg", "implicit.terms=80"]
COLD = [*IMPLICIT, "implicit.warm_start=false", "implicit.batches=0"]
WARM = [*IMPLICIT, "method=dd_implicit", "ipc=2", "inner.steps=4", "implicit.steps=6", "implicit.restart=3"]
GENERATOR = [
    "generator.batch=12", "generator.hidden=10", "generator.maps=3", "generator.conv=4", "generator.noise=5",
]  # fmt: skip
WHAT = {
    "images": ["method=dd_implicit", "ipc=2"],
    "labels": ["method=dd_implicit", "ipc=1", "labels.kind=soft"],
    "full": ["method=gtn_implicit", *GENERATOR],
    "none": ["method=gtn_implicit", *GENERATOR, "generator.curriculum=none"],
}


class Regression(nn.Sequential):
    """Softmax regression."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 10))


pytestmark = pytest.mark.usefixtures("one_thread")


def made(*words: str) -> Setup:
    """The objects of a run; of words for one key the last counts, and what it would not read is left out."""
    last = {word.partition("=")[0]: word for word in (*SMALL, *words)}
    if last["method"].startswith("method=gtn"):
        last.pop("ipc", None)
    if last.get("implicit.warm_start") == "implicit.warm_start=false":
        last.pop("implicit.restart", None)
    return build(compose(list(last.values())))


def implicit_of(setup: Setup) -> Implicit:
    assert isinstance(setup.method, Implicit)
    return setup.method


def gradient(setup: Setup, step: int = 0) -> Phi:
    """Gradient of the summed losses of all tasks, by parameter."""
    phi = {k: v.requires_grad_() for k, v in setup.method.parameters().items()}
    task = setup.method.draw(step, torch.arange(setup.config.tasks))
    setup.method.loss(phi, task).sum().backward()
    return {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in phi.items()}


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def own_batches(setup: Setup, phi: Phi, task: Any) -> tuple[Tensor, Tensor]:
    """[G, S, B, ...] for tasks that share them or own them."""
    x, y = setup.synthetic.batches(phi, task.drawn)
    return (x, y) if not setup.synthetic.shared else (x.expand(TASKS, *x.shape), y.expand(TASKS, *y.shape))


def penalized(setup: Setup, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(setup.learner(theta, x), y) + setup.config.implicit.l2 / 2 * (theta**2).sum()


def trained(setup: Setup, phi: Phi, task: Any, theta0: Tensor) -> Tensor:
    """Weights [G, P] by a plain loop of SGD on the loss with its l2 term, over the batches in turn."""
    x, y = (b.detach() for b in own_batches(setup, phi, task))
    rows = []
    for g, start in enumerate(theta0):
        theta = start.detach().clone().requires_grad_()
        for t in range(setup.config.implicit.steps):
            s = t % setup.config.inner.steps
            (d,) = torch.autograd.grad(penalized(setup, theta, x[g, s], y[g, s]), theta)
            theta = (theta - setup.config.inner.lr * d).detach().requires_grad_()
        rows.append(theta.detach())
    return torch.stack(rows)


# ---------------------------------------------------------------- against the unrolled gradient


def unrolled(setup: Setup) -> Phi:
    """The gradient of the same losses, by differentiating the same training."""
    method, inner = implicit_of(setup), setup.config.inner
    phi = {k: v.requires_grad_() for k, v in method.parameters().items()}
    task = method.draw(0, torch.arange(TASKS))
    order = tuple(t % inner.steps for t in range(setup.config.implicit.steps))
    h = torch.full((len(order), 1), inner.lr, dtype=F64)
    end = method.penalized.unroll(task.theta0, setup.synthetic.batches(phi, task.drawn), order, h)[0]
    torch.stack([cross_entropy(setup.learner(end[g], task.x[g]), task.y[g]) for g in range(TASKS)]).sum().backward()
    return {k: v.grad for k, v in phi.items() if v.grad is not None}


@pytest.mark.parametrize("what", WHAT)
def test_at_convergence_it_is_the_unrolled_gradient(what: str) -> None:
    setup = made(*COLD, *WHAT[what], "inner.steps=1", "implicit.steps=200", "implicit.l2=0.4", "implicit.terms=60")
    got, right = gradient(setup), unrolled(setup)
    assert got.keys() == right.keys()
    for name, value in right.items():
        assert float(value.norm()) > 1e-8 and error(got[name], value) < 1e-5, name
    figures = setup.method.figures()
    assert figures["residual"] < 1e-10 and 0 < figures["inner_gradient_norm"] < 1e-8


def test_before_convergence_it_is_not() -> None:
    setup = made(*COLD, *WHAT["images"], "inner.steps=1", "implicit.steps=10")
    assert error(gradient(setup)["images"], unrolled(setup)["images"]) > 0.1
    assert setup.method.figures()["inner_gradient_norm"] > 1e-3


def test_with_several_batches_what_is_left_falls_with_the_rate() -> None:
    """SGD over batches in turn stays O(rate) from where the mean of their losses is stationary."""
    errors = []
    for rate in (0.08, 0.04):
        words = ["inner.steps=2", f"inner.lr={rate}", f"implicit.steps={round(10 / rate)}", "implicit.l2=1.0"]
        setup = made(*COLD, *WHAT["images"], *words)
        errors.append(error(gradient(setup)["images"], unrolled(setup)["images"]))
    assert errors[0] < 0.1 and errors[0] / errors[1] == pytest.approx(2, rel=0.15)


# ---------------------------------------------------------------- against dense algebra


def at_rest(setup: Setup, step: int = 0, start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Any]:
    """(weights [G, P], Hessians [G, P, P] of the batches chosen, real loss's gradients [G, P], the tasks)."""
    phi, tasks = setup.method.parameters(), torch.arange(TASKS)
    task = setup.method.draw(step, tasks)
    theta = trained(setup, phi, task, task.theta0 if start is None else start)
    x, y = own_batches(setup, phi, task)
    hessians, lams = [], []
    for g in range(TASKS):

        def mean(th: Tensor, g: int = g) -> Tensor:
            return sum(penalized(setup, th, x[g, s], y[g, s]) for s in task.chosen[g]) / len(task.chosen[g])

        def real(th: Tensor, g: int = g) -> Tensor:
            return cross_entropy(setup.learner(th, task.x[g]), task.y[g])

        hessians.append(torch.func.jacrev(torch.func.grad(mean))(theta[g]))
        lams.append(torch.func.grad(real)(theta[g]))
    return theta, torch.stack(hessians), torch.stack(lams), task


def dense(setup: Setup, damping: float = 0.0, step: int = 0) -> Phi:
    """-(H + damping)^-1 lambda through the gradient of the chosen batches' mean loss, by one ordinary graph."""
    theta, hessians, lams, task = at_rest(setup, step)
    eye = torch.eye(theta.shape[1], dtype=F64)
    phi = {k: v.requires_grad_() for k, v in setup.method.parameters().items()}
    x, y = own_batches(setup, phi, task)
    total = torch.zeros((), dtype=F64)
    for g in range(TASKS):
        v, th = torch.linalg.solve(hessians[g] + damping * eye, lams[g]), theta[g].clone().requires_grad_()
        mean = sum(penalized(setup, th, x[g, s], y[g, s]) for s in task.chosen[g]) / len(task.chosen[g])
        (d,) = torch.autograd.grad(mean, th, create_graph=True)
        total = total - (d * v).sum()
    total.backward()
    return {k: v.grad for k, v in phi.items() if v.grad is not None}


@pytest.mark.parametrize("batches", [0, 1, 2])
@pytest.mark.parametrize("what", ["images", "none"])
def test_hessian_products_see_the_batches_chosen(what: str, batches: int) -> None:
    """Anywhere, stationary or not: each task its own choice of the four, and no other batch gets a gradient."""
    words = [*COLD, *WHAT[what], "inner.steps=4", "implicit.steps=7", "implicit.terms=200", f"implicit.batches={batches}"]
    setup = made(*words)
    got, right = gradient(setup), dense(setup)
    for name, value in right.items():
        assert error(got[name], value) < 1e-8, name
    if what == "images":
        chosen = setup.method.draw(0, torch.arange(TASKS)).chosen
        met = got["images"].view(4, -1).abs().amax(1) > 0
        assert met.tolist() == [s in chosen for s in range(4)]


def test_the_choice_is_a_function_of_seed_step_and_task() -> None:
    setup = made(*COLD, *WHAT["images"], "inner.steps=5", "implicit.batches=3")
    rows = torch.stack([setup.method.draw(step, torch.arange(8)).chosen for step in range(6)])
    assert rows.shape == (6, 8, 3) and all(len(set(row.tolist())) == 3 for row in rows.flatten(0, 1))
    assert torch.equal(setup.method.draw(4, torch.tensor([6, 2])).chosen, rows[4, [6, 2]])
    assert len({tuple(row.tolist()) for row in rows.flatten(0, 1)}) > 20  # of 60
    assert torch.bincount(rows.flatten(), minlength=5).min() > 10  # 29 each, sd 4
    everything = made(*COLD, *WHAT["images"], "inner.steps=5", "implicit.batches=9").method.draw(0, torch.arange(2)).chosen
    assert everything.sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 2
    other = made(*COLD, *WHAT["images"], "inner.steps=5", "implicit.batches=3", "seed=1").method.draw(0, torch.arange(8))
    assert not torch.equal(other.chosen, rows[0])


def test_damping_is_added() -> None:
    setup = made(*COLD, *WHAT["images"], "inner.steps=1", "implicit.steps=20", "implicit.damping=0.7", "implicit.terms=200")
    got = gradient(setup)["images"]
    assert error(got, dense(setup, 0.7)["images"]) < 1e-8
    assert error(got, dense(setup)["images"]) > 0.1


@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_neumanns_error_falls_at_the_rate_of_its_theory(end: str) -> None:
    """max |1 - step * eigenvalue| a term, wherever in the spectrum the maximum lies."""
    # Ten images leave directions that no image sees: there the eigenvalue is l2's alone, and the real loss does see them.
    common = [*COLD, *WHAT["images"], "ipc=1", "inner.steps=1", "implicit.steps=30"]
    setup = made(*common, "implicit.terms=200")
    _, hessians, _, _ = at_rest(setup)
    spectrum = torch.linalg.eigvalsh(hessians)
    assert float(spectrum.min()) == pytest.approx(0.1, rel=1e-6)  # l2
    # All tasks share the images: their errors fall together. Beyond 2 / (sum of the ends) the largest eigenvalue decides.
    top = float(spectrum.max())
    step = 1 / top if end == "smallest" else 1.97 / top
    rate = float((1 - step * spectrum).abs().max())
    assert rate == pytest.approx(1 - 0.1 * step if end == "smallest" else 0.97)
    exact, errors = gradient(setup)["images"], {}
    few, many = (60, 90) if end == "smallest" else (400, 450)
    for terms in (few, many):
        other = made(*common, "implicit.solver=neumann", f"implicit.step={step!r}", f"implicit.terms={terms}")
        errors[terms] = error(gradient(other)["images"], exact)
        assert other.method.figures()["residual"] <= rate**terms
    assert errors[many] / errors[few] == pytest.approx(rate ** (many - few), rel=0.1)
    assert 1e-10 < errors[many] < 0.5


def test_the_bias_of_an_implicit_run_can_be_measured() -> None:
    """Law 5: enough products leave nothing but rounding, two terms of the series do."""
    common = [*COLD, *WHAT["full"], "inner.steps=1", "implicit.steps=20", "engine.dtype=float32"]

    def bias(*words: str) -> float:
        setup = made(*common, *words)
        phi = setup.method.parameters()
        right = gradient_check.gradient(gradient_check.exact(setup), {k: v.double() for k, v in phi.items()}, 0)
        found = gradient_check.compare(gradient_check.gradient(setup, phi, 0), right)
        return {b.parameter: b for b in found}["all"].relative_error

    assert bias() < 1e-3
    assert bias("implicit.solver=neumann", "implicit.terms=2", "implicit.step=0.1") > 0.1


def test_carried_weights_are_no_part_of_a_bias() -> None:
    setup = made(*WARM)
    phi = setup.method.parameters()
    names = {b.parameter for b in gradient_check.compare(*[gradient_check.gradient(setup, phi, 0)] * 2)}
    assert names == {"images", "all"}


def test_the_inner_loss_is_the_runs_own_with_an_l2_term() -> None:
    """A GPU's bf16 is a wrapper around the loss; here a factor stands for it."""
    setup = made(*COLD, *WHAT["images"], "inner.steps=1")
    given = setup.inner.but(loss=lambda theta, batch: 3 * setup.inner.loss(theta, batch))
    method = methods.build(setup.config, setup.data, setup.synthetic, given, setup.starts, setup.learner)
    assert isinstance(method, Implicit)
    theta, batch = setup.starts.sample(0, torch.arange(1))[0], (setup.data.train.x[:8], setup.data.train.y[:8])
    want = 3 * setup.inner.loss(theta, batch) + 0.05 * (theta**2).sum()
    torch.testing.assert_close(method.penalized.loss(theta, batch), want, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- carried weights


def state_of(setup: Setup) -> MetaState:
    return MetaState(setup.method.parameters(), setup.config.meta, 10)


def compute(setup: Setup, state: MetaState, tasks: list[int] | None = None, group: int = TASKS) -> Tensor:
    given = torch.arange(setup.config.tasks) if tasks is None else torch.tensor(tasks)
    return Compute(setup.method, group, setup.device)(state.phi, state.step, given)


def next_weights(setup: Setup, state: MetaState) -> Tensor:
    """Where plain training gets to in the next meta-step, from where the learners stand."""
    task = setup.method.draw(state.step, torch.arange(TASKS))
    start = task.theta0 if state.step % setup.config.implicit.restart == 0 else state.phi[WEIGHTS].detach()
    return trained(setup, {k: v.detach() for k, v in state.phi.items()}, task, start)


@pytest.mark.parametrize("words", [["meta.clip=0.001"], ["meta.ema=0.9", "meta.optimizer=sgd"], WHAT["none"]])
def test_carried_weights_are_those_that_training_gives(words: list[str]) -> None:
    """Seven meta-steps: started anew at steps 0, 3 and 6, gone on with in between."""
    setup = made(*WARM, *words)
    state = state_of(setup)
    assert torch.equal(state.phi[WEIGHTS].detach(), setup.starts.sample(0, torch.arange(TASKS)))
    for step in range(7):
        assert setup.method.draw(step, torch.arange(TASKS)).fresh == (step in (0, 3, 6))
        want, before = next_weights(setup, state), state.phi[WEIGHTS].detach().clone()
        state.apply(compute(setup, state))
        torch.testing.assert_close(state.phi[WEIGHTS].detach(), want, rtol=1e-12, atol=1e-13)
        assert torch.equal(state.average[WEIGHTS], state.phi[WEIGHTS].detach())
        assert float((state.phi[WEIGHTS].detach() - before).abs().max()) > 1e-3


def test_carried_weights_are_neither_optimized_nor_clipped_nor_counted() -> None:
    setup = made(*WARM, "meta.clip=0.001")
    state = state_of(setup)
    total = compute(setup, state)
    learned = total[: state.phi["images"].numel()] / TASKS
    state.apply(total)
    assert state.grad_norm == pytest.approx(float(learned.norm()), rel=1e-12)
    assert 0.001 < state.grad_norm < float(state.phi[WEIGHTS].detach().norm())
    assert [name for name, _ in state.learned] == ["images"] and len(state.optimizer.param_groups) == 1
    assert not [k for k in state.tensors() if k.startswith("opt/") and not k.startswith("opt/images/")]
    # A cold run learns the same from the same weights: the carrying itself changes no gradient.
    cold = made(*WARM, "implicit.warm_start=false", "meta.clip=0.001")
    other = state_of(cold)
    other.apply(compute(cold, other))
    torch.testing.assert_close(other.phi["images"], state.phi["images"], rtol=1e-13, atol=1e-15)
    assert other.loss == pytest.approx(state.loss, rel=1e-13) and other.grad_norm == pytest.approx(state.grad_norm, rel=1e-12)


def test_a_cold_run_carries_nothing() -> None:
    setup = made(*COLD, *WHAT["images"], "inner.steps=4", "implicit.steps=6")
    assert list(setup.method.parameters()) == ["images"]
    assert all(setup.method.draw(step, torch.arange(TASKS)).fresh for step in range(4))


def test_a_skipped_step_hands_nothing_on() -> None:
    setup = made(*WARM)
    state = state_of(setup)
    state.apply(compute(setup, state))
    before, total = state.copy_phi(), compute(setup, state)
    total[-2] = math.nan
    state.apply(total)
    assert state.skipped == 1 and all(torch.equal(state.phi[k].detach(), v) for k, v in before.items())


def test_a_checkpoint_brings_them_back() -> None:
    setup = made(*WARM)
    state = state_of(setup)
    for _ in range(2):
        state.apply(compute(setup, state))
    tensors, metadata = unpack(pack({k: v.clone() for k, v in state.tensors().items()}, state.metadata()))
    again = state_of(setup)
    again.restore(tensors, metadata)
    assert torch.equal(again.phi[WEIGHTS], state.phi[WEIGHTS]) and again.step == 2
    for _ in range(3):
        for one in (state, again):
            one.apply(compute(setup, one))
        assert all(torch.equal(again.tensors()[k], v) for k, v in state.tensors().items())


@pytest.mark.parametrize("parts", [[[0, 1], [2]], [[2], [0], [1]], [[1, 2], [], [0]]])
def test_workers_rows_add_up_exactly(parts: list[list[int]]) -> None:
    """Each worker's buffer holds its own tasks' weights and zeros: the sum is exact whoever computed what."""
    setup = made(*WARM, "engine.group=1")
    state = state_of(setup)
    state.apply(compute(setup, state, group=1))
    alone = compute(setup, state, group=1)
    buffers = [compute(setup, state, part, group=1) for part in parts]
    together = torch.stack(buffers).sum(0)
    n = state.phi["images"].numel()
    assert torch.equal(together[n:-2], alone[n:-2])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(alone[n:-2].view(TASKS, -1), next_weights(setup, state), rtol=1e-12, atol=1e-13)
    for part, buffer in zip(parts, buffers, strict=True):
        rows = buffer[n:-2].view(TASKS, -1)
        assert [bool(row.any()) for row in rows] == [i in part for i in range(TASKS)] and float(buffer[-1]) == len(part)
    # A group filled up with a repeated task counts it once.
    torch.testing.assert_close(compute(setup, state, group=2), alone, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- gradient matching

MATCHING = [
    "method=gtn_matching",
    "inner.optimizer=momentum",
    "inner.lr=0.1",
    "inner.momentum=0.4",
    "inner.steps=5",
    *GENERATOR,
]


def matching_of(*words: str) -> tuple[Setup, Phi, Any]:
    setup = made(*MATCHING, *words)
    assert isinstance(setup.method, Matching)
    phi = setup.method.parameters()
    for name in phi:
        if name.endswith(
            "gain"
        ):  # so small that the epsilon of the normalization counts: else a gain has no effect to speak of
            phi[name] = 0.05 * phi[name]
    return setup, phi, setup.method.draw(0, torch.arange(TASKS))


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_distances_are_their_formulas(kind: str) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(12, 4))
    learner = Learner(net, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, learner.size, dtype=F64, generator=generator) for _ in range(2))
    want = []
    for a, b in zip(ours, theirs, strict=True):
        total = 0.0
        if kind == "l2":
            total = sum((p - q) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True)) / sum(q**2 for q in b.tolist())
        else:
            va, vb = learner.views(a), learner.views(b)
            for name in ("0.weight", "3.weight"):
                for p, q in zip(va[name].flatten(1).tolist(), vb[name].flatten(1).tolist(), strict=True):
                    dot = sum(i * j for i, j in zip(p, q, strict=True))
                    total += 1 - dot / (math.hypot(*p) * math.hypot(*q))
        want.append(total)
    # 1e-6 stands in both denominators.
    torch.testing.assert_close(distance(ours, theirs, learner, kind), torch.tensor(want, dtype=F64), rtol=1e-5, atol=0)
    torch.testing.assert_close(distance(ours, ours, learner, kind), torch.zeros(2, dtype=F64), rtol=0, atol=1e-5)
    rows = 7 if kind == "cosine" else 4
    torch.testing.assert_close(
        distance(-ours, ours, learner, kind), torch.full((2,), 2.0 * rows if rows == 7 else 4.0, dtype=F64)
    )


def points(setup: Setup, phi: Phi, task: Any) -> list[Tensor]:
    """Weights [G, P] at the points of the path, by a plain loop of SGD with momentum."""
    inner, (x, y) = setup.config.inner, (b.detach() for b in own_batches(setup, phi, task))
    theta, velocity, found = task.theta0.clone(), torch.zeros_like(task.theta0), []
    for t in range(inner.steps):
        if t % (inner.loss_every or 1) == 0:
            found.append(theta.clone())
        for g in range(TASKS):
            weights = theta[g].clone().requires_grad_()
            (d,) = torch.autograd.grad(cross_entropy(setup.learner(weights, x[g, t]), y[g, t]), weights)
            velocity[g] = inner.momentum * velocity[g] + d
        theta = theta - inner.lr * velocity
    return found


def by_hand(setup: Setup, phi: Phi, task: Any, path: list[Tensor]) -> Tensor:
    """Sum over tasks of the mean distance over a fixed path: one ordinary graph."""
    (x, y), total = own_batches(setup, phi, task), torch.zeros((), dtype=F64)
    for i, theta in enumerate(path):
        s = i * (setup.config.inner.loss_every or 1)
        for g in range(TASKS):
            weights = theta[g].clone().requires_grad_()
            pairs = ((x[g, s], y[g, s]), (task.x[i, g], task.y[i, g]))
            a, b = (
                torch.autograd.grad(cross_entropy(setup.learner(weights, u), v), weights, create_graph=True)[0]
                for u, v in pairs
            )
            if setup.config.matching.distance == "l2":
                total = total + ((a - b) ** 2).sum() / ((b**2).sum() + 1e-6)
            else:
                a, b = a[:160].view(10, 16), b[:160].view(10, 16)  # the bias has no direction
                total = total + sum(1 - (p @ q) / (p.norm() * q.norm() + 1e-6) for p, q in zip(a, b, strict=True))
    return total / len(path)


@pytest.mark.parametrize("curriculum", ["full", "shuffled_batches", "shuffled", "none"])
@pytest.mark.parametrize(("kind", "every"), [("cosine", 0), ("l2", 2)])
def test_matching_is_its_formula_and_finite_differences_agree(kind: str, every: int, curriculum: str) -> None:
    words = [f"matching.distance={kind}", f"inner.loss_every={every}", f"generator.curriculum={curriculum}"]
    setup, phi, task = matching_of(*words)
    path = points(setup, phi, task)
    assert len(path) == task.x.shape[0] == (5 if every == 0 else 3) and "rate" not in phi
    (ours, loss), (hand, want) = (
        differentiated(f, phi) for f in (lambda p: setup.method.loss(p, task).sum(), lambda p: by_hand(setup, p, task, path))
    )
    assert loss == pytest.approx(want, rel=1e-11)
    for name, value in hand.items():
        assert float(value.norm()) > 1e-7 and error(ours[name], value) < 1e-8, name
    # And no graph at all: along the gradient and a random direction as long.
    h, generator = 1e-7, torch.Generator().manual_seed(1)
    random = {k: torch.randn(v.shape, dtype=F64, generator=generator) for k, v in phi.items()}
    length = [math.sqrt(sum(float((v**2).sum()) for v in d.values())) for d in (ours, random)]
    direction = {k: ours[k] / length[0] / 2 + random[k] / length[1] / 2 for k in phi}
    with torch.no_grad():
        ends = [{k: v + s * h * direction[k] for k, v in phi.items()} for s in (1, -1)]
    values = [float(by_hand(setup, end, task, path).detach()) for end in ends]
    numeric, exact = (values[0] - values[1]) / (2 * h), sum(float((ours[k] * direction[k]).sum()) for k in phi)
    assert abs(numeric - exact) < 1e-5 * abs(exact)


def differentiated(function: Callable[[Phi], Tensor], phi: Phi) -> tuple[Phi, float]:
    leaves = {k: v.clone().requires_grad_() for k, v in phi.items()}
    value = function(leaves)
    value.backward()
    return {k: v.grad for k, v in leaves.items() if v.grad is not None}, float(value.detach())


def test_matching_does_not_differentiate_its_path() -> None:
    """With the path moved along, differences tell another number: what was compared is not blind to it."""
    setup, phi, task = matching_of("inner.lr=1.0")
    g = differentiated(lambda p: setup.method.loss(p, task).sum(), phi)[0]["codes"]
    h, direction = 1e-6, g / g.norm()
    ends = [float(setup.method.loss(phi | {"codes": phi["codes"] + s * h * direction}, task).sum()) for s in (1, -1)]
    assert abs((ends[0] - ends[1]) / (2 * h) - float(g.norm())) > 1e-4 * float(g.norm())


def test_matching_of_images_and_of_their_labels() -> None:
    """The estimator takes images as well: method.gradient=matching with dd_random_init."""
    words = ["method=dd_random_init", "method.gradient=matching", "inner.learn_lr=false", "ipc=1", "inner.steps=5"]
    setup = made(*words, "inner.epochs=1", "labels.kind=soft", "inner.optimizer=momentum", "inner.lr=0.1", "inner.momentum=0.4")
    phi, task = setup.method.parameters(), setup.method.draw(0, torch.arange(TASKS))
    path = points(setup, phi, task)
    ours = differentiated(lambda p: setup.method.loss(p, task).sum(), phi)[0]
    hand = differentiated(lambda p: by_hand(setup, p, task, path), phi)[0]
    assert list(ours) == ["images", "labels"]
    assert all(error(ours[name], hand[name]) < 1e-9 for name in hand)


def test_compiled_setups_keep_their_method() -> None:
    """``Setup.compiled`` builds the method anew: the same kind, the same gradient."""
    for words in ([*COLD, *WHAT["none"], "inner.steps=2", "implicit.steps=4"], MATCHING):
        setup = made(*words)
        again = dataclasses.replace(setup.compiled(False), config=setup.config)
        assert type(again.method) is type(setup.method)
        one, other = gradient(setup), gradient(again)
        assert all(torch.equal(one[k], other[k]) for k in one) and any(v.any() for v in one.values())
