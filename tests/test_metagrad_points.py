"""``inner_gradient`` and ``fixed_point`` against autograd, dense linear algebra and closed forms, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import NETS, difference, make, normal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cosine_similarity, cross_entropy

from metadist.errors import UserError
from metadist.metagrad import FORMS, Batch, Solve, fixed_point, inner_gradient

L2, TASKS, N, D, K = 0.1, 2, 12, 5, 3


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("net", NETS)
def test_inner_gradient_is_autograd(net: str, form: str, shared: bool) -> None:
    case, target = make(net, shared), None
    results = []
    for ours in (True, False):
        leaves = case.params.leaves()
        x, y = leaves.batches()
        batch = (x[0], y[0]) if shared else (x[:, 0], y[:, 0])
        if ours:
            g = inner_gradient(case.loss, leaves.theta0, batch, form, shared)
        else:
            tasks = [(batch if shared else tuple(b[i] for b in batch)) for i in range(len(leaves.theta0))]
            value = sum(case.loss(th, b) for th, b in zip(leaves.theta0, tasks))
            (g,) = torch.autograd.grad(value, leaves.theta0, create_graph=True)
        target = normal("target", g.shape)
        (1 - cosine_similarity(g, target)).sum().backward()
        results.append((g, leaves.theta0.grad, leaves.pixels.grad, leaves.labels.grad))
    for a, b in zip(*results):
        assert b.norm() > 0 and difference(a, b) < 1e-10


def test_inner_gradient_refuses_a_second_derivative_and_an_unknown_form() -> None:
    case = make("mlp")
    theta = case.params.theta0.clone().requires_grad_()
    batch = tuple(b[0] for b in case.params.batches())
    (g,) = torch.autograd.grad(inner_gradient(case.loss, theta, batch).square().sum(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    with pytest.raises(UserError, match="did you mean forward"):
        inner_gradient(case.loss, theta, batch, "forwards")


def test_inner_gradient_notices_an_overwritten_batch() -> None:
    case = make("mlp")
    x, y = (b[0].clone() for b in case.params.batches())
    loss = inner_gradient(case.loss, case.params.theta0.clone().requires_grad_(), (x, y)).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def ridge_loss(theta: Tensor, batch: Batch) -> Tensor:
    x, y = batch
    return 0.5 * (x @ theta - y).square().mean() + 0.5 * L2 * theta.square().sum()


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """The minimiser [..., D] in closed form."""
    matrix = x.mT @ x / x.shape[-2] + L2 * torch.eye(D, dtype=x.dtype)
    return torch.linalg.solve(matrix, (x.mT @ y[..., None] / x.shape[-2])[..., 0])


def softmax_loss(theta: Tensor, batch: Batch) -> Tensor:
    x, y = batch
    return cross_entropy(x @ theta.view(D, K), y) + 0.5 * L2 * theta.square().sum()


def newton(x: Tensor, y: Tensor) -> Tensor:
    """The minimiser [D * K] of ``softmax_loss`` to rounding."""
    theta = torch.zeros(D * K, dtype=x.dtype)
    for _ in range(12):
        g, h = (f(softmax_loss)(theta, (x, y)) for f in (torch.func.grad, torch.func.hessian))
        theta = theta - torch.linalg.solve(h, g)
    assert torch.func.grad(softmax_loss)(theta, (x, y)).norm() < 1e-14
    return theta


def problem(kind: str, shared: bool) -> tuple[Callable[..., Tensor], Tensor, Tensor, Tensor, Tensor]:
    """(loss, theta_star [G, P], x, y, meta-gradient's directions [G, P])"""
    lead = (N,) if shared else (TASKS, N)
    x = normal("x", (*lead, D))
    if kind == "ridge":
        y = normal("y", lead)
        star = ridge(x, y).expand(TASKS, D)
        return ridge_loss, star, x, y, normal("lam", star.shape)
    y = normal("y", (*lead, K)).softmax(-1)
    star = torch.stack([newton(x, y) if shared else newton(x[g], y[g]) for g in range(TASKS)])
    return softmax_loss, star, x, y, normal("lam", star.shape)


def implicit(kind: str, shared: bool = True, **options: Any) -> tuple[Tensor, Tensor, Solve]:
    """Gradients of <theta*, lam> in x and y by ``fixed_point``, and its report."""
    loss, star, x, y, lam = problem(kind, shared)
    x, y, seen = x.clone().requires_grad_(), y.clone().requires_grad_(), []
    out = fixed_point(loss, star, (x, y), shared=shared, report=seen.append, **options)
    assert torch.equal(out, star)
    (out * lam).sum().backward()
    return x.grad, y.grad, seen[0]


def dense(kind: str, shared: bool = True, solve: Callable[[Tensor, Tensor], Tensor] = torch.linalg.solve) -> tuple[Tensor, ...]:
    """The same from dense Hessians and Jacobians, task by task; ``solve(H, lam)`` may be replaced."""
    loss, star, x, y, lam = problem(kind, shared)
    parts = []
    for g in range(TASKS):
        batch = (x, y) if shared else (x[g], y[g])
        v = solve(torch.func.hessian(loss)(star[g], batch), lam[g])
        jacobian = torch.func.jacrev(lambda *b, th=star[g]: torch.func.grad(loss)(th, b), (0, 1))(*batch)
        parts.append([-torch.tensordot(v, j, 1) for j in jacobian])
    return tuple(sum(p) if shared else torch.stack(p) for p in zip(*parts))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
def test_ridge_is_its_closed_form(shared: bool, form: str) -> None:
    _, _, x, y, lam = problem("ridge", shared)
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    (ridge(x, y) * lam).sum().backward()
    gx, gy, seen = implicit("ridge", shared, terms=D, form=form)
    assert difference(gx, x.grad) < 1e-10 and difference(gy, y.grad) < 1e-10
    assert seen.residual.shape == (TASKS,) and seen.residual.max() < 1e-10 and seen.gradient_norm.max() < 1e-14


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
def test_softmax_regression_is_its_closed_form(shared: bool, form: str) -> None:
    for a, b in zip(implicit("softmax", shared, terms=D * K, form=form), dense("softmax", shared)):
        assert difference(a, b) < 1e-9


def test_softmax_regression_against_solving_again() -> None:
    _, _, x, y, lam = problem("softmax", True)
    g, direction, h = implicit("softmax", terms=D * K)[0], normal("direction", x.shape), 1e-4
    ends = [(newton(x + s * h * direction, y) * lam).sum() for s in (1, -1)]
    numeric, exact = float(ends[0] - ends[1]) / (2 * h), float((g * direction).sum())
    assert abs(numeric - exact) < 1e-6 * abs(exact)


def test_cg_stays_where_it_has_converged() -> None:
    exact = implicit("ridge", terms=D)[0]
    assert difference(implicit("ridge", terms=D + 60)[0], exact) < 1e-10
    loss, star, x, y, _ = problem("ridge", True)
    x.requires_grad_()
    (fixed_point(loss, star, (x, y), terms=3) * 0.0).sum().backward()  # lambda = 0: no 0 / 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_cg_residual_falls_with_terms() -> None:
    residuals = torch.stack([implicit("softmax", terms=n)[2].residual for n in (2, 5, 8)])
    assert (residuals[1:] < 0.5 * residuals[:-1]).all() and residuals[0].min() > 1e-3


def eigenvalues() -> Tensor:
    loss, star, x, y, _ = problem("ridge", True)
    return torch.linalg.eigvalsh(torch.func.hessian(loss)(star[0], (x, y)))


def test_neumann_is_the_truncated_series_and_its_error_has_the_known_rate() -> None:
    spectrum = eigenvalues()
    step = 1.0 / float(spectrum[-1])
    rate = float((1 - step * spectrum).abs().max())
    exact = dense("ridge")[0]
    errors = {}
    for terms in (1, 60, 80):

        def series(h: Tensor, lam: Tensor, terms: int = terms) -> Tensor:
            m = torch.eye(D, dtype=h.dtype) - step * h
            return step * sum(torch.linalg.matrix_power(m, k) @ lam for k in range(terms))

        got, _, seen = implicit("ridge", solver="neumann", terms=terms, step=step)
        assert difference(got, dense("ridge", solve=series)[0]) < 1e-10
        assert seen.residual.max() <= rate**terms * (1 + 1e-9)
        errors[terms] = float((got - exact).norm())
    assert errors[80] / errors[60] == pytest.approx(rate**20, rel=0.02)
    assert 1e-8 < errors[80] / float(exact.norm()) < 1e-2  # still above rounding: the rate was measured, not noise


@pytest.mark.parametrize("options", [{"solver": "cg", "terms": D}, {"solver": "neumann", "terms": 400, "step": 0.4}])
def test_damping_is_added_to_the_diagonal(options: dict[str, Any]) -> None:
    def damped(h: Tensor, lam: Tensor) -> Tensor:
        return torch.linalg.solve(h + 0.5 * torch.eye(D, dtype=h.dtype), lam)

    got, _, seen = implicit("ridge", damping=0.5, **options)
    assert difference(got, dense("ridge", solve=damped)[0]) < 1e-10
    assert seen.residual.max() < 1e-10


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_the_host_is_never_waited_for(solver: str) -> None:
    """Fake tensors hold no numbers: looking at one (.item(), an if) would raise."""
    with FakeTensorMode():
        x, star = torch.zeros(N, D, requires_grad=True), torch.zeros(TASKS, D)
        out = fixed_point(ridge_loss, star, (x, torch.zeros(N)), solver, terms=3, step=0.1, report=lambda seen: None)
        out.sum().backward()
        assert x.grad.shape == x.shape


def test_what_is_refused() -> None:
    loss, star, x, y, _ = problem("ridge", True)
    with pytest.raises(UserError, match=r"solver=gc is unknown \(allowed: cg, neumann\)"):
        fixed_point(loss, star, (x, y), "gc")
    for bad in ({"terms": 0}, {"damping": -1.0}, {"solver": "neumann"}, {"solver": "neumann", "step": 0.0}):
        with pytest.raises(ValueError, match="need terms >= 1"):
            fixed_point(loss, star, (x, y), **bad)
    x.requires_grad_()
    (g,) = torch.autograd.grad(fixed_point(loss, star, (x, y)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
