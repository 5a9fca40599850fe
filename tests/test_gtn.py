"""Generative Teaching Networks: the generator's gradients, its curricula, the saved generator, whole runs, refusals."""

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
from run_helpers import ROOT
from server_helpers import StoppedAt, finished, same, saved
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy, interpolate, leaky_relu, one_hot

from metadist import draw, nets, store
from metadist.config import Config, NetConfig
from metadist.errors import UserError
from metadist.evaluate.train import predictions, recorded, statistics
from metadist.exchange.allreduce import Alone
from metadist.methods.implicit import WEIGHTS
from metadist.run import judge, local, trainer
from metadist.run.compose import compose
from metadist.run.folder import RunFolder
from metadist.run.setup import Setup, build
from metadist.run.signals import Stop
from metadist.synthetic.distilled import DistilledSet, load
from metadist.synthetic.generator import CURRICULA, Generator
from metadist.synthetic.images import Phi
from metadist.synthetic.maker import Maker

F64 = torch.float64
TASKS = 2
COMMON = [
    "data=digits", "data.size=8", "threads=1", "device=cpu", "engine.compile=off", "meta.lr_rate=null", "meta.ema=0",
    "meta.clip=0",
]  # fmt: skip
# A smooth learner: what kinks there are, are the generator's own.
SMALL = [
    *COMMON, "method=gtn", "net=mlp", "net.width=6", "net.depth=1", "net.activation=sigmoid", "net.weight_norm=true",
    f"tasks={TASKS}", "real_batch=12", "inner.steps=4", "inner.lr=0.2", "generator.batch=12", "generator.noise=5",
    "generator.hidden=7", "generator.maps=3", "generator.conv=4", "engine.dtype=float64",
]  # fmt: skip
STEPS, BATCH, NOISE = 4, 12, 5


pytestmark = pytest.mark.usefixtures("one_thread")


def composed(*words: str) -> Config:
    """Of words for one key the last counts."""
    return compose(list({word.partition("=")[0]: word for word in words}.values()))


def made(*words: str) -> Setup:
    return build(composed(*SMALL, *words))


def generator_of(setup: Setup) -> Generator:
    assert isinstance(setup.synthetic, Generator)
    return setup.synthetic


def normal(stream: str, shape: Any) -> Tensor:
    return draw.normal(draw.key(3, stream), tuple(shape), F64)


def moved(setup: Setup) -> Phi:
    """Parameters away from their start, where scales are 1, biases 0 and all rates one. Gains are so small that the epsilon of
    the normalization after them counts: else they have no effect to speak of."""
    phi = setup.method.parameters()
    for name, value in phi.items():
        phi[name] = value + 0.2 * normal(name, value.shape)
        if name.endswith("gain") and name != "generator.image.gain":
            phi[name] = 0.05 * phi[name]
    return phi


def differentiated(function: Callable[[Phi], Tensor], phi: Phi) -> tuple[Phi, float]:
    leaves = {k: v.clone().requires_grad_() for k, v in phi.items()}
    value = function(leaves)
    value.backward()
    return {k: v.grad for k, v in leaves.items() if v.grad is not None}, float(value.detach())


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# ---------------------------------------------------------------- gradients

VARIANTS = {
    "full": [],
    "shuffled_batches": ["generator.curriculum=shuffled_batches", "labels.kind=soft"],
    "shuffled": ["generator.curriculum=shuffled", "inner.loss_every=2"],
    "none": ["generator.curriculum=none", "labels.kind=soft"],
    "soft": ["labels.kind=soft", "inner.epochs=2", "inner.optimizer=adam", "inner.lr=0.05", "inner.rate=raw"],
    "plain": ["inner.optimizer=adam", "inner.lr=0.05", "generator.weight_norm=false", "net.weight_norm=false"],
    "gtn": ["net=gtn", "net.width=3", "net.depth=0", "net.activation=relu", "generator.curriculum=shuffled"],
}


