"""The meta-state: its update against torch.optim, schedules, average, clipping, skipping, and its record."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from metadist.config import MetaConfig
from metadist.run.state import MetaState
from metadist.store.files import pack, unpack

SHAPES = {"images": (3, 2), "rate": (4,), "labels": (3, 5)}


def values(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: scale * torch.randn(s, generator=generator, dtype=torch.float64) for k, s in SHAPES.items()}


def buffer(grads: dict[str, Tensor], tasks: int = 4, loss: float = 2.0) -> Tensor:
    """The combined buffer of ``tasks`` tasks whose mean gradient is ``grads``."""
    flat = torch.cat([g.flatten() for g in grads.values()])
    return torch.cat((tasks * flat, torch.tensor([tasks * loss, tasks], dtype=torch.float64)))


def state(horizon: int = 100, **keys: Any) -> MetaState:
    return MetaState(values(0), MetaConfig(**keys), horizon)


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for k in found:
        torch.testing.assert_close(found[k].detach(), expected[k].detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_update_is_that_of_torch_with_a_rate_for_each_kind(kind: str) -> None:
    own = state(optimizer=kind, lr=0.1, lr_rate=0.02, lr_labels=0.5, beta1=0.6, beta2=0.9, eps=1e-3)
    rates = {"images": 0.1, "rate": 0.02, "labels": 0.5}
    phi = {k: v.clone().requires_grad_() for k, v in values(0).items()}
    groups = [{"params": [p], "lr": rates[k]} for k, p in phi.items()]
    other: torch.optim.Optimizer
    if kind == "adam":
        other = torch.optim.Adam(groups, betas=(0.6, 0.9), eps=1e-3)
    else:
        other = torch.optim.SGD(groups, lr=0.1, momentum=0.6)
    for step in range(5):
        grads = values(step + 1)
        assert own.apply(buffer(grads, tasks=step + 1)) is own  # the count does not matter: it is a mean
        for k, p in phi.items():
            p.grad = grads[k]
        other.step()
        close(own.phi, phi)
        assert own.grad_norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in grads.values())), rel=1e-12)
        assert own.loss == pytest.approx(2.0, rel=1e-12) and own.step == step + 1


def test_rates_of_other_kinds_default_to_lr() -> None:
    own = state(optimizer="sgd", beta1=0.0, lr=0.25)
    grads = values(1)
    own.apply(buffer(grads))
    close(own.phi, {k: v - 0.25 * grads[k] for k, v in values(0).items()})


def cosine(step: int) -> float:
    """From 1 to 0.2 in 4 steps."""
    return 0.2 + 0.4 * (1 + math.cos(math.pi * min(step, 4) / 4))


@pytest.mark.parametrize(
    "keys,expected",
    [
        ({"schedule": "constant", "decay_every": 2}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "step", "decay": 0.5, "decay_every": 2}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        ({"schedule": "step", "decay": 0.5}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"schedule": "cosine", "decay": 0.2}, [cosine(s) for s in range(6)]),
        ({"schedule": "cosine", "decay": 0.2, "warmup": 2}, [0.5, *(cosine(s) for s in range(1, 6))]),
    ],
)
def test_schedules(keys: dict[str, Any], expected: list[float]) -> None:
    own = state(horizon=4, optimizer="sgd", beta1=0.0, lr=0.1, **keys)
    for factor in expected:
        assert own.factor() == pytest.approx(factor, rel=1e-12)
        before, grads = own.copy_phi(), values(own.step)
        own.apply(buffer(grads))
        close(own.phi, {k: v - 0.1 * factor * grads[k] for k, v in before.items()})
    own.scale = 0.25  # two roll-backs
    own.step = 0
    assert own.factor() == pytest.approx(expected[0] / 4, rel=1e-12)


def test_average() -> None:
    own = state(optimizer="sgd", beta1=0.0, lr=0.1, ema=0.75)
    expected = values(0)
    for step in range(3):
        own.apply(buffer(values(step + 1)))
        expected = {k: 0.75 * v + 0.25 * own.phi[k].detach() for k, v in expected.items()}
    close(own.kept, expected)
    assert not any(torch.equal(own.kept[k], own.phi[k]) for k in SHAPES)
    without = state(optimizer="sgd")
    without.apply(buffer(values(1)))
    assert all(torch.equal(without.kept[k], without.phi[k]) for k in SHAPES)
    assert not any(v.requires_grad for v in without.kept.values())


def test_clipping() -> None:
    own = state(optimizer="sgd", beta1=0.0, lr=1.0, clip=0.5)
    grads = values(1)
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    assert norm > 0.5
    own.apply(buffer(grads))
    close(own.phi, {k: v - 0.5 / norm * grads[k] for k, v in values(0).items()})
    assert own.grad_norm == pytest.approx(norm)  # shown as it was
    before, small = own.copy_phi(), values(2, scale=1e-3)
    own.apply(buffer(small))  # below the bound: left alone
    close(own.phi, {k: v - small[k] for k, v in before.items()})


def test_bad_steps_are_skipped_counted_and_forgotten() -> None:
    own = state(optimizer="adam", explode=10.0, ema=0.5)
    own.apply(buffer(values(1)))
    good = copy.deepcopy(own.tensors())
    nan, infinite = values(2), values(2)
    nan["rate"][1], infinite["images"][0, 0] = math.nan, math.inf
    for bad, total in enumerate(
        (buffer(nan), buffer(infinite), buffer(values(2), loss=math.nan), buffer(values(2, scale=1e3))), start=1
    ):
        own.apply(total)
        assert (own.bad, own.skipped, own.step) == (bad, bad, bad + 1)
        assert all(torch.equal(v, good[k]) for k, v in own.tensors().items())
    own.apply(buffer(values(3)))
    assert (own.bad, own.skipped, own.step) == (0, 4, 6)
    assert not any(torch.equal(own.phi[k], good[f"phi/{k}"]) for k in SHAPES)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_record_continues_to_the_bit(kind: str) -> None:
    keys: dict[str, Any] = {"optimizer": kind, "ema": 0.9, "schedule": "step", "decay_every": 2, "explode": 100.0}
    own = state(**keys)
    for step in range(3):
        own.apply(buffer(values(step + 1)))
    own.apply(buffer(values(0, scale=1e6)))
    own.best, own.best_valid, own.best_step, own.scale, own.rollbacks = own.copy_phi(), 0.75, 2, 0.5, 1
    tensors, metadata = unpack(pack(own.tensors(), json.loads(json.dumps(own.metadata()))))
    other = MetaState(values(9), MetaConfig(**keys), 100)
    other.restore(tensors, metadata)
    assert (other.bad, other.skipped, other.step) == (1, 1, 4)
    for step in range(4, 8):
        for s in (own, other):
            s.apply(buffer(values(step)))
        assert own.metadata() == other.metadata()
        ours, theirs = own.tensors(), other.tensors()
        assert ours.keys() == theirs.keys() and any(k.startswith("opt/") for k in ours)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_record_of_a_fresh_state() -> None:
    own = state()
    assert json.loads(json.dumps(own.metadata()))["best_valid"] is None  # minus infinity is no JSON
    used = state()
    used.apply(buffer(values(1)))
    used.best, used.best_valid = used.copy_phi(), 0.5
    used.restore(own.tensors(), own.metadata())  # a roll-back to the beginning forgets the optimizer's memory too
    assert used.best == {} and used.best_valid == -math.inf and used.step == 0
    assert used.tensors().keys() == own.tensors().keys()
    for s in (own, used):
        s.apply(buffer(values(2)))
    assert all(torch.equal(own.tensors()[k], used.tensors()[k]) for k in own.tensors())


def test_restoring_copies() -> None:
    own = state(optimizer="adam")
    own.apply(buffer(values(1)))
    snapshot = {k: v.clone() for k, v in own.tensors().items()}
    record, kept = own.metadata(), {k: v.clone() for k, v in snapshot.items()}
    own.restore(snapshot, record)
    own.apply(buffer(values(2)))
    assert all(torch.equal(v, kept[k]) for k, v in snapshot.items())  # an anchor can be returned to again
