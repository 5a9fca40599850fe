"""The benchmark's reference loops do the engine's work: the same meta-gradient in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_cases import CLASSES, KINDS, ORDER, difference, make, normal

from metadist.metagrad import Inner, Optimizer


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_both_references_are_the_engine(kind: str, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import reference

    case, optimizer = make("convnet_instance"), Optimizer(kind)
    h = optimizer.schedule(0.1 * case.params.rates, case.params.momenta)
    batches = (case.params.pixels, torch.arange(12).reshape(2, 6) % CLASSES)
    real = (normal("own real", (2, 8, 1, 8, 8)), (torch.arange(16) % CLASSES).reshape(2, 8))
    leaves = (batches[0].clone().requires_grad_(), h.clone().requires_grad_())
    theta = Inner(case.loss, optimizer).unroll(case.params.theta0, (leaves[0], batches[1]), ORDER, leaves[1], start=start)[0]
    torch.vmap(case.loss)(theta, real).mean().backward()
    for loop in (reference.kept_graphs, reference.one_graph):
        got = loop(case.loss, optimizer, case.params.theta0, batches, ORDER, h, real, start)
        for a, leaf in zip(got, leaves):
            assert difference(a, leaf.grad) < 1e-10


def test_the_evaluation_reference_trains_the_same_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import reference

    case = make("convnet_batch")
    batches = (case.params.pixels, torch.arange(12).reshape(2, 6) % CLASSES)
    h = torch.full((3, 1), 0.2, dtype=torch.float64)
    got = reference.train_one_by_one(case.learner, case.params.theta0, batches, ORDER, 0.2)
    assert difference(got, Inner(case.loss, Optimizer("sgd")).train(case.params.theta0, batches, ORDER, h)) < 1e-12