def loss_of(setup: Setup, task: Any) -> Callable[[Phi], Tensor]:
    return lambda phi: setup.method.loss(phi, task).sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_gradient_against_finite_differences(variant: str) -> None:
    """Every tensor by itself: weights, gains, scales and biases of the normalizations, codes, rates, momenta, labels."""
    setup = made(*VARIANTS[variant])
    phi, task = moved(setup), setup.method.draw(0, torch.arange(TASKS))
    function = loss_of(setup, task)
    grads, _ = differentiated(function, phi)
    learned = {k for k in phi if not k.startswith("generator.")}
    assert ("codes" in learned) == (variant != "none") and {"rate", "momentum"} <= learned
    assert ("labels" in learned) == ("labels.kind=soft" in VARIANTS[variant])
    weights = ["first", "second", "conv", "image"]
    parts = {f"generator.{w}.{p}" for w in weights for p in ("weight", "gain", "scale", "bias")} - {"generator.image.scale"}
    if variant == "plain":
        parts = {p for p in parts if not p.endswith("gain")}
    assert set(phi) == set(grads) == parts | learned
    for name, g in grads.items():
        random = normal(f"random {name}", g.shape)
        direction = (g / g.norm() + random / random.norm()) / 2 if g.numel() > 1 else torch.ones_like(g)
        h = 1e-7 if name.endswith("gain") else 1e-6
        with torch.no_grad():
            ends = [float(function(phi | {name: phi[name] + sign * h * direction})) for sign in (1, -1)]
        numeric, exact = (ends[0] - ends[1]) / (2 * h), float((g * direction).sum())
        assert abs(exact) > 1e-7, name
        assert abs(numeric - exact) < 2e-6 * abs(exact) + 5e-8, f"{name}: {numeric} against {exact}"


def test_the_check_can_fail() -> None:
    """Forgetting the generator's statistics, as if they were constants, is told apart by far."""
    setup = made()
    phi, task = moved(setup), setup.method.draw(0, torch.arange(TASKS))
    grads, _ = differentiated(loss_of(setup, task), phi)
    wrong, _ = differentiated(lambda p: plain_loss(setup, p, task, constant=True), phi)
    assert error(wrong["generator.first.weight"], grads["generator.first.weight"]) > 0.1


# ---------------------------------------------------------------- one plain graph


def plain_images(phi: Phi, z: Tensor, y: Tensor, constant: bool = False) -> Tensor:
    """The generator on one inner step's latents [B, Z] and classes [B], of PyTorch's own functions."""

    def weight(name: str) -> Tensor:
        v, gain = phi[f"generator.{name}.weight"], phi.get(f"generator.{name}.gain")
        if gain is None:
            return v
        each = (-1, *[1] * (v.dim() - 1))
        return gain.view(each) * v / v.flatten(1).norm(dim=1).view(each)

    def normed(x: Tensor, name: str) -> Tensor:
        scale, bias = phi[f"generator.{name}.scale"], phi[f"generator.{name}.bias"]
        if constant:
            flat = x.detach().transpose(0, 1).flatten(1)
            x = batch_norm(x, flat.mean(1), flat.var(1, correction=0), scale, bias, training=False)
        else:
            x = batch_norm(x, None, None, scale, bias, training=True)
        return leaky_relu(x, 0.1)

    pad = nn.ReflectionPad2d(1)
    x = normed(torch.cat((z, one_hot(y, 10)), 1) @ weight("first").T, "first")
    x = normed(x @ weight("second").T, "second").view(len(z), -1, 2, 2)
    x = normed(torch.conv2d(pad(interpolate(x, scale_factor=2)), weight("conv")), "conv")
    x = torch.conv2d(pad(interpolate(x, scale_factor=2)), weight("image"), phi["generator.image.bias"])
    return 2 * torch.tanh(x)


def plain_batch(setup: Setup, phi: Phi, drawn: Tensor | None, g: int, s: int, constant: bool = False) -> tuple[Tensor, Tensor]:
    """Images and labels of inner step s of task g. A code's image is made beside those of its own step."""
    classes = torch.arange(STEPS * BATCH) % 10

    def step(number: int) -> Tensor:
        rows = slice(number * BATCH, (number + 1) * BATCH)
        return plain_images(phi, phi["codes"][rows], classes[rows], constant)

    if drawn is not None and drawn.is_floating_point():
        y = classes[s * BATCH : (s + 1) * BATCH]
        x = plain_images(phi, drawn[g, s], y, constant)
        return x, phi["labels"].softmax(1)[y] if "labels" in phi else y
    if drawn is None:
        rows, x = torch.arange(s * BATCH, (s + 1) * BATCH), step(s)
    else:
        rows = drawn[g, s]
        x = torch.cat([step(number) for number in range(STEPS)])[rows]
    return x, phi["labels"].softmax(1)[rows] if "labels" in phi else classes[rows]


