"""Learners: parameter counts, distributions, purity, BatchNorm's two modes, transforms, refusals."""

from __future__ import annotations

import copy
import math
import random
import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap
from torch.nn.functional import cross_entropy

from metadist import draw
from metadist.config import NetConfig
from metadist.errors import UserError
from metadist.nets import NAMES, Learner, build
from metadist.nets.init import INITS
from metadist.nets.layers import LocalResponseNorm

F64 = torch.float64


def keys(n: int, seed: int = 0) -> Tensor:
    return draw.key(seed, "theta0", 0, torch.arange(n))


def images(*shape: int, seed: int = 7) -> Tensor:
    return draw.normal(draw.key(seed, "x"), shape, F64)


def refused(part: str):  # type: ignore[no-untyped-def]
    return pytest.raises(UserError, match=part)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("cfg", "channels", "size", "count"),
    [
        (NetConfig(name="convnet"), 3, 32, 320_010),
        (NetConfig(name="convnet"), 1, 28, 317_706),
        (NetConfig(name="convnet", norm="none"), 3, 32, 320_010 - 3 * 256),
        (NetConfig(name="convnet", norm="group", width=8, depth=1, pooling="none"), 3, 8, 224 + 16 + 5120 + 10),
        (NetConfig(name="convnet", norm="layer", width=4, depth=1), 1, 28, 9 * 4 + 4 + 2 * 4 * 32 * 32 + 4 * 256 * 10 + 10),
        (NetConfig(name="lenet"), 1, 28, 61_706),
        (NetConfig(name="lenet"), 1, 12, 156 + 2416 + 16 * 120 + 120 + 10_164 + 850),
        (NetConfig(name="alexcifar"), 3, 32, 4864 + 102_464 + 4096 * 384 + 384 + 384 * 192 + 192 + 1930),
        (NetConfig(name="mlp"), 1, 8, 64 * 256 + 256 + 256 * 256 + 256 + 2570),
        (NetConfig(name="mlp", width=5, depth=1), 3, 4, 48 * 5 + 5 + 60),
        (NetConfig(name="resnet18"), 3, 32, 11_173_962),
        (NetConfig(name="resnet50"), 3, 32, 23_520_842),
        (NetConfig(name="alexnet"), 3, 32, 9728 + 614_592 + 442_624 + 442_560 + 331_968 + 3072 * 10 + 10),
        (NetConfig(name="alexnet"), 1, 28, 3328 + 614_592 + 442_624 + 442_560 + 331_968 + 3072 * 10 + 10),
        (NetConfig(name="vgg11"), 3, 32, 9_231_114),
        (NetConfig(name="vgg11", norm="none"), 1, 28, 9_231_114 - 2 * 2752 - 2 * 9 * 64),
    ],
)
def test_parameter_counts(cfg: NetConfig, channels: int, size: int, count: int) -> None:
    learner = build(cfg, channels, size, 10)
    assert learner.size == count == sum(math.prod(s) for s in learner.shapes)


@pytest.mark.parametrize("size", [8, 12, 13, 28, 32])
@pytest.mark.parametrize("name", ["mlp", "lenet", "alexcifar", "convnet"])
def test_every_net_takes_what_it_is_built_for(name: str, size: int) -> None:
    if name == "lenet" and size == 8:
        with refused("lenet can't take 8x8 images.*data.size=12"):
            build(NetConfig(name=name), 1, size, 10)
        return
    width = 8 if name == "convnet" else 0
    learner = build(NetConfig(name=name, width=width), 1, size, 10, F64)
    assert learner(learner.init(keys(1))[0], images(3, 1, size, size)).shape == (3, 10)


@pytest.mark.parametrize("name", ["alexnet", "vgg11"])
def test_gray_images_of_28_pixels_are_padded_to_32(name: str) -> None:
    """The same weights on the image with a rim of two zeros: the padding of the first convolution is that and no other."""
    small, large = (build(NetConfig(name=name), 1, size, 10, F64) for size in (28, 32))
    theta, x = small.init(keys(1))[0], images(3, 1, 28, 28)
    logits = small(theta, x)
    assert small.shapes == large.shapes and logits.shape == (3, 10)
    assert torch.allclose(logits, large(theta, nn.functional.pad(x, (2, 2, 2, 2))), rtol=1e-12)
    assert float((logits - logits.mean(0)).abs().max()) > 1e-6  # and the image is seen


