"""Weight normalization as an option of any net, mean-only batch normalization, the learner of Generative Teaching Networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import leaky_relu, max_pool2d

from metadist import draw
from metadist.config import NetConfig
from metadist.errors import UserError
from metadist.metagrad import FORMS
from metadist.nets import Learner, build
from metadist.nets.layers import MeanOnlyBatchNorm
from metadist.nets.weight_norm import Conv2d, Linear, normalized, weight_normed

F64 = torch.float64
SMALL = {"mlp": 5, "convnet": 4, "gtn": 4}  # widths
SIDE = 12
HERE = __name__.rpartition(".")[2]


pytestmark = pytest.mark.usefixtures("one_thread")


def keys(n: int) -> Tensor:
    return draw.key(0, "theta0", 0, torch.arange(n))


def normal(stream: str, *shape: int) -> Tensor:
    return draw.normal(draw.key(7, stream), shape, F64)


def learner_of(name: str, weight_norm: bool = True, init: str = "kaiming", **more: Any) -> Learner:
    if name[0].isupper():
        more |= {"target": f"{HERE}.{name}"}
        name = "custom"
    cfg = NetConfig(name=name, init=init, width=SMALL.get(name, 0), weight_norm=weight_norm, **more)
    return build(cfg, 1, SIDE, 10, F64)


def moved(learner: Learner) -> Tensor:
    """Weights that are not at their start: gains are no longer norms."""
    theta = learner.init(keys(1))[0]
    return theta + 0.1 * normal("moved", *theta.shape)


class Plain(nn.Module):
    """A user's net: a convolution, a normalization, a parameter of its own, a linear layer that stands in a list."""

    def __init__(self, hidden: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, hidden, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.factor = nn.Parameter(torch.rand(hidden, 1, 1) + 0.5)
        self.heads = nn.ModuleList([nn.Linear(hidden * 25, 10)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x)) * self.factor)
        out: Tensor = self.heads[0](x.flatten(1))
        return out


class Frozen(nn.Module):
    """A user's net whose first layer's weights are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(SIDE**2, 6), nn.Linear(6, 10)
        self.first.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x.flatten(1))))
        return out


class Tied(nn.Module):
    """A user's net of which two layers have the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(SIDE**2, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last, self.third.weight = nn.Linear(6, 10), self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = torch.tanh(layer(x.flatten(1)))
        out: Tensor = self.last(x)
        return out


class ZeroHead(nn.Module):
    """A user's net whose last layer starts at 0, as is often done."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(SIDE**2, 10)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x.flatten(1))
        return out


class Scales(nn.Module):
    """A net without any layer that could be normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10, SIDE**2))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.scale.T


class Transposed(nn.Sequential):
    """A net with a layer that has weights and is neither of the two."""

    def __init__(self) -> None:
        super().__init__(nn.ConvTranspose2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * (SIDE + 2) ** 2, 10))


# ---------------------------------------------------------------- W = g V / |V|


@pytest.mark.parametrize("shape", [(4, 7), (5, 3, 3, 2)])
def test_normalized_is_its_formula(shape: tuple[int, ...]) -> None:
    v, gain = normal("v", *shape), normal("gain", shape[0])
    w = normalized(v, gain)
    for i in range(shape[0]):
        length = sum(float(a) ** 2 for a in v[i].flatten()) ** 0.5
        torch.testing.assert_close(w[i], float(gain[i]) / length * v[i], rtol=1e-14, atol=0)
    # V's length has no part in it, the gain is W's.
    torch.testing.assert_close(normalized(3 * v, gain), w, rtol=1e-14, atol=0)
    torch.testing.assert_close(w.flatten(1).norm(dim=1), gain.abs(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)])
