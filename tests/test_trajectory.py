"""Trajectory matching, with and without a teacher: gradients against one plain graph, laws, errors, whole small runs."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Nursery, result, same
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax, softplus

import metadist
from metadist import nets, store
from metadist.config import Config, DataConfig, InnerConfig, LabelsConfig, MethodConfig, NetConfig
from metadist.config_train import KdConfig
from metadist.config_trajectory import TrajectoryConfig
from metadist.data import dsa
from metadist.errors import RunError, UserError
from metadist.evaluate import teachers
from metadist.exchange.allreduce import Alone
from metadist.identity import identity_hash
from metadist.methods.starts import Expert
from metadist.nets.loss import cross_entropy_loss, distillation_loss
from metadist.run import evaluation, gradient_check, judge, local, origins, trainer
from metadist.run import setup as setup_room
from metadist.run.command import main
from metadist.run.compose import compose, expand
from metadist.run.compute import Compute
from metadist.run.experts import experts_dir, recipe
from metadist.run.folder import RunFolder
from metadist.run.helptext import header
from metadist.run.setup import Setup, build
from metadist.run.signals import Stop
from metadist.run.state import MetaState
from metadist.store.coding import Trajectory as Coded
from metadist.store.experts import prepare, write_expert
from metadist.synthetic.images import MIN_RATE, Phi

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = dsa.MIRROR_FREE
SIZE = 698


class Walks:
    """Experts that wander: a double of metadist.store.experts.ExpertStore."""

    def __init__(self, count: int, epochs: int, size: int) -> None:
        self.key, self.count, self.epochs, self.size = "walks", count, epochs, size
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
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Setup]:
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


@pytest.mark.parametrize("kd", [False, True])
def test_finite_differences(kd: bool, made: Any) -> None:
    # No ReLU, whose kinks a difference may step over.
    config = config_of(kd, dsa=ALL, labels=LabelsConfig(kind="soft"))
    config.net.activation = "sigmoid"
    config.teacher.net.activation = "sigmoid"
    setup = made(config)
    phi, tasks = perturbed(setup.method.parameters()), torch.arange(3)
    ours = gradient_check.gradient(setup, phi, 1)
    segment = setup.method.draw(1, tasks)
    for name, value in phi.items():
        direction = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(3))
        h = 1e-5
        ends = [float(setup.method.loss(phi | {name: value + s * h * direction}, segment).mean()) for s in (1, -1)]
        slope = float(ours[name] @ direction.flatten())
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=1e-6), name


# --- what a task is


def test_segments_are_drawn_by_counter_and_come_from_the_whole_window() -> None:
    learner = nets.build(NetConfig(name="mlp", width=3, depth=1), 1, 4, 2)
    walks = Walks(4, 9, learner.size)
    expert = Expert(learner, walks, TrajectoryConfig(epochs=2, min_start=1, max_start=5), seed=7)
    start, end = expert.segments(3, torch.arange(400))
    known = {tuple(walks.path[i, t].tolist()): (i, t) for i in range(4) for t in range(10)}
    drawn = [(known[tuple(a.tolist())], known[tuple(b.tolist())]) for a, b in zip(start, end)]
    assert all(i == j and u == t + 2 for (i, t), (j, u) in drawn)
    counts = torch.zeros(4, 10)
    for (i, t), _ in drawn:
        counts[i, t] += 1
    assert int(counts[:, 1:5].min()) > 8 and float(counts.sum()) == float(counts[:, 1:5].sum())  # 25 each, sd 5
    some = expert.segments(3, torch.tensor([17, 5]))
    assert torch.equal(some[0], start[[17, 5]]) and not torch.equal(expert.segments(4, torch.arange(400))[0], start)
    other = Expert(learner, walks, TrajectoryConfig(epochs=2, min_start=1, max_start=5), seed=8)
    assert not torch.equal(other.segments(3, torch.arange(400))[0], start)


def test_the_window_of_start_epochs_grows() -> None:
    learner = nets.build(NetConfig(name="mlp", width=3, depth=1), 1, 4, 2)
    config = TrajectoryConfig(epochs=1, min_start=1, max_start=10, grow=100, grow_from=4)
    expert = Expert(learner, Walks(1, 20, learner.size), config, seed=0)
    assert [expert.bound(s) for s in (0, 16, 17, 50, 99, 100, 10**6)] == [4, 4, 5, 7, 9, 10, 10]
    assert Expert(learner, expert.experts, dataclasses.replace(config, grow_from=0), 0).bound(0) == 2
    assert Expert(learner, expert.experts, dataclasses.replace(config, grow=0, grow_from=0), 0).bound(0) == 10


def test_a_pass_takes_every_image_once_and_steps_cut_across_passes(made: Any) -> None:
    setup = made(config_of(ipc=2, trajectory=TrajectoryConfig(epochs=1, max_start=2, batch=8, replay=8)))
    rows = setup.method.draw(0, torch.arange(3)).rows  # 4 steps of 8: one pass of 20, and 12 of the next
    assert rows.shape == (3, 4, 8)
    for own in rows.flatten(1):
        assert sorted(own[:20].tolist()) == list(range(20)) and len(set(own[20:].tolist())) == 12
    assert not torch.equal(rows[0], rows[1])


def test_augmentation_is_one_operation_a_step_with_parameters_of_each_image(made: Any) -> None:
    setup = made(config_of(dsa="color_rotate", ipc=1))
    drawn = setup.method.draw(0, torch.arange(40)).augmentation
    assert drawn.shape == (40, 4, 10, dsa.WIDTH)
    identity = torch.tensor([0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0], dtype=drawn.dtype)
    colored = (drawn[..., :3] != identity[:3]).any(-1)
    turned = (drawn[..., 3:9] != identity[3:9]).any(-1)
    assert bool((colored ^ turned).all()) and bool((colored == colored[..., :1]).all())
    assert 50 < int(colored[..., 0].sum()) < 110  # of 160
    assert bool((drawn[:, :, 0] != drawn[:, :, 1]).any(-1).all())


# --- the student's loss with a teacher


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Given(nn.Module):
    """A net whose logits are its weights."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.z + 0 * x.sum()