@pytest.mark.parametrize(("name", "side"), [("alexnet", 8), ("alexnet", 13), ("alexnet", 28), ("vgg11", 32), ("vgg11", 65)])
def test_transfer_nets_take_other_sizes(name: str, side: int) -> None:
    learner = build(NetConfig(name=name), 3, side, 4, F64)
    assert learner(learner.init(keys(1))[0], images(2, 3, side, side)).shape == (2, 4)


# ---------------------------------------------------------------- p(theta0)


def test_initial_weights_have_the_stated_moments() -> None:
    x = {n: build(NetConfig(name="convnet", init=n, norm="batch"), 3, 32, 10, F64) for n in INITS}
    place = {n: (s, o) for n, s, o in zip(x["xavier"].names, x["xavier"].shapes, _offsets(x["xavier"]))}
    shape, at = place["4.weight"]
    n, fan_in, fan_out = math.prod(shape), 128 * 9, 128 * 9
    expected = {"xavier": 2 / (fan_in + fan_out), "kaiming": 2 / fan_in, "orthogonal": 1 / fan_in, "default": 1 / (3 * fan_in)}
    for name, learner in x.items():
        theta = learner.init(keys(1))[0]
        w = theta[at : at + n]
        assert abs(float(w.mean())) < 5 * math.sqrt(expected[name] / n)
        assert float(w.square().mean()) == pytest.approx(expected[name], rel=0.01)
        views = {k: theta[o : o + math.prod(s)] for k, (s, o) in place.items()}
        assert torch.equal(views["1.weight"], torch.ones(128, dtype=F64))  # a normalization's
        assert torch.equal(views["1.bias"], torch.zeros(128, dtype=F64))
        biases = torch.cat([views["0.bias"], views["4.bias"]])
        assert bool(biases.any()) == (name == "default")
    bound = 1 / math.sqrt(fan_in)
    w = x["default"].init(keys(1))[0, at : at + n]
    assert 0.999 * bound < float(w.abs().max()) <= bound


def _offsets(learner: Learner) -> list[int]:
    sizes = torch.tensor([0, *[math.prod(s) for s in learner.shapes]])
    return sizes.cumsum(0)[:-1].tolist()


def test_xavier_counts_both_fans() -> None:
    """A layer with very different fans, so that fan_in alone or fan_out alone would fail."""
    learner = Learner(nn.Sequential(nn.Flatten(), nn.Linear(1000, 10)), "xavier", dtype=F64)
    w = learner.init(keys(1))[0, :10_000]
    assert float(w.square().mean()) == pytest.approx(2 / 1010, rel=0.05)


@pytest.mark.parametrize("module", [nn.Linear(20, 7), nn.Linear(7, 20), nn.Conv2d(3, 8, 3)])
def test_orthogonal_weights_are_orthonormal(module: nn.Module) -> None:
    learner = Learner(module, "orthogonal", dtype=F64)
    w = learner.module(learner.init(keys(1))[0]).weight.flatten(1)
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    assert torch.allclose(gram, torch.eye(len(gram), dtype=F64), atol=1e-12)
    other = learner.module(learner.init(keys(2))[1]).weight.flatten(1)
    assert float((w - other).detach().abs().max()) > 0.01


class Token(nn.Module):
    """A parameter that belongs to no known layer, with a distribution of its own."""

    def __init__(self, classes: int = 3, mean: float = 5.0) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(400) + mean)
        self.head = nn.Linear(8 * 8, classes)
        nn.init.constant_(self.head.weight, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) * self.token.mean()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", ["lenet", "custom"])
