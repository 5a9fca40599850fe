"""Spaces of architectures: their names, what their modules compute, groups that train as each candidate alone, free proxies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, pad

from metadist import draw
from metadist.config import NetConfig
from metadist.errors import UserError
from metadist.evaluate.train import predictions, standard, statistics
from metadist.metagrad.inner import Inner
from metadist.metagrad.optimizers import Optimizer
from metadist.nets import build as build_net
from metadist.nets.learner import Learner
from metadist.nets.loss import cross_entropy_loss
from metadist.search import free
from metadist.search.cells import EDGES, Cell, Cells, Reduction
from metadist.search.convnets import Convnets
from metadist.search.space import Space, build, grouped, open_space

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64
SMALL = Convnets(4)
NORMS = ("none", "batch", "layer", "instance", "group")
ACTIVATIONS, POOLINGS = ("sigmoid", "relu", "leaky"), ("none", "max", "avg")
# The best cell of NAS-Bench-201 for CIFAR-10, and the one of most parameters.
BEST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
MOST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
NONE = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
SKIP = NONE.replace("none", "skip_connect")
MIXED = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_3x3~0|none~1|avg_pool_3x3~2|"


def number(space: Space, key: str) -> int:
    return next(i for i in range(len(space)) if space.key(i) == key)


def images(n: int, channels: int = 1, size: int = 8, classes: int = 3) -> tuple[Tensor, Tensor]:
    x = draw.normal(draw.key(1, "images"), (n, channels, size, size), F64)
    return x, draw.integers(draw.key(1, "labels"), (n,), classes)


def weighted(module: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """The module in float64 with every parameter drawn, normalizations' too, and these in their order."""
    module = module.to(F64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=F64) / math.sqrt(p[0].numel()) + 0.1)
    return module, [p.detach() for p in module.parameters()]


