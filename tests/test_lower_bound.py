"""The linear-regression lower bound: theory against what the engine learns, and the closed-form set."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from metadist import draw
from metadist.config import Config
from metadist.methods import lower_bound as lb

D, N = 8, 40


def least_over_subspaces(p: lb.Problem, size: int) -> float:
    """The exact least expected excess for M < D, without the engine.

    For a row space spanned by Q (orthonormal [D, M]) the best symmetric B is Q Q^T, the best b the A-projection of theta*;
    what is left is a smooth function of Q alone.
    """
    a, best = p.d.T @ p.d / len(p.d), p.optimum
    raw = draw.normal(draw.key(1, "subspace", size, 0), (p.d.shape[1], size), torch.float64).requires_grad_()

    def value() -> Tensor:
        q = torch.linalg.qr(raw).Q
        g, inner = q.T @ a @ q, q.T @ a @ best
        return (a.trace() - g.trace() + best @ a @ best - inner @ torch.linalg.solve(g, inner)) / 2

    optimizer = torch.optim.LBFGS([raw], max_iter=500, tolerance_change=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    return float(value().detach())


def expected(p: lb.Problem, distilled: lb.Regression) -> float:
    """Expected excess over N(0, I) from the affine map itself: 1/2 |A^(1/2) [I - B, b - theta*]|^2."""
    size, dimension = distilled.d.shape
    shrink = torch.eye(dimension) - distilled.rate / size * distilled.d.T @ distilled.d
    shift = distilled.rate / size * distilled.d.T @ distilled.t - p.optimum
    return float((p.d @ torch.cat((shrink, shift[:, None]), 1)).square().sum() / (2 * len(p.d)))


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("scale", [1.0, 8.0, 0.3])
def test_closed_form_set_reaches_the_optimum_from_anywhere(scale: float) -> None:
    p = lb.problem(0, 0, D, N)
    theta0 = 10 * draw.normal(draw.key(5, "anywhere", 0, 0), (10, D), torch.float64)
    theta = lb.step(lb.closed_form(p, scale), theta0)
    assert (theta - torch.linalg.lstsq(p.d, p.t).solution).abs().max() < 1e-12
    assert lb.excess(p, theta).max() < 1e-12
    assert lb.excess(p, theta0).min() > 1  # they were far from it


def test_excess_is_loss_above_the_optimum() -> None:
    p = lb.problem(3, 1, D, N)
    theta = draw.normal(draw.key(5, "anywhere", 0, 0), (4, D), torch.float64)
    losses = torch.stack([lb.squared_loss(v, (p.d, p.t)) for v in (*theta, p.optimum)])
    torch.testing.assert_close(lb.excess(p, theta), losses[:-1] - losses[-1], rtol=1e-12, atol=0)


def test_starts_have_gaussian_mean_of_quadratic_functions() -> None:
    theta0 = lb.starts(0, 0, D)
    assert theta0.shape == (2 * D, D)
    torch.testing.assert_close(theta0.T @ theta0 / len(theta0), torch.eye(D), rtol=0, atol=1e-12)
    assert theta0.mean(0).abs().max() < 1e-12
    assert not torch.allclose(theta0, lb.starts(0, 1, D))


@pytest.mark.parametrize("size", [1, 4, 7])
def test_fewer_examples_than_features_cannot_and_reach_what_theory_allows(size: int) -> None:
    p = lb.problem(0, 0, D, N)
    learned = lb.learn(p, size, 0, 0)
    reached = expected(p, learned)
    assert reached == pytest.approx(float(lb.excess(p, lb.step(learned, lb.starts(9, 9, D))).mean()), rel=1e-9)
    assert lb.bound(p, size) > 0.01
    assert lb.bound(p, size) < reached < 1.05 * lb.bound(p, size)
    assert reached == pytest.approx(least_over_subspaces(p, size), rel=1e-5)


@pytest.mark.parametrize("size", [8, 12])
def test_as_many_examples_as_features_reach_the_optimum(size: int) -> None:
    p = lb.problem(0, 0, D, N)
    assert lb.bound(p, size) == 0
    assert expected(p, lb.learn(p, size, 0, 0)) < 1e-6


def test_what_counts_is_the_rank_of_the_data() -> None:
    p = lb.problem(0, 0, D, 5)  # fewer samples than features
    assert p.rank == 5
    assert lb.bound(p, 4) > 0 and lb.bound(p, 5) == 0
    assert expected(p, lb.learn(p, 5, 0, 0)) < 1e-6


def test_no_random_set_gets_below_the_bound() -> None:
    p = lb.problem(2, 0, D, N)
    assert lb.bound(p, 0) == pytest.approx(float(lb.excess(p, lb.starts(0, 0, D)).mean()))  # M = 0: no step
    for trial in range(20):
        values = draw.normal(draw.key(4, "any set", 0, trial), (3, D + 1), torch.float64)
        assert expected(p, lb.Regression(values[:, :D], values[:, D], torch.tensor(0.2))) > lb.bound(p, 3)


def test_demonstration_prints_plots_and_records(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config()
    config.lower_bound.dimension, config.lower_bound.samples, config.lower_bound.trials = 4, 20, 2
    config.lower_bound.set_sizes = [5, 2, 4, 2]
    result = lb.demonstrate(config, tmp_path)
    assert capsys.readouterr().out == ""
    assert json.loads(json.dumps(result)) == result
    assert [s["size"] for s in result["sets"]] == [2, 4, 5]
    below, at, above = (s["reached"] for s in result["sets"])
    assert below > result["sets"][0]["bound"] > 0.01 and max(at, above) < 1e-6
    assert max(result["closed_form"].values()) < 1e-20
    assert result["bounds"] == sorted(result["bounds"], reverse=True) and result["bounds"][4] == 0
    lines = result["text"].splitlines()
    assert [" ".join(line.split()[:3]) for line in lines[4:7]] == ["2 < D", "4 = D", "5 > D"]
    assert (tmp_path / "lower_bound.png").read_bytes().startswith(b"\x89PNG")
