"""Training many networks at once, protocols, statistics, the report and `launch/evaluate.py`."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metadist import draw
from metadist.config import Config, DataConfig, NetConfig
from metadist.data import Data, Split, baseline, load
from metadist.errors import UserError
from metadist.evaluate import fitting, picture
from metadist.evaluate.plan import Plan
from metadist.evaluate.protocols import Evaluation, baseline_random
from metadist.evaluate.recipe import RATES, Recipe, random_indices
from metadist.evaluate.settings import Settings
from metadist.evaluate.statistics import Summary
from metadist.evaluate.suite import Examination, glance
from metadist.evaluate.train import accuracy, chunks, predictions, recorded, standard, statistics
from metadist.metagrad.inner import Inner
from metadist.metagrad.optimizers import Optimizer
from metadist.methods.starts import Fixed, Random
from metadist.nets import Learner, build
from metadist.nets.loss import cross_entropy_loss
from metadist.run import evaluation, gradient_check
from metadist.run.guard import guarded
from metadist.run.setup import build as build_setup
from metadist.synthetic.distilled import DistilledSet

F64 = torch.float64
CPU = torch.device("cpu")
MLP = NetConfig(name="mlp", width=24, depth=1)
BN = NetConfig(name="convnet", width=4, depth=2, norm="batch")


@pytest.fixture(scope="module")
def digits() -> Data:
    return load(DataConfig(name="digits"), "cpu", F64)


def learner(cfg: NetConfig) -> Learner:
    return build(cfg, 1, 8, 10, F64)


def keys(n: int, stream: str = "evaluation") -> Tensor:
    return draw.key(0, stream, 0, torch.arange(n))


def make_set(data: Data, ipc: int = 2, steps: int = 2, passes: int = 3, rate: float = 0.1, **more: object) -> DistilledSet:
    x, y = baseline("kmeans", data.train, 10, ipc, 0)
    order = torch.arange(steps * passes) % steps
    lr = torch.linspace(rate, 2 * rate, len(order), dtype=F64)
    manifest = {"method": "dd_random_init", "data": "digits", "net": dataclasses.asdict(MLP), "seed": 3}
    return DistilledSet(x, y, order, lr, data.normalization, manifest=manifest, **more)  # type: ignore[arg-type]


def evaluator(data: Data, cfg: NetConfig = MLP, nets: int = 6, **more: int) -> Evaluation:
    net = learner(cfg)
    return Evaluation(net, data, Random(net, 0, CPU), nets=nets, **more)  # type: ignore[arg-type]


# Summaries


def test_summary_is_students_interval() -> None:
    s = Summary.of([1.0, 2.0, 3.0, 4.0])
    assert (s.mean, s.n) == (2.5, 4)
    assert s.sd == pytest.approx((5 / 3) ** 0.5, rel=1e-12)
    assert s.ci95 == pytest.approx(3.182446305 * (5 / 3) ** 0.5 / 2, rel=1e-9)  # t(0.975, 3) from a printed table
    assert Summary.of([0.5]).as_dict() == {"mean": 0.5, "sd": 0.0, "n": 1, "ci95": None}
    with pytest.raises(ValueError, match="no values"):
        Summary.of([])


# Training and judging


def test_accuracy_is_that_of_the_plain_module(digits: Data) -> None:
    net = learner(BN)
    theta = net.init(keys(3))
    buffers = statistics(net, theta, digits.train.x[:40].unflatten(0, (2, 20)))
    assert net.buffers_size == buffers.shape[1] == 16
    got = accuracy(net, theta, buffers, digits.test, chunk=2, batch=77)
    for i in range(3):
        module = net.module(theta[i], buffers[i]).eval()
        right = (module(digits.test.x).argmax(1) == digits.test.y).to(F64).mean()
        assert got[i] == right
    assert got.dtype == F64 and len(set(got.tolist())) > 1


def one_by_one(module: nn.Module, key: Tensor, x: Tensor, y: Tensor, epochs: int, batch: int, lr: float) -> Tensor:
    """Ordinary training of one network by torch.optim, with the documented shuffling."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.8, weight_decay=0.01)
    total, t = epochs * -(-len(x) // batch), 0
    for epoch in range(epochs):
        rows = draw.permutation(draw.split(draw.split(key, epoch), 0), len(x))
        for part in rows.split(batch):
            optimizer.param_groups[0]["lr"] = lr if t < total // 2 else lr / 10
            optimizer.zero_grad()
            cross_entropy(module(x[part]), y[part]).backward()
            optimizer.step()
            t += 1
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_standard_training_of_n_nets_is_a_loop_over_nets(digits: Data) -> None:
    net, x, y = learner(BN), digits.train.x[:50], digits.train.y[:50]
    theta0, shuffles = net.init(keys(3)), keys(3, "shuffle")
    plan = {"epochs": 3, "batch": 16, "lr": 0.05}
    got = standard(
        net, theta0, x, y, optimizer=Optimizer("momentum"), momentum=0.8, weight_decay=0.01, keys=shuffles,
        schedule="half", chunk=2, epochs=3, batch=16, lr=0.05,
    )  # fmt: skip
    for i in range(3):
        want = one_by_one(net.module(theta0[i]), shuffles[i], x, y, **plan)  # type: ignore[arg-type]
        assert torch.allclose(got[i], want, rtol=0, atol=1e-11)
    assert (got - theta0).abs().max() > 0.01


def test_standard_training_on_rows_of_each_network(digits: Data) -> None:
    net, theta0 = learner(MLP), learner(MLP).init(keys(2))
    rows = torch.tensor([[3, 5, 8, 13], [40, 41, 42, 43]])
    settings = {"epochs": 2, "optimizer": Optimizer("adam"), "lr": 0.01, "batch": 3}
    got = standard(net, theta0, digits.train.x, digits.train.y, keys=keys(2), index=rows, **settings)  # type: ignore[arg-type]
    for i in range(2):
        x, y = digits.train.x[rows[i]], digits.train.y[rows[i]]
        want = standard(net, theta0[i : i + 1], x, y, keys=keys(2)[i : i + 1], **settings)  # type: ignore[arg-type]
        assert torch.allclose(got[i], want[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_recorded_training_is_replay(digits: Data, kind: str) -> None:
    more = {"momentum": torch.full((6,), 0.9, dtype=F64), "optimizer": {"kind": "adam", "eps": 1e-3}} if kind == "adam" else {}
    dset = make_set(digits, rate=0.1 if kind == "sgd" else 0.003, **more)
    net = learner(BN)
    theta0, recipe = net.init(keys(3)), Recipe.of(dset, F64)
    inner = Inner(cross_entropy_loss(net), recipe.optimizer)
    theta = recorded(inner, theta0, recipe.batches, recipe.order, recipe.h, chunk=2)
    buffers = statistics(net, theta, recipe.x)
    guesses = predictions(net, theta, buffers, digits.test.x)
    for i in range(3):
        module = dset.replay(net.module(theta0[i]))
        assert torch.allclose(theta[i], net.flatten(module), rtol=0, atol=1e-9)
        mine = dict(net.module(theta[i], buffers[i]).named_buffers())
        for name, value in module.named_buffers():
            if "num_batches" not in name:
                assert torch.allclose(mine[name], value, rtol=0, atol=1e-9), name
        assert torch.equal(guesses[i], module(digits.test.x).argmax(1))


def test_statistics_are_of_the_training_images(digits: Data) -> None:
    net = learner(BN)
    theta, x = net.init(keys(1)), digits.train.x[:40].unflatten(0, (2, 20))
    first = net.module(theta[0]).get_submodule(net.names[0].rpartition(".")[0])
    outputs = [first(part) for part in x]
    mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    variance = torch.stack([o.var((0, 2, 3), correction=1) for o in outputs]).mean(0)
    got = statistics(net, theta, x)[0]
    assert torch.allclose(got[:4], mean, atol=1e-12) and torch.allclose(got[4:8], variance, atol=1e-12)
    own = statistics(net, theta.repeat(2, 1), torch.stack((x, x.flip(0) + 1)))
    assert torch.allclose(own[0], got, atol=1e-12) and not torch.allclose(own[1], got, atol=1e-2)


def test_chunks_cover_all_networks_in_one_size() -> None:
    for n, chunk in ((1, 20), (20, 20), (21, 20), (7, 3), (5, 1)):
        found = list(chunks(n, chunk))
        assert torch.cat([index[:count] for index, count in found]).tolist() == list(range(n))
        assert len({len(index) for index, _ in found}) == 1 and len(found[0][0]) <= chunk


def test_chunking_does_not_change_results(digits: Data) -> None:
    dset = make_set(digits)
    recipe, plan = Recipe.of(dset, F64), Plan(epochs=2, batch=8, augment="crop", rates=(0.05,))
    for cfg in (MLP, BN):
        results = []
        for chunk in (1, 3, 20):
            judge = evaluator(digits, cfg, nets=5, chunk=chunk, trials=2)
            found = (judge.recorded(recipe), judge.random(recipe), judge.standard(*recipe.images, plan))
            results.append(torch.stack([r.accuracies for r in found]))
        assert (results[0] - results[1]).abs().max() < 1e-10 and (results[0] - results[2]).abs().max() < 1e-10
    theta0 = learner(MLP).init(keys(5))
    inner = Inner(cross_entropy_loss(learner(MLP)), recipe.optimizer)
    parts = [recorded(inner, theta0, recipe.batches, recipe.order, recipe.h, chunk=c) for c in (2, 5)]
    assert torch.allclose(parts[0], parts[1], rtol=0, atol=1e-12)


def test_augmentation_changes_training_and_schedule_is_refused_by_name(digits: Data) -> None:
    net, x, y = learner(MLP), digits.train.x[:30], digits.train.y[:30]
    settings = {"epochs": 1, "optimizer": Optimizer(), "lr": 0.1, "keys": keys(2), "batch": 30}
    plain = standard(net, net.init(keys(2)), x, y, **settings)  # type: ignore[arg-type]
    cropped = standard(net, net.init(keys(2)), x, y, augment="crop", **settings)  # type: ignore[arg-type]
    assert (plain - cropped).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"schedule=halve is unknown; did you mean half\?"):
        standard(net, net.init(keys(2)), x, y, schedule="halve", **settings)  # type: ignore[arg-type]


# Protocols


def test_random_images_are_balanced_distinct_and_each_networks_own(digits: Data) -> None:
    rows = random_indices(digits.train, 10, 7, keys(4, "images"))
    assert rows.shape == (4, 70)
    assert torch.equal(digits.train.y[rows], torch.arange(10).repeat(7).expand(4, -1))
    assert all(len(set(row.tolist())) == 70 for row in rows)
    assert len({tuple(row.tolist()) for row in rows}) == 4


def test_fresh_networks_are_of_the_evaluation_stream(digits: Data) -> None:
    judge = evaluator(digits, nets=4)
    assert torch.equal(judge.theta0, learner(MLP).init(draw.key(0, "evaluation", 0, torch.arange(4))))
    assert not torch.equal(judge.theta0, learner(MLP).init(draw.key(0, "theta0", 0, torch.arange(4))))


def test_rates_are_chosen_on_validation_alone(digits: Data) -> None:
    recipe = Recipe.of(make_set(digits), F64)
    wrong = Split(digits.test.x, (digits.test.y + 1) % 10)
    found = []
    for data in (digits, dataclasses.replace(digits, test=wrong)):
        judge = evaluator(data, nets=5)
        found.append((judge.random(recipe), judge.standard(*recipe.images, Plan(epochs=2))))
    for a, b in zip(*found):
        assert a.rate == b.rate and a.tried == b.tried and a.summary.mean != b.summary.mean
        assert a.tried[a.rate] == max(a.tried.values())
    assert set(found[0][0].tried) == {None, *RATES["sgd"]} and set(found[0][1].tried) == set(RATES["momentum"])


def test_baselines_on_digits_come_in_the_known_order(digits: Data) -> None:
    dset = make_set(digits, ipc=5, steps=5, passes=6)
    judge, recipe = evaluator(digits, nets=10), Recipe.of(dset, F64)
    untrained, random = judge.untrained().summary.mean, judge.random(recipe).summary.mean
    kmeans = judge.recorded(recipe, recipe.candidates()).summary.mean
    full = judge.standard(digits.train.x, digits.train.y, Plan(epochs=6, batch=64, rates=(0.01, 0.1)), 3)
    assert untrained < 0.25 < 0.6 < random < kmeans < full.summary.mean
    assert full.summary.n == 3 and full.summary.mean > 0.92


def test_light_baseline_is_the_protocols(digits: Data) -> None:
    dset, net = make_set(digits), learner(MLP)
    starts = Random(net, 0, CPU)
    want = Evaluation(net, digits, starts, nets=4, seed=1).random(Recipe.of(dset, F64)).summary
    assert baseline_random(net, digits, dset, starts, 4, seed=1) == want
    report = glance(dset, digits, net, "mlp", starts, "fresh", Settings(nets=4, seed=1))
    row = report.find("random")
    assert row is not None and row.result.summary == want


def test_one_start_is_one_network_but_random_images_vary(digits: Data) -> None:
    net, recipe = learner(MLP), Recipe.of(make_set(digits), F64)
    judge = Evaluation(net, digits, Fixed(net, 0, CPU), nets=50)
    assert judge.recorded(recipe).summary.n == 1
    drawn = judge.random(recipe).summary
    assert drawn.n == 20 and drawn.sd > 0
    assert judge.standard(*recipe.images, Plan(epochs=1, rates=(0.1,))).summary.n == 1  # full batches: nothing is drawn
    assert judge.standard(*recipe.images, Plan(epochs=1, batch=4, rates=(0.1,))).summary.n == 20


def test_curve_ends_at_the_recorded_accuracy(digits: Data) -> None:
    judge, recipe = evaluator(digits, BN), Recipe.of(make_set(digits), F64)
    curve = judge.curve(recipe, None, (0, 2, 6))
    assert curve.shape == (3, 6)
    assert torch.allclose(curve[-1], judge.recorded(recipe).accuracies, atol=1e-12)
    random = judge.random(recipe)
    assert torch.allclose(judge.curve(recipe, random.rate, (6,), own_images=True)[0], random.accuracies, atol=1e-12)


def test_poison_figures_follow_the_labels(digits: Data) -> None:
    dset = make_set(digits, ipc=3, steps=1, passes=60)
    poisoned = dataclasses.replace(dset, labels=torch.where(dset.labels == 3, 5, dset.labels))
    judge = evaluator(digits, nets=4)
    clean, bad = (judge.poison(Recipe.of(s, F64), 3, 5) for s in (dset, poisoned))
    assert clean["attacked_accuracy"].mean > 0.5 > clean["success"].mean
    assert bad["attacked_accuracy"].mean == 0 and bad["success"].mean > 0.5
    assert clean["accuracy"] == judge.recorded(Recipe.of(dset, F64)).summary


def test_data_are_put_under_the_sets_normalization(digits: Data) -> None:
    other = load(DataConfig(name="digits", normalize="none"), "cpu", F64)
    fitted = fitting.aligned(other, digits.normalization)
    assert torch.allclose(fitted.test.x, digits.test.x, atol=1e-12) and not torch.allclose(other.test.x, digits.test.x)
    assert fitting.aligned(digits, digits.normalization) is digits
    big = load(DataConfig(name="digits", size=12), "cpu", F64)
    with pytest.raises(UserError, match=r"made for images of 1x8x8, data=digits has 1x12x12; data.size=8"):
        fitting.check(make_set(digits), big)


def test_settings_refuse_nonsense(digits: Data) -> None:
    for given, message in (
        ({"nets": 0}, "nets=0 must be 1 or more"),
        ({"protocol": ("recordet",)}, "did you mean recorded"),
        ({"baselines": ("kmean",)}, "did you mean kmeans"),
        ({"split": "train"}, "split=train is unknown"),
        ({"optimizer": "adamw"}, "did you mean adam"),
    ):
        with pytest.raises(UserError, match=message):
            Settings(**given)  # type: ignore[arg-type]
    assert Settings().augmentations(digits) == ("none",)  # 8 pixels: too small to be cropped
    with pytest.raises(UserError, match="mirrored digit"):
        Settings(augment=("flip",)).augmentations(digits)


# The report and the program


def test_examination_measures_what_was_asked(digits: Data) -> None:
    net, seen = learner(MLP), []
    settings = Settings(nets=3, epochs=2, baselines=("random", "kcenter"), full=True, full_epochs=1, trials=2)
    dset = make_set(digits)
    examination = Examination(dset, digits, net, "mlp", Random(net, 0, CPU), "fresh", settings, seen.append)
    report = examination.run({"convnet": learner(BN)}, poison=(0, 1))
    names = [(r.images, r.protocol, r.net) for r in report.rows]
    both = [("distilled", "recorded", "mlp"), ("distilled", "standard", "mlp")]
    assert names[:3] == [("none", "none", "mlp"), *both]
    assert names[3:8] == [
        *((k, p, "mlp") for k in ("random", "kcenter") for p in ("recorded", "standard")),
        ("all", "standard", "mlp"),
    ]
    assert names[8:] == [(k, p, "convnet") for k in ("distilled", "random") for p in ("recorded", "standard")]
    assert [r.count for r in report.rows[:4]] == [0, 20, 20, 20] and report.rows[7].count == len(digits.train)
    assert len(seen) == len(report.rows) and report.poison is not None
    record = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert record["rows"][1]["accuracy"]["n"] == 3 and record["curves"]["random"]["steps"] == [0, 1, 2, 3, 4, 5, 6]
    assert picture.draw(report).startswith(b"\x89PNG")


def test_picture_of_many_steps_and_of_one_network(digits: Data) -> None:
    net = learner(MLP)
    for dset, starts in ((make_set(digits, 16, 16, 1), Random(net, 0, CPU)), (make_set(digits, 1, 1), Fixed(net, 0, CPU))):
        assert picture.draw(glance(dset, digits, net, "mlp", starts, "", Settings(nets=2, trials=1))).startswith(b"\x89PNG")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = guarded(evaluation.main, words)
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.fixture(scope="module")
def saved(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "set.safetensors"
    make_set(digits).save(path)
    return path


def test_program_writes_report_and_figures(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    words = (f"set={saved}", f"out={tmp_path}", "nets=3", "protocol=recorded", "baselines=random", "trials=1")
    status, out, err = run(capsys, *words)
    assert status == 0 and "6 recorded steps" in out and "20 random real" in out and "6 ordered steps" in out
    assert "mlp, 20 distilled" in err
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert record["settings"]["seed"] == 3 and record["starts"] == "fresh xavier initializations"
    status, out, err = run(capsys, *words, "json=true")
    assert status == 0 and err == ""
    assert [r["accuracy"] for r in json.loads(out)["rows"]] == [r["accuracy"] for r in record["rows"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("netz=3",), "key=netz is unknown; did you mean net?"),
        (("nets=many",), "nets=many is not an integer"),
        (("full=maybe",), "full=maybe is neither true nor false"),
        (("nets",), "nets is not key=value"),
        (("protocol=recordet",), "did you mean recorded?"),
        (("transfer=convnett",), "net=convnett is unknown; did you mean convnet?"),
        (("transfer=lenet",), "net.name=lenet can't take 8x8 images"),
        (("data.size=12",), "the set was made for images of 1x8x8, data=digits has 1x12x12"),
        (("data=digit",), "did you mean digits?"),
        (("check=gradient",), "check=gradient needs run="),
        (("run=x",), "give run= or set=, one of them"),
        (("device=gpu",), "device=gpu is unknown"),
    ],
)
def test_program_refuses_in_one_line(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    status, out, err = run(capsys, f"set={saved}", f"out={tmp_path}", *words)
    assert status == 2 and out == "" and message in err
    assert len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_program_names_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, message in (
        ((), "give run= or set="),
        ((f"run={tmp_path}",), "no run folder"),
        (("set=mnist-9",), "mnist-9 is unknown"),
    ):
        status, _, err = run(capsys, *words)
        assert status == 2 and message in err and len(err.strip().splitlines()) == 1
    assert run(capsys, "--help")[0] == 0


# The bias of the meta-gradient


def small_run() -> Config:
    config = Config(tasks=3, ipc=1, real_batch=8)
    config.data = DataConfig(name="digits")
    config.net = copy.deepcopy(MLP)
    config.inner.steps, config.inner.epochs, config.inner.lr = 1, 4, 0.1
    return config


def test_gradient_check_sees_truncation_and_nothing_else() -> None:
    def bias(window: int) -> gradient_check.Bias:
        config = small_run()
        if window:
            config.method.gradient, config.inner.window = "truncated", window
        setup = build_setup(config)
        phi = setup.method.parameters()
        wide = {k: v.to(F64) for k, v in phi.items()}
        given = gradient_check.gradient(setup, phi, 0)
        return gradient_check.compare(given, gradient_check.gradient(gradient_check.exact(setup), wide, 0))[-1]

    whole, full_window, part = bias(0), bias(4), bias(1)
    assert whole.parameter == "all" and whole.norm > 0
    assert 0 < whole.relative_error < 1e-4 and full_window.relative_error < 1e-4
    assert part.relative_error > 0.05 and part.cosine < 0.9999