def test_layers_are_those_of_pytorchs_weight_norm(layer: nn.Module) -> None:
    layer = layer.to(F64)
    x = normal("x", *((5, 6) if isinstance(layer, nn.Linear) else (5, 2, 9, 9)))
    before = layer(x)
    want = nn.utils.parametrizations.weight_norm(layer.__class__(**arguments(layer)).to(F64))
    ours = weight_normed(layer)
    assert type(ours) in (Linear, Conv2d)
    torch.testing.assert_close(ours(x), before, rtol=1e-13, atol=1e-13)
    gain = normal("gain", 4)
    with torch.no_grad():
        ours.gain.copy_(gain)
        want.parametrizations.weight.original0.copy_(gain.view(want.parametrizations.weight.original0.shape))
        want.parametrizations.weight.original1.copy_(ours.weight)
        if ours.bias is not None:
            want.bias.copy_(ours.bias)
    torch.testing.assert_close(ours(x), want(x), rtol=1e-13, atol=1e-13)
    assert float((ours(x) - before).detach().abs().max()) > 0.1
    ours.reset_parameters()
    torch.testing.assert_close(ours.gain, ours.weight.flatten(1).norm(dim=1), rtol=1e-15, atol=0)


def arguments(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    assert isinstance(layer, nn.Conv2d)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


# ---------------------------------------------------------------- any net takes it


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "default"])
@pytest.mark.parametrize("name", ["mlp", "lenet", "alexcifar", "convnet", "gtn", "Plain"])
def test_at_its_start_a_net_is_the_one_without(name: str, init: str) -> None:
    """The same V, biases and other parameters; g = |V|; so the same outputs. Away from the start it is another."""
    normed, plain = learner_of(name, init=init), learner_of(name, False, init=init)
    theta, x = normed.init(keys(2)), normal("x", 4, 1, SIDE, SIDE)
    # A user's module that draws itself does so in float32, and takes its norms there.
    near = 1e-6 if (name, init) == ("Plain", "default") else 1e-12
    gains = [n for n in normed.names if n.endswith("gain")]
    assert [n for n in normed.names if n not in gains] == list(plain.names)
    widths = [m.weight.shape[0] for m in plain.template.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sorted(normed.size - plain.size - sum(widths[:i] + widths[i + 1 :]) for i in range(len(widths))) == sorted(widths)
    for row in theta:
        views = normed.views(row)
        for gain in gains:
            weight = views[gain.removesuffix("gain") + "weight"]
            torch.testing.assert_close(views[gain], weight.flatten(1).norm(dim=1), rtol=near, atol=0)
        same = torch.cat([views[n].flatten() for n in plain.names])
        torch.testing.assert_close(normed(row, x), plain(same, x), rtol=10 * near, atol=near)
    # V's length is of no account to the one, all to the other.
    longer = {n: 2 * v if f"{n.removesuffix('weight')}gain" in views else v for n, v in views.items()}
    torch.testing.assert_close(functional_call(normed.net, longer, (x,)), normed(row, x), rtol=1e-11, atol=1e-12)
    other = functional_call(plain.net, {n: longer[n] for n in plain.names}, (x,))
    assert float((other - plain(same, x)).abs().max()) > 1e-2


def test_gains_are_drawn_with_the_weights_of_their_task() -> None:
    learner = learner_of("gtn")
    theta = learner.init(keys(3))
    assert torch.equal(learner.init(keys(3)[1:2])[0], theta[1])
    gains = torch.stack([torch.cat([v for n, v in learner.views(t).items() if n.endswith("gain")]) for t in theta])
    assert float((gains[0] - gains[1]).abs().min()) > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mlp", "lenet", "convnet", "gtn", "Plain"])
def test_check_takes_normalized_nets(name: str, form: str) -> None:
    learner_of(name).check(normal("noise", 8, 1, SIDE, SIDE), form)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_residual_nets_take_it(name: str) -> None:
    plain, normed = (build(NetConfig(name=name, weight_norm=on), 3, 32, 10) for on in (False, True))
    rows = sum(shape[0] for shape in plain.shapes if len(shape) > 1)  # a gain for each output of each layer
    assert normed.size == plain.size + rows
    assert sum(n.endswith("gain") for n in normed.names) == sum(len(s) > 1 for s in plain.shapes)


def test_a_custom_net_keeps_its_own_distribution() -> None:
    """Its own parameter and, with init=default, its own weights; a different net for each key."""
    for init in ("kaiming", "default"):
        normed = learner_of("Plain", init=init, kwargs={"hidden": 4})
        theta = normed.init(keys(2))
        own = normed.views(theta[0])["factor"]
        assert own.shape == (4, 1, 1) and float(own.min()) >= 0.5 and float(own.max()) < 1.5
        assert float((own - normed.views(theta[1])["factor"]).abs().min()) > 0
        bound = 1 / 3  # of PyTorch's own draw for 9 inputs
        assert (float(normed.views(theta[0])["conv.weight"].abs().max()) <= bound) == (init == "default")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Scales", "net.weight_norm=true, but the net has no layer of class nn.Linear or nn.Conv2d; leave it out"),
        ("Transposed", "net.weight_norm=true knows nn.Linear and nn.Conv2d; layer 0 is a ConvTranspose2d: leave it out"),
    ],
)
def test_what_it_can_not_normalize_is_refused_in_one_line(name: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        learner_of(name)
    assert str(caught.value) == said
    assert learner_of(name, False).size > 0


def works_at_its_start(name: str, init: str) -> None:
    """Takes it, and computes what the net without it would (gains of a module that draws itself are norms in float32)."""
    normed, plain = learner_of(name, init=init), learner_of(name, False, init=init)
    theta, x = normed.init(keys(1))[0], normal("x", 4, 1, SIDE, SIDE)
    same = torch.cat([normed.views(theta)[n].flatten() for n in plain.names])
    torch.testing.assert_close(normed(theta, x), plain(same, x), rtol=1e-5, atol=1e-6)
    normed.check(normal("noise", 8, 1, SIDE, SIDE))


@pytest.mark.parametrize(
    "init",
    ["kaiming", "default"],
)
def test_a_net_with_frozen_weights_takes_it(init: str) -> None:
    works_at_its_start("Frozen", init)


@pytest.mark.parametrize(
    "init",
    ["kaiming", "default"],
)
def test_a_net_with_tied_weights_takes_it(init: str) -> None:
    works_at_its_start("Tied", init)


def test_weights_that_start_at_zero_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="last"):
        learner_of("ZeroHead", init="default").check(normal("noise", 8, 1, SIDE, SIDE))