def given(*shape: int) -> nets.Learner:
    return nets.Learner(Given(*shape), dtype=torch.float64)


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_the_loss_is_that_of_torch(T: float, scale: float | None) -> None:
    z, t, y, x = logits(6, 5), logits(6, 5, seed=1), torch.tensor([0, 1, 2, 3, 4, 0]), torch.zeros(6, 1, 1, 1).double()
    loss = distillation_loss(given(6, 5), 0.3, T, scale)
    soft = kl_div(log_softmax(z / T, 1), log_softmax(t / T, 1), reduction="batchmean", log_target=True)
    want = 0.7 * cross_entropy(z, y) + 0.3 * (T * T if scale is None else scale) * soft
    torch.testing.assert_close(loss(z.flatten(), (x, y, t)), want, rtol=1e-13, atol=0)


def test_its_ends_are_cross_entropy_and_the_teacher_alone() -> None:
    z, t, y, x = logits(6, 5), logits(6, 5, seed=1), softmax(logits(6, 5, seed=2), 1), torch.zeros(6, 1, 1, 1).double()
    learner = given(6, 5)
    hard = distillation_loss(learner, 0.0, 2.0)(z.flatten(), (x, y, t))
    torch.testing.assert_close(hard, cross_entropy_loss(learner)(z.flatten(), (x, y)), rtol=1e-14, atol=0)
    only = distillation_loss(learner, 1.0, 2.0)
    assert float(only(t.flatten(), (x, y, t))) == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(only(z.flatten(), (x, y, t)), only(z.flatten(), (x, y.flip(0), t)))
    # At T = 1 the soft term is cross-entropy with the teacher's probabilities, less their entropy.
    one, p = distillation_loss(learner, 1.0, 1.0)(z.flatten(), (x, y, t)), softmax(t, 1)
    torch.testing.assert_close(one, cross_entropy(z, p) + (p * p.log()).sum(1).mean(), rtol=1e-12, atol=0)


