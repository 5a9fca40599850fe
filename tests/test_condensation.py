"""Matching class by class: gradients (dc, dsa) and embeddings (dm), in float64 against plain graphs, differences, closed forms;
the learner trained on the way, over workers, a server, kills; real starts; refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from law_worker import train_all
from run_helpers import ROOT, Nursery
from server_helpers import alone, finished, same, starting
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metadist import draw, nets, store
from metadist.config import Config, NetConfig
from metadist.data import dsa
from metadist.errors import UserError
from metadist.exchange.allreduce import Alone
from metadist.methods.dc import Condensation
from metadist.methods.dm import Distribution
from metadist.methods.implicit import WEIGHTS
from metadist.nets import Learner
from metadist.nets.embedding import embedding
from metadist.run import gradient_check, local
from metadist.run.compose import compose
from metadist.run.compute import Compute
from metadist.run.folder import RunFolder
from metadist.run.setup import Setup, build
from metadist.run.state import MetaState
from metadist.synthetic.distilled import load
from metadist.synthetic.images import Phi

F64 = torch.float64
HERE = __name__.rpartition(".")[2]
TEN = torch.arange(10)
# Ten classes of 8 x 8 digits; a smooth learner with instance normalization.
SMALL = [
    "data=digits", "data.size=8", "threads=1", "device=cpu", "engine.compile=off", "engine.dtype=float64", "net=convnet",
    "net.width=3", "net.depth=2", "net.activation=sigmoid", "real_batch=9", "ipc=2", "inner.epochs=2", "matching.outer=3",
    "matching.inner=2", "matching.batch=8", "matching.lr=0.3",
]  # fmt: skip
CASES = {
    "dc": ["method=dc"],
    "dsa": ["method=dsa"],
    "one image, l2": ["method=dsa", "ipc=1", "matching.distance=l2"],
    "soft labels, mlp": ["method=dsa", "labels.kind=soft", "net=mlp", "net.width=6", "net.depth=1"],
    "weight norm": ["method=dc", "net.weight_norm=true"],
}

pytestmark = pytest.mark.usefixtures("one_thread")


class Projection(nn.Sequential):
    """Embeds linearly: five numbers of an image."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 5, bias=False), nn.Linear(5, 10))


class Convolutions(nn.Sequential):
    """Logits without a linear layer."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Tempered(nn.Module):
    """The last linear layer is followed by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.head(x.flatten(1)))


def composed(*given: str) -> Config:
    """Of words for one key the last counts; what a method would not read is left out."""
    last = {word.partition("=")[0]: word for word in given}
    gone = set[str]()
    if last.get("method") == "method=dm" or last.get("matching.outer") == "matching.outer=1":
        gone = {"matching.inner", "matching.batch", "matching.lr"}
    if last.get("method") == "method=dm":
        gone.add("matching.outer")
    return compose([word for key, word in last.items() if key not in gone])


def made(*given: str) -> Setup:
    return build(composed(*SMALL, *given))


def normal(stream: str, shape: Any) -> Tensor:
    return draw.normal(draw.key(3, stream), tuple(shape), F64)


