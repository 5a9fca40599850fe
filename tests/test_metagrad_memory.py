"""The engine's memory grows by the states alone; the meter that says so is itself checked on known amounts."""

from __future__ import annotations

import gc

import pytest
import torch
from engine_cases import KINDS

from metadist import draw
from metadist.config import NetConfig
from metadist.metagrad import Inner, LiveBytes, Optimizer, group_size
from metadist.nets import build
from metadist.nets.loss import cross_entropy_loss


def peak(kind: str, steps: int) -> tuple[int, int]:
    """(peak bytes of one meta-gradient of ``steps`` inner steps on a ConvNet, bytes of its weights)"""
    learner = build(NetConfig(name="convnet", width=16, depth=3), 3, 16, 10)
    theta0 = learner.init(draw.key(0, "theta0", 0, torch.arange(1)))
    x = draw.normal(draw.key(0, "x"), (5, 4, 3, 16, 16)).requires_grad_()
    y = torch.arange(4).expand(5, 4)
    lr = torch.full((steps,), 0.01, requires_grad=True)
    optimizer = Optimizer(kind)
    inner, loss = Inner(cross_entropy_loss(learner), optimizer), cross_entropy_loss(learner)
    gc.collect()
    with LiveBytes() as live:
        h = optimizer.schedule(lr, torch.full_like(lr, 0.9))
        theta = inner.unroll(theta0, (x, y), [t % 5 for t in range(steps)], h)
        loss(theta[0, 0], (x[0].detach(), y[0])).backward()
    assert x.grad is not None and x.grad.norm() > 0
    return live.peak, theta0.nbytes


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] if k == "momentum" else []) for k in KINDS])
def test_memory_grows_by_the_states_alone(kind: str) -> None:
    (ten, weights), (twenty, _), (forty, _) = (peak(kind, steps) for steps in (10, 20, 40))
    limit = 1.25 * (1 + Optimizer(kind).buffers) * weights
    assert (twenty - ten) / 10 < limit and (forty - twenty) / 20 < limit
    # And not by nothing: the meter sees the states.
    assert (forty - ten) / 30 > 0.9 * (1 + Optimizer(kind).buffers) * weights


def test_the_meter_on_known_amounts() -> None:
    old = torch.zeros(1000)
    with LiveBytes() as live:
        assert live.peak == 0
        old.add_(1)  # in place, and of before: not counted
        old[10:].view(-1)
        a = torch.zeros(256)  # 1,024 bytes
        b = a[:128].view(2, 64)  # the same storage
        assert live.peak == 1024
        del a
        c = torch.zeros(512)  # b still holds the storage
        assert live.peak == 1024 + 2048
        del b, c
        assert live.live == 0
        d = torch.zeros(64)
        assert live.live == d.nbytes == 256
    torch.zeros(10000)
    assert live.peak == 3072


def test_the_meter_sees_what_autograd_keeps() -> None:
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        y = x
        for _ in range(10):
            y = y.exp()  # keeps its result
        kept = live.live
        y.sum().backward()
        del y
        after = live.live
    assert kept == 10 * 4000
    assert after <= 4000 + 8  # the gradient


def test_the_meter_under_vmap_and_grad() -> None:
    with LiveBytes() as live:
        out = torch.func.vmap(torch.func.grad(lambda t: t.exp().sum()))(torch.ones(8, 100))
        assert live.live == out.nbytes + 0
    assert live.peak >= 2 * out.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_meter_on_a_gpu() -> None:
    held = torch.zeros(1 << 20, device="cuda")
    with LiveBytes("cuda") as live:
        torch.zeros(1 << 18, device="cuda")
    assert live.peak == 1 << 20 and held.numel() == 1 << 20


@pytest.mark.parametrize(
    "budget, one, tasks, size",
    [(100, 10, 8, 8), (100, 30, 8, 3), (100, 30, 9, 3), (100, 25, 10, 4), (5, 10, 8, 1), (55, 10, 8, 4), (10, 10, 1, 1)],
)
def test_group_size(budget: int, one: int, tasks: int, size: int) -> None:
    assert group_size(budget, one, tasks) == size
    assert size == 1 or size * one <= budget


def test_group_size_refuses_nonsense() -> None:
    for one, tasks in ((0, 4), (10, 0)):
        with pytest.raises(ValueError, match="need tasks >= 1"):
            group_size(100, one, tasks)