def plain_loss(setup: Setup, phi: Phi, task: Any, constant: bool = False) -> Tensor:
    """Sum over tasks of the mean over points of the real loss; SGD with momentum from its formula. One autograd graph."""
    rates, momenta = phi["rate"].exp().log1p(), phi["momentum"].sigmoid()
    total, at = torch.zeros((), dtype=F64), task.at
    for g in range(TASKS):
        theta = task.theta0[g].clone().requires_grad_()
        velocity = torch.zeros_like(theta)
        for t in range(STEPS):
            x, y = plain_batch(setup, phi, task.drawn, g, t, constant)
            (d,) = torch.autograd.grad(cross_entropy(setup.learner(theta, x), y), theta, create_graph=True)
            velocity = momenta[t] * velocity + d
            theta = theta - rates[t] * velocity
            if t + 1 in at:
                i = at.index(t + 1)
                total = total + cross_entropy(setup.learner(theta, task.x[i, g]), task.y[i, g]) / len(at)
    return total


@pytest.mark.parametrize("variant", ["full", "shuffled_batches", "shuffled", "none"])
def test_the_engine_is_one_plain_graph(variant: str) -> None:
    setup = made(*VARIANTS[variant])
    phi, task = moved(setup), setup.method.draw(0, torch.arange(TASKS))
    assert task.at == ((2, 4) if variant == "shuffled" else (1, 2, 3, 4)) and len(task.x) == len(task.at)
    (ours, loss), (plain, want) = (differentiated(f, phi) for f in (loss_of(setup, task), lambda p: plain_loss(setup, p, task)))
    assert loss == pytest.approx(want, rel=1e-12) and ours.keys() == plain.keys() == phi.keys()
    for name, value in plain.items():
        assert float(value.norm()) > 1e-7 and error(ours[name], value) < 1e-10, name


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_chunks_change_nothing(curriculum: str) -> None:
    results = []
    for chunk in (1, 3, 4, 100):
        setup = made(f"generator.curriculum={curriculum}", f"generator.chunk={chunk}")
        phi, task = moved(setup), setup.method.draw(0, torch.arange(TASKS))
        images = setup.synthetic.batches(phi, task.drawn)[0].detach()
        results.append((images, differentiated(loss_of(setup, task), phi)[0]))
    for images, grads in results[1:]:
        assert error(images, results[0][0]) < 1e-12
        assert max(error(v, results[0][1][k]) for k, v in grads.items()) < 1e-10  # through four steps of training
    lead = () if curriculum == "full" else (TASKS,)
    assert results[0][0].shape == (*lead, STEPS, BATCH, 1, 8, 8) and float(results[0][0].abs().max()) < 2


def test_a_step_sees_nothing_of_the_others() -> None:
    """Batch normalization is each inner step's own."""
    setup = made()
    phi = moved(setup)
    before = setup.synthetic.batches(phi)[0]
    codes = phi["codes"].clone()
    codes[BATCH + 1] += 1  # one image of the second step
    after = setup.synthetic.batches(phi | {"codes": codes})[0]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    assert bool(((before - after)[1].abs().amax((1, 2, 3)) > 0).all())  # through the statistics, its neighbours too


# ---------------------------------------------------------------- curricula


def drawn(setup: Setup, step: int, tasks: list[int]) -> Tensor:
    found = setup.method.draw(step, torch.tensor(tasks)).drawn
    assert found is not None
    return found