def test_at_high_temperature_it_matches_logits() -> None:
    z, t, y, x = logits(6, 5), logits(6, 5, seed=1), torch.zeros(6, dtype=torch.int64), torch.zeros(6, 1, 1, 1).double()
    z, t = z - z.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    limit = (z - t).square().sum(1).mean() / (2 * 5)
    errors = []
    for T in (1e2, 1e3, 1e4):
        value = distillation_loss(given(6, 5), 1.0, T)(z.flatten(), (x, y, t))
        errors.append(float((value - limit).abs() / limit))
    assert errors[0] < 0.1 and errors[1] < 0.15 * errors[0] and errors[2] < 1e-3  # of first order in 1 / T


def test_gradients_reach_the_pixels_through_the_teacher(made: Any) -> None:
    """With the teacher's logits cut off, another gradient comes out."""
    config = config_of(True, dsa=ALL)
    config.kd = KdConfig(alpha=0.9, T=1.0)
    setup = made(config)
    phi = perturbed(setup.method.parameters())
    right = gradient_check.gradient(setup, phi, 0)["images"]
    teacher = setup.guide.teacher
    setup.method.guide = setup.guide._replace(teacher=lambda x: teacher(x).detach())
    cut = gradient_check.gradient(setup, phi, 0)["images"]
    assert float((cut - right).norm() / right.norm()) > 0.05


# --- teachers


def test_a_teacher_is_trained_once_read_back_and_refused_for_other_classes(made: Any, tmp_path: Path, capsys: Any) -> None:
    config = config_of(True)
    config.teacher.epochs, config.teacher.lr, config.seed = 3, 0.1, 4
    setup = made(config)  # trains for one epoch
    assert "training the teacher, convnet, for 1 epochs" in capsys.readouterr().out
    (path,) = (tmp_path / "teacher").glob("*.safetensors")
    first = setup.guide.teacher
    valid = setup.data.valid
    accuracy = float((first(valid.x).argmax(1) == valid.y).double().mean())
    assert accuracy > 0.5  # it has learned
    again = teachers.teacher(config, setup.data, torch.float64)
    assert capsys.readouterr().out == "" and torch.equal(again.theta, first.theta)
    config.teacher.path = str(path)
    read = teachers.teacher(config, setup.data, torch.float64)
    x = valid.x[:7]
    assert torch.equal(read(x), first(x)) and read(x).shape == (7, 10)
    torch.testing.assert_close(read(x)[:2], read(x[:2]))  # by its own statistics, not the batch's
    single = read.to(torch.float32)
    torch.testing.assert_close(single(x.float()).double(), read(x), rtol=1e-3, atol=1e-3)
    renamed = dataclasses.replace(setup.data, classes=tuple(f"c{i}" for i in range(10)))
    with pytest.raises(UserError, match=r"is a teacher for 10 classes \(0, 1, 2, 3, \.\.\.\), this data has 10 \(c0"):
        teachers.teacher(config, renamed, torch.float64)
    fewer = dataclasses.replace(setup.data, classes=("a", "b"))
    with pytest.raises(UserError, match=r"for 10 classes \(0, 1, 2, 3, \.\.\.\), this data has 2 \(a, b\)"):
        teachers.teacher(config, fewer, torch.float64)
    config.teacher.net.width = 5
    with pytest.raises(UserError, match=r"holds theta \[\d+\] and buffers \[6\]; teacher.net.name=convnet for 10 classes has"):
        teachers.teacher(config, setup.data, torch.float64)
    config.teacher.path = str(tmp_path / "none")
    with pytest.raises(UserError, match="is no file"):
        teachers.teacher(config, setup.data, torch.float64)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(path.read_bytes()[:-9])
    config.teacher.path = str(torn)
    with pytest.raises(UserError, match="can't be read"):
        teachers.teacher(config, setup.data, torch.float64)


# --- the bias of shortcuts