def test_a_task_draws_the_same_weights_in_any_group(name: str, init: str) -> None:
    cfg = NetConfig(name=name, init=init)
    cfg.target = f"{__name__}.Token" if name == "custom" else None
    learner = build(cfg, 1, 28, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    all_of_them = learner.init(keys(5))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    torch.manual_seed(2)  # and not listened to
    assert torch.equal(learner.init(keys(5)[2:3])[0], all_of_them[2])
    assert torch.equal(build(cfg, 1, 28, 3).init(keys(5)), all_of_them)
    assert not torch.equal(all_of_them[2], all_of_them[3])
    wide = build(cfg, 1, 28, 3, F64).init(keys(5))
    # Uniforms take 53 bits in float64 and 24 in float32: other draws. All else is the same draw, rounded.
    assert init == "default" or torch.allclose(wide.float(), all_of_them, rtol=1e-6, atol=1e-7)


def test_a_users_module_keeps_its_own_distribution() -> None:
    cfg = NetConfig(name="custom", init="default", target=f"{__name__}.Token", kwargs={"mean": -2.0})
    learner = build(cfg, 1, 8, 3, F64)
    drawn = [learner.module(t) for t in learner.init(keys(3))]
    tokens = torch.stack([m.token for m in drawn]).detach()
    assert float(tokens.mean()) == pytest.approx(-2, abs=0.15)
    assert float(tokens.std()) == pytest.approx(1, abs=0.1)
    assert all(bool((m.head.weight == 0.25).all()) for m in drawn)
    # With a named distribution its layers follow it, the token still its own.
    cfg.init = "kaiming"
    m = (learner := build(cfg, 1, 8, 3, F64)).module(learner.init(keys(1))[0])
    assert float(m.token.detach().mean()) == pytest.approx(-2, abs=0.25)
    assert float(m.head.weight.detach().square().mean()) == pytest.approx(2 / 64, rel=0.3)


def test_without_a_factory_layers_reset_themselves() -> None:
    module = nn.Sequential(nn.Embedding(50, 40), nn.Flatten(), nn.Linear(40, 2))
    nn.init.constant_(module[0].weight, 9.0)
    learner = Learner(module, dtype=F64)
    first, second = learner.init(keys(2))
    assert float(first[:2000].square().mean()) == pytest.approx(1, rel=0.15)
    assert not torch.equal(first[:2000], second[:2000])
    assert bool((module[0].weight == 9.0).all())


# ---------------------------------------------------------------- flat weights


def bn_net() -> nn.Module:
    head = [nn.Flatten(), nn.Linear(216, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)]
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True), *head)


def test_flatten_and_module_are_inverse() -> None:
    learner = Learner(bn_net(), dtype=F64)
    theta = learner.init(keys(2))[1]
    module = learner.module(theta)
    assert torch.equal(learner.flatten(module), theta)
    assert [n for n, _ in module.named_parameters()] == list(learner.names)
    assert torch.equal(module[0].weight.flatten(), theta[: module[0].weight.numel()])
    with torch.no_grad():
        module[0].weight.zero_()
    assert torch.equal(learner.flatten(learner.module(theta)), theta)  # copies, not views
    with refused("parameter 0.weight should have shape .6, 2, 3, 3., it has shape .6, 1, 3, 3."):
        learner.flatten(nn.Sequential(nn.Conv2d(1, 6, 3)))
    with refused("no such parameter"):
        learner.flatten(nn.Linear(2, 2))


def test_frozen_and_shared_parameters() -> None:
    shared = nn.Linear(16, 16)
    module = nn.Sequential(nn.Flatten(), shared, nn.Tanh(), shared, nn.Linear(16, 3))
    module[4].bias.requires_grad_(False)
    learner = Learner(module, dtype=F64)
    assert learner.names == ("1.weight", "1.bias", "4.weight") and learner.size == 256 + 16 + 48
    theta, x = learner.init(keys(1))[0], images(4, 1, 4, 4)
    assert torch.allclose(learner(theta, x), learner.module(theta)(x), rtol=1e-12)
    assert torch.equal(learner.module(theta)[4].bias, module[4].bias.double())


# ---------------------------------------------------------------- BatchNorm


