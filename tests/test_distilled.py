"""The distilled set: what is saved comes back, and replay trains as recorded."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metadist import draw, nets, store
from metadist.config import NetConfig
from metadist.data.normalization import Normalization, Zca
from metadist.errors import RunError, UserError
from metadist.synthetic import distilled, picture
from metadist.synthetic.distilled import DistilledSet, load, theta0_recipe

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)  # modules draw their own weights from torch's generator


def _normal(stream: str, *shape: int) -> Tensor:
    return draw.normal(draw.key(7, stream), shape, F64)


def _set(kind: str = "sgd", steps: int = 3, epochs: int = 2, n: int = 12, size: int = 5, **changes: object) -> DistilledSet:
    t = steps * epochs
    parts: dict[str, object] = {
        "images": _normal("images", n, 1, size, size) * 2 + 0.3,
        "labels": torch.arange(n) % 4,
        "order": torch.arange(t) % steps,
        "lr": torch.linspace(0.05, 0.4, t, dtype=F64),
        "momentum": None if kind == "sgd" else torch.linspace(0.2, 0.9, t, dtype=F64),
        "optimizer": {"kind": kind, "beta2": 0.99, "eps": 1e-3},
        "normalization": Normalization(torch.tensor([0.25], dtype=F64), torch.tensor([0.5], dtype=F64)),
        "manifest": {"classes": ["a", "b", "c", "d"], "seed": 3, "metrics": {"accuracy": 0.1}},
    }
    return DistilledSet(**(parts | changes))  # type: ignore[arg-type]


def _linear(inputs: int = 25, classes: int = 4) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes)).to(F64)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(_normal(f"w{i}", *p.shape) * 0.1)
    return net


def _softmax_regression_gradient(w: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """By hand, without autograd."""
    probabilities = torch.softmax(x @ w.T + b, 1)
    target = y if y.is_floating_point() else nn.functional.one_hot(y, b.numel()).to(x)
    error = (probabilities - target) / len(x)
    return error.T @ x, error.sum(0)


def _by_hand(s: DistilledSet, w: Tensor, b: Tensor) -> list[Tensor]:
    """The recorded recipe written out: the formulas of SGD, momentum and Adam themselves."""
    x, y = s.batches()
    weights, first, second = [w, b], [0 * w, 0 * b], [0 * w, 0 * b]
    beta1s = 1.0
    for t, batch in enumerate(s.order.tolist()):
        lr = s.lr[t].item()
        mu = 0.0 if s.momentum is None else s.momentum[t].item()
        beta1s *= mu
        grads = _softmax_regression_gradient(*weights, x[batch].flatten(1), y[batch])
        for k, g in enumerate(grads):
            if s.optimizer["kind"] == "adam":
                first[k] = mu * first[k] + (1 - mu) * g
                second[k] = 0.99 * second[k] + 0.01 * g * g
                v = second[k] / (1 - 0.99 ** (t + 1))
                weights[k] = weights[k] - lr * first[k] / (1 - beta1s) / torch.sqrt(v + 1e-3**2)
            else:
                first[k] = mu * first[k] + g
                weights[k] = weights[k] - lr * first[k]
    return weights


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("soft", [False, True])
def test_replay_equals_the_recipe_written_by_hand(kind: str, soft: bool) -> None:
    labels = torch.softmax(_normal("labels", 12, 4), 1) if soft else torch.arange(12) % 4
    s, net = _set(kind, labels=labels, order=torch.tensor([0, 2, 1, 1, 0, 2])), _linear()
    want = _by_hand(s, *(p.detach().clone() for p in net.parameters()))
    assert s.replay(net) is net and not net.training
    for p, q in zip(net.parameters(), want):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-12)


def test_replay_of_sgd_equals_torch_on_a_deep_module_and_under_no_grad() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.frozen = nn.Conv2d(1, 3, 3), nn.Linear(27, 4), nn.Linear(4, 4)
            self.unused = nn.Parameter(torch.ones(2))
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.b(torch.tanh(self.a(x)).flatten(1)))

    net, same, s = Net().to(F64), Net().to(F64), _set()
    same.load_state_dict(net.state_dict())
    frozen = net.frozen.weight.clone()
    with torch.no_grad():
        s.replay(net)
    x, y = s.batches()
    optimizer = torch.optim.SGD(same.parameters(), lr=1.0)
    for t, batch in enumerate(s.order.tolist()):
        optimizer.param_groups[0]["lr"] = s.lr[t].item()
        optimizer.zero_grad()
        cross_entropy(same(x[batch]), y[batch]).backward()
        optimizer.step()
    for p, q in zip(net.parameters(), same.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert torch.equal(net.unused, torch.ones(2, dtype=F64)) and torch.equal(net.frozen.weight, frozen)


def test_replay_reestimates_batchnorm_on_the_distilled_images() -> None:
    s = _set()
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.0), nn.Flatten(), nn.Linear(25, 4)).to(F64)
    s.replay(net)
    x, _ = s.batches()
    torch.testing.assert_close(net[0].running_mean, x.mean().reshape(1))
    torch.testing.assert_close(net[0].running_var, torch.stack([b.var() for b in x]).mean().reshape(1))


def test_replay_starts_from_the_one_initialization(tmp_path: Path) -> None:
    net = _linear()
    theta0 = _normal("theta0", 104)
    s = _set(theta0=theta0)
    s.save(tmp_path / "s")
    want = _by_hand(s, theta0[:100].reshape(4, 25), theta0[100:])
    for given in (s, load(tmp_path / "s")):
        given = dataclasses.replace(given, images=s.images)
        given.replay(net)
        torch.testing.assert_close([p.detach() for p in net.parameters()], want, rtol=0, atol=1e-12)
    own = _linear()
    start = [p.detach().clone() for p in own.parameters()]
    s.replay(own, start="own")
    torch.testing.assert_close([p.detach() for p in own.parameters()], _by_hand(s, *start), rtol=0, atol=1e-12)


def test_the_initialization_by_recipe_is_drawn_again_and_proven() -> None:
    config = NetConfig(name="mlp", width=6)
    learner = nets.build(config, 1, 5, 4)
    theta0 = learner.init(draw.key(9, "theta0", 0, torch.tensor([0])))[0]
    recipe = theta0_recipe(dataclasses.asdict(config), 9, theta0)
    manifest = {"classes": list("abcd"), "theta0_recipe": json.loads(json.dumps(recipe))}
    s = _set(manifest=manifest)
    start = s.start()
    assert start is not None and torch.equal(start, theta0) and theta0.std() > 0
    net, same = learner.module(theta0), learner.module(torch.zeros_like(theta0))
    s.replay(net, start="own")
    s.replay(same)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), same.parameters()))
    for change in ({"seed": 10}, {"sha256": "0" * 64}):
        with pytest.raises(RunError, match="differs"):
            _set(manifest=manifest | {"theta0_recipe": recipe | change}).start()
    evil = recipe | {"net": recipe["net"] | {"name": "custom", "target": "os.abort"}}
    with pytest.raises(UserError, match="custom"):
        _set(manifest=manifest | {"theta0_recipe": evil}).start()


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), r"1 x 5 x 5.*\[batch, 4\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(25, 3)), r"answers \[4, 3\]"),
        (nn.Conv2d(1, 4, 3), r"answers \[4, 4, 3, 3\]"),
        (nn.Conv2d(3, 4, 3), "1 x 5 x 5"),
        (nn.Flatten(), "no weights"),
    ],
)
def test_a_module_that_does_not_fit_is_the_users_mistake(net: nn.Module, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        _set().replay(net)
    assert "\n" not in str(caught.value)


def test_other_misfits_are_named() -> None:
    with pytest.raises(UserError, match=r'104 weights.*79.*start="own"'):
        _set(theta0=torch.zeros(104)).replay(_linear(25, 3).append(nn.PReLU()))
    with pytest.raises(UserError, match="start=warm is unknown"):
        _set().replay(_linear(), start="warm")
    with pytest.raises(UserError, match="1 x 28 x 28 do not fit this set of 1 x 5 x 5"):
        _set().normalize(torch.zeros(2, 1, 28, 28))
    orders = ([0, 2, 0, 2, 0, 2], [0, 1, 2, 3, 4, 0], [])
    parts: list[dict[str, object]] = [{"order": torch.tensor(o, dtype=torch.int64)} for o in orders]
    parts += [{"lr": torch.ones(5)}, {"labels": torch.zeros(11).long()}, {"images": torch.zeros(12, 25)}]
    for part in parts:
        with pytest.raises(UserError, match="lacks a fitting"):
            _set(**part)
    with pytest.raises(UserError, match="this optimizer needs"):
        _set("adam", momentum=None)


def test_normalize_and_batches() -> None:
    s = _set()
    torch.testing.assert_close(s.normalize(torch.full((2, 1, 5, 5), 0.75)), torch.ones(2, 1, 5, 5))
    x, y = s.batches()
    assert torch.equal(x[1], s.images[4:8]) and torch.equal(y[2], s.labels[8:]) and (s.steps, s.size, s.channels) == (3, 5, 1)
    assert [v.shape for v in torch.utils.data.default_collate([s.dataset()[i] for i in range(2)])] == [(2, 1, 5, 5), (2,)]


@pytest.mark.parametrize("precision", ["float32", "float16", "uint8"])
def test_round_trip(tmp_path: Path, precision: str) -> None:
    whitening = Zca(torch.rand(25), torch.linalg.qr(torch.rand(25, 25))[0], torch.rand(25) + 0.5)
    normalization = Normalization(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), whitening)
    images = _normal("images", 12, 1, 5, 5).float()
    images[3], images[4] = 0.7, images[4] * 50  # no contrast, and much
    s = _set("adam", images=images, theta0=torch.rand(9), normalization=normalization)
    s.save(tmp_path / "run" / distilled.FILE, precision)
    back = load(tmp_path / "run")
    flat = images.flatten(1)
    step = {"float32": 0.0, "float16": 2**-10 * flat.abs().amax(1), "uint8": (flat.amax(1) - flat.amin(1)) / 255}[precision]
    off = (back.images - images).flatten(1).abs().amax(1)
    assert bool((off <= torch.as_tensor(step) / 2 * (1 + 1e-4)).all()), off
    assert (precision == "float32") == torch.equal(back.images, images) and back.images.dtype == torch.float32
    for name in ("labels", "order", "lr", "momentum", "theta0"):
        got, want = getattr(back, name), getattr(s, name)
        assert got.dtype == want.dtype and torch.equal(got, want), name
    assert (back.optimizer, back.manifest, back.classes) == (s.optimizer, s.manifest, ("a", "b", "c", "d"))
    x = torch.rand(2, 1, 5, 5)
    assert torch.equal(back.normalize(x), s.normalize(x))


def test_uint8_keeps_a_hundred_digits_under_eighty_five_kilobytes(tmp_path: Path) -> None:
    _set(images=torch.randn(100, 1, 28, 28), labels=torch.arange(100) % 10, steps=10, epochs=3, manifest={}).save(
        tmp_path / "s", "uint8"
    )
    assert (tmp_path / "s").stat().st_size < 85_000
    with pytest.raises(UserError, match=r"precision=int4 is unknown.*float16, float32, uint8"):
        _set().save(tmp_path / "s", "int4")


def test_load_by_name_folder_and_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilled, "SETS", tmp_path / "sets")
    _set().save(tmp_path / "sets" / "mnist-10.safetensors")
    assert load("mnist-10").manifest["seed"] == 3
    with pytest.raises(UserError, match=r"mnist-1O is unknown; did you mean mnist-10\? \(allowed: mnist-10\)"):
        load("mnist-1O")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no distilled\.safetensors"):
        load(tmp_path / "empty")
    store.save_tensors(tmp_path / "other", {"images": torch.zeros(1)}, {"kind": "checkpoint"})
    with pytest.raises(UserError, match="not a distilled set"):
        load(tmp_path / "other")
    store.save_tensors(tmp_path / "next", {}, {"kind": "metadist distilled set", "format": 99})
    with pytest.raises(UserError, match="format 99"):
        load(tmp_path / "next")


def test_a_tampered_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    _set().save(path)
    data = path.read_bytes()
    for at in (200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(store.Torn, match=r"s\.safetensors"):
            load(path)


@pytest.mark.parametrize("soft", [False, True])
def test_export_writes_a_png_an_image_and_labels(tmp_path: Path, soft: bool) -> None:
    labels = torch.softmax(nn.functional.one_hot(torch.arange(12) % 4, 4) * 3.0, 1) if soft else torch.arange(12) % 4
    s = _set(labels=labels)
    s.export(tmp_path)
    record = json.loads((tmp_path / "labels.json").read_text())
    assert record["classes"] == ["a", "b", "c", "d"] and len(record["images"]) == len(list(tmp_path.glob("*.png"))) == 12
    entry = record["images"]["00006.png"]
    assert (entry["step"], entry["class"], entry["name"]) == (1, 2, "c")
    assert entry.get("probabilities") == (labels[6].tolist() if soft else None)
    want = ((s.images[6, 0] * 0.5 + 0.25).clamp(0, 1) * 255).round()
    with Image.open(tmp_path / "00006.png") as file:
        got = np.asarray(file)
    assert got.shape == (5, 5) and np.abs(got - want.numpy()).max() == 0 and 0 in got and 255 in got


@pytest.mark.parametrize(
    ("n", "steps", "classes", "bands", "first"),
    [
        (10, 1, 10, [[5, 5]], [0, 1, 2, 3, 4]),
        (100, 1, 10, [[10] * 10], [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]),
        (100, 10, 10, [[10]] * 10, list(range(10))),
        (40, 2, 10, [[10, 10]] * 2, list(range(10))),
        (100, 20, 10, [[5]] * 20, [0, 1, 2, 3, 4]),
        (7, 1, 10, [[3, 3, 1]], [0, 1, 2]),
        (1, 1, 10, [[1]], [0]),
    ],
)
def test_arrangement(n: int, steps: int, classes: int, bands: list[list[int]], first: list[int]) -> None:
    got = picture.arrange(n, steps, classes)
    assert [[len(row) for row in band] for band in got] == bands and got[0][0] == first
    assert sorted(i for band in got for row in band for i in row) == list(range(n))


def test_picture_shows_every_image_enlarged_in_its_place(tmp_path: Path) -> None:
    x = torch.rand(20, 3, 28, 28)
    grid = picture.grid(x, steps=2, classes=10)
    assert grid.shape == (4 + 2 * 116, 4 + 10 * 116, 3) and grid.dtype == torch.uint8
    cell = grid[4 + 116 : 4 + 116 + 112, 4 + 3 * 116 : 4 + 3 * 116 + 112]
    assert torch.equal(cell[::4, ::4], picture.to_uint8(x)[13]) and torch.equal(cell[3::4, 3::4], cell[::4, ::4])
    assert bool((grid[:4] == 255).all())
    s = _set()
    s.save_picture(tmp_path / "images.png")
    with Image.open(tmp_path / "images.png") as file:
        assert file.size == (s.picture().shape[1], s.picture().shape[0]) and file.mode == "L"
    wide = picture.grid(torch.rand(200, 1, 28, 28), steps=2, classes=100)
    assert wide.shape[1] <= 4096 and math.isclose(wide.shape[1], 100 * 32 + 4)