@pytest.mark.parametrize("kd", [False, True])
def test_gradient_check_measures_the_first_order_shortcut(kd: bool, made: Any) -> None:
    config = config_of(kd, dsa="color_crop", inner=InnerConfig(steps=1, epochs=6, lr=0.5, shared_lr=True, rate="raw"))
    config.engine.dtype = "float32"
    setup = made(config)
    phi = setup.method.parameters()
    wide, best = {k: v.double() for k, v in phi.items()}, gradient_check.exact(setup)
    right = gradient_check.gradient(best, wide, 2)
    assert gradient_check.compare(gradient_check.gradient(setup, phi, 2), right)[-1].relative_error < 1e-3  # float32
    segment, h = best.method.draw(2, torch.arange(3)), best.synthetic.schedule(wide)[:6]
    found = gradient_check.compare_shortcut(best, wide, 2, right)
    assert [b.parameter for b in found] == ["images", "rate", "all"]
    assert 0.5 < found[-1].cosine < 0.9999 and found[0].relative_error > 1e-2
    # By hand: every step's gradient at weights that are held still.
    leaves = {k: v.clone().requires_grad_() for k, v in wide.items()}
    batches, loss = best.method.batches(leaves, segment), best.method.inner.loss
    total = torch.zeros((), dtype=torch.float64)
    for g in range(3):
        theta, end = segment.theta0[g], segment.theta0[g]
        for t in range(6):
            at = theta.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss(at, tuple(b[g, t] for b in batches)), at, create_graph=True)
            end = end - leaves["rate"] * slope
            theta = theta - h[t, 0].detach() * slope.detach()
        total = total + (end - segment.target[g]).square().sum() / (segment.theta0[g] - segment.target[g]).square().sum() / 3
    hand = torch.autograd.grad(total, list(leaves.values()))
    by_hand = {k: v.flatten() for k, v in zip(leaves, hand, strict=True)}
    for ours, theirs in zip(found, gradient_check.compare(by_hand, right), strict=True):
        assert ours.cosine == pytest.approx(theirs.cosine, abs=1e-10)
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-8)


# --- rates


def test_a_shared_rate_stands_for_every_recorded_step_and_stays_positive(made: Any) -> None:
    setup = made(config_of())
    phi = setup.method.parameters()
    assert phi["rate"].shape == (1,) and len(setup.synthetic.order) == 8 and setup.synthetic.inner_steps == 4
    assert setup.synthetic.rates(phi).tolist() == [0.3] * 8
    setup.config.meta.optimizer, setup.config.meta.beta1, setup.config.meta.lr = "sgd", 0.0, 1.0
    state = MetaState(phi, setup.config.meta, 1, setup.synthetic.least)
    push = torch.zeros(sum(p.numel() for p in phi.values()) + 2, dtype=torch.float64)
    push[sum(v.numel() for v in list(phi.values())[: list(phi).index("rate")])], push[-1] = 5.0, 1.0
    state.apply(push)
    assert MIN_RATE < float(state.phi["rate"].detach()) < 2 * MIN_RATE
    # There it still has a gradient, that of training which gets nowhere: it can come back.
    assert abs(float(gradient_check.gradient(setup, state.kept, 0)["rate"])) > 1e-3


def test_recorded_steps_go_on_with_the_inner_ones(made: Any) -> None:
    inner = InnerConfig(steps=2, epochs=2, lr=0.1, optimizer="momentum", learn_momentum=True)
    trajectory = TrajectoryConfig(epochs=1, max_start=2, replay=10)
    setup = made(config_of(ipc=2, inner=inner, trajectory=trajectory))
    phi = perturbed(setup.method.parameters())
    made_of = setup.synthetic
    assert made_of.order == (0, 1) * 5
    for each, learned in ((made_of.rates(phi), softplus(phi["rate"])), (made_of.momenta(phi), phi["momentum"].sigmoid())):
        assert torch.equal(each, torch.cat((learned, learned, learned[:2])))
    kept = judge.distilled(setup, phi, 0, {})
    assert kept.order.tolist() == [0, 1] * 5 and kept.manifest["init"] == "expert" and kept.theta0 is None