def differentiated(function: Callable[[Phi], Tensor], phi: Phi) -> tuple[Phi, float]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in phi.items()}
    value = function(leaves)
    value.backward()
    return {k: v.grad for k, v in leaves.items() if v.grad is not None}, float(value.detach())


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def batch_of(setup: Setup, phi: Phi, task: Any, c: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Distilled and real images of class c with their labels, augmented. Image i is of class i mod 10."""
    x, y = phi["images"][c::10], (phi["labels"].softmax(1)[c::10] if "labels" in phi else torch.full((setup.config.ipc,), c))
    real = task.x[c]
    if setup.config.dsa != "none":
        own = task.siamese[c]
        assert own.shape == (1, dsa.WIDTH)
        x, real = dsa.apply(own.expand(len(x), -1), x), dsa.apply(own.expand(len(real), -1), real)
    return (x, y), (real, torch.full((len(real),), c))


def matched_by_hand(setup: Setup, phi: Phi, task: Any, theta: Tensor) -> Tensor:
    """Sum over classes of the distance between the two gradients at theta [P]: one ordinary graph."""
    total = torch.zeros((), dtype=F64)
    for c in range(10):
        weights = theta.clone().requires_grad_()
        a, b = (
            torch.autograd.grad(cross_entropy(setup.learner(weights, x), y), weights, create_graph=True)[0]
            for x, y in batch_of(setup, phi, task, c)
        )
        if setup.config.matching.distance == "l2":
            total = total + ((a - b) ** 2).sum() / ((b**2).sum() + 1e-6)
            continue
        ours, theirs = setup.learner.views(a), setup.learner.views(b)
        for name in ours:
            if ours[name].dim() > 1:
                for p, q in zip(ours[name].flatten(1), theirs[name].flatten(1), strict=True):
                    total = total + 1 - (p @ q) / (p.norm() * q.norm() + 1e-6)
    return total


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", CASES)
def test_matching_is_one_plain_graph_and_finite_differences_agree(name: str) -> None:
    setup = made(*CASES[name], "matching.outer=1")
    assert isinstance(setup.method, Condensation)
    phi, task = setup.method.parameters(), setup.method.draw(4, TEN)
    theta = task.theta0[0]
    ours, loss = differentiated(lambda p: setup.method.loss(p, task).sum(), phi)
    hand, want = differentiated(lambda p: matched_by_hand(setup, p, task, theta), phi)
    assert loss == pytest.approx(want, rel=1e-12) and ours.keys() == hand.keys() == phi.keys()
    for key, value in hand.items():
        assert float(value.norm()) > 1e-6 and error(ours[key], value) < 1e-10, key
    # No graph at all: along the gradient and a random direction as long.
    h, direction = 1e-6, {k: g / g.norm() + (r := normal(k, g.shape)) / r.norm() for k, g in ours.items()}
    with torch.no_grad():
        moved = [{k: v + s * h * direction[k] for k, v in phi.items()} for s in (1, -1)]
    ends = [float(matched_by_hand(setup, p, task, theta).detach()) for p in moved]
    exact = sum(float((ours[k] * direction[k]).sum()) for k in phi)
    assert abs((ends[0] - ends[1]) / (2 * h) - exact) < 1e-6 * abs(exact)


def test_matching_an_image_with_itself_costs_nothing() -> None:
    """Real images on both sides, the same draw done to them: siamese."""
    setup = made("method=dsa", "matching.outer=1", "real_batch=2")
    task = setup.method.draw(0, TEN)
    phi = {"images": task.x.transpose(0, 1).flatten(0, 1)}
    assert float(setup.method.loss(phi, task).max()) < 0.02  # 1e-6 stands in the denominators
    other = setup.method.draw(1, TEN)
    assert float(setup.method.loss(phi, other._replace(theta0=task.theta0, x=task.x)).max()) < 0.02
    assert float(setup.method.loss(phi, other).mean()) > 0.2


def test_the_mean_over_tasks_makes_a_published_rate_ten_times_as_large() -> None:
    """Pixels by SGD of rate .1, momentum .5, on the sum over classes: three steps by the formula."""
    setup = made("method=dc", "matching.outer=1", "meta.lr=1.0")
    state = MetaState(setup.method.parameters(), setup.config.meta, 10)
    x, velocity = state.phi["images"].detach().clone(), torch.zeros(1, dtype=F64)
    for step in range(3):
        task = setup.method.draw(step, TEN)
        g = differentiated(lambda p, task=task: matched_by_hand(setup, p, task, task.theta0[0]), {"images": x})[0]["images"]
        velocity = 0.5 * velocity + g
        x = x - 0.1 * velocity
        state.apply(Compute(setup.method, 10, setup.device)(state.phi, step, TEN))
    torch.testing.assert_close(state.phi["images"].detach(), x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("net", [["net=mlp", "net.width=7", "net.depth=2", "net.activation=sigmoid"], ["net.norm=batch"]])
@pytest.mark.parametrize("strategy", ["none", dsa.MIRROR_FREE])
def test_distribution_matching_is_one_plain_graph(net: list[str], strategy: str) -> None:
    setup = made("method=dm", f"dsa={strategy}", *net)
    assert isinstance(setup.method, Distribution)
    phi, task = setup.method.parameters(), setup.method.draw(2, TEN)
    module = setup.learner.module(task.theta0[0])
    seen: list[Tensor] = []
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

    def by_hand(p: Phi) -> Tensor:
        total = torch.zeros((), dtype=F64)
        for c in range(10):
            seen.clear()
            for x, _ in batch_of(setup, p, task, c):
                module(x)
            total = total + ((seen[0].mean(0) - seen[1].mean(0)) ** 2).sum()
        return total

    (ours, loss), (hand, want) = (differentiated(f, phi) for f in (lambda p: setup.method.loss(p, task).sum(), by_hand))
    assert loss == pytest.approx(want, rel=1e-11) and list(ours) == ["images"]
    assert float(hand["images"].norm()) > 1e-3 and error(ours["images"], hand["images"]) < 1e-10


def test_distribution_matching_of_a_linear_embedding_has_a_closed_form() -> None:
    """loss = |W (mean of distilled - mean of real)|^2, gradient in each image 2 / ipc W^T W (...)."""
    setup = build(composed(*(w for w in SMALL if not w.startswith("net")), "net=custom", f"net.target={HERE}.Projection",
                           "method=dm", "dsa=none", "ipc=3"))  # fmt: skip
    phi, task = setup.method.parameters(), setup.method.draw(0, TEN)
    weight = setup.learner.views(task.theta0[0])["1.weight"]
    ours, loss = differentiated(lambda p: setup.method.loss(p, task).sum(), phi)
    means = phi["images"].view(3, 10, 64).mean(0) - task.x.view(10, -1, 64).mean(1)
    assert loss == pytest.approx(float(((means @ weight.T) ** 2).sum()), rel=1e-12)
    want = (2 / 3 * means @ weight.T @ weight).view(1, 10, 64).expand(3, 10, 64)
    torch.testing.assert_close(ours["images"].view(3, 10, 64), want, rtol=1e-11, atol=1e-12)
    # A new network every time: each step's gradient lies in another plane of 5 dimensions.
    assert not torch.equal(setup.method.draw(1, TEN).theta0, task.theta0)


def test_an_embedding_is_what_the_last_linear_layer_sees() -> None:
    sizes = {"mlp": 8, "lenet": 28, "convnet": 16, "alexcifar": 16, "gtn": 12}
    for name, size in sizes.items():
        for normed in (False, True):
            learner = nets.build(NetConfig(name=name, weight_norm=normed), 1, size, 10, F64)
            embed = embedding(learner, torch.Size([1, size, size]))
            theta = learner.init(draw.key(1, "theta0", 0, torch.arange(1)))[0]
            x, seen = normal(name, (3, 1, size, size)), list[Tensor]()
            module = learner.module(theta)
            last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
            last.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            module(x)
            torch.testing.assert_close(embed(theta, x), seen[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("net", "said"), [
    (Convolutions, "the net Convolutions has no linear layer behind its features, and distribution matching compares"),
    (Tempered, "layer head, the last linear one of the net Tempered, doesn't make its logits of its features, and"),
])  # fmt: skip
def test_a_net_without_an_embedding_is_named(net: type[nn.Module], said: str) -> None:
    with pytest.raises(UserError) as caught:
        embedding(Learner(net(), dtype=F64), torch.Size([1, 8, 8]))
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- draws


def nearest(x: Tensor, others: Tensor) -> Tensor:
    """The rows of ``others`` that each of x is nearest to."""
    return torch.cdist(x.flatten(1), others.flatten(1)).argmin(1)


def test_a_task_draws_real_images_of_its_class() -> None:
    setup = made("method=dsa", "real_batch=400")
    train = setup.data.train
    task = setup.method.draw(5, TEN)
    for c in (0, 4, 9):
        members = train.x[train.y == c].flatten(1)
        which = nearest(task.x[c], members)
        torch.testing.assert_close(task.x[c].flatten(1), members[which], rtol=0, atol=0)
        counts = torch.bincount(which, minlength=len(members))
        # 400 draws of about 125: 3.2 each, seen at least once with probability .96.
        assert int(counts.max()) < 14 and (counts > 0).float().mean() > 0.9
    some = torch.tensor([7, 2])
    again = made("method=dsa", "real_batch=400").method.draw(5, some)
    assert torch.equal(again.x, task.x[some]) and torch.equal(again.siamese, task.siamese[some])
    for name in ("theta0", "rows", "augmentation"):  # the learner is the step's, whoever asks
        assert torch.equal(getattr(again, name), getattr(task, name))
    others = (setup.method.draw(6, TEN), made("method=dsa", "real_batch=400", "seed=1").method.draw(5, TEN))
    assert not any(torch.equal(o.x, task.x) or torch.equal(o.siamese, task.siamese) for o in others)
    assert len({tuple(row.flatten().tolist()) for row in task.siamese}) > 7


def test_images_may_start_from_real_ones() -> None:
    setup = made("method=dc", "images.start=real", "ipc=4")
    train, start = setup.data.train, setup.method.parameters()["images"]
    found = nearest(start, train.x)
    assert torch.equal(train.x[found], start) and len(set(found.tolist())) == 40  # no image twice
    assert train.y[found].tolist() == (torch.arange(40) % 10).tolist()
    assert torch.equal(made("method=dc", "images.start=real", "ipc=4").method.parameters()["images"], start)
    assert not torch.equal(made("method=dc", "images.start=real", "ipc=4", "seed=1").method.parameters()["images"], start)
    noise = made("method=dc", "ipc=4").method.parameters()["images"]
    assert float(noise.mean()) == pytest.approx(0, abs=0.1) and float(noise.std()) == pytest.approx(1, abs=0.1)
    plain = build(compose(["data=digits", "images.start=real", "ipc=3", "device=cpu"]))  # any method of images
    images = plain.method.parameters()["images"]
    assert torch.equal(plain.data.train.x[nearest(images, plain.data.train.x)], images)
    with pytest.raises(UserError, match=r"^ipc=500 is not possible .*: class 0 has \d+ images") as caught:
        made("method=dsa", "ipc=500").method.parameters()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the learner on the way


def compute(setup: Setup, state: MetaState, tasks: list[int] | None = None, group: int = 10) -> Tensor:
    return Compute(setup.method, group, setup.device)(state.phi, state.step, TEN if tasks is None else torch.tensor(tasks))


def trained_by_hand(setup: Setup, phi: Phi, theta: Tensor, task: Any) -> Tensor:
    """Plain SGD of theta [P] over the distilled images as they are, in the drawn order, batches of 8, 8 and 4."""
    s, x = setup.config.matching, phi["images"].detach()
    y = torch.arange(len(x)) % 10
    assert task.rows.shape == (s.inner, 20)
    for rows, augmentation in zip(task.rows, task.augmentation, strict=True):
        assert sorted(rows.tolist()) == list(range(20))
        for start in range(0, 20, 8):
            part = rows[start : start + 8]
            seen = torch.cat([dsa.apply(augmentation[start + i][None], x[n][None]) for i, n in enumerate(part.tolist())])
            theta = theta.detach().requires_grad_()
            (d,) = torch.autograd.grad(cross_entropy(setup.learner(theta, seen), y[part]), theta)
            theta = theta - s.lr * d
    return theta.detach()


@pytest.mark.parametrize("method", ["dc", "dsa"])
def test_the_learner_is_trained_on_the_images_as_they_are(method: str) -> None:
    """Eight meta-steps: drawn anew at 0, 3 and 6, before each of the others trained on what the step before has left."""
    setup = made(f"method={method}", "meta.lr=5")
    state = MetaState(setup.method.parameters(), setup.config.meta, 10)
    assert state.phi[WEIGHTS].shape == (1, setup.learner.size) and [k for k, _ in state.learned] == ["images"]
    carried = torch.zeros(0)
    for step in range(8):
        task = setup.method.draw(step, TEN)
        assert task.fresh == (step in (0, 3, 6))
        theta = task.theta0[0] if task.fresh else trained_by_hand(setup, state.phi, carried, task)
        phi = {"images": state.phi["images"].detach()}
        hand, want = differentiated(lambda p, task=task, theta=theta: matched_by_hand(setup, p, task, theta), phi)
        total = compute(setup, state)
        assert error(total[: phi["images"].numel()], hand["images"].flatten()) < 1e-10
        assert float(total[-2]) == pytest.approx(want, rel=1e-11)
        state.apply(total)
        torch.testing.assert_close(state.phi[WEIGHTS][0].detach(), theta, rtol=1e-12, atol=1e-13)
        carried = theta
    if method == "dsa":
        later = setup.method.draw(7, TEN).augmentation
        assert not torch.equal(later[0, 0], later[0, 1]) or not torch.equal(later[0, 8], later[0, 9])  # each image its own


def test_groups_and_workers_change_nothing() -> None:
    setup = made("method=dsa")
    state = MetaState(setup.method.parameters(), setup.config.meta, 10)
    state.apply(compute(setup, state))
    whole, n = compute(setup, state), state.phi["images"].numel()
    for group in (1, 3, 4):
        torch.testing.assert_close(compute(setup, state, group=group), whole, rtol=1e-11, atol=1e-13)
    parts = [compute(setup, state, part, group=4) for part in ([5, 0, 9], [1, 2, 3, 4], [8, 7, 6])]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-11, atol=1e-13)
    assert [bool(part[n:-2].any()) for part in parts] == [True, False, False]  # class 0 hands the weights on, alone
    torch.testing.assert_close(parts[0][n:-2], whole[n:-2], rtol=1e-12, atol=1e-14)


def test_a_learner_that_lasts_one_meta_step_is_not_carried() -> None:
    for given in (["method=dc", "matching.outer=1"], ["method=dm"]):
        assert list(made(*given).method.parameters()) == ["images"]


def test_float32_draws_what_float64_does() -> None:
    """Law 5's check: the run's gradient against the exact one, its augmentation and learner the same."""
    for method in ("dsa", "dm"):
        setup = made(f"method={method}", "engine.dtype=float32")
        phi = setup.method.parameters()
        right = gradient_check.gradient(gradient_check.exact(setup), {k: v.double() for k, v in phi.items()}, 1)
        found = gradient_check.compare(gradient_check.gradient(setup, phi, 1), right)
        assert {b.parameter for b in found} == {"images", "all"} and all(b.relative_error < 2e-3 for b in found)


# ---------------------------------------------------------------- whole runs

RUN = [
    "tasks=10", "ipc=2", "inner.steps=1", "inner.epochs=4", "matching.outer=4", "matching.inner=2", "matching.batch=16",
]  # fmt: skip


def of_run(*given: str) -> list[str]:
    """Words of a whole run that ``server_helpers.words`` puts behind those of TINY."""
    return [*RUN, "method=dsa", "engine.group=5", *given]


@pytest.mark.slow
def test_killed_and_resumed_a_run_ends_the_same(tmp_path: Path) -> None:
    """Bit for bit: images, carried learner, momenta, both sets."""
    given = of_run("steps=24", "eval.every=10", "run.checkpoint_every=3")
    want = alone(tmp_path / "whole", *given)
    at = tmp_path / "parts"
    at.mkdir()
    with Nursery() as nursery, starting(nursery, at) as start:
        for lines in (6, 7):
            started = start(*given)
            started.until_lines(lines)
            started.kill()
            assert started.wait() == -9
        assert start(*given).wait() == 0
    same(want, finished(at))
    assert f"phi/{WEIGHTS}" in want
    summary = json.loads((at / "run" / "summary.json").read_text())
    kept = load(at / "run")
    assert summary["method"] == kept.manifest["method"] == "dsa" and summary["images"] == 20 == len(kept.images)
    assert kept.lr.tolist() == pytest.approx([0.02] * 4) and kept.optimizer["kind"] == "momentum"


@pytest.mark.slow
def test_a_server_of_two_workers_makes_the_same_steps(tmp_path: Path) -> None:
    """max_staleness=0: the carried learner travels with a pull, and comes back with the task of class 0."""
    given = [*of_run("steps=6", "eval.every=6"), "engine.group=1"]
    want = alone(tmp_path / "alone", *given)
    at = tmp_path / "served"
    at.mkdir()
    with Nursery() as nursery, starting(nursery, at) as start:
        served = start(*given, "exchange=server", "exchange.item=1", "exchange.max_staleness=0", "workers=2")
        assert served.wait() == 0, (served.out, served.err)
    same(want, finished(at))


LAW = {"dsa": ["method=dsa"], "dm": ["method=dm"]}
LAWFUL = [*SMALL, "steps=4", "eval.every=4", "eval.nets=2", "eval.final_nets=2", "run.checkpoint_every=2", "run.log_every=1"]


def law_folders(base: Path, workers: int, *given: str) -> list[RunFolder]:
    more = [f"workers={workers}", f"cache_dir={base.parent / 'cache'}", *given]
    return [RunFolder.open(composed(*LAWFUL, *case, *more, f"run_dir={base / name}")) for name, case in LAW.items()]


@pytest.mark.slow
def test_two_workers_are_one(tmp_path: Path) -> None:
    """Combined buffers and last checkpoints to 1e-10 in float64; the carried learner among them."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_all(law_folders(one, 1, "engine.group=10"), Alone())
    listed = tmp_path / "two.json"
    listed.write_text(json.dumps([str(folder.path) for folder in law_folders(two, 2, "engine.group=3")]))
    frame = RunFolder.open(composed(*LAWFUL, "method=dc", "workers=2", f"run_dir={tmp_path / 'frame'}"))
    assert local.launch(frame, [sys.executable, str(ROOT / "tests" / "law_worker.py"), str(listed)]) == 0
    losses = set()
    for name in LAW:
        buffers = [store.load_tensors(path / name / "buffers.safetensors")[0] for path in (one, two)]
        states = [store.Checkpoints(path / name / "checkpoints", 0).load_newest() for path in (one, two)]
        assert len(buffers[0]) == 4 and float(buffers[0]["0"][-1]) == 10 and states[0] is not None and states[1] is not None
        assert (f"phi/{WEIGHTS}" in states[0][1]) == (name != "dm")
        for a, b in (buffers, (states[0][1], states[1][1])):
            assert a.keys() == b.keys()
            assert all(float((v - b[k]).abs().max()) <= 1e-10 * max(float(v.abs().max()), 1e-300) for k, v in a.items()), name
        losses.add(round(float(buffers[0]["0"][-2]), 9))
    assert len(losses) == len(LAW) and not any(math.isnan(v) for v in losses)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["method=dc", "method.gradient=unrolled"],
            "method.gradient=unrolled contradicts method=dc, which means",
        ),
        (["method=dm", "method.gradient=matching"], "means gradient=distribution; choose method=d"),
        (["method=dc", "method.init=fixed"], "method.init=fixed contradicts method=dc, which means init=random"),
        (["method=dc", "method.match=batch"], "method.match=batch contradicts method=dc, which means match=class"),
        (["method.gradient=distribution", "inner.learn_lr=false"], "give method.match=class, or choose method=dm"),
        (["method.match=class"], "is for method.gradient=matching or distribution, not unrolled; choose method=dc"),
        (
            ["method=gtn_matching", "method.match=class"],
            "method.synthetic=generator and method.objective=real don't go",
        ),
        (["method=dc", "inner.learn_lr=true"], "inner.learn_lr=true, but method.gradient=matching does not differentiate"),
        (["method=dm", "inner.learn_lr=true"], "inner.learn_lr=true, but method.gradient=distribution trains no network"),
        (["method=dm", "labels.kind=soft"], "labels.kind=soft, but method.gradient=distribution sees no labels"),
        (["method=dc", "inner.loss_every=2"], "inner.loss_every=2 is for method.match=batch"),
        (["method=dm", "matching.outer=2"], "matching.outer is not read by this run: it belongs to method=dc or dsa"),
        (["method=dc", "matching.inner=2"], "it belongs to method=dc or dsa with matching.outer above 1"),
        (["method=gtn_matching", "matching.outer=2"], "matching.outer is not read by this run: it belongs to method=dc or dsa"),
        (["method=dc", "matching.outer=0"], "matching.outer=0 is out of range; allowed: at least 1"),
        (["method=gtn", "images.start=real"], "images.start is not read by this run: it belongs to method.synthetic=images"),
        (["images.start=reel"], "images.start=reel is unknown; did you mean real? (allowed: noise, real)"),
        (
            ["method=dc", "matching.outer=10", "exchange=server", "exchange.max_staleness=4"],
            "matching.outer=10 carries learners from one meta-step to the next: with exchange=server give",
        ),
    ],
)
def test_refusals_are_one_line(given: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_there_is_a_task_for_each_class() -> None:
    with pytest.raises(UserError) as caught:
        made("method=dc", "tasks=8")
    assert str(caught.value) == "tasks=8, but method=dc has a task for each class and data=digits has 10; give tasks=10"


def test_what_comes_near_a_refusal_is_taken() -> None:
    """A stale server where nothing is carried; a synchronous one where a learner is."""
    compose(["method=dc", "exchange=server", "exchange.max_staleness=4"])
    compose(["method=dm", "exchange=server", "exchange.max_staleness=4"])
    compose(["method=dc", "matching.outer=10", "exchange=server", "exchange.max_staleness=0"])
    free = build(compose(["method=dd_random_init", "method.gradient=matching", "method.match=class", "inner.learn_lr=false",
                          "tasks=10", "device=cpu"]))  # fmt: skip
    assert isinstance(free.method, Condensation)
