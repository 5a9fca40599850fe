"""Knowledge distillation: the loss against its limits, every switch, and the laws: killed = whole, two workers = one."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_helpers import Nursery
from torch.func import grad
from torch.nn import functional as F

import metadist
from metadist import draw
from metadist.config import NetConfig
from metadist.data import load
from metadist.errors import RunError, UserError
from metadist.evaluate import bias
from metadist.exchange.allreduce import Alone
from metadist.nets import build as build_net
from metadist.nets.dropout import masks
from metadist.nets.loss import distillation
from metadist.run import job, origins, trainer, training
from metadist.run.compare import last as last_of
from metadist.run.compose import compose
from metadist.run.folder import RunFolder
from metadist.run.signals import Stop
from metadist.store import Checkpoints
from metadist.store.logits import Logits
from metadist.synthetic import network

F64 = torch.float64
TINY = [
    "data=digits", "data.size=8", "net=mlp", "net.width=8", "net.depth=1", "steps=30", "tasks=2", "real_batch=16", "threads=1",
    "device=cpu", "engine.compile=off", "eval.every=10", "run.checkpoint_every=5", "run.log_every=1", "meta.lr=0.01",
    "engine.dtype=float64", "exchange.timeout_s=60",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quiet(one_thread: None) -> None:
    """One thread for all of this file."""


def run(at: Path, *words: str) -> dict[str, Any]:
    """A whole run in this process; its summary."""
    config = compose([*TINY, *words, f"run_dir={at}", f"cache_dir={at.parent / 'cache'}"])
    folder = RunFolder.open(config)
    with Stop() as stop:
        return trainer.train(folder.config, folder, Alone(), stop)


def made(at: Path, *words: str) -> training.TrainingSetup:
    return training.build(compose(last_of(*TINY, *words, f"cache_dir={at / 'cache'}")))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("kd") / "teacher"
    run(at, "method=train", "net.width=32", "steps=60", "train.networks=2", "train.snapshots=[.5]")
    return at


# --- the loss


def logits(n: int = 6, k: int = 10, seed: int = 0) -> torch.Tensor:
    return 3 * draw.normal(draw.key(seed, "test"), (n, k), F64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_the_gradient_is_T_times_the_difference_of_probabilities(temperature: float) -> None:
    z, t, y = logits(seed=1), logits(seed=2), torch.arange(6)
    p = torch.softmax(t / temperature, -1)
    found = grad(lambda z: distillation(z, p, y, 1.0, temperature))(z)
    want = temperature**2 * (torch.softmax(z / temperature, -1) - p) / temperature / len(z)  # the mean over the batch
    assert torch.allclose(found, want, rtol=1e-10, atol=1e-14)
    hard = grad(lambda z: F.cross_entropy(z, y))(z)
    both = grad(lambda z: distillation(z, p, y, 0.3, temperature))(z)
    assert torch.allclose(both, 0.3 * want + 0.7 * hard, rtol=1e-10, atol=1e-14)
    plain = grad(lambda z: distillation(z, p, y, 1.0, temperature, scale=1.0))(z)
    assert torch.allclose(plain * temperature**2, want, rtol=1e-10, atol=1e-14)


def test_at_high_temperature_it_is_half_the_squared_distance_of_centred_logits() -> None:
    z, v, y = logits(seed=1), logits(seed=2), torch.arange(6)
    z, v = z - z.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    want = float((z - v).square().sum(1).mean() / (2 * 10))
    errors = []
    for temperature in (100.0, 1000.0):
        found = float(distillation(z, torch.softmax(v / temperature, -1), y, 1.0, temperature))
        errors.append(abs(found / want - 1))
    assert errors[0] < 0.05 and errors[1] < 0.005 and errors[1] < 0.2 * errors[0]
    shifted = float(distillation(z + 7, torch.softmax(v / 1000, -1), y, 1.0, 1000.0))
    assert abs(shifted / want - 1) < 0.005  # but for uncentred ones |z - v|^2 is far off
    assert float((z + 7 - v).square().sum(1).mean() / 20) > 5 * want


def test_it_does_not_see_shifts_and_is_the_library_s() -> None:
    z, t, y = logits(seed=1), logits(seed=2), torch.arange(6)
    shift = torch.arange(6, dtype=F64)[:, None]
    for temperature in (0.7, 3.0):
        p = torch.softmax(t / temperature, -1)
        value = distillation(z, p, y, 0.4, temperature)
        moved = distillation(z + 5 * shift, torch.softmax((t - 3 * shift) / temperature, -1), y, 0.4, temperature)
        assert float(moved) == pytest.approx(float(value), rel=1e-12)
        library = F.kl_div(F.log_softmax(z / temperature, -1), p, reduction="batchmean")
        want = 0.6 * F.cross_entropy(z, y) + 0.4 * temperature**2 * library
        assert float(value) == pytest.approx(float(want), rel=1e-12)
    certain = F.one_hot(y, 10).to(F64)  # probabilities of exactly 0 are no NaN, and at T = 1 this is cross-entropy
    assert float(distillation(z, certain, y, 1.0, 1.0)) == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-12)
    assert float(distillation(z, torch.softmax(z / 3, -1), y, 1.0, 3.0)) == pytest.approx(0, abs=1e-12)


# --- what a task draws


def test_every_pass_shows_every_image_once_in_an_order_of_each_network_s_own(tmp_path: Path) -> None:
    setup = made(tmp_path, "method=train", "train.networks=2")
    method, count = setup.method, len(setup.data.train)
    turns = [method.place(s, torch.arange(2)) for s in range(-(-method.batches // 2))]
    assert method.batches == count // 16 and {int(t) for turn, _ in turns for t in turn} <= {0, 1}
    orders = [method.order(t) for t in (0, 1)]
    assert all(sorted(o.tolist()) == list(range(count)) for order in orders for o in order)
    assert not torch.equal(orders[0][0], orders[0][1]) and not torch.equal(orders[0][0], orders[1][0])
    task = method.draw(3, torch.tensor([1]))  # micro-batch 3 * 2 + 1
    assert torch.equal(task.y[0, 1], setup.data.train.y[orders[0][1][7 * 16 : 8 * 16]])
    both = method.draw(3, torch.arange(2))
    assert torch.equal(both.x[1], task.x[0])  # whatever it is drawn with


def test_each_network_is_trained_as_if_alone(tmp_path: Path) -> None:
    together, first = (run(tmp_path / str(n), "method=train", f"train.networks={n}") for n in (3, 1))
    theta = [network.load(tmp_path / str(n) / "network-last.safetensors").theta for n in (3, 1)]
    assert torch.allclose(theta[0][0], theta[1][0], rtol=1e-9, atol=1e-12)
    assert len(together["errors"]) == 3 and len(first["errors"]) == 1 and not torch.equal(theta[0][0], theta[0][1])


def test_what_a_run_leaves_is_a_page_and_a_module_that_errs_as_often_as_it_says(teacher: Path, tmp_path: Path) -> None:
    with Image.open(teacher / "report.png") as page:
        assert page.size == (1560, 552)
        colours = {tuple(c) for c in np.asarray(page.convert("RGB")).reshape(-1, 3)[::7]}
    assert (200, 69, 45) in colours  # bars and dots of errors
    summary = json.loads((teacher / "summary.json").read_text())
    found, data = metadist.load_network(teacher), made(tmp_path, "method=train").data
    with torch.no_grad():
        wrong = [int((found.module(i)(data.test.x.to(found.theta)).argmax(1) != data.test.y).sum()) for i in range(len(found))]
        probabilities = torch.stack([F.softmax(found.module(i)(data.test.x.to(found.theta)), -1) for i in range(len(found))])
    assert summary["together"] == int((probabilities.mean(0).argmax(1) != data.test.y).sum())
    assert wrong == summary["errors"] and f"{teacher}/report.png" in summary["text"]
    with pytest.raises(metadist.UserError, match=r"there is no .*network.safetensors; give the run folder"):
        metadist.load_network(tmp_path)


def test_soft_targets_are_the_mean_of_all_teachers_at_T(teacher: Path, tmp_path: Path) -> None:
    setup = made(tmp_path, "method=kd", f"kd.teachers=[{teacher}]", "kd.T=4", "train.networks=2")
    task = setup.method.draw(0, torch.arange(2))
    found = network.load(teacher)
    modules = [found.module(i) for i in range(2)]
    for s in range(2):
        z = [m(task.x[1, s]).detach() for m in modules]
        want = torch.stack([torch.softmax(v / 4, -1) for v in z]).mean(0)
        assert torch.allclose(task.soft[1, s], want, rtol=1e-10)
        assert not torch.allclose(task.soft[1, s], torch.softmax(torch.stack(z).mean(0) / 4, -1), rtol=1e-3)
    paired = made(tmp_path, "method=kd", f"kd.teachers=[{teacher}]", "kd.T=4", "train.networks=2", "kd.pair=true")
    own = paired.method.draw(0, torch.arange(2)).soft[1]
    assert torch.allclose(own[1], torch.softmax(modules[1](task.x[1, 1]).detach() / 4, -1), rtol=1e-10)
    two = made(tmp_path, "method=kd", f"kd.teachers=[{teacher},{teacher}]", "kd.T=4", "train.networks=2", "kd.pair=true")
    assert torch.allclose(two.method.draw(0, torch.arange(2)).soft[1], own, rtol=1e-12)


def test_a_teacher_of_another_normalization_sees_what_it_knows(tmp_path: Path) -> None:
    run(tmp_path / "raw", "method=train", "data.normalize=none", "steps=10")
    setup = made(tmp_path, "method=kd", f"kd.teachers=[{tmp_path / 'raw'}]", "kd.T=1")
    task = setup.method.draw(0, torch.arange(1))
    x = setup.data.normalization.invert(task.x[0, 0])
    assert torch.allclose(task.soft[0, 0], torch.softmax(network.load(tmp_path / "raw").module(0)(x), -1).detach(), rtol=1e-8)


@pytest.mark.parametrize("pair", ["true", "false"])
def test_kept_logits_are_those_of_the_image_that_is_seen(pair: str, teacher: Path, tmp_path: Path) -> None:
    words = ["method=kd", f"kd.teachers=[{teacher}]", "train.networks=2", f"kd.pair={pair}", "data.augment=jitter"]
    fresh, kept = made(tmp_path, *words), made(tmp_path, *words, "kd.variants=2")
    turn = -(-fresh.method.batches // 2)  # the first step of the second pass is near
    for step in (0, turn):
        a, b = (s.method.draw(step, torch.arange(2)) for s in (fresh, kept))
        assert torch.equal(a.x, b.x) and torch.allclose(a.soft, b.soft, rtol=1e-9)
    third = [s.method.draw(2 * turn, torch.arange(1)).x for s in (fresh, kept)]
    assert not torch.equal(*third)  # a variant comes again
    assert kept.advice is not None and kept.advice.kept is not None
    assert len(list(kept.advice.kept.folder.glob("variant-*.safetensors"))) == 2
    shown = kept.method.augmented(torch.arange(5), 0)
    assert torch.equal(kept.method.everything(0)[:5], shown) and not torch.equal(shown, kept.data.train.x[:5])


def test_stored_logits_are_mapped_proven_and_made_once(tmp_path: Path) -> None:
    table, calls = torch.arange(24, dtype=torch.float32).view(4, 2, 3), []

    def make() -> torch.Tensor:
        calls.append(1)
        return table

    first = Logits(tmp_path, {"a": 1})
    assert torch.equal(first.variant(3, make), table) and torch.equal(first.variant(3, make), table)
    again = Logits(tmp_path, {"a": 1})
    assert torch.equal(again.variant(3, make), table) and len(calls) == 1
    with path_maps() as maps:
        assert str(again.path(3)) in maps.read()
    other = Logits(tmp_path, {"a": 2})
    other.variant(3, make)
    assert len(calls) == 2 and other.folder != again.folder
    damaged = bytearray(again.path(3).read_bytes())
    damaged[-1] ^= 1
    again.path(3).write_bytes(damaged)
    assert torch.equal(Logits(tmp_path, {"a": 1}).variant(3, make), table) and len(calls) == 3


def path_maps() -> Any:
    return Path("/proc/self/maps").open()


# --- the switches


def test_the_soft_term_ends_after_kd_until(teacher: Path, tmp_path: Path) -> None:
    setup = made(tmp_path, "method=kd", f"kd.teachers=[{teacher}]", "kd.until=1.5", "kd.alpha=.9", "kd.T=2")
    method = setup.method
    last = math.ceil(1.5 * method.batches / 2) - 1
    assert method.guided(last) and not method.guided(last + 1)
    phi, tasks = method.parameters(), torch.arange(2)
    before, after = method.draw(last, tasks), method.draw(last + 1, tasks)
    assert before.soft.shape[-1] == 10 and after.soft.shape[-1] == 0
    z = setup.learner(phi["theta"][0], after.x[0, 0])
    assert float(method.loss(phi, after)[0]) == pytest.approx(float(F.cross_entropy(z, after.y[0, 0])), rel=1e-10)
    z = setup.learner(phi["theta"][0], before.x[0, 0])
    want = distillation(z, before.soft[0, 0], before.y[0, 0], 0.9, 2.0)
    assert float(method.loss(phi, before)[0]) == pytest.approx(float(want), rel=1e-10)


def test_a_teacher_can_be_taken_from_the_middle_of_its_training(teacher: Path, tmp_path: Path) -> None:
    half = network.load(teacher / "network-0.5.safetensors")
    assert half.manifest["step"] == 30
    words = ["method=kd", f"kd.teachers=[{teacher}]", "kd.stopped=.5", "kd.T=1"]
    setup = made(tmp_path, *words)
    task = setup.method.draw(0, torch.arange(1))
    z = torch.stack([torch.softmax(half.module(i)(task.x[0, 0]), -1) for i in range(2)]).mean(0)
    assert torch.allclose(task.soft[0, 0], z.detach(), rtol=1e-9)
    alone = tmp_path / "half"
    run(alone, "method=train", "net.width=32", "steps=30", "train.networks=2", "meta.horizon=60")
    assert torch.allclose(network.load(alone / "network-last.safetensors").theta, half.theta, rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match=r"it has 0\.5"):
        made(tmp_path, *words[:2], "kd.stopped=.25")


def test_excluded_classes_and_fractions_of_the_training_images() -> None:
    whole, part = (compose(["data=digits", *w, "method=train"]) for w in ([], ["data.exclude=[3,5]", "data.fraction=.1"]))
    all_, few = (load(c.data, "cpu", torch.float32) for c in (whole, part))
    assert set(few.train.y.tolist()) == {0, 1, 2, 4, 6, 7, 8, 9} and set(few.valid.y.tolist()) == set(range(10))
    counts, left = torch.bincount(all_.train.y, minlength=10), torch.bincount(few.train.y, minlength=10)
    kept = [c for c in range(10) if c not in (3, 5)]
    assert all(abs(int(left[c]) - 0.1 * int(counts[c])) <= 1 for c in kept)
    assert torch.equal(all_.test.x, few.test.x) and torch.equal(all_.valid.x, few.valid.x)


def test_biases_by_prior_and_by_labels() -> None:
    y = torch.arange(3000) % 10
    z = 4 * F.one_hot(y, 10).to(F64) + 0.9 * draw.normal(draw.key(0, "noise"), (3000, 10), F64)
    z[:, 3] -= 4
    z[:, 7] -= 3
    prior = torch.full((10,), 0.1, dtype=F64)
    before = (z.argmax(1) != y).sum()
    for missing in ([3], [3, 7]):
        honest, oracle = bias.by_prior(z, missing, prior), bias.by_labels(z, missing, y)
        assert {int(c) for c in honest.nonzero()} == set(missing) == {int(c) for c in oracle.nonzero()}
        guesses = (z + honest).argmax(1)
        assert all(abs(int((guesses == c).sum()) - 300) <= 3 for c in missing)
        wrong = [int(((z + b).argmax(1) != y).sum()) for b in (honest, oracle)]
        assert wrong[1] <= wrong[0] < 0.5 * int(before)
    one = bias.by_labels(z, [3], y)
    shifts = torch.linspace(-1, 8, 400, dtype=F64)
    swept = min(int(((z + s * F.one_hot(torch.tensor(3), 10)).argmax(1) != y).sum()) for s in shifts)
    assert int(((z + one).argmax(1) != y).sum()) <= swept


def test_a_class_never_seen_is_recovered(teacher: Path, tmp_path: Path) -> None:
    run(tmp_path / "good", "method=train", "net.width=64", "steps=400", "train.networks=1", "meta.lr=.005")
    words = ["method=kd", f"kd.teachers=[{tmp_path / 'good'}]", "kd.alpha=1", "kd.T=6", "steps=600", "net.width=32"]
    found = run(tmp_path / "student", *words, "data.exclude=[3]", "train.networks=2")["corrections"]
    threes = found["missing_images"]
    before, honest, oracle = (found[k]["missing_errors"] for k in ("before", "prior", "test"))
    alone = run(tmp_path / "alone", "method=train", "data.exclude=[3]", "steps=200", "net.width=32")["corrections"]
    assert alone["before"]["missing_errors"] == [threes] == [37]  # hard labels say nothing of a 3
    assert max(before) < 0.4 * threes and max(honest) < 0.2 * threes and len(oracle) == 2
    assert all(o <= b for o, b in zip(*(found[k]["errors"] for k in ("test", "before")), strict=True))
    text = json.loads((tmp_path / "student" / "summary.json").read_text())["text"]
    assert "not honest" in text and "prior" in text and "without class 3" in text


def test_precision_lowers_the_loss(tmp_path: Path) -> None:
    values = {}
    for precision in ("fp32", "bf16"):
        setup = made(tmp_path, "method=train", "engine.dtype=float32")
        setup.config.engine.precision = precision  # on a CPU the command line refuses it
        values[precision] = float(setup.method.loss(setup.method.parameters(), setup.method.draw(0, torch.arange(2))).sum())
    assert values["fp32"] != values["bf16"] == pytest.approx(values["fp32"], rel=0.02)


def test_dropout_by_counter_and_the_weight_constraint(tmp_path: Path) -> None:
    words = ["method=train", "net.width=64", "net.dropout=.5", "net.input_dropout=.2", "train.max_square=2", "meta.lr=.1"]
    setup = made(tmp_path, *words)
    task = setup.method.draw(0, torch.arange(2))
    kept = task.kept[..., :64].float().mean(), task.kept[..., 64:].float().mean()
    assert task.kept.shape == (2, 1, 16, 128) and abs(kept[0] - 0.8) < 0.03 and abs(kept[1] - 0.5) < 0.03
    again = setup.method.draw(0, torch.tensor([1]))
    assert torch.equal(again.kept[0], task.kept[1]) and not torch.equal(task.kept[0], task.kept[1])
    theta, x, mask = setup.method.parameters()["theta"][0], task.x[0, 0], task.kept[0, 0].to(F64)
    w1, b1, w2, b2 = setup.learner.views(theta).values()
    hidden = torch.relu((x.flatten(1) * mask[:, :64] / (1 - 51 / 256)) @ w1.T + b1) * mask[:, 64:] * 2
    assert torch.allclose(setup.learner(theta, x, task.kept[0, 0]), hidden @ w2.T + b2, rtol=1e-10)
    whole = torch.relu(x.flatten(1) @ w1.T + b1) @ w2.T + b2
    assert torch.allclose(setup.learner.predict(theta, torch.zeros(0), x), whole, rtol=1e-10)
    run(tmp_path / "run", *words)
    after = setup.learner.views(network.load(tmp_path / "run" / "network-last.safetensors").theta[0])
    lengths = [v.square().sum(1) for v in after.values() if v.dim() == 2]
    assert float(lengths[0].max()) == pytest.approx(2, rel=1e-9) and float(lengths[1].max()) > 2  # the output's is free
    learner = build_net(NetConfig(name="mlp", init="kaiming", dropout=0.25, depth=1, width=3), 1, 2, 2)
    counted = masks(learner.dropouts, draw.key(0, "m", 0, torch.arange(50)), 200).float().mean((0, 1))
    assert bool(((counted - 0.75).abs() < 0.02).all())


def test_jitter_moves_by_two_pixels_at_most(tmp_path: Path) -> None:
    setup = made(tmp_path, "method=train", "data.augment=jitter", "data.size=8", "data.normalize=none")
    rows = torch.arange(400)
    seen, plain = setup.method.augmented(rows, 5), setup.data.train.x[rows]
    padded = F.pad(plain, (2, 2, 2, 2), mode="reflect")
    moves = [[(padded[:, :, i : i + 8, j : j + 8] == seen).flatten(1).all(1) for j in range(5)] for i in range(5)]
    table = torch.stack([torch.stack(row) for row in moves])
    assert bool(table.flatten(0, 1).any(0).all()) and int((table.sum(2) > 5).sum()) == 25


def test_a_distilled_set_can_be_trained_on(teacher: Path, tmp_path: Path) -> None:
    at = tmp_path / "set"
    words = [w for w in TINY if not w.startswith(("tasks", "meta.lr", "engine.dtype", "run.check"))]
    config = compose([*words, "method=dd_random_init", "labels.kind=soft", "steps=3", "eval.nets=2", "eval.final_nets=2",
                      f"run_dir={at}"])  # fmt: skip
    with Stop() as stop:
        trainer.train(config, RunFolder.open(config), Alone(), stop)
    student = [w for w in TINY if not w.startswith(("data=", "real_batch"))]
    student += ["method=kd", f"kd.teachers=[{teacher}]", "data=distilled", f"data.path={at}"]
    setup = training.build(compose([*student, "real_batch=5"]))
    assert setup.data.train.y.shape == (10, 10) and len(setup.data.test) == len(load(compose().data, "cpu", F64).test)
    config = compose([*student, "real_batch=5", "steps=5", f"run_dir={tmp_path / 'student'}"])
    with Stop() as stop:
        summary = trainer.train(config, RunFolder.open(config), Alone(), stop)
    assert summary["data"] == "distilled" and len(summary["errors"]) == 1
    assert torch.equal(setup.data.train.x, metadist.load(str(at)).images.to(F64))
    assert f"teacher {teacher}" in summary["text"] and " (digits)\n" in summary["text"]
    longer = metadist.load(str(at))
    dataclasses.replace(longer, images=longer.images + 1e-3).save(at / "distilled.safetensors")
    folder = RunFolder.attach(tmp_path / "student")
    with pytest.raises(RunError, match=r"the images of data\.path are not those this run began with"):
        origins.check(job.build(folder.config).origins, folder)
    with pytest.raises(UserError, match="holds trained networks, no distilled set"):
        metadist.load(str(tmp_path / "student"))
    with pytest.raises(UserError, match="more than the 10 training images"):
        training.build(compose([*student, "real_batch=16"]))


# --- the laws


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as ours:
        yield ours


def last(at: Path) -> dict[str, Any]:
    found = Checkpoints(at / "checkpoints", 0).load_newest()
    assert found is not None
    out: dict[str, Any] = {k: v.numpy().tobytes() for k, v in found[1].items()}
    names = ("network.safetensors", "network-last.safetensors", "network-0.5.safetensors")
    return out | {n: (at / n).read_bytes() for n in names} | {"state": found[2]["state"]}


def kd_words(teacher: Path, at: Path) -> list[str]:
    """Everything that a checkpoint, or a draw, could forget."""
    switches = ["kd.until=.5", "kd.variants=1", "data.augment=jitter", "net.dropout=.5", "train.max_square=2", "meta.ema=0.9"]
    words = [*TINY, "method=kd", f"kd.teachers=[{teacher}]", *switches, "train.networks=2", "train.snapshots=[.5]"]
    return [*words, "steps=50", "engine.dtype=float32", "eval.every=7", f"cache_dir={at / 'cache'}", f"run_dir={at / 'run'}"]


@pytest.mark.slow
def test_killed_anywhere_it_ends_where_the_uninterrupted_run_does(nursery: Nursery, teacher: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    nursery.run(kd_words(teacher, whole), whole)
    for lines in (4, 9):
        started = nursery.start(kd_words(teacher, broken), broken)
        started.until_lines(lines)
        started.kill()
        assert started.wait() == -9
    nursery.run(kd_words(teacher, broken), broken)
    one, other = last(whole / "run"), last(broken / "run")
    assert one.keys() == other.keys() and [k for k in one if one[k] != other[k]] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [["workers=2"], ["workers=2", "exchange=server", "exchange.max_staleness=0"]],
    ids=["allreduce", "server"],
)
def test_two_workers_are_one(more: list[str], nursery: Nursery, teacher: Path, tmp_path: Path) -> None:
    theta = []
    for name, extra in (("one", []), ("two", more)):
        at = tmp_path / name
        at.mkdir()
        words = [*TINY, "method=kd", f"kd.teachers=[{teacher}]", "train.networks=2", "tasks=3", "net.dropout=.5", "steps=4",
                 f"cache_dir={at}", f"run_dir={at / 'run'}"]  # fmt: skip
        nursery.run([*words, *extra], at)
        theta.append(network.load(at / "run" / "network-last.safetensors").theta)
    assert float((theta[0] - theta[1]).abs().max()) < 1e-10 * float(theta[0].abs().max())


def test_another_teacher_under_the_same_name_is_refused(teacher: Path, tmp_path: Path) -> None:
    run(tmp_path / "t", "method=train", "steps=5")
    words = ["method=kd", f"kd.teachers=[{tmp_path / 't'}]", "steps=5"]
    run(tmp_path / "s", *words)
    network.load(teacher).save(tmp_path / "t" / "network.safetensors")
    folder = RunFolder.attach(tmp_path / "s")
    with pytest.raises(RunError, match="the teachers are not those this run began with"):
        origins.check(job.build(folder.config).origins, folder)


WRONG = {
    "method=kd": "method=kd needs kd.teachers",
    "method=train kd.alpha=.5": "kd.alpha is not read by this run: it belongs to method.loss=distillation",
    "method=train kd.until=2": "kd.until is not read by this run",
    "method=train ipc=3": "ipc is not read by this run",
    "method=train inner.lr=3": "inner.lr is not read by this run",
    "method=train train.networks=2 meta.clip=1": "together",
    "method=train train.snapshots=[1.5]": "train.snapshots=1.5 is no part",
    "method=kd kd.teachers=[x] kd.variants=3": "kd.variants=3",
    "method=kd kd.teachers=[x] kd.alpha=1.5": "kd.alpha=1.5 is out of range",
    "method=kd kd.teachers=[x] kd.T=0": "kd.T=0.0 is out of range",
    "method=dd_random_init data=distilled data.path=x": "method=dd_random_init makes one",
    "method=dd_random_init data.exclude=[3]": "data.exclude is not read by this run",
    "method=dd_random_init net.dropout=.5": "net.dropout is not read by this run",
    "method=dd_random_init method.synthetic=network": "method.synthetic=network contradicts method=dd_random_init",
    "method=train data=distilled": "data=distilled needs data.path",
    "method=train data=distilled data.path=x data.normalize=zca": "data.normalize is for real images",
    "method=train data=distilled data.path=x data.fraction=.5": "data.fraction is for real images",
    "method=train train.max_square=2 net.weight_norm=true": "which net.weight_norm=true divides out",
    "method=train meta.schedule=cosine meta.horizon=100 steps=4 train.snapshots=[.5]": "after steps=4",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_named_before_any_work(wrong: str) -> None:
    with pytest.raises(UserError) as error:
        compose(wrong.split())
    assert WRONG[wrong] in str(error.value) and "\n" not in str(error.value)


def test_mistakes_that_the_data_tell(teacher: Path, tmp_path: Path) -> None:
    renamed, resized = tmp_path / "renamed.safetensors", tmp_path / "resized.safetensors"
    known = network.load(teacher)
    classes = ["nought", *known.classes[1:]]
    dataclasses.replace(known, manifest={**known.manifest, "classes": classes}).save(renamed)
    narrow = {**known.manifest["net"], "width": 3}
    dataclasses.replace(known, manifest={**known.manifest, "net": narrow}).save(resized)
    for words, said in {
        ("method=kd", "kd.teachers=[nowhere]"): "there is no nowhere",
        ("method=kd", f"kd.teachers=[{teacher}]", "data.size=12"): "1x8x8 of 10 classes, its student 1x12x12",
        ("method=kd", f"kd.teachers=[{teacher}]", "kd.pair=true", "train.networks=3"): "has 2 networks, train.networks=3",
        ("method=train", "data.exclude=[11]"): "data.exclude=11 is no class",
        ("method=train", "real_batch=5000"): "more than the",
        ("method=kd", f"kd.teachers=[{renamed}]"): "knows other classes than its student \\('nought' where that has '0'\\)",
        ("method=kd", f"kd.teachers=[{resized}]"): "has 2410 weights and 0 statistics, net=mlp of its manifest 235 and 0",
        ("method=train", "data=distilled", "data.path=digits-10", "data.size=16"): "data.size=16 is not the 8",
        ("method=train", "data=distilled", "data.path=digits-10", "data.augment=flip"): "a mirrored digit of digits",
    }.items():
        with pytest.raises(UserError, match=said):
            made(tmp_path, *words)


@pytest.mark.parametrize(("net", "size", "count"), [("plain", 8, 6), ("resnet_cifar", 8, 8)])
def test_convolutional_teachers_and_students(net: str, size: int, count: int, tmp_path: Path) -> None:
    words = ["method=train", f"net={net}", f"net.depth={count}", "net.width=4", "steps=3", "train.networks=2",
             "engine.dtype=float32"]  # fmt: skip
    words = [*words, "net.width=4"]
    base = [w for w in TINY if not w.startswith(("net", "engine.dtype"))]
    config = compose([*base, *words, f"run_dir={tmp_path / 'run'}"])
    with Stop() as stop:
        summary = trainer.train(config, RunFolder.open(config), Alone(), stop)
    found = network.load(tmp_path / "run")
    assert found.buffers.shape[0] == 2 and found.buffers.shape[1] > 0 and len(summary["errors"]) == 2
    module = found.module(1)
    assert not module.training and module(torch.zeros(1, 1, size, size)).shape == (1, 10)


def test_sizes_as_published() -> None:
    def parameters(name: str, depth: int) -> int:
        return build_net(NetConfig(name=name, init="kaiming", depth=depth), 3, 32, 10).size

    # He et al. 2015, table 6: 0.27 M and 1.7 M; 0.08 M for the smallest
    assert [round(parameters("resnet_cifar", d) / 1e6, 2) for d in (8, 20, 110)] == [0.08, 0.27, 1.73]
    sizes = [parameters("plain", d) for d in (2, 4, 6, 8, 10)]
    layers = [sum(len(s) == 4 for s in build_net(NetConfig(name="plain", depth=d), 3, 32, 10).shapes) for d in (2, 4, 6, 8, 10)]
    assert layers == [2, 4, 6, 8, 10] and sizes[1] < sizes[2] < sizes[3] < sizes[4]
    for name, depth in (("plain", 3), ("resnet_cifar", 10)):
        with pytest.raises(UserError, match=r"net\.depth"):
            parameters(name, depth)
