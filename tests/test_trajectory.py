"""Trajectory matching, with and without a teacher: gradients against one plain graph, laws, errors, whole small runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax, softplus

from metadist.config import Config, DataConfig, InnerConfig, LabelsConfig, MethodConfig, NetConfig
from metadist.config_train import KdConfig
from metadist.config_trajectory import TrajectoryConfig
from metadist.data import dsa
from metadist.run import gradient_check
from metadist.run import setup as setup_room
from metadist.run.setup import Setup, build
from metadist.synthetic.images import Phi

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = dsa.MIRROR_FREE
SIZE = 698


class Walks:
    """Experts that wander: a double of metadist.store.experts.ExpertStore."""

    def __init__(self, count: int, epochs: int, size: int) -> None:
        self.count, self.epochs, self.size = count, epochs, size
        made = torch.Generator().manual_seed(0)
        steps = torch.randn(count, epochs + 1, size, generator=made) * 0.1
        self.path = steps.cumsum(1)

    def weights(self, expert: int, epochs: Sequence[int]) -> Tensor:
        return self.path[expert, list(epochs)]


def config_of(kd: bool = False, **changes: Any) -> Config:
    """A ConvNet of 4 channels on 8 x 8 digits."""
    config = Config(
        method=MethodConfig("mtt_kd" if kd else "mtt", gradient="trajectory", init="expert"),
        inner=InnerConfig(steps=1, epochs=4, lr=0.3, shared_lr=True, rate="raw"),
        trajectory=TrajectoryConfig(epochs=2, max_start=3, replay=8),
        data=DataConfig(size=8),
        net=NetConfig(name="convnet", width=4, depth=1, init="default"),
        tasks=3,
        ipc=1,
    )
    config.engine.dtype = "float64"
    config.teacher.net = NetConfig(name="convnet", width=3, depth=1, norm="batch", init="default")
    config.method.loss = "distillation" if kd else "cross_entropy"
    return dataclasses.replace(config, **changes)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """Setups of configurations, with walks for experts and a teacher that was hardly trained."""

    def of(config: Config, experts: Walks | None = None) -> Setup:
        config.cache_dir, config.teacher.epochs = str(tmp_path), 1
        monkeypatch.setattr(setup_room, "experts_of", lambda config: experts or Walks(3, 5, SIZE))
        return build(config)

    return of


def perturbed(phi: Phi) -> Phi:
    """Away from the start, where soft labels are all alike."""
    key = torch.Generator().manual_seed(1)
    return {k: v + 0.1 * torch.randn(v.shape, generator=key, dtype=v.dtype) * v.abs().mean() for k, v in phi.items()}


def plain(setup: Setup, phi: Phi, step: int, tasks: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the mean loss and the losses, by one autograd graph through every step of every task."""
    config, method, learner = setup.config, setup.method, setup.learner
    leaves = {k: v.detach().clone().requires_grad_() for k, v in phi.items()}
    segment, losses = method.draw(step, tasks), []
    labels = torch.softmax(leaves["labels"], 1) if "labels" in leaves else torch.arange(setup.synthetic.count) % 10
    for task in range(len(tasks)):
        theta = segment.theta0[task].clone().requires_grad_()
        for t, rows in enumerate(segment.rows[task]):
            x = leaves["images"][rows]
            if config.dsa != "none":
                x = dsa.apply(segment.augmentation[task, t], x)
            z = learner(theta, x)
            loss = cross_entropy(z, labels[rows])
            if setup.guide is not None:
                a, T = config.kd.alpha, config.kd.T
                soft = kl_div(log_softmax(z / T, 1), softmax(setup.guide.teacher(x) / T, 1), reduction="batchmean")
                loss = (1 - a) * loss + a * (T**2 if config.kd.scale is None else config.kd.scale) * soft
            (g,) = torch.autograd.grad(loss, theta, create_graph=True)
            rate = leaves["rate"] if config.inner.shared_lr else softplus(leaves["rate"][t])
            theta = theta - rate * g
        way = (segment.theta0[task] - segment.target[task]).square().sum()
        losses.append((theta - segment.target[task]).square().sum() / way)
    found = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True)), torch.stack(losses).detach()


CASES: dict[str, dict[str, Any]] = {
    "dsa": {"dsa": ALL},
    "alike": {},
    "soft labels, minibatches": {
        "dsa": "color_crop_cutout",
        "ipc": 2,
        "labels": LabelsConfig(kind="soft"),
        "trajectory": TrajectoryConfig(epochs=1, max_start=5, batch=6, replay=8),
    },
    "a rate a step, passes in two batches": {
        "ipc": 2,
        "inner": InnerConfig(steps=2, epochs=2, lr=0.3, rate="softplus"),
    },
    "kd, dsa, soft labels": {"kd": KdConfig(alpha=0.3, T=2.0), "dsa": ALL, "labels": LabelsConfig(kind="soft")},
    "kd, alike, without T^2": {"kd": KdConfig(alpha=0.7, T=0.5, scale=1.0)},
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_one_graph(case: str, made: Any) -> None:
    changes = dict(CASES[case])
    kd = changes.pop("kd", None)
    config = config_of(kd is not None, **changes)
    if kd is not None:
        config.kd = kd
    setup = made(config)
    assert setup.method.alike == (case in ("alike", "kd, alike, without T^2"))
    phi, tasks = perturbed(setup.method.parameters()), torch.arange(3)
    right, losses = plain(setup, phi, 5, tasks)
    ours = gradient_check.gradient(setup, phi, 5)
    torch.testing.assert_close(setup.method.loss(phi, setup.method.draw(5, tasks)).detach(), losses, rtol=1e-12, atol=0)
    assert ours.keys() == right.keys() == phi.keys()
    for name, value in right.items():
        value = value.flatten()
        assert float(value.norm()) > 1e-6, name
        assert float((ours[name] - value).norm() / value.norm()) < 1e-10, name