# --- whole runs, on experts that a store holds

TINY = [
    "data=digits", "data.size=8", "net=mlp", "net.width=8", "net.depth=1", "ipc=1", "tasks=3", "inner.epochs=3",
    "inner.lr=0.05", "experts.count=3", "experts.epochs=4", "trajectory.max_start=3", "trajectory.replay=6", "meta.lr=0.1",
    "meta.lr_rate=0.001", "dsa=color_crop_cutout", "eval.every=7", "eval.nets=2", "eval.final_nets=3",
    "run.checkpoint_every=3", "run.log_every=1", "run.image_every=1000", "threads=1", "engine.compile=off",
    "engine.group=2", "device=cpu", "exchange.timeout_s=60",
]  # fmt: skip
KD = ["method=mtt_kd", "kd.alpha=.4", "teacher.net.name=mlp", "teacher.net.width=6", "teacher.epochs=1"]


def walked(words: list[str]) -> None:
    """Put experts that wander into the store of a configuration."""
    config = compose(words)
    learner = nets.build(config.net, 1, 8, 10)
    key = prepare(experts_dir(config), recipe(config), {n: list(s) for n, s in zip(learner.names, learner.shapes)})
    walks = Walks(config.experts.count, config.experts.epochs, learner.size)
    for i, path in enumerate(walks.path):
        coded = Coded(path[0])
        for theta in path[1:]:
            coded.add(theta)
        write_expert(experts_dir(config), i, key, coded, {})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache with the experts of TINY, in float32 and float64."""
    cache = f"cache_dir={tmp_path_factory.mktemp('cache')}"
    for more in ([], ["engine.dtype=float64"]):
        walked([*TINY, cache, "method=mtt", *more])
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("method", [["method=mtt"], KD], ids=["mtt", "mtt_kd"])
def test_two_workers_are_one(method: list[str], cache: str, tmp_path: Path) -> None:
    words = [*TINY, *method, cache, "engine.dtype=float64", "steps=4"]
    alone = RunFolder.open(compose([*words, f"run_dir={tmp_path / 'one'}"]))
    trainer.train(alone.config, alone, Alone(), Stop())
    both = RunFolder.open(compose([*words, "workers=2", f"run_dir={tmp_path / 'two'}"]))
    assert local.launch(both) == 0
    one, two = (store.Checkpoints(f.path / "checkpoints", 0).load_newest() for f in (alone, both))
    assert one is not None and two is not None and one[0] == two[0] == 4 and one[1].keys() == two[1].keys()
    for name, value in one[1].items():
        assert value.dtype == torch.float64
        assert float((value - two[1][name]).abs().max()) <= 1e-10 * max(float(value.abs().max()), 1e-300), name


def test_students_are_judged_with_their_teacher_and_without(cache: str) -> None:
    made = build(compose([*TINY, *KD, cache, "engine.dtype=float64", "kd.alpha=.8", "kd.T=2"]))
    phi, theta0 = made.synthetic.parameters(), made.starts.held_out(3, "validation")
    taught, alone = judge.figures_of(made, phi, "evaluation", theta0)
    guide = made.guide
    assert guide is not None
    x, y = (v[0] for v in made.synthetic.batches(phi))
    rates, split = made.synthetic.rates(phi), made.data.test

    def trained(loss: Callable[..., Tensor], *seen: Tensor) -> list[float]:
        found = []
        for theta in theta0:
            for rate in rates:
                theta = theta.detach().requires_grad_()
                theta = theta - rate * torch.autograd.grad(loss(theta, seen), theta)[0]
            found.append(float((made.learner(theta, split.x).argmax(1) == split.y).double().mean()))
        return found

    assert taught.tolist() == trained(distillation_loss(made.learner, 0.8, 2.0), x, y, guide.teacher(x).detach())
    assert alone.tolist() == trained(cross_entropy_loss(made.learner), x, y) and taught.tolist() != alone.tolist()
    assert len(judge.figures_of(made, phi, "validation", theta0)) == 1  # a checkpoint is chosen by students with their teacher


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as ours:
        yield ours


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(nursery: Nursery, cache: str, tmp_path: Path) -> None:
    words, rng = [*TINY, *KD, cache, "steps=25", "trajectory.grow=20", "labels.kind=soft"], random.Random(3)
    nursery.run([*words, f"run_dir={tmp_path / 'whole'}"], tmp_path)
    for _ in range(2):
        started = nursery.start([*words, f"run_dir={tmp_path / 'killed'}"], tmp_path)
        started.until_lines(rng.randint(1, 6))
        time.sleep(rng.random() * 0.05)
        assert started.poll() is None, (started.out, started.err)
        started.kill()
        assert started.wait() == -signal.SIGKILL
    nursery.run([*words, f"run_dir={tmp_path / 'killed'}"], tmp_path)
    same(result(tmp_path / "whole"), result(tmp_path / "killed"))


def test_a_whole_run_and_what_comes_of_it(cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert main([*TINY, "method=mtt", cache, "steps=8", f"run_dir={run_dir}"]) == 0
    out = capsys.readouterr().out
    assert "mtt on digits, mlp, 8 meta-steps" in out and "10 real images, random" in out
    kept = metadist.load(str(run_dir))
    assert kept.order.tolist() == [0] * 6 and len(set(kept.lr.tolist())) == 1 and kept.images.shape == (10, 1, 8, 8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = net[1].weight.detach().clone()
    kept.replay(net)
    assert not torch.equal(net[1].weight, before)
    assert evaluation.main([f"run={run_dir}", "check=gradient"]) == 0
    text = capsys.readouterr().out
    assert "as configured (trajectory, float32, fp32)" in text and "first-order shortcut" in text
    assert evaluation.main([f"run={run_dir}", "check=gradient", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    exact, short = ({b["parameter"]: b["cosine"] for b in found[k]} for k in ("gradient", "first_order"))
    assert exact["all"] > 0.9999 and short.keys() == exact.keys() == {"images", "rate", "all"}
    scalars = (run_dir / "scalars.jsonl").read_text() if (run_dir / "scalars.jsonl").exists() else "rate/00"
    assert "rate/01" not in scalars


WRONG: list[tuple[list[str], str]] = [
    (["trajectory.max_start=4"], "max_start=4 asks for snapshot 5 of experts that end at 4; allowed with trajectory.epochs=2"),
    (["trajectory.max_start=6"], "max_start=6 names more start epochs than the 5 snapshots of these experts; allowed with"),
    (["trajectory.epochs=5"], "trajectory.epochs=5 is longer than the experts' 4 epochs; allowed: 1 to 4"),
    (["experts.dsa=colour"], "did you mean color?"),
    (["experts.path=/x"], "experts.epochs is not read by this run: it belongs to experts.path=null"),
    (["net.width=9"], "there are no experts in"),
    (["experts.count=9"], "holds 3 finished experts"),
    (["trajectory.min_start=3"], "min_start=3 is not below trajectory.max_start=3"),
    (["trajectory.grow_from=2"], "trajectory.grow_from=2 needs trajectory.grow above 0"),
    (["trajectory.batch=11"], "trajectory.batch=11 is more than the 10 distilled images"),
    (["trajectory.batch=5", "inner.steps=2"], "both say how many images a step takes"),
    (["trajectory.replay=2"], "trajectory.replay=2 is shorter than the 3 inner steps"),
    (["dsa=color_flip"], "mirrors images"),
    (["dsa=colour"], "did you mean color?"),
    (["kd.alpha=.3"], "kd.alpha is not read by this run: it belongs to method.loss=distillation"),
    (["teacher.net.name=resnet18"], "teacher.net.name is not read by this run"),
    (["method=mtt_kd", "kd.alpha=1.5"], "kd.alpha=1.5 is out of range; allowed: 0 to 1"),
    (["method=mtt_kd", "kd.T=0"], "kd.T=0.0 is out of range; allowed: above 0"),
    (["method=mtt_kd", "teacher.path=nowhere"], "teacher.path=nowhere is no file"),
    (["real_batch=7"], "real_batch is not read by this run"),
    (["method.init=random"], "contradicts method=mtt, which means init=expert"),
    (["method=dd_random_init", "method.gradient=trajectory"], "start at experts; choose method=mtt"),
    (["method=dd_random_init", "method.loss=distillation", "dsa=none"], "method=mtt_kd"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_a_mistake_is_one_line(words: list[str], said: str, cache: str, tmp_path: Path, capsys: Any) -> None:
    own = [w for w in words if w.startswith("method=")] or ["method=mtt"]
    theirs = {w.partition("=")[0] for w in words}
    plain = [w for w in TINY if w.partition("=")[0] not in theirs]
    assert main([*plain, *own, *(w for w in words if w not in own), cache, f"run_dir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err


def test_a_resumed_run_goes_on_with_the_experts_it_began_with(cache: str, tmp_path: Path) -> None:
    """experts.path names a folder, not a recipe: another's experts may have come to lie there."""
    folder = RunFolder.open(compose([f"run_dir={tmp_path / 'run'}"]))
    setup = build(compose([*TINY, "method=mtt", cache]))
    starts: Any = setup.starts
    for key, said in (
        ("a" * 64, ""),
        ("a" * 64, ""),
        ("b" * 64, "not those this run began with .sha256 bbbb.*restore experts.path"),
    ):
        starts.experts.key = key
        with pytest.raises(RunError, match=said) if said else nullcontext():
            origins.check(setup.origins, folder)


