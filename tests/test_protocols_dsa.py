"""Published protocols: their numbers, DSA in ordinary training, the drop at half, transfer, and the program's refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from metadist import draw
from metadist.config import DataConfig, NetConfig
from metadist.data import Data, baseline, dsa, load
from metadist.errors import UserError
from metadist.evaluate import published, report
from metadist.evaluate.plan import Plan
from metadist.evaluate.protocols import Evaluation
from metadist.evaluate.recipe import Recipe
from metadist.evaluate.settings import Settings
from metadist.evaluate.suite import Examination
from metadist.evaluate.train import standard
from metadist.metagrad.optimizers import Optimizer
from metadist.methods.starts import Random
from metadist.nets import Learner, build
from metadist.run import evaluation
from metadist.run.guard import guarded
from metadist.synthetic.distilled import DistilledSet

F64 = torch.float64
CPU = torch.device("cpu")
MLP = NetConfig(name="mlp", width=24, depth=1)
CONVNET = NetConfig(name="convnet", width=4, depth=2)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load(DataConfig(name="digits"), "cpu", F64)


def learner(cfg: NetConfig = MLP) -> Learner:
    return build(cfg, 1, 8, 10, F64)


def keys(n: int, stream: str = "shuffle") -> Tensor:
    return draw.key(0, stream, 0, torch.arange(n))


def make_set(data: Data, rates: tuple[float, ...] = (0.02, 0.04), **more: Any) -> DistilledSet:
    x, y = baseline("kmeans", data.train, 10, 1, 0)
    lr = torch.tensor(rates, dtype=F64)
    manifest = {"method": "mtt", "data": "digits", "net": dataclasses.asdict(MLP), "seed": 3}
    return DistilledSet(x, y, torch.zeros(len(lr), dtype=torch.int64), lr, data.normalization, manifest=manifest, **more)


# Ordinary training


def one_by_one(net: Learner, theta: Tensor, key: Tensor, x: Tensor, y: Tensor, strategy: str, anew: bool, kind: str) -> Tensor:
    """One network by torch.optim: 5 epochs of 3 steps; each step's operation and images' parameters from its key."""
    module, t = net.module(theta), 0

    def fresh(lr: float) -> torch.optim.Optimizer:
        if kind == "adam":
            return torch.optim.Adam(module.parameters(), lr=lr, betas=(0.8, 0.999), eps=0.0)
        return torch.optim.SGD(module.parameters(), lr=lr, momentum=0.8, weight_decay=0.01)

    optimizer = fresh(0.05)
    for epoch in range(5):
        own = draw.split(key, epoch)
        for i, rows in enumerate(draw.permutation(draw.split(own, 0), len(x)).split(16)):
            if t == 7:  # half of 15
                optimizer.param_groups[0]["lr"] = 0.005
                optimizer = fresh(0.005) if anew else optimizer
            parameters = dsa.parameters(strategy, draw.split(own, 1 + i), len(rows), 8, F64)
            optimizer.zero_grad()
            cross_entropy(module(dsa.apply(parameters, x[rows])), y[rows]).backward()
            optimizer.step()
            t += 1
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize(
    ("strategy", "schedule", "kind"),
    [(dsa.ALL, "half", "momentum"), (dsa.MIRROR_FREE, "half_anew", "momentum"), ("none", "half_anew", "adam")],
)
def test_training_with_dsa_is_a_loop_over_nets(digits: Data, strategy: str, schedule: str, kind: str) -> None:
    # No dead units: at a gradient of exactly 0 PyTorch's Adam and ours differ, and without an epsilon it has no value.
    net, x, y = learner(dataclasses.replace(MLP, activation="sigmoid")), digits.train.x[:40], digits.train.y[:40]
    theta0, shuffles = net.init(keys(3, "evaluation")), keys(3)
    options = {"weight_decay": 0.01} if kind == "momentum" else {}
    augment = strategy if strategy == "none" else f"dsa:{strategy}"
    got = standard(
        net, theta0, x, y, optimizer=Optimizer(kind, eps=1e-30), momentum=0.8, keys=shuffles, epochs=5, batch=16, lr=0.05,
        augment=augment, schedule=schedule, chunk=2, **options,
    )  # fmt: skip
    anew = schedule == "half_anew"
    for i in range(3):
        want = one_by_one(net, theta0[i], shuffles[i], x, y, strategy, anew, kind)
        assert torch.allclose(got[i], want, rtol=0, atol=1e-9)
        other = one_by_one(net, theta0[i], shuffles[i], x, y, strategy, not anew, kind)
        assert (got[i] - other).abs().max() > 1e-4  # what the optimizer remembers of the first half is felt


def test_the_operation_is_the_steps_its_strength_the_images(digits: Data) -> None:
    """As the source evaluates: one operation for a batch; and no two networks, steps or images get the same numbers."""
    found = dsa.parameters(dsa.ALL, keys(40), 6, 8, F64)
    identity = dsa.parameters("none", keys(40), 6, 8, F64)
    parts = {"color": slice(0, 3), "warp": slice(3, 9), "cutout": slice(9, 13)}
    touched = torch.stack([(found != identity)[..., part].any(-1).any(-1) for part in parts.values()])
    assert touched.sum(0).max() == 1 and bool(touched.any(1).all())  # one kind a batch, every kind somewhere
    colored = found[touched[0]][..., 0]
    assert len(colored.flatten().unique()) == colored.numel() > 6


def test_accuracy_does_not_depend_on_the_chunk(digits: Data) -> None:
    recipe = Recipe.of(make_set(digits), F64)
    for cfg in (MLP, CONVNET):
        results = []
        for chunk in (1, 2, 20):
            net = learner(cfg)
            judge = Evaluation(net, digits, Random(net, 0, CPU), nets=5, chunk=chunk, trials=2)
            plan = Plan(epochs=4, batch=8, augment=f"dsa:{dsa.MIRROR_FREE}", schedule="half_anew", rates=(0.05,))
            found = (judge.standard(*recipe.images, plan, 5), judge.standard_random(recipe, plan, 5))
            results.append(torch.stack([r.accuracies for r in found]))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert len(set(results[0].flatten().tolist())) > 5


# The protocols' numbers


def test_published_numbers(digits: Data) -> None:
    dset = make_set(digits)
    expected = {
        ("dc", "cifar10"): (20, 300, ("none",), "half", (0.01,), ()),
        ("dc", "mnist"): (20, 1000, ("dsa:crop_scale_rotate",), "half", (0.01,), ()),
        ("dsa", "cifar10"): (20, 1000, ("dsa",), "half", (0.01,), ()),
        ("mtt", "cifar10"): (5, 1000, ("dsa",), "half_anew", (0.03,), (0.03, 0.01)),
    }
    for (name, data), numbers in expected.items():
        s = Settings(**published.settings({"protocol": (name,)}, data, dset))
        assert (s.nets, s.epochs, s.augment, s.schedule, pytest.approx(s.lr), pytest.approx(s.baseline_lr)) == numbers
        assert (s.optimizer, s.momentum, s.weight_decay, s.batch, s.baselines) == ("momentum", 0.9, 5e-4, 256, ("random",))
        assert s.few == s.nets and s.ordinary == name
    assert published.settings({"epochs": 7}, "mnist", dset) == {"epochs": 7}


def test_every_published_number_can_be_given_anew(digits: Data) -> None:
    own = {
        "nets": 50, "epochs": 3, "optimizer": "adam", "momentum": 0.5, "weight_decay": 0.1, "batch": 4, "augment": ("crop",),
        "schedule": "constant", "lr": (0.2,), "baselines": ("kmeans",),
    }  # fmt: skip
    for name in published.NAMES:
        s = Settings(**published.settings({"protocol": ("recorded", name)} | own, "digits", make_set(digits)))
        assert {k: getattr(s, k) for k in own} == own and s.few == 50
        assert s.plan("crop", real=True).rates == (0.2,)
    adams = make_set(digits, momentum=torch.full((2,), 0.9, dtype=F64), optimizer={"kind": "adam"})
    with pytest.raises(UserError, match="rates are Adam's; give lr="):
        published.settings({"protocol": ("mtt",)}, "digits", adams)
    assert published.settings({"protocol": ("mtt",), "lr": (0.1,)}, "digits", adams)["lr"] == (0.1,)


def test_dsa_leaves_out_the_flip_for_digits(digits: Data) -> None:
    asked = Settings(augment=("dsa", "none"))
    assert asked.augmentations(digits) == (f"dsa:{dsa.MIRROR_FREE}", "none")
    assert asked.augmentations(dataclasses.replace(digits, name="cifar10")) == (f"dsa:{dsa.ALL}", "none")
    with pytest.raises(UserError, match="mirrored digit"):
        Settings(augment=("dsa:crop_flip",)).augmentations(digits)
    assert Plan(augment=f"dsa:{dsa.ALL}").text == "100 epochs, momentum, dsa"
    assert Plan(augment="dsa:crop_scale_rotate").text == "100 epochs, momentum, dsa:crop_scale_rotate"


def examined(data: Data, protocol: str, seen: list[report.Row] | None = None, **more: Any) -> report.Report:
    dset, net = make_set(data), learner()
    asked = published.settings({"protocol": (protocol,), "epochs": 3, "nets": 3, "trials": 2} | more, data.name, dset)
    told = seen if seen is not None else []
    starts = Random(net, 0, CPU)
    return Examination(dset, data, net, "mlp", starts, "fresh", Settings(**asked), told.append).run(
        {"convnet": learner(CONVNET)}
    )


def test_each_net_by_the_protocol_beside_random_real_images(digits: Data) -> None:
    found = examined(digits, "mtt")
    names = [(r.images, r.protocol, r.net) for r in found.rows[1:]]
    assert names == [(images, "mtt", net) for net in ("mlp", "convnet") for images in ("distilled", "random")]
    ours, real = found.rows[1].result, found.rows[2].result
    # The learned rate is used as it is; real images choose between it and the published one, on validation.
    assert ours.rate == pytest.approx(0.03) and not ours.tried
    assert list(real.tried) == [pytest.approx(0.03), 0.01] and real.rate in real.tried
    assert all(r.result.summary.n == 3 for r in found.rows[1:])
    table = report.transfer(found)
    assert [row[0] for row in table] == ["mlp", "convnet"]
    for row, a, b in zip(table, found.rows[1::2], found.rows[2::2]):
        assert float(row[-1]) == pytest.approx(100 * (a.result.summary.mean - b.result.summary.mean), abs=0.01)
        assert row[2].startswith(f"{100 * a.result.summary.mean:.2f}")
    assert found.find("distilled", "mtt") is found.rows[1]


def test_the_protocols_differ_where_they_should(digits: Data) -> None:
    """Same rate, same epochs: dc leaves the images alone, dsa does not; the rows say which."""
    plain, augmented = (examined(digits, name, epochs=6, lr=(0.05,)).rows[1] for name in ("dc", "dsa"))
    assert plain.training == "6 epochs, momentum" and augmented.training == "6 epochs, momentum, dsa without flip"
    assert not torch.equal(plain.result.accuracies, augmented.result.accuracies)


# The program


@pytest.fixture(scope="module")
def saved(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "set.safetensors"
    make_set(digits).save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = guarded(evaluation.main, words)
    out = capsys.readouterr()
    return status, out.out, out.err


def test_program_transfers_by_a_published_protocol(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    words = ("protocol=dsa", "transfer=mlp,alexnet", "epochs=1", "nets=2", "lr=0.02,0.05", "trials=1")
    status, out, err = run(capsys, f"set={saved}", f"out={tmp_path}", *words)
    assert status == 0, err
    assert "protocol dsa: momentum 0.9, weight decay 0.0005, batch 256, schedule half" in out and "judged once" in out
    lines = out[out.index("transfer") :].splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["mlp", "mlp", "alexnet"]
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["settings"]["epochs"] == 1 and record["settings"]["batch"] == 256
    assert all(set(row["validation"]) == {"0.02", "0.05"} for row in record["rows"][1:])
    assert record["rows"][1]["protocol"] == "dsa" and record["rows"][1]["training"] == "1 epochs, momentum, dsa without flip"


def test_named_nets_are_those_of_the_configurations() -> None:
    """transfer=mlp is net=mlp: the literature's two layers of 128."""
    assert evaluation.named("mlp") == NetConfig(name="mlp", init="kaiming", width=128)
    assert evaluation.named("vgg11") == NetConfig(name="vgg11", init="default")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("protocol=dcc",), "protocol=dcc is unknown; did you mean dc?"),
        (("protocol=dc,mtt",), "protocol=dc,mtt names two ordinary trainings; give one of standard, dc, dsa, mtt"),
        (("protocol=standard,dsa",), "names two ordinary trainings"),
        (("protocol=dc", "schedule=halve"), "schedule=halve is unknown; did you mean half?"),
        (("protocol=dc", "augment=dsa:colour"), "augmentation=colour is unknown; did you mean color?"),
        (("augment=dsa:crop_crop",), "names an operation twice"),
        (("augment=dsa:flip",), "a mirrored digit is no digit"),
        (("augment=dsaa",), "augment=dsaa is unknown; did you mean dsa?"),
        (("lr=fast",), "lr=fast is not a number"),
        (("lr=0",), "lr and baseline_lr must be above 0"),
        (("baseline_lr=nan",), "lr and baseline_lr must be above 0"),
        (("transfer=vgg",), "net=vgg is unknown; did you mean vgg11?"),
        (("transfer=vgg11",), "net.name=vgg11 can't take 8x8 images: it needs 32x32"),
    ],
)
def test_program_refuses_in_one_line(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    status, out, err = run(capsys, f"set={saved}", f"out={tmp_path}", *words)
    assert status == 2 and out == "" and message in err
    assert len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