@pytest.mark.parametrize("name", ["small", "convnet", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_batch_norm_in_training_and_evaluation(name: str) -> None:
    """Against PyTorch's module: training forward, statistics with momentum 1, evaluation forward."""
    if name == "small":
        learner, x, z = Learner(bn_net(), "kaiming", dtype=F64), images(5, 2, 8, 8), images(3, 2, 8, 8, seed=8)
    else:
        learner = build(NetConfig(name=name, init="kaiming", norm="batch" if name == "convnet" else "instance"), 3, 8, 10, F64)
        x, z = images(5, 3, 8, 8), images(3, 3, 8, 8, seed=8)
    theta = learner.init(keys(1))[0] + 0.01 * images(learner.size)
    module = learner.module(theta)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 1.0
    before = learner(theta, z)
    assert torch.allclose(learner(theta, x), module(x), rtol=1e-10, atol=1e-12)
    buffers = learner.statistics(theta, x)
    running = [b for n, b in module.named_buffers() if "running" in n]
    assert torch.allclose(buffers, torch.cat(running), rtol=1e-11, atol=1e-12)
    assert torch.allclose(learner.predict(theta, buffers, z), module.eval()(z), rtol=1e-10, atol=1e-12)
    assert torch.allclose(learner.module(theta, buffers)(z), module(z), rtol=1e-10, atol=1e-12)
    assert torch.equal(learner(theta, z), before)  # nothing was kept
    thetas = torch.stack((theta, theta * 1.1))
    many = vmap(learner.statistics, (0, None))(thetas, x)
    assert torch.allclose(many[0], buffers, rtol=1e-10, atol=1e-12)
    logits = vmap(learner.predict, (0, 0, None))(thetas, many, z)
    assert torch.allclose(logits[1], learner.predict(thetas[1], many[1], z), rtol=1e-9, atol=1e-11)


def test_nets_without_batch_norm_have_no_statistics() -> None:
    learner = build(NetConfig(name="lenet"), 1, 28, 10, F64)
    theta, x = learner.init(keys(1))[0], images(2, 1, 28, 28)
    assert learner.statistics(theta, x).shape == (0,)
    assert torch.equal(learner.predict(theta, theta.new_zeros(0), x), learner(theta, x))


def test_batch_norm_without_running_statistics_and_reused() -> None:
    norm, plain_norm = nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False, track_running_stats=False)
    module = nn.Sequential(norm, nn.Conv2d(2, 2, 1), norm, plain_norm, nn.Flatten())
    learner, x = Learner(module, dtype=F64), images(4, 2, 3, 3)
    theta = learner.init(keys(1))[0]
    plain = learner.module(theta)
    norm_copy = plain[0]
    norm_copy.momentum = 1.0
    assert torch.allclose(learner(theta, x), plain(x), atol=1e-12)
    assert torch.allclose(learner.statistics(theta, x), torch.cat((norm_copy.running_mean, norm_copy.running_var)), atol=1e-12)


def test_batch_norm_of_one_value_is_refused() -> None:
    learner = Learner(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()), dtype=F64)
    with refused("layer 1: BatchNorm needs more than one value per channel"):
        learner(learner.init(keys(1))[0], images(1, 1, 3, 3))


def test_instance_norm_and_lrn_equal_pytorchs() -> None:
    module = nn.Sequential(nn.Conv2d(2, 5, 3), nn.InstanceNorm2d(5, affine=True), nn.Flatten())
    learner, x = Learner(module, "xavier", dtype=F64), images(4, 2, 8, 8)
    theta = learner.init(keys(1))[0] + 0.1 * images(learner.size)
    assert torch.allclose(learner(theta, x), learner.module(theta)(x), rtol=1e-11, atol=1e-12)
    for size in (1, 4, 5):
        args = (size, 0.3, 0.75, 1.5)
        z = images(2, 7, 3, 3)
        assert torch.allclose(LocalResponseNorm(*args)(z), nn.LocalResponseNorm(*args)(z), rtol=1e-13)


# ---------------------------------------------------------------- transforms


SMALL = {
    "mlp": (NetConfig(name="mlp", width=9), 1, 6),
    "lenet": (NetConfig(name="lenet"), 1, 12),
    "alexcifar": (NetConfig(name="alexcifar", init="kaiming"), 1, 5),
    "resnet18": (NetConfig(name="resnet18", init="kaiming"), 3, 8),
    "resnet50": (NetConfig(name="resnet50", init="kaiming"), 3, 8),
    "alexnet": (NetConfig(name="alexnet", init="kaiming"), 3, 8),
    "vgg11": (NetConfig(name="vgg11", init="kaiming"), 1, 28),
} | {
    f"convnet-{norm}-{act}-{pool}": (
        NetConfig(name="convnet", width=8, depth=2, norm=norm, activation=act, pooling=pool),
        1,
        28 if norm == "instance" else 6,
    )
    for norm, act, pool in [
        ("none", "relu", "avg"),
        ("batch", "leaky", "max"),
        ("layer", "sigmoid", "none"),
        ("instance", "relu", "avg"),
        ("group", "relu", "max"),
    ]
}


CASES = [pytest.param(c, marks=pytest.mark.slow) if c[:3] in ("res", "vgg") else c for c in SMALL]