# ---------------------------------------------------------------- mean-only batch normalization


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)])
def test_mean_only_batch_norm_is_its_formula(shape: tuple[int, ...]) -> None:
    layer, bias = MeanOnlyBatchNorm(3).to(F64), normal("bias", 3)
    with torch.no_grad():
        layer.bias.copy_(bias)
    running = torch.zeros(3, dtype=F64)
    for step in range(3):
        x = normal(f"x{step}", *shape) + step
        out = layer.train()(x)
        for c in range(3):
            column = x[:, c].flatten()
            mean = sum(float(v) for v in column) / column.numel()
            torch.testing.assert_close(out[:, c], x[:, c] - mean + float(bias[c]), rtol=1e-13, atol=1e-14)
            running[c] = 0.9 * running[c] + 0.1 * mean
        torch.testing.assert_close(layer.running_mean, running, rtol=1e-13, atol=1e-15)
    assert torch.equal(layer.running_var, torch.ones(3, dtype=F64))  # the variance has no part in it
    z = normal("z", *shape)
    spread = (1, 3, *[1] * (len(shape) - 2))
    torch.testing.assert_close(layer.eval()(z), z - running.view(spread) + bias.view(spread), rtol=1e-13, atol=1e-14)
    layer.reset_parameters()
    assert not layer.bias.detach().any() and not layer.running_mean.any()