@pytest.mark.parametrize("curriculum", CURRICULA[1:])
def test_a_task_draws_by_seed_step_and_number_alone(curriculum: str) -> None:
    words = [f"generator.curriculum={curriculum}", "inner.steps=9"]
    setup = made(*words)
    every = drawn(setup, 5, [0, 1, 2, 3])
    assert torch.equal(drawn(setup, 5, [3, 1]), every[[3, 1]])
    assert torch.equal(drawn(made(*words), 5, [2])[0], every[2])  # whatever was drawn before
    others = [drawn(setup, 6, [0])[0], drawn(made(*words, "seed=1"), 5, [0])[0], every[1]]
    assert not any(torch.equal(other, every[0]) for other in others)
    reference = generator_of(setup).reference()
    assert reference is not None and not any(torch.equal(reference, row) for row in every)
    assert torch.equal(reference, generator_of(setup).reference())  # type: ignore[arg-type]


def test_full_is_the_same_for_all() -> None:
    setup = made()
    tasks = [setup.method.draw(step, torch.arange(3)) for step in (0, 7)]
    assert all(task.drawn is None for task in tasks) and setup.synthetic.shared
    phi = setup.method.parameters()
    images, labels = setup.synthetic.batches(phi, None)
    assert torch.equal(images, setup.synthetic.batches(phi)[0])
    assert labels.tolist() == (torch.arange(STEPS * BATCH) % 10).view(STEPS, BATCH).tolist()
    assert len({round(float(x.sum()), 9) for x in images.flatten(0, 1)}) == STEPS * BATCH  # a code for every image