def _loss(learner: Learner):  # type: ignore[no-untyped-def]
    return lambda theta, x, y: cross_entropy(learner(theta, x), y)


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_agree_under_every_transform(case: str) -> None:
    """vjp(vmap(grad)), vmap(vjp(grad)), jvp(grad) and PyTorch's plain double backward on an nn.Module."""
    cfg, channels, size = SMALL[case]
    learner = build(cfg, channels, size, 3, F64)
    thetas = learner.init(keys(2))
    x, y = images(8, channels, size, size), torch.arange(8) % 3
    lam = images(2, learner.size)
    loss = _loss(learner)
    _, pull = vjp(lambda t, x: vmap(grad(loss), (0, None, None))(t, x, y), thetas, x)
    hessian, image = pull(lam)
    plain = [_double_backward(learner, t, v, x, y) for t, v in zip(thetas, lam)]
    _close(hessian, torch.stack([h for h, _ in plain]))
    _close(image, sum(i for _, i in plain))

    def one(theta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        h, i = vjp(lambda t, x: grad(loss)(t, x, y), theta, x)[1](v)
        return h, i

    _close(vmap(one)(thetas, lam)[0], hessian)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own forward-mode rules are jit scripts
        _, (h, i) = jvp(lambda t: vmap(grad(loss, (0, 1)), (0, None, None))(t, x, y), (thetas,), (lam,))
        _, (h0, _) = jvp(lambda t: grad(loss, (0, 1))(t, x, y), (thetas[0],), (lam[0],))
    _close(h, hessian)
    _close(i.sum(0), image)
    _close(h0, hessian[0])


def _close(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) < 1e-9 * float(b.abs().max())


def _double_backward(learner: Learner, theta: Tensor, v: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    module, x = learner.module(theta), x.clone().requires_grad_()
    params = list(module.parameters())
    g = torch.autograd.grad(cross_entropy(module(x), y), params, create_graph=True)
    product = torch.cat([p.flatten() for p in g]) @ v
    *h, image = torch.autograd.grad(product, [*params, x])
    return torch.cat([p.flatten() for p in h]), image


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lenet", "alexcifar", "convnet-batch-leaky-max", "convnet-instance-relu-avg", "resnet18"])
def test_compiles_as_one_graph(case: str) -> None:
    cfg, channels, size = SMALL[case]
    learner = build(cfg, channels, size, 3, F64)
    thetas, x, y = learner.init(keys(2)), images(4, channels, size, size), torch.tensor([0, 1, 2, 1])
    f = vmap(grad(_loss(learner)), (0, None, None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()
        compiled = torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")(thetas, x, y)
    _close(compiled, f(thetas, x, y))


# ---------------------------------------------------------------- refusals of check()


class Once(torch.autograd.Function):
    """x^3: works under vmap, but its backward was not made to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Layer(nn.Module):
    """One misbehaving layer in the middle of a net."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.lin = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        match self.kind:
            case "detach":
                h = h / h.square().mean().detach()
            case "fused":
                h = torch.embedding_bag(h, torch.arange(len(h)), torch.arange(len(h)), mode=2)[0]
            case "layer_norm":
                h = torch.nn.functional.layer_norm(h, (6,), self.scale)
            case "count":
                self.count += 1
            case "branch":
                h = h if h.sum() > 0 else -h
            case "item":
                h = h * h.mean().item()
            case "draw":
                h = h + torch.randn(6, dtype=F64)
            case "once":
                h = Once.apply(h)
            case "inplace":
                x += 1
            case "tuple":
                return h, h
        return h


def net(kind: str) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(True), Layer(kind), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("count", r"layer 3 \(Layer\) changes its buffer 3.count"),
        ("branch", r"layer 3 \(Layer\) branches on the values of a tensor"),
        ("item", r"layer 3 \(Layer\) branches on the values of a tensor"),
        ("draw", r"layer 3 \(Layer\) draws random numbers"),
        ("once", r"layer 3 \(Layer\) gives second derivatives that are not those of its gradient"),
        ("detach", r"layer 3 \(Layer\) gives second derivatives that are not those of its gradient"),
        ("fused", r"layer 3 \(Layer\) can't be differentiated twice"),
        ("layer_norm", r"layer 3 \(Layer\) gets wrong second derivatives"),
    ],
)
def test_check_names_the_layer(kind: str, message: str) -> None:
    with refused(message) as caught:
        Learner(net(kind), dtype=F64).check(images(3, 1, 4, 4))
    assert "\n" not in str(caught.value)


class Vit(nn.Module):
    """A transformer layer and a frozen projection: what users bring beside convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 2, 2)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.norm = nn.RMSNorm(8)
        self.register_buffer("place", torch.randn(4, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.patch(x).flatten(2).mT + self.place)).mean(1))


@pytest.mark.parametrize("form", ["reverse", "forward"])
def test_check_passes_a_transformer_and_a_recurrent_net(form: str) -> None:
    x = images(3, 1, 4, 4)
    vit = Learner(Vit(), "xavier", Vit, F64)
    vit.check(x, form)  # type: ignore[arg-type]
    theta = vit.init(keys(1))[0]
    assert torch.allclose(vit(theta, x), vit.module(theta)(x), rtol=1e-10, atol=1e-12)
    Learner(nn.Sequential(nn.Flatten(1, 2), nn.LSTM(4, 3, batch_first=True), Last()), dtype=F64).check(x, form)  # type: ignore[arg-type]


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def forward(self, out: tuple[Tensor, Tensor]) -> Tensor:
        return out[0][:, -1]


def python_weights() -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        module[1].weight.fill_(random.random())
    return module


def test_check_refuses_weights_drawn_outside_pytorch() -> None:
    with refused("draws its initial weights outside PyTorch's generator"):
        Learner(python_weights(), factory=python_weights).check(images(3, 1, 4, 4))


def test_check_names_dropout_and_lets_a_closed_one_pass() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.5)), nn.Linear(4, 3))
    with refused(r"layer 1.1 \(Dropout\) draws random numbers"):
        Learner(module, dtype=F64).check(images(3, 1, 4, 4))
    module[1][1].p = 0.0
    Learner(module, dtype=F64).check(images(3, 1, 4, 4))


def test_check_refuses_other_impure_or_misshapen_nets() -> None:
    x = images(3, 1, 4, 4)
    spectral = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(16, 3)))
    with refused("1.parametrizations.weight.0.*changes its buffer"):
        Learner(spectral, dtype=F64).check(x)
    with refused("changes its input in place"):
        Learner(nn.Sequential(nn.ReLU(True), nn.Flatten(), nn.Linear(16, 3)), dtype=F64).check(x)
    with refused(r"shape \[3, 4, 3\].*logits \[3, classes\]"):
        Learner(nn.Sequential(nn.Flatten(2), nn.Linear(16, 3), nn.Unflatten(1, (4, 1)), nn.Flatten(2)), dtype=F64).check(
            images(3, 4, 4, 4)
        )
    with refused(r"logits \[3, 5\]"):
        Learner(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), dtype=F64, classes=5).check(x)
    with refused(r"layer 2 \(GroupNorm\) normalizes groups of one value each \(maps of \[1, 1\]\) to zero"):
        Learner(nn.Sequential(nn.Conv2d(1, 6, 4), nn.ReLU(), nn.GroupNorm(6, 6), nn.Flatten()), dtype=F64).check(x)
    with refused("returns a tuple"):
        Learner(nn.Sequential(nn.Flatten(), nn.Linear(16, 6), Layer("tuple")), dtype=F64).check(x)
    with refused(r"layer 1 \(Linear\).*batch of 3 images 1x5x5.*data.size"):
        Learner(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), dtype=F64).check(images(3, 1, 5, 5))
    with refused(r"layer 0 \(InstanceNorm2d\) changes its buffer"):
        running = nn.InstanceNorm2d(1, track_running_stats=True)
        Learner(nn.Sequential(running, nn.Flatten(), nn.Linear(16, 3)), dtype=F64).check(x)


class Loose(nn.Module):
    """Uses a parameter behind the module's back."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 3)
        self.refs = [self.lin.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x.flatten(1)) + x.flatten(1) @ self.refs[0].T


def test_check_refuses_weights_that_are_not_registered() -> None:
    with refused("neither its parameters nor its buffers"):
        Learner(Loose(), dtype=F64).check(images(3, 1, 4, 4))


@pytest.mark.parametrize("form", ["reverse", "forward"])
@pytest.mark.parametrize("case", CASES)
def test_check_passes_every_own_net(case: str, form: str) -> None:
    cfg, channels, size = SMALL[case]
    build(cfg, channels, size, 3, F64).check(images(8, channels, size, size), form)  # type: ignore[arg-type]


def test_check_leaves_no_trace() -> None:
    module = net("none")
    learner = Learner(module, dtype=F64)
    state, theta = torch.get_rng_state(), learner.init(keys(1))[0]
    before = learner(theta, images(3, 1, 4, 4))
    weights = copy.deepcopy(module.state_dict())
    learner.check(images(3, 1, 4, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(learner(theta, images(3, 1, 4, 4)), before)
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learner.net.modules())


# ---------------------------------------------------------------- configuration


def fails(**_: int) -> nn.Module:
    raise ValueError("no luck\nat all")


def listing() -> list[int]:
    return []


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (NetConfig(name="convnett"), "did you mean convnet"),
        (NetConfig(init="xavir"), "net.init=xavir is unknown; did you mean xavier"),
        (NetConfig(name="convnet", norm="batsch"), "net.norm=batsch.*did you mean batch"),
        (NetConfig(name="convnet", activation="tanh"), "net.activation=tanh.*allowed: leaky, relu, sigmoid"),
        (NetConfig(name="convnet", pooling="mean"), "net.pooling=mean"),
        (NetConfig(name="convnet", norm="group", width=6), "net.width=6.*multiple of 4"),
        (NetConfig(name="convnet", depth=5), "convnet can't take 28x28 images.*32x32.*data.size=32"),
        (NetConfig(name="convnet", width=-1), "net.width=-1 must be 1 or more"),
        (NetConfig(name="vgg11", norm="batsch"), "net.norm=batsch.*did you mean batch"),
        (NetConfig(name="vgg11", width=5), "net.width=5 means nothing to net.name=vgg11"),
        (NetConfig(name="alexnet", norm="batch"), "net.norm=batch means nothing to net.name=alexnet"),
        (NetConfig(name="lenet", width=5), "net.width=5 means nothing to net.name=lenet"),
        (NetConfig(name="mlp", pooling="max"), "net.pooling=max means nothing to net.name=mlp"),
        (NetConfig(name="lenet", target="a.b"), "net.target=a.b means nothing"),
        (NetConfig(name="custom"), "needs net.target"),
        (NetConfig(name="custom", target="Net"), "is not an import path"),
        (NetConfig(name="custom", target="no.such.Net"), "net.target=no.such.Net can't be imported: ModuleNotFoundError"),
        (NetConfig(name="custom", target="torch.nn.Linnear"), "torch.nn has no Linnear"),
        (NetConfig(name="custom", target="torch.nn.Linear", kwargs={"inn": 3}), "torch.nn.Linear fails with net.kwargs"),
        (NetConfig(name="custom", target="math.pi"), "net.target=math.pi is a float"),
        (NetConfig(name="custom", target=f"{__name__}.fails"), "ValueError: no luck"),
        (NetConfig(name="custom", target=f"{__name__}.listing"), "makes a list"),
        (NetConfig(name="custom", target="torch.nn.ReLU"), "no trainable parameters"),
        (NetConfig(name="custom", target="torch.nn.LazyLinear", kwargs={"out_features": 3}), "is lazy"),
    ],
)
def test_bad_configurations_are_one_line(cfg: NetConfig, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(cfg, 1, 28, 10)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


def test_transfer_nets_refuse_small_images() -> None:
    for name, channels, size, message in (
        ("alexnet", 3, 7, "alexnet can't take 7x7 images: it needs 8x8 at least .data.size=8"),
        ("vgg11", 3, 28, "vgg11 can't take 28x28 images: it needs 32x32 at least .data.size=32"),
        ("vgg11", 1, 27, "vgg11 can't take 27x27"),
    ):
        with refused(message):
            build(NetConfig(name=name), channels, size, 10)


def test_names_and_a_module_of_the_users_folder(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    assert NAMES == (
        "mlp", "lenet", "alexcifar", "convnet", "resnet18", "resnet50", "gtn", "alexnet", "vgg11",
        "plain", "resnet_cifar", "custom",
    )  # fmt: skip
    (tmp_path / "my_own_net.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n"
        "    def __init__(self, hidden):\n        super().__init__(nn.Flatten(), nn.Linear(4, hidden), nn.Linear(hidden, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    learner = build(NetConfig(name="custom", target="my_own_net.Net", kwargs={"hidden": 7}), 1, 2, 2)
    assert learner.size == 28 + 7 + 14 + 2
    assert torch.equal(torch.get_rng_state(), state)