@pytest.mark.parametrize(
    ("preset", "experts"),
    [
        ("mnist_mtt", "mnist_experts"),
        ("cifar10_mtt_small", "cifar10_experts_small"),
        ("cifar10_mtt_kd_small", "cifar10_experts_small"),
        ("cifar10_mtt_1", "cifar10_experts"),
        ("cifar10_mtt_10", "cifar10_experts"),
        ("cifar10_mtt_kd_resnet50", "cifar10_experts"),
        ("cifar10_mtt_50", "cifar10_experts_plain"),
    ],
)
def test_presets_find_the_experts_that_their_headers_name(preset: str, experts: str) -> None:
    config = compose([f"preset={preset}"])
    made = compose([f"preset={experts}"], judge=lambda config, words: None)
    assert experts_dir(config) == experts_dir(made) and config.experts.count == made.experts.count
    assert config.trajectory.max_start - 1 + config.trajectory.epochs <= made.experts.epochs
    assert f"preset={experts} " in header("preset", preset)["experts"]


class _Named:
    """As much of a data set as a teacher's recipe reads."""

    name, classes = "cifar10", ("a", "b")


def test_the_table_of_temperatures_and_weights_is_one_sweep() -> None:
    points = expand(["preset=cifar10_mtt_kd_resnet50", "kd.T=.5,1,3", "kd.alpha=.3,.7", "kd.scale=1"])
    assert {(p.config.kd.T, p.config.kd.alpha) for p in points} == {(T, a) for T in (0.5, 1, 3) for a in (0.3, 0.7)}
    assert len({identity_hash(p.config) for p in points}) == 6  # six runs
    shared = {json.dumps(teachers.recipe(p.config, _Named(), torch.float32)) for p in points}
    assert len(shared) == 1  # that share one teacher


@pytest.mark.parametrize("method", ["dd_random_init", "mtt"])
def test_static_members_of_a_task_select_the_graph_and_its_tensors_are_inputs(method: str, cache: str) -> None:
    """As a GPU takes it; on a CPU the capture is a plain call. A static member may be None."""
    own = [w for w in TINY if method == "mtt" or not w.startswith(("experts.", "trajectory.", "dsa="))]
    setup = build(compose([*own, f"method={method}", cache]))
    compute, phi = Compute(setup.method, 2, setup.device), setup.method.parameters()
    plain = compute(phi, 0, torch.arange(3))
    compute._static = True
    assert torch.equal(compute(phi, 0, torch.arange(3)), plain)