def normed(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / ((centred**2).mean(dims, keepdim=True) + 1e-5).sqrt()


def batch_normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return normed(x, (0, 2, 3)) * weight[:, None, None] + bias[:, None, None]


# --- ConvNets -----------------------------------------------------------------------------------------------------------------


def test_the_convnets_are_720_with_names_that_stay() -> None:
    space = open_space("convnets")
    keys = [space.key(i) for i in range(len(space))]
    parts = itertools.product((1, 2, 3, 4), (32, 64, 128, 256), NORMS, ACTIVATIONS, POOLINGS)
    assert keys == [f"d{d}-w{w}-{norm}-{act}-{pool}" for d, w, norm, act, pool in parts]
    assert len(keys) == len(set(keys)) == 720
    assert (keys[0], keys[437], keys[719]) == (
        "d1-w32-none-sigmoid-none",
        "d3-w64-instance-relu-avg",
        "d4-w256-group-leaky-avg",
    )
    assert {k.split("-")[1] for k in map(SMALL.key, range(720))} == {"w4", "w8", "w16", "w32"}


def convnet_by_hand(key: str, p: Iterator[Tensor], x: Tensor) -> Tensor:
    """What the architecture of that name computes in training, by its parameters in order."""
    depth, width, norm, act, pooling = key.split("-")
    for layer in range(int(depth[1:])):
        weight, bias = next(p), next(p)
        assert len(weight) == int(width[1:])
        x = conv2d(x, weight, bias, padding=3 if layer == 0 and x.shape[1:] == (1, 28, 28) else 1)
        if norm != "none":
            weight, bias = next(p), next(p)
            dims = {"batch": (0, 2, 3), "layer": (1, 2, 3), "instance": (2, 3), "group": (2, 3, 4)}[norm]
            grouped = x.view(len(x), 4, -1, *x.shape[2:]) if norm == "group" else x
            x = normed(grouped, dims).reshape(x.shape)
            x = x * weight + bias if norm == "layer" else x * weight[:, None, None] + bias[:, None, None]
        x = {"sigmoid": 1 / (1 + torch.exp(-x)), "relu": x.clamp(min=0), "leaky": torch.maximum(x, x / 100)}[act]
        if pooling != "none":
            windows = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
            x = windows.amax(4) if pooling == "max" else windows.mean(4)
    return x.flatten(1) @ next(p).T + next(p)


def test_a_convnet_computes_what_its_name_says() -> None:
    x, _ = images(2, 2, 16)
    narrow = [i for i in range(720) if SMALL.options(i)[1] == 4]
    for i in [*narrow, *range(7, 720, 61)]:
        module, weights = weighted(SMALL.module(i, 2, 16, 3))
        p = iter(weights)
        torch.testing.assert_close(module(x), convnet_by_hand(SMALL.key(i), p, x), rtol=1e-9, atol=1e-9, msg=SMALL.key(i))
        assert next(p, None) is None


def test_small_grey_images_are_padded_as_published() -> None:
    x, _ = images(2, 1, 28)
    module, weights = weighted(SMALL.module(number(SMALL, "d2-w4-layer-leaky-max"), 1, 28, 3))
    torch.testing.assert_close(module(x), convnet_by_hand("d2-w4-layer-leaky-max", iter(weights), x))
    assert weights[-2].shape == (3, 4 * 8 * 8)


# --- groups -------------------------------------------------------------------------------------------------------------------


def candidates(shape: str) -> list[int]:
    return [i for i in range(720) if SMALL.shape(i) == shape]


def trained(
    learner: Learner, theta: Tensor, keys: Tensor, data: tuple[Tensor, Tensor], steps: int = 5, batch: int = 8, lr: float = 0.1,
    momentum: float = 0.9, decay: float = 0.05,
) -> Tensor:  # fmt: skip
    """Weights [n, P] of ordinary training."""
    return standard(
        learner, theta, *data, steps=steps, batch=batch, optimizer=Optimizer("momentum"), lr=lr, momentum=momentum,
        weight_decay=decay, keys=keys,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [f"d2-w4-{norm}-{pool}" for norm in NORMS for pool in ("none", "pooled")])
def test_a_candidate_trains_in_a_group_as_it_does_alone(shape: str) -> None:
    indices, data = candidates(shape), images(20)
    assert len(indices) == (3 if shape.endswith("none") else 6)
    group = build(SMALL, indices, 1, 8, 3, "kaiming", F64)
    keys = draw.key(3, "networks", 0, torch.arange(len(indices)))
    theta0 = group.start(keys)
    theta = trained(group.learner, theta0, keys, data)
    buffers = statistics(group.learner, theta, data[0].view(2, 10, 1, 8, 8))
    logits = torch.vmap(group.learner.predict, (0, 0, None))(theta, buffers, data[0])
    for j, i in enumerate(indices):
        alone = Learner(SMALL.module(i, 1, 8, 3), "kaiming", None, F64)
        own = trained(alone, alone.init(keys[j : j + 1]), keys[j : j + 1], data)[0]
        module = group.module(j, theta[j], buffers[j])
        torch.testing.assert_close(alone.flatten(module), own, rtol=0, atol=1e-10, msg=SMALL.key(i))
        moved = (own - alone.init(keys[j : j + 1])[0]).abs().max()
        assert moved > 1e-3  # it has trained
        own_buffers = statistics(alone, own[None], data[0].view(2, 10, 1, 8, 8))[0]
        torch.testing.assert_close(logits[j], alone.predict(own, own_buffers, data[0]), rtol=0, atol=1e-9)
        torch.testing.assert_close(module(data[0]), logits[j], rtol=0, atol=1e-9)
    assert len({tuple(row.tolist()) for row in logits[:, 0]}) == len(indices)  # no two candidates are the same function


def test_a_group_trains_as_torch_trains_each_module() -> None:
    """Full batches, by torch.optim on the ordinary module."""
    indices, (x, y) = candidates("d2-w4-batch-pooled"), images(12)
    group = build(SMALL, indices, 1, 8, 3, "default", F64)
    theta0 = group.start(draw.key(3, "networks", 0, torch.arange(6)))
    optimizer = Optimizer("momentum")
    h = optimizer.schedule(torch.full((6,), 0.1, dtype=F64), torch.full((6,), 0.9, dtype=F64))
    theta = Inner(cross_entropy_loss(group.learner, 0.05), optimizer).train(theta0, (x[None], y[None]), (0,) * 6, h)
    for j, i in enumerate(indices):
        module = SMALL.module(i, 1, 8, 3).to(F64)
        module.load_state_dict(group.module(j, theta0[j]).state_dict())
        after = torch_trained(module, x, y, 6)
        torch.testing.assert_close(group.own[i].flatten(group.module(j, theta[j])), after, rtol=0, atol=1e-10)


def torch_trained(module: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    optimizer = torch.optim.SGD(module.parameters(), 0.1, 0.9, weight_decay=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(module(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_no_training_turns_a_choice() -> None:
    """With so much momentum, decay swings every weight that has no gradient through zero."""
    indices, data = candidates("d1-w4-none-pooled"), images(8, size=4)
    group = build(SMALL, indices, 1, 4, 3, "default", F64)
    keys = draw.key(3, "networks", 0, torch.arange(6))
    theta0 = group.start(keys)
    theta = trained(group.learner, theta0, keys, data, 14, 8, 0.5, 0.9, 0.2)
    assert (theta[0, 0] < 0) and (theta0[0, 0] > 0)
    choice = torch.tensor([SMALL.choice(i) for i in indices], dtype=F64)
    assert torch.equal(theta[:, :3] == 0, choice == 0)
    for j, i in enumerate(indices):
        own = trained(group.own[i], theta0[j : j + 1, 3:], keys[j : j + 1], data, 14, 8, 0.5, 0.9, 0.2)
        torch.testing.assert_close(theta[j, 3:], own[0], rtol=0, atol=1e-10, msg=SMALL.key(i))


@pytest.mark.parametrize("init", ["default", "orthogonal"])
def test_initial_weights_depend_on_key_and_candidate_alone(init: str) -> None:
    indices = candidates("d2-w4-layer-pooled")
    keys = draw.key(3, "networks", 0, torch.arange(6))
    theta = build(SMALL, indices, 1, 8, 3, init).start(keys)
    swapped = build(SMALL, [indices[5], indices[2]], 1, 8, 3, init).start(keys[[5, 2]])
    assert torch.equal(swapped, theta[[5, 2]])
    for j, i in enumerate(indices):
        depth, width, norm, act, pooling = SMALL.options(i)
        net = NetConfig(name="convnet", width=width, depth=depth, norm=norm, activation=act, pooling=pooling, init=init)
        assert torch.equal(theta[j, 3:], build_net(net, 1, 8, 3).init(keys[j : j + 1])[0])
        assert torch.equal(theta[j, 3:], build(SMALL, [i], 1, 8, 3, init).start(keys[j : j + 1])[0])


def test_one_candidate_with_several_seeds_is_an_ordinary_group() -> None:
    i, data = number(SMALL, "d1-w8-group-leaky-max"), images(20)
    group = build(SMALL, (i, i, i), 1, 8, 3, dtype=F64)
    keys = draw.key(3, "networks", 0, torch.arange(3))
    theta0 = group.start(keys)
    assert theta0.shape == (3, group.own[i].size) and len({float(row[0]) for row in theta0}) == 3
    theta = trained(group.learner, theta0, keys, data)
    torch.testing.assert_close(theta[1:2], trained(group.learner, theta0[1:2], keys[1:2], data), rtol=0, atol=1e-10)


class Unbuilt(Convnets):
    def module(self, index: int, channels: int, size: int, classes: int) -> nn.Module:
        raise AssertionError("nothing is built")

    shared = module


@pytest.mark.parametrize("most", [1, 4, 100])
def test_grouping_is_a_partition_by_shape(most: int) -> None:
    space = Unbuilt(4)
    indices = draw.permutation(draw.key(0, "candidates"), 720)[:200].tolist()
    indices += indices[:3]  # several seeds
    found = grouped(space, indices, most)
    assert sorted(itertools.chain(*found)) == sorted(indices)
    assert all(len({space.shape(i) for i in group}) == 1 and 1 <= len(group) <= most for group in found)
    assert found == grouped(space, indices, most)
    for name in {space.shape(i) for i in indices}:  # the order given, and no more groups than are needed
        own, parts = [i for i in indices if space.shape(i) == name], [g for g in found if space.shape(g[0]) == name]
        assert list(itertools.chain(*parts)) == own and len(parts) == math.ceil(len(own) / most)


def test_a_shape_is_one_structure() -> None:
    for name in {SMALL.shape(i) for i in range(720)}:
        modules = [SMALL.module(i, 1, 16, 3) for i in candidates(name)]
        assert len({tuple((k, tuple(p.shape)) for k, p in m.named_parameters()) for m in modules}) == 1
    assert grouped(Cells(), (5, 9, 5), 8) == [(5, 5), (9,)]


def test_groups_that_can_not_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"^candidates d1-w4-none-sigmoid-max, d1-w4-batch-relu-max are of several shapes;"):
        build(SMALL, (1, number(SMALL, "d1-w4-batch-relu-max")), 1, 8, 3)
    with pytest.raises(UserError, match=r"can't take 8x8 images: it needs 16x16 at least"):
        build(SMALL, candidates("d4-w4-batch-pooled"), 1, 8, 3)


# --- cells --------------------------------------------------------------------------------------------------------------------


def test_the_cells_are_15625_with_names_that_stay() -> None:
    space = open_space("cells")
    keys = [space.key(i) for i in range(len(space))]
    form = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"
    operations = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
    assert keys == [form.format(*names) for names in itertools.product(operations, repeat=6)]
    assert len(keys) == len(set(keys)) == 15625
    assert (keys[0], keys[15624]) == (NONE, NONE.replace("none", "avg_pool_3x3"))
    assert keys[12345] == "|nor_conv_3x3~0|+|avg_pool_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|avg_pool_3x3~1|none~2|"


def pooled(x: Tensor, kernel: int, stride: int, before: int, after: int) -> Tensor:
    """Mean over what of each window lies in the image."""
    ones = torch.ones(x.shape[1], 1, kernel, kernel, dtype=x.dtype)

    def total(v: Tensor) -> Tensor:
        return conv2d(pad(v, (before, after, before, after)), ones, stride=stride, groups=x.shape[1])

    return total(x) / total(torch.ones_like(x))


def cell_by_hand(key: str, p: Iterator[Tensor], x: Tensor) -> Tensor:
    nodes = [x]
    for text in key.split("+"):
        total = torch.zeros_like(x)
        for edge in text.strip("|").split("|"):
            name, source = edge.split("~")
            v = nodes[int(source)]
            if name.startswith("nor_conv"):
                weight = next(p)
                total = total + batch_normed(conv2d(v.clamp(min=0), weight, padding=int(name[-1]) // 2), next(p), next(p))
                assert weight.shape[2:] == (int(name[-1]),) * 2
            elif name != "none":
                total = total + (v if name == "skip_connect" else pooled(v, 3, 1, 1, 1))
        nodes.append(total)
    return nodes[3]


def reduced_by_hand(p: Iterator[Tensor], x: Tensor) -> Tensor:
    long = batch_normed(conv2d(x.clamp(min=0), next(p), stride=2, padding=1), next(p), next(p))
    long = batch_normed(conv2d(long.clamp(min=0), next(p), padding=1), next(p), next(p))
    return long + conv2d(pooled(x, 2, 2, 0, x.shape[-1] % 2), next(p))


def network_by_hand(key: str, cells: int, p: Iterator[Tensor], x: Tensor) -> Tensor:
    x = batch_normed(conv2d(x, next(p), padding=1), next(p), next(p))
    for stage in range(3):
        x = reduced_by_hand(p, x) if stage else x
        for _ in range(cells):
            x = cell_by_hand(key, p, x)
    x = batch_normed(x, next(p), next(p)).clamp(min=0).mean((2, 3))
    return x @ next(p).T + next(p)


@pytest.mark.parametrize("size", [8, 9])
def test_a_cell_network_computes_what_its_name_says(size: int) -> None:
    space, (x, _) = Cells(2, 2), images(3, 2, size)
    for i in [*range(11, 15625, 781), *(number(space, key) for key in (NONE, SKIP, BEST, MIXED))]:
        module, weights = weighted(space.module(i, 2, size, 3))
        p = iter(weights)
        torch.testing.assert_close(module(x), network_by_hand(space.key(i), 2, p, x), rtol=1e-9, atol=1e-9, msg=space.key(i))
        assert next(p, None) is None and weights[-2].shape == (3, 8)


def test_cells_and_reductions_by_numbers() -> None:
    x = draw.normal(draw.key(1, "images"), (2, 3, 4, 4), F64)
    assert torch.equal(Cell(("skip_connect",) * 6, 3)(x), 4 * x)  # x, 2 x, and x + x + 2 x
    assert torch.equal(Cell(("none",) * 6, 3)(x), torch.zeros_like(x))
    # Each edge by itself: into node 3, or through those that lead there.
    for only, expected in (
        ((3,), x),
        ((0, 4), x),
        ((1, 5), x),
        ((0, 2, 5), x),
        ((0, 1), 0 * x),
        ((0, 1, 2), 0 * x),
        ((4, 5), 0 * x),
    ):
        names = tuple("skip_connect" if e in only else "none" for e in range(len(EDGES)))
        assert torch.equal(Cell(names, 3)(x), expected), only
    ones = torch.ones(1, 1, 3, 3)  # whose border doesn't count
    assert torch.equal(
        Cell(("none", "none", "none", "avg_pool_3x3", "none", "none"), 1)(ones), ones
    )  # the border doesn't count
    block = Reduction(1, 2).eval()
    with torch.no_grad():
        for p in block.parameters():
            p.fill_(0.0)
        block.short[1].weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))  # type: ignore[operator]
    means = torch.tensor([[2.5, 4.5], [10.5, 12.5]])
    grid = torch.tensor([[1.0, 2, 3, 4], [3.0, 4, 5, 6], [9.0, 10, 11, 12], [11.0, 12, 13, 14]])
    assert torch.equal(block(grid[None, None])[0], torch.stack([means, -2 * means]))


@pytest.mark.parametrize(
    ("key", "params", "multiply_adds"),
    # By hand: 464 of the stem, 56 c^2 + 8 c of each reduction, 128 and 650 of the end; five cells a stage, each convolution
    # 9 c^2 + 2 c or c^2 + 2 c. Multiply-adds: 442,368 of the stem, 3,670,016 of each reduction, 640; a 3x3 convolution of any
    # stage 2,359,296, of 1x1 a ninth. As published: 0.073, 1.07, 1.53 million and 7.78, 153.27, 220.12 million.
    [
        (SKIP, 73_306, 442_368 + 2 * 3_670_016 + 640),
        (BEST, 73_306 + 5 * sum(37 * c * c + 10 * c for c in (16, 32, 64)), 7_783_040 + 15 * (4 * 2_359_296 + 262_144)),
        (MOST, 1_531_546, 220_119_680),
    ],
    ids=["skip", "best", "most"],
)
def test_published_cells_have_the_published_size(key: str, params: int, multiply_adds: int) -> None:
    space = open_space("cells")
    i = number(space, key)
    assert free.score("params", space, i, 3, 32, 10, 0) == params
    assert free.score("flops", space, i, 3, 32, 10, 0) == 2 * multiply_adds


def test_sizes_of_cells() -> None:
    module = open_space("cells", width=8, cells=2).module(number(Cells(), SKIP), 3, 8, 10)
    stages = [m.edges[0] for m in module.children() if isinstance(m, Cell)]
    assert len(stages) == 6 and module[0].out_channels == 8 and module[-1].in_features == 32  # type: ignore[index]
    assert module(torch.ones(2, 3, 4, 4)).shape == (2, 10) and module(torch.ones(2, 3, 28, 28)).shape == (2, 10)
    with pytest.raises(UserError, match=r"can't take 3x3 images: it needs 4x4 at least"):
        Cells().module(0, 1, 3, 2)


@pytest.mark.parametrize("key", [MIXED, SKIP, BEST])
def test_cells_train_as_torch_trains_the_module(key: str) -> None:
    space, (x, y) = Cells(2, 1), images(12)
    i = number(space, key)
    group = build(space, (i, i), 1, 8, 3, "default", F64)
    theta0 = group.start(draw.key(3, "networks", 0, torch.arange(2)))
    keys = draw.key(3, "order", 0, torch.arange(2))
    theta = trained(group.learner, theta0, keys, (x, y), 4, 12)
    module = space.module(i, 1, 8, 3).to(F64)
    module.load_state_dict(group.module(1, theta0[1]).state_dict())
    torch.testing.assert_close(theta[1], torch_trained(module, x, y, 4), rtol=0, atol=1e-10)
    # One step of momentum 1 makes the running statistics those of the batch, as re-estimated ones are.
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    module(x)
    buffers = statistics(group.learner, theta, x[None])
    torch.testing.assert_close(group.module(1, theta[1], buffers[1])(x), module.eval()(x), rtol=0, atol=1e-9)


def test_a_cell_without_a_path_trains_its_last_bias() -> None:
    space, (x, _), y = Cells(2, 1), images(12), torch.tensor([0, 1, 2, 2, 1, 2, 2, 1, 2, 2, 2, 1])
    i = number(space, NONE)
    group = build(space, (i, i), 1, 8, 3, "default", F64)
    theta0 = group.start(draw.key(3, "networks", 0, torch.arange(2)))
    keys = draw.key(3, "order", 0, torch.arange(2))
    theta = trained(group.learner, theta0, keys, (x, y), 60, 12, 1.0, 0.5, 0.0)
    assert torch.equal(theta[:, :-3], theta0[:, :-3])
    shares = torch.bincount(y, minlength=3) / len(y)  # all that it can learn
    torch.testing.assert_close(theta[:, -3:].softmax(1), shares.to(F64).expand(2, 3), atol=1e-4, rtol=0)
    buffers = statistics(group.learner, theta, x.view(2, 6, 1, 8, 8))
    assert torch.isfinite(buffers).all()
    assert torch.equal(predictions(group.learner, theta, buffers, x), shares.argmax().expand(2, 12))


def test_cells_take_meta_gradients() -> None:
    build(Cells(2, 1), (number(Cells(), MIXED),), 1, 8, 3).learner.check(images(8)[0].float())


# --- words --------------------------------------------------------------------------------------------------------------------

OWN = """
from dataclasses import dataclass
import torch
from torch import nn

class Token(nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.token = nn.Parameter(torch.randn(features))
        self.out = nn.Linear(features, classes)
        nn.init.constant_(self.out.weight, 0.5)
    def forward(self, x):
        return self.out(x.flatten(1) + self.token)

class Tokens:
    def __len__(self):
        return 2
    def key(self, index):
        return f"token-{index}"
    def module(self, index, channels, size, classes):
        return Token(channels * size * size, classes)

class Named(Tokens):
    name = "mine"

class Constant(Tokens):
    def module(self, index, channels, size, classes):
        made = super().module(index, channels, size, classes)
        made.token.requires_grad_(False)
        return made
    def shape(self, index):
        return "one"
    def choice(self, index):
        return (0.0,)
    def shared(self, index, channels, size, classes):
        made = self.module(index, channels, size, classes)
        return nn.Sequential(nn.ParameterDict({"choice": nn.Parameter(torch.zeros(1))}), made)

class Wrong(Tokens):
    def module(self, index, channels, size, classes):
        return 7

class Empty(Tokens):
    def __len__(self):
        return 0

class Same(Tokens):
    def key(self, index):
        return "one"

class Numbered(Tokens):
    def key(self, index):
        return index

@dataclass(frozen=True)
class Frozen(Tokens):
    size: int = 1

class Half:
    def __len__(self):
        return 2

class Needy:
    def __init__(self, size):
        pass

def made():
    return Named()

def broken():
    raise ValueError("no file\\nof mine")

def seven():
    return 7

number = 7
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "spaces_of_mine.py").write_text(OWN)
    (tmp_path / "spaces_that_fail.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "spaces_of_mine"
    import sys

    sys.modules.pop("spaces_of_mine", None)


def test_a_space_of_ones_own(mine: str) -> None:
    space = open_space(f"{mine}.Tokens")
    assert (space.name, len(space), space.key(1)) == ("Tokens", 2, "token-1")
    assert open_space(f"{mine}.Named").name == open_space(f"{mine}.made").name == "mine"
    assert grouped(space, (1, 0, 1), 9) == [(1, 1), (0,)]
    assert free.score("params", space, 0, 1, 2, 3, 0) == 4 + 4 * 3 + 3


def test_modules_of_ones_own_keep_their_own_initialization(mine: str) -> None:
    space = open_space(f"{mine}.Tokens")
    keys = draw.key(3, "networks", 0, torch.arange(2))
    before = torch.get_rng_state()
    theta = build(space, (1, 1), 1, 2, 3).start(keys)
    assert torch.equal(theta, build(space, (1, 1), 1, 2, 3).start(keys)) and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(theta[0, :4], theta[1, :4])  # drawn for each network
    assert torch.equal(theta[:, 4:16], torch.full((2, 12), 0.5))
    assert torch.equal(build(space, (0, 0), 1, 2, 3, "kaiming").start(keys)[:, 16:], torch.zeros(2, 3))


def test_frozen_weights_of_ones_own_depend_on_the_candidate_alone(mine: str) -> None:
    """Not on the generator of the process, nor on who is built with it."""
    space = open_space(f"{mine}.Constant")
    groups = []
    for indices in ((1,), (0, 1), (1, 0)):
        torch.rand(1)
        groups.append(build(space, indices, 1, 2, 3))
    frozen = [g.own[1].template.token for g in groups]
    assert torch.equal(frozen[0], frozen[1]) and torch.equal(frozen[0], frozen[2]) and frozen[0].abs().sum() > 0


def test_synflow_of_a_module_of_ones_own_draws_as_it_does(mine: str) -> None:
    """Weights of .5 from its own initialization, so that an output adds .5 (1 + |token|) for each pixel, and a bias."""
    space, key = open_space(f"{mine}.Tokens"), draw.key(7, "search synflow", 0, 1)[None]
    theta = build(space, (1,), 1, 2, 3, dtype=F64).start(key)[0].abs()
    token, bias = theta[:4].sum(), theta[16:].sum()
    total = float(3 * 0.5 * (4 + token) + 3 * 0.5 * token + bias)  # of the weights, the token, the biases
    assert free.score("synflow", space, 1, 1, 2, 3, 7) == pytest.approx(math.log1p(total), rel=1e-12)


def test_a_space_that_makes_no_module(mine: str) -> None:
    with pytest.raises(UserError, match=r"^search\.space=Wrong makes a int; its module\(\) must make an nn\.Module$"):
        free.score("params", open_space(f"{mine}.Wrong"), 0, 1, 2, 3, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnet", r"search\.space=convnet is unknown.*convnets.*cells.*package\.module\.Space"),
        (
            "no_such_module.Space",
            r"search\.space=no_such_module\.Space can't be imported: ModuleNotFoundError: No module named",
        ),
        ("spaces_that_fail.Space", r"can't be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("spaces_of_mine.Missing", r"search\.space=spaces_of_mine\.Missing: module spaces_of_mine has no Missing"),
        ("spaces_of_mine.number", r"can't be made: TypeError: 'int' object is not callable"),
        ("spaces_of_mine.Needy", r"can't be made: TypeError: .*missing 1 required positional argument: 'size'"),
        ("spaces_of_mine.broken", r"can't be made: ValueError: no file$"),
        ("spaces_of_mine.Half", r"makes a Half without key, module; a space has __len__, key, module"),
        ("spaces_of_mine.Empty", r"is empty; a space holds one architecture at least"),
        ("spaces_of_mine.Same", r"architectures 0 and 1 are both 'one'; keys must differ"),
        ("spaces_of_mine.Numbered", r"the key of architecture 0 is a int; it must be a text"),
        ("spaces_of_mine.Frozen", r"Frozen has no name and can't be given one; write name = 'mine' in its class"),
        ("spaces_of_mine.seven", r"makes a int without __len__, key, module"),
    ],
)
def test_no_space_of_that_name(mine: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_space(name)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("convnets", {"width": 6}, r"search\.width=6 can't be split into 4 groups.*give a multiple of 4, or 0 for 32$"),
        ("convnets", {"width": -4}, r"search\.width=-4 can't be"),
        ("convnets", {"cells": 2}, r"search\.cells=2 means nothing to search\.space=convnets; leave it out$"),
        ("cells", {"width": -1}, r"search\.width=-1 must be 1 or more, or 0 for the published size$"),
        ("cells", {"cells": -3}, r"search\.cells=-3 must be 1 or more, or 0 for the published size$"),
        (
            "spaces_of_mine.Tokens",
            {"width": 8},
            r"search\.width=8 means nothing to search\.space=spaces_of_mine\.Tokens; leave",
        ),
    ],
)
def test_sizes_that_a_space_does_not_know(mine: str, name: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_space(name, **sizes)


# --- free proxies -------------------------------------------------------------------------------------------------------------


class Tiny:
    """A few modules whose scores are plain sums. 0: one linear layer; 1: convolution, BatchNorm, ReLU, linear; 2: no biases."""

    name = "tiny"

    def __len__(self) -> int:
        return 3

    def key(self, index: int) -> str:
        return f"tiny-{index}"

    def module(self, index: int, channels: int, size: int, classes: int) -> nn.Module:
        pixels = size * size
        if index == 0:
            return nn.Sequential(nn.Flatten(), nn.Linear(channels * pixels, classes))
        if index == 1:
            end = [nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * pixels, classes)]
            return nn.Sequential(nn.Conv2d(channels, 3, 3, padding=1), *end)
        convolutions = [nn.Conv2d(channels, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 1, bias=False)]
        return nn.Sequential(
            *convolutions, nn.GroupNorm(1, 2, affine=False), nn.Flatten(), nn.Linear(2 * pixels, classes, False)
        )


@pytest.mark.parametrize(
    ("index", "params", "flops"),
    [(0, 32 * 5 + 5, 2 * 32 * 5), (1, 57 + 6 + 48 * 5 + 5, 2 * (3 * 2 * 9 * 16 + 48 * 5)), (2, 60 + 160, 2 * (864 + 96 + 160))],
)
def test_parameters_and_flops_by_hand(index: int, params: int, flops: int) -> None:
    assert free.score("params", Tiny(), index, 2, 4, 5, 0) == params
    assert free.score("flops", Tiny(), index, 2, 4, 5, 0) == flops


def drawn(space: Space, index: int, seed: int, size: int = 4, channels: int = 2) -> tuple[list[Tensor], Tensor]:
    """The absolute weights that synflow draws for a candidate without normalizations, and an image of ones."""
    learner = build(space, (index,), channels, size, 5, dtype=F64).learner
    theta = learner.init(draw.key(seed, "search synflow", 0, index)[None])[0].abs()
    return list(learner.views(theta).values()), torch.ones(1, channels, size, size, dtype=F64)


def logarithm(given: Sequence[Tensor]) -> float:
    """log(1 + sum of |theta dR/dtheta|) after a backward pass; a parameter that is not used has no gradient."""
    return math.log1p(sum(float((p * p.grad).detach().abs().sum()) for p in given if p.grad is not None))


def test_synflow_of_one_layer_is_its_absolute_weights() -> None:
    parts, _ = drawn(Tiny(), 0, 7)
    total = sum(float(p.sum()) for p in parts)
    assert free.score("synflow", Tiny(), 0, 2, 4, 5, 7) == pytest.approx(math.log1p(total), rel=1e-12)


def test_synflow_counts_the_flow_once_a_layer() -> None:
    """Without biases each of the three layers carries the whole flow R (Tanaka et al., theorem 1); the norm is left out."""
    (first, second, last), x = drawn(Tiny(), 2, 0)
    flow = conv2d(conv2d(x, first, padding=1), second).flatten(1) @ last.T
    assert free.score("synflow", Tiny(), 2, 2, 4, 5, 0) == pytest.approx(math.log1p(3 * float(flow.sum())), rel=1e-12)


@pytest.mark.parametrize("key", ["d2-w4-none-leaky-max", "d1-w8-none-sigmoid-avg"])
def test_synflow_of_convnets_by_plain_autograd(key: str) -> None:
    i = number(SMALL, key)
    parts, x = drawn(SMALL, i, 1, 8)
    given = [p.clone().requires_grad_() for p in parts]
    convnet_by_hand(key, iter(given), x).sum().backward()
    assert free.score("synflow", SMALL, i, 2, 8, 5, 1) == pytest.approx(logarithm(given), rel=1e-12)


def test_synflow_of_cells() -> None:
    """Without normalizations: the last bias alone if the network has no path, else what each operation hands on."""
    space = Cells(2, 1)
    i = number(space, NONE)
    _, x = drawn(space, i, 0)
    bias = plain_weights(space, i, 0)[-1]
    assert free.score("synflow", space, i, 2, 4, 5, 0) == pytest.approx(math.log1p(float(bias.sum())), rel=1e-12)
    i = number(space, MIXED)
    given = [p.requires_grad_() for p in plain_weights(space, i, 0)]
    p = iter(given)
    v = conv2d(x, next(p), padding=1)
    for stage in range(3):
        if stage:
            v = conv2d(conv2d(v, next(p), stride=2, padding=1), next(p), padding=1) + conv2d(pooled(v, 2, 2, 0, 0), next(p))
        one = pooled(v, 3, 1, 1, 1)
        two = conv2d(v, next(p)) + one
        v = conv2d(v, next(p), padding=1) + pooled(two, 3, 1, 1, 1)
    (v.mean((2, 3)) @ next(p).T + next(p)).sum().backward()
    assert next(p, None) is None
    assert free.score("synflow", space, i, 2, 4, 5, 0) == pytest.approx(logarithm(given), rel=1e-12)


def plain_weights(space: Space, index: int, seed: int) -> list[Tensor]:
    """Absolute weights of a network of cells without its normalizations, U(-1, 1) / sqrt(fan-in) by place."""
    shapes = [p.shape for p in space.module(index, 2, 4, 5).parameters()]
    kept = [s for s in shapes if len(s) > 1]
    key = draw.key(seed, "search synflow", 0, index)
    weights = [draw.uniform(draw.split(key, k), s, F64) * 2 - 1 for k, s in enumerate([*kept, shapes[-1]])]
    bounds = [s[1:].numel() for s in [*kept, kept[-1]]]
    return [w.abs() / math.sqrt(fan) for w, fan in zip(weights, bounds, strict=True)]


def test_free_proxies_are_functions_of_seed_and_candidate() -> None:
    i = number(SMALL, "d2-w4-batch-relu-avg")
    before = torch.get_rng_state()
    scores = [free.score("synflow", SMALL, i, 1, 8, 3, seed) for seed in (0, 1, 0)]
    assert scores[0] == scores[2] != scores[1] and torch.equal(before, torch.get_rng_state())
    assert free.score("flops", SMALL, i, 1, 8, 3, 0) == free.score("flops", SMALL, i, 1, 8, 3, 1)


def test_free_proxies_refuse_what_they_do_not_know() -> None:
    with pytest.raises(UserError, match=r"^free proxy=flop is unknown.*flops, params, synflow"):
        free.score("flop", SMALL, 0, 1, 8, 3, 0)
    with pytest.raises(UserError, match=r"can't take 8x8 images"):
        free.score("params", SMALL, number(SMALL, "d4-w4-none-relu-max"), 1, 8, 3, 0)
