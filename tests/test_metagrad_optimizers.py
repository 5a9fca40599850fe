"""The inner optimizers against torch.optim and against what they promise."""

from __future__ import annotations

import pytest
import torch
from engine_cases import KINDS, difference, engine, make, normal
from torch import Tensor

from metadist.config import NetConfig
from metadist.errors import UserError
from metadist.metagrad import Inner, Optimizer
from metadist.nets import build
from metadist.nets.loss import cross_entropy_loss

STEPS, LR, MU = 5, 0.07, 0.9


def ours(kind: str, grads: list[Tensor], **options: float) -> Tensor:
    optimizer = Optimizer(kind, **options)
    rates, momenta = (torch.full((STEPS,), v, dtype=torch.float64) for v in (LR, MU))
    h, state = optimizer.schedule(rates, momenta), optimizer.init(torch.ones(7, dtype=torch.float64))
    for t, g in enumerate(grads):
        state = optimizer.update(state, g, h[t])
    return state[0]


def theirs(optimizer: type[torch.optim.Optimizer], grads: list[Tensor], **options: object) -> Tensor:
    theta = torch.ones(7, dtype=torch.float64, requires_grad=True)
    torch_optimizer = optimizer([theta], lr=LR, **options)
    for g in grads:
        theta.grad = g.clone()
        torch_optimizer.step()
    return theta.detach()


GRADS = [normal("grads", (7,), t) for t in range(STEPS)]


def test_sgd_is_torchs() -> None:
    torch.testing.assert_close(ours("sgd", GRADS), theirs(torch.optim.SGD, GRADS), rtol=0, atol=2e-16)


def test_momentum_is_torchs() -> None:
    torch.testing.assert_close(ours("momentum", GRADS), theirs(torch.optim.SGD, GRADS, momentum=MU), rtol=0, atol=4e-16)


def test_adam_without_epsilon_is_torchs() -> None:
    # With eps = 0 the place of eps, the one difference, is gone.
    expected = theirs(torch.optim.Adam, GRADS, betas=(MU, 0.99), eps=0.0)
    torch.testing.assert_close(ours("adam", GRADS, beta2=0.99, eps=0.0), expected, rtol=1e-13, atol=0)


def test_adams_epsilon_is_under_the_root() -> None:
    g = torch.tensor([3e-4, 0.0, -3e-4], dtype=torch.float64)
    optimizer = Optimizer("adam", eps=4e-4)
    h = optimizer.schedule(torch.ones(1, dtype=torch.float64), torch.full((1,), 0.9, dtype=torch.float64))
    theta = optimizer.update(optimizer.init(torch.zeros(3, dtype=torch.float64)), g, h[0])[0]
    torch.testing.assert_close(theta, torch.tensor([-0.6, 0.0, 0.6], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", ["reverse", "forward"])
def test_adam_with_dead_units_gives_finite_meta_gradients(form: str) -> None:
    learner = build(NetConfig(name="mlp", width=6, depth=1), 1, 6, 3, torch.float64)
    case = make("mlp")
    theta0 = learner.init(torch.tensor([[3, 1], [4, 1]]))
    first = 6 * 36
    theta0[:, first : first + 3] = -50.0  # three of six ReLU units never fire: their gradients are exactly zero
    x, y = (b.clone().requires_grad_() for b in case.params.batches())
    rates = torch.full((3,), 0.01, dtype=torch.float64, requires_grad=True)
    optimizer = Optimizer("adam")
    h = optimizer.schedule(rates, torch.full((3,), 0.9, dtype=torch.float64))
    thetas = Inner(cross_entropy_loss(learner), optimizer, form).unroll(theta0, (x, y), (0, 1, 1), h)
    assert torch.equal(thetas[0, :, first : first + 3], theta0[:, first : first + 3])
    thetas.square().sum().backward()
    for value in (x, y, rates):
        assert torch.isfinite(value.grad).all() and value.grad.norm() > 0


def test_gradient_of_the_schedule_in_momentum() -> None:
    momenta = torch.tensor([0.9, 0.5, 0.8], dtype=torch.float64, requires_grad=True)
    h = Optimizer("adam").schedule(torch.ones(3, dtype=torch.float64), momenta)
    h[:, 2].sum().backward()  # sum of 1 - prod(beta1)
    a, b, c = momenta.tolist()
    expected = torch.tensor([-(1 + b + b * c), -(a + a * c), -a * b], dtype=torch.float64)
    torch.testing.assert_close(momenta.grad, expected, rtol=1e-13, atol=0)


def test_adams_bias_corrections() -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        h = Optimizer("adam", beta2=0.999).schedule(torch.ones(40, dtype=dtype), torch.full((40,), 0.5, dtype=dtype))
        expected = torch.tensor([1 - 0.999**t for t in range(1, 41)], dtype=torch.float64)
        torch.testing.assert_close(h[:, 3].double(), expected, rtol=tolerance, atol=0)
    assert Optimizer("adam", beta2=0.0).schedule(torch.ones(2), torch.ones(2) / 2)[:, 3].tolist() == [1.0, 1.0]


def test_each_step_has_its_rate_and_momentum() -> None:
    case = make("mlp")
    for kind in KINDS:
        base = engine(case, kind, case.params, at=(1, 2, 3))
        moved = engine(case, kind, case.params.moved("rates", torch.tensor([0.0, 0.01, 0.0]).double()), at=(1, 2, 3))
        assert torch.equal(base[0], moved[0]) and difference(moved[1], base[1]) > 1e-6


def test_unknown_kind_and_missing_momentum() -> None:
    with pytest.raises(UserError, match=r"inner.optimizer=adma is unknown; did you mean adam"):
        Optimizer("adma")
    with pytest.raises(ValueError, match="needs a momentum"):
        Optimizer("momentum").schedule(torch.ones(3))
    assert [Optimizer(kind).buffers for kind in KINDS] == [0, 1, 2]