def test_shuffled_batches_takes_whole_batches() -> None:
    setup = made("generator.curriculum=shuffled_batches")
    numbers = torch.cat([drawn(setup, step, [0, 1, 2]) for step in range(40)])
    assert torch.equal(numbers % BATCH, torch.arange(BATCH).expand_as(numbers))
    which = numbers[..., 0] // BATCH
    assert torch.equal(numbers // BATCH, which[..., None].expand_as(numbers))
    counts = torch.bincount(which.flatten(), minlength=STEPS)
    assert len(counts) == STEPS and int((counts - 120).abs().max()) < 45  # 480 draws, sd 9.5
    assert any(len(set(row.tolist())) < STEPS for row in which)  # with replacement
    phi = moved(setup)
    x, y = setup.synthetic.batches(phi, numbers[:3])
    inorder = made().synthetic.batches(phi)
    torch.testing.assert_close(x, inorder[0][which[:3]], rtol=1e-12, atol=1e-13)
    assert torch.equal(y, inorder[1][which[:3]])


def test_shuffled_takes_every_image_by_itself() -> None:
    setup = made("generator.curriculum=shuffled")
    numbers = torch.cat([drawn(setup, step, [0, 1, 2]) for step in range(40)])
    counts = torch.bincount(numbers.flatten(), minlength=STEPS * BATCH)
    assert len(counts) == STEPS * BATCH and int((counts - 120).abs().max()) < 55  # 5,760 draws among 48, sd 11
    assert any(len(set(row.tolist())) < BATCH for row in numbers.flatten(0, 1))
    assert (numbers // BATCH).float().std(-1).min() > 0  # no batch is one of the learned ones
    phi = moved(setup)
    x, y = setup.synthetic.batches(phi, numbers[:3])
    inorder = made().synthetic.batches(phi)
    torch.testing.assert_close(x, inorder[0].flatten(0, 1)[numbers[:3]], rtol=1e-12, atol=1e-13)
    assert torch.equal(y, numbers[:3] % 10)


def test_none_is_fresh_noise() -> None:
    setup = made("generator.curriculum=none")
    noise = torch.cat([drawn(setup, step, [0, 1, 2]) for step in range(20)])
    assert noise.shape == (60, STEPS, BATCH, NOISE) and "codes" not in setup.method.parameters()
    assert float(noise.mean()) == pytest.approx(0, abs=0.05) and float(noise.var()) == pytest.approx(1, abs=0.06)
    assert len(noise.flatten(0, 2).unique(dim=0)) == 60 * STEPS * BATCH  # no latent twice
    x, y = setup.synthetic.batches(moved(setup), noise[:2])
    assert x.shape == (2, STEPS, BATCH, 1, 8, 8)
    assert torch.equal(y, (torch.arange(STEPS * BATCH) % 10).view(STEPS, BATCH).expand(2, -1, -1))


def test_soft_labels_start_at_their_confidence() -> None:
    for curriculum in ("full", "shuffled", "none"):
        setup = made(f"generator.curriculum={curriculum}", "labels.kind=soft", "labels.confidence=0.8")
        phi = setup.method.parameters()
        assert phi["labels"].shape == (10 if curriculum == "none" else STEPS * BATCH, 10)
        task = setup.method.draw(0, torch.arange(TASKS))
        soft = setup.synthetic.batches(phi, task.drawn)[1]
        hard = made(f"generator.curriculum={curriculum}").synthetic.batches(
            {k: v for k, v in phi.items() if k != "labels"}, task.drawn
        )[1]
        torch.testing.assert_close(soft.gather(-1, hard[..., None]).squeeze(-1), torch.full(hard.shape, 0.8, dtype=F64))
        torch.testing.assert_close(soft.sum(-1), torch.ones(hard.shape, dtype=F64))


# ---------------------------------------------------------------- sizes and the start


@pytest.mark.parametrize(("shape", "count"), [((1, 28, 28), 6_660_226), ((3, 32, 32), 8_633_222)])
def test_default_sizes_are_the_published_ones(shape: tuple[int, int, int], count: int) -> None:
    """6.66 M and 8.63 M."""
    config = Config()
    config.method.synthetic, config.inner.steps, config.inner.epochs = "generator", 2, 1
    phi = Generator(config, 10, shape, torch.float32, "cpu").parameters()
    own = {k: v.numel() for k, v in phi.items() if k.startswith("generator.")}
    channels, quarter = shape[0], shape[1] // 4
    linear = 138 * 1024 + 1024 * 128 * quarter**2
    assert sum(own.values()) == count == (
        linear + 9 * (128 * 64 + 64 * channels) + channels + 3 * (1024 + 128 * quarter**2 + 64) + channels
    )  # fmt: skip
    assert phi["codes"].shape == (256, 128)


def test_the_generator_starts_as_the_one_without_weight_norm() -> None:
    plain, normed = made("generator.weight_norm=false"), made()
    one, other = plain.method.parameters(), normed.method.parameters()
    assert all(torch.equal(one[k], other[k]) for k in one) and len(other) == len(one) + 4
    torch.testing.assert_close(plain.synthetic.batches(one)[0], normed.synthetic.batches(other)[0], rtol=1e-11, atol=1e-12)
    big = build(composed(*COMMON, "method=gtn", "net=mlp", "inner.steps=2"))
    for name, fan_in in (("first", 138), ("second", 1024), ("conv", 128 * 9)):
        weight = big.method.parameters()[f"generator.{name}.weight"]
        assert float(weight.var()) == pytest.approx(2 / (1.01 * fan_in), rel=0.03)


# ---------------------------------------------------------------- a saved generator


def set_of(*words: str) -> tuple[Setup, Phi, DistilledSet]:
    """A set in float32 as a run leaves it, of parameters away from their start."""
    setup = build(composed(*SMALL, "engine.dtype=float32", *words))
    phi = {k: v + 0.2 * normal(k, v.shape).float() for k, v in setup.method.parameters().items()}
    return setup, phi, judge.distilled(setup, phi, 3, {})


@pytest.mark.parametrize("curriculum", CURRICULA)
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_what_is_saved_comes_back(curriculum: str, labels: str, tmp_path: Path) -> None:
    setup, phi, before = set_of(f"generator.curriculum={curriculum}", f"labels.kind={labels}")
    before.save(tmp_path / "set.safetensors")
    after = load(tmp_path / "set.safetensors")
    torch.testing.assert_close(after.images, before.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.labels, before.labels, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.images, setup.synthetic.batches(phi)[0].flatten(0, 1), rtol=0, atol=1e-6)
    for name in ("order", "lr", "momentum"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    assert after.manifest == before.manifest and after.optimizer == before.optimizer and after.steps == STEPS
    assert isinstance(after.maker, Maker) and before.maker is not None and after.maker.settings == before.maker.settings
    tensors, _ = store.load_tensors(tmp_path / "set.safetensors")
    kept = {k.removeprefix("generator/") for k in tensors if k.startswith("generator/")}
    assert kept == {k for k in phi if k not in ("rate", "momentum")} and "images" not in tensors
    # Fresh batches: another draw, the same for the same seed, of the same labels; "full" has no other.
    fresh, again, other = (after.fresh(seed) for seed in (5, 5, 6))
    assert torch.equal(fresh.images, again.images) and fresh.images.shape == after.images.shape
    assert torch.equal(fresh.images, after.images) == (curriculum == "full")
    assert torch.equal(fresh.images, other.images) == (curriculum == "full")
    assert torch.equal(fresh.lr, after.lr) and fresh.maker is after.maker
    if curriculum == "shuffled_batches":  # whole batches of the learned ones
        known = {round(float(x.double().sum()), 3) for x in made_in_order(phi)}
        assert {round(float(x.double().sum()), 3) for x in fresh.batches()[0]} <= known
    assert after.picture().shape[2] == 3


def made_in_order(phi: Phi) -> Tensor:
    return build(composed(*SMALL, "engine.dtype=float32")).synthetic.batches(phi)[0]


def test_precisions_of_a_saved_generator(tmp_path: Path) -> None:
    _, _, before = set_of("generator.hidden=64", "generator.curriculum=none")
    for precision in ("float32", "float16"):
        before.save(tmp_path / precision, precision)
    sizes = [(tmp_path / p).stat().st_size for p in ("float32", "float16")]
    tensors, _ = store.load_tensors(tmp_path / "float16")
    assert {v.dtype for k, v in tensors.items() if k.startswith("generator/")} == {torch.float16}
    assert sizes[0] - sizes[1] == pytest.approx(2 * sum(v.numel() for v in before.maker.phi.values()), abs=200)  # type: ignore[union-attr]
    half = load(tmp_path / "float16")
    assert half.images.dtype == torch.float32 and 1e-6 < float((half.images - before.images).abs().max()) < 0.05
    assert torch.equal(half.lr, before.lr)
    with pytest.raises(UserError) as caught:
        before.save(tmp_path / "uint8", "uint8")
    assert str(caught.value).startswith("precision of a generator=uint8 is unknown (allowed: float16, float32")
    assert "\n" not in str(caught.value) and not (tmp_path / "uint8").exists()


def test_a_set_of_images_has_no_fresh_batches() -> None:
    with pytest.raises(UserError, match=r"^this set holds images, not a generator: .*; use batches\(\)$"):
        load("digits-10").fresh(0)


@pytest.mark.parametrize("curriculum", ["full", "none"])
def test_replay_trains_a_module_as_the_run_does(curriculum: str, tmp_path: Path) -> None:
    """The paper's learner, its mean-only statistics those of the synthetic batches: the judge's own predictions."""
    setup, phi, before = set_of(
        "net=gtn", "net.width=4", "net.depth=0", "net.activation=relu", f"generator.curriculum={curriculum}"
    )
    before.save(tmp_path / "set.safetensors")
    after = load(tmp_path / "set.safetensors")
    theta0 = setup.starts.held_out(2)
    batches, h = setup.synthetic.batches(phi), setup.synthetic.schedule(phi)
    theta = recorded(setup.inner, theta0, batches, setup.synthetic.order, h)
    buffers, x = statistics(setup.learner, theta, batches[0]), setup.data.test.x[:200]
    for start, end, own in zip(theta0, theta, buffers, strict=True):
        net = after.replay(setup.learner.module(start))
        assert not net.training
        torch.testing.assert_close(setup.learner.flatten(net), end, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(net(x).detach(), setup.learner.predict(end, own, x), rtol=1e-3, atol=1e-3)
        assert float((setup.learner.flatten(net) - start).abs().max()) > 0.01
    assert torch.equal(
        predictions(setup.learner, theta, buffers, x)[0], after.replay(setup.learner.module(theta0[0]))(x).argmax(1)
    )
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    weights = own[1].weight.detach().clone()
    assert float((after.replay(own)[1].weight.detach() - weights).abs().max()) > 1e-3


# ---------------------------------------------------------------- whole runs

RUN = [
    *COMMON, "net=gtn", "net.width=4", "generator.batch=20", "generator.hidden=32", "generator.maps=8", "generator.conv=8",
    "generator.noise=16", "inner.steps=4", "steps=6", "tasks=2", "real_batch=16", "eval.every=3", "eval.nets=2",
    "eval.final_nets=2", "run.checkpoint_every=2", "run.log_every=1", "engine.group=1",
]  # fmt: skip
RUNS = {
    "gtn": ["method=gtn", "generator.curriculum=shuffled", "meta.ema=0.9"],
    "gtn_implicit": ["method=gtn_implicit", "implicit.steps=5", "implicit.restart=5", "implicit.terms=3"],
}


def run(at: Path, *words: str, stopped_at: int | None = None) -> dict[str, Any]:
    folder = RunFolder.open(composed(*RUN, *words, f"run_dir={at / 'run'}", f"cache_dir={at / 'cache'}"))
    return trainer.train(folder.config, folder, Alone() if stopped_at is None else StoppedAt(stopped_at), Stop())


@pytest.mark.parametrize("name", ["gtn", pytest.param("gtn_implicit", marks=pytest.mark.slow)])
def test_a_stopped_run_ends_where_the_uninterrupted_one_does(name: str, tmp_path: Path) -> None:
    """Bit for bit: parameters, optimizer, average, carried weights, counters, both distilled sets."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = run(whole, *RUNS[name])
    assert run(parts, *RUNS[name], stopped_at=3)["stopped"] and saved(parts)[0] in (3, 4)
    run(parts, *RUNS[name])
    same(finished(whole), finished(parts))
    tensors = store.Checkpoints(whole / "run" / "checkpoints", 0).load_newest()[1]  # type: ignore[index]
    assert (f"phi/{WEIGHTS}" in tensors) == (name == "gtn_implicit")
    assert summary["images"] == 80 and summary["synthetic"] == "generator" and "80 generated images" in summary["text"]
    made_set = load(whole / "run")
    assert made_set.maker is not None and made_set.images.shape == (80, 1, 8, 8) and made_set.manifest["method"] == name
    head = store.load_tensors(whole / "run" / "distilled.safetensors")[1]
    assert head["generator"]["generator"]["curriculum"] == ("shuffled" if name == "gtn" else "full")
    assert (whole / "run" / "images.png").stat().st_size > 1000


# N workers = 1 worker. Three tasks, two workers: two and one.
LAW = {
    "gtn": ["method=gtn", "generator.curriculum=shuffled", "labels.kind=soft"],
    "implicit": ["method=gtn_implicit", "implicit.steps=5", "implicit.restart=2", "implicit.terms=3"],
}
LAWFUL = [*RUN, "tasks=3", "steps=3", "engine.dtype=float64", "net.width=2", "inner.steps=2", "eval.every=2", "eval.nets=3"]


def law_folders(base: Path, workers: int, *words: str) -> list[RunFolder]:
    more = [f"workers={workers}", f"cache_dir={base.parent / 'cache'}", *words]
    return [RunFolder.open(composed(*LAWFUL, *case, *more, f"run_dir={base / name}")) for name, case in LAW.items()]


@pytest.mark.slow
def test_two_workers_are_one(tmp_path: Path) -> None:
    """Combined buffers and last checkpoints to 1e-10 in float64; the carried weights among them."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_all(law_folders(one, 1, "engine.group=3"), Alone())
    listed = tmp_path / "two.json"
    listed.write_text(json.dumps([str(folder.path) for folder in law_folders(two, 2)]))
    frame = RunFolder.open(composed(*LAWFUL, "method=gtn", "workers=2", f"run_dir={tmp_path / 'frame'}"))
    assert local.launch(frame, [sys.executable, str(ROOT / "tests" / "law_worker.py"), str(listed)]) == 0
    losses = set()
    for name in LAW:
        buffers = [store.load_tensors(path / name / "buffers.safetensors")[0] for path in (one, two)]
        states = [store.Checkpoints(path / name / "checkpoints", 0).load_newest() for path in (one, two)]
        assert len(buffers[0]) == 3 and float(buffers[0]["0"][-1]) == 3 and states[0] is not None and states[1] is not None
        assert (f"phi/{WEIGHTS}" in states[0][1]) == (name == "implicit")
        for a, b in (buffers, (states[0][1], states[1][1])):
            assert a.keys() == b.keys()
            for key, value in a.items():
                difference = (value - b[key]).abs().max() / value.abs().max().clamp(min=1e-300)
                # Gains before a normalization: what is left of their gradients after cancellation is 1e-6 of the terms.
                near = 1e-8 if key.endswith("gain/exp_avg_sq") else 1e-10
                assert float(difference) <= near, (name, key, float(difference))
        losses.add(round(float(buffers[0]["0"][-2]), 9))
    assert len(losses) == len(LAW)  # none is a copy of another


# ---------------------------------------------------------------- refusals

IMPLICIT = ["method=gtn_implicit", *COMMON]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=gtn", "ipc=2"], "ipc is not read by this run: it belongs to method.synthetic=images"),
        (["generator.batch=64"], "generator.batch is not read by this run: it belongs to method.synthetic=generator"),
        (["method=gtn", "implicit.terms=3"], "implicit.terms is not read by this run: it belongs to method.gradient=implicit"),
        (["method=gtn_implicit", "implicit.solver=cg", "implicit.step=0.1"], "it belongs to implicit.solver=neumann"),
        (["method=gtn", "matching.distance=l2"], "it belongs to method.gradient=matching"),
        (["method=gtn_implicit", "inner.loss_every=2"], "it belongs to method.gradient=unrolled, truncated or matching"),
        (["method=gtn_implicit", "inner.learn_lr=true"], "inner.learn_lr=true, but method.gradient=implicit does not"),
        (["method=gtn_matching", "inner.learn_lr=true"], "inner.learn_lr=true, but method.gradient=matching does not"),
        (["method=gtn_implicit", "inner.learn_momentum=true"], "inner.learn_momentum=true, but method.gradient=implicit"),
        (["method=gtn_implicit", "generator.curriculum=shuffled"], "generator.curriculum=shuffled orders the steps"),
        (["method=gtn_implicit", "generator.curriculum=shuffled_batches"], "give full (learned codes) or none (fresh noise)"),
        (["method=gtn_implicit", "implicit.l2=0"], "implicit.l2=0 and implicit.damping=0: the Hessian then has directions"),
        (["method=gtn", "method.gradient=implicit"], "means gradient=unrolled; choose method=gtn_implicit, or"),
        (["method=gtn", "generator.batch=1"], "generator.batch=1: batch normalization makes one image a constant"),
        (["method=gtn", "generator.curriculum=ful"], "did you mean full"),
        (["method=gtn", "generator.noise=0"], "generator.noise=0 is out of range; allowed: at least 1"),
        (
            ["method=gtn_implicit", "exchange=server", "exchange.max_staleness=4"],
            "implicit.warm_start=true carries learners from one meta-step to the next: with exchange=server give",
        ),
    ],
)
def test_refusals_are_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_gtn_with_plain_sgd_can_be_asked_for() -> None:
    assert composed(*SMALL, "inner.optimizer=sgd", "inner.learn_momentum=false").inner.optimizer == "sgd"


def test_images_of_other_sizes_are_refused() -> None:
    for size in (10, 6):
        with pytest.raises(UserError) as caught:
            build(composed(*SMALL, f"data.size={size}"))
        assert f"the generator makes images of 4 n x 4 n pixels, not {size}; resize: data.size=" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_comes_near_a_refusal_is_taken() -> None:
    """A synchronous server, a stale one without warm start, fresh noise: all of them have a meaning."""
    compose(["method=gtn_implicit", "exchange=server", "exchange.max_staleness=0"])
    compose(["method=gtn_implicit", "exchange=server", "exchange.max_staleness=4", "implicit.warm_start=false"])
    compose(["method=gtn_implicit", "generator.curriculum=none", "implicit.l2=0", "implicit.damping=0.1"])
    assert nets.build(NetConfig(name="gtn"), 1, 8, 10).size > 0 and math.prod((STEPS, BATCH)) == 48