def test_mean_only_batch_norm_averages_over_batches_as_pytorchs() -> None:
    """momentum=None, as update_bn sets it: the mean over all batches so far."""
    ours, theirs = MeanOnlyBatchNorm(3).to(F64), nn.BatchNorm1d(3, affine=False).to(F64)
    ours.momentum = theirs.momentum = None
    for step in range(4):
        x = normal(f"x{step}", 5, 3)
        for layer in (ours, theirs):
            layer(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("depth", [2, 5])
def test_module_and_learner_are_one(depth: int, weight_norm: bool) -> None:
    """In training by the batch, in evaluation by statistics; gains and mean-only layers included."""
    learner = learner_of("gtn", weight_norm, depth=depth)
    theta, x, z = moved(learner), normal("x", 6, 1, SIDE, SIDE), normal("z", 5, 1, SIDE, SIDE)
    torch.testing.assert_close(learner.module(theta)(x), learner(theta, x), rtol=1e-11, atol=1e-12)
    buffers = learner.statistics(theta, x)
    norms = [m for m in learner.template.modules() if isinstance(m, MeanOnlyBatchNorm)]
    assert len(norms) == depth + 1 and len(buffers) == learner.buffers_size == 2 * sum(m.num_features for m in norms)
    module = learner.module(theta, buffers)
    assert not module.training
    torch.testing.assert_close(module(z), learner.predict(theta, buffers, z), rtol=1e-11, atol=1e-12)
    # On the batch the statistics are of, both modes are one.
    torch.testing.assert_close(learner.predict(theta, buffers, x), learner(theta, x), rtol=1e-11, atol=1e-12)
    assert float((learner.predict(theta, buffers, z) - learner(theta, z)).abs().max()) > 1e-3
    # And PyTorch's own bookkeeping, with momentum 1, records the same.
    trained = learner.module(theta).train()
    for m in trained.modules():
        if isinstance(m, MeanOnlyBatchNorm):
            m.momentum = 1.0
    trained(x)
    torch.testing.assert_close(trained.eval()(z), module(z), rtol=1e-11, atol=1e-12)


def test_one_value_a_channel_is_refused() -> None:
    learner = learner_of("gtn")
    with pytest.raises(UserError, match="BatchNorm needs more than one value per channel; give it a larger batch"):
        learner(learner.init(keys(1))[0], normal("x", 1, 1, SIDE, SIDE))


# ---------------------------------------------------------------- the learner of the paper


@pytest.mark.parametrize(
    ("cfg", "channels", "size", "count"),
    [
        (NetConfig(name="gtn", weight_norm=True), 1, 28, 1_683_668),  # as published
        (NetConfig(name="gtn"), 1, 28, 1_683_668 - 64 - 128 - 256 - 10),
        (
            NetConfig(name="gtn", depth=5, weight_norm=True),
            3,
            32,
            9 * (3 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256)
            + 256 * 4 * 4 * 256
            + 2 * (64 + 128 + 128 + 256 + 256 + 256)
            + 256
            + 2570
            + 10,
        ),
        (NetConfig(name="gtn", width=4, weight_norm=True), 1, 8, 36 + 288 + 32 * 16 + 16 + 2 * (4 + 8 + 16) + 170 + 10),
    ],
)
def test_parameter_counts(cfg: NetConfig, channels: int, size: int, count: int) -> None:
    assert build(cfg, channels, size, 10).size == count


def test_the_learner_is_its_formula() -> None:
    """conv, max-pool 3/2, minus the mean, leaky .1, twice; linear, minus the mean, leaky; linear: written out."""
    learner = learner_of("gtn")
    theta, x = moved(learner), normal("x", 5, 1, SIDE, SIDE)
    values, used = learner.views(theta), set[str]()

    def value(name: str) -> Tensor:
        used.add(name)
        return values[name]

    def weight(layer: int) -> Tensor:
        v, gain = value(f"{layer}.weight"), value(f"{layer}.gain")
        each = (-1, *[1] * (v.dim() - 1))
        return gain.view(each) * v / v.flatten(1).norm(dim=1).view(each)

    out = x
    for layer in (0, 4):  # convolution, pooling, mean, non-linearity
        out = max_pool2d(torch.conv2d(out, weight(layer), padding=1), 3, 2, 1)
        out = leaky_relu(out - out.mean((0, 2, 3), keepdim=True) + value(f"{layer + 2}.bias").view(1, -1, 1, 1), 0.1)
    out = out.flatten(1) @ weight(9).T + value("9.bias")
    out = leaky_relu(out - out.mean(0) + value("10.bias"), 0.1)
    out = out @ weight(12).T + value("12.bias")
    assert used == set(values)
    torch.testing.assert_close(learner(theta, x), out, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(vmap(learner, (0, None))(theta[None], x)[0], out, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("depth", "size", "said"), [(3, 28, "allowed: 2, 5"), (2, 3, "data.size")])
def test_other_depths_and_tiny_images_are_refused(depth: int, size: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(NetConfig(name="gtn", depth=depth), 1, size, 10)
