"""net.draw_width: a silenced wide network is the narrow one, at the start and after training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metadist import draw
from metadist.config import NetConfig
from metadist.errors import UserError
from metadist.metagrad import Inner, Optimizer
from metadist.nets import Learner, build
from metadist.nets.layers import MeanOnlyBatchNorm
from metadist.nets.loss import cross_entropy_loss
from metadist.nets.weight_norm import weight_normed
from metadist.nets.widths import narrowed, widths
from metadist.run.compose import compose
from metadist.run.setup import build as build_setup

SIZE, CLASSES = 8, 10
F64 = torch.float64


def narrow(first: int, second: int, hidden: int, normed: bool) -> nn.Module:
    """The GTN learner written once more, with these widths."""
    net = nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1, bias=False),
        nn.MaxPool2d(3, 2, padding=1),
        MeanOnlyBatchNorm(first),
        nn.LeakyReLU(0.1),
        nn.Conv2d(first, second, 3, padding=1, bias=False),
        nn.MaxPool2d(3, 2, padding=1),
        MeanOnlyBatchNorm(second),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Linear(second * 4, hidden),
        MeanOnlyBatchNorm(hidden),
        nn.LeakyReLU(0.1),
        nn.Linear(hidden, CLASSES),
    )
    return weight_normed(net) if normed else net


def cut(wide: dict[str, Tensor], small: dict[str, torch.Size]) -> Tensor:
    """The leading part of every weight; of the first linear layer the pixels of the channels that are there."""
    return torch.cat([wide[name][tuple(slice(n) for n in shape)].flatten() for name, shape in small.items()])


@pytest.mark.parametrize("normed", [True, False])
def test_a_drawn_width_is_the_narrow_network_before_and_after_training(normed: bool) -> None:
    wide = build(NetConfig(name="gtn", init="kaiming", weight_norm=normed, width=4, draw_width=True), 1, SIZE, CLASSES, F64)
    tasks = torch.arange(4)
    keys = draw.key(3, "width", 0, tasks)
    theta = narrowed(wide, wide.init(draw.key(3, "theta0", 0, tasks)), keys)
    x = draw.normal(draw.key(3, "x"), (1, 20, 1, SIZE, SIZE), F64)
    y = draw.integers(draw.key(3, "y"), (1, 20), CLASSES)
    optimizer = Optimizer("momentum")
    h = optimizer.schedule(torch.full((6,), 0.1, dtype=F64), torch.full((6,), 0.5, dtype=F64))
    after = Inner(cross_entropy_loss(wide), optimizer).train(theta, (x, y), (0,) * 6, h)
    assert float((after - theta).abs().max()) > 0.05
    for g in tasks.tolist():
        first, second = (int(widths(draw.split(keys, i), full)[g]) for i, full in ((0, 8), (1, 16)))
        small = Learner(narrow(first, second, 16, normed), "kaiming", dtype=F64)
        shapes = dict(zip(small.names, small.shapes, strict=True))
        given, trained = cut(wide.views(theta[g]), shapes), cut(wide.views(after[g]), shapes)
        torch.testing.assert_close(small(given, x[0]), wide(theta[g], x[0]), rtol=0, atol=1e-12)
        ours = Inner(cross_entropy_loss(small), optimizer).train(given[None], (x, y), (0,) * 6, h)[0]
        torch.testing.assert_close(ours, trained, rtol=0, atol=1e-12)


def test_widths_are_a_quarter_to_all_but_one_of_the_widest_and_weights_have_the_narrow_nets_scale() -> None:
    tasks = torch.arange(400)
    drawn = widths(draw.key(0, "w", 0, tasks), 128)
    assert int(drawn.min()) >= 32 and int(drawn.max()) <= 127 and abs(float(drawn.double().mean()) - 79.5) < 4
    wide = build(NetConfig(name="gtn", init="kaiming", width=8, draw_width=True), 1, SIZE, CLASSES, F64)
    keys = draw.key(1, "width", 0, tasks)
    theta = narrowed(wide, wide.init(draw.key(1, "theta0", 0, tasks)), keys)
    second = torch.stack([wide.views(t)["4.weight"] for t in theta])  # [G, 32, 16, 3, 3]
    first = widths(draw.split(keys, 0), 16)
    for g in range(5):
        live = second[g][:, : int(first[g])]
        assert bool((second[g][:, int(first[g]) :] == 0).all())
        live = live[live.flatten(1).abs().sum(1) > 0]
        assert float(live.std()) == pytest.approx((2 / (9 * int(first[g]))) ** 0.5, rel=0.25)


def test_a_run_draws_widths_for_training_and_for_judging() -> None:
    words = ["method=gtn", "data=digits", "data.size=8", "net=gtn", "net.width=4", "net.draw_width=true", "threads=1"]
    small = ["generator.hidden=16", "generator.maps=4", "generator.conv=4", "generator.noise=8", "inner.steps=2"]
    setup = build_setup(compose([*words, *small, "generator.batch=20", "real_batch=16", "tasks=2"]))
    for theta in (setup.starts.sample(0, torch.arange(6)), setup.starts.held_out(6)):
        alive = {int((setup.learner.views(t)["0.gain"] > 0).sum()) for t in theta}
        assert alive <= set(range(2, 8)) and len(alive) > 1
    loss = setup.method.loss(setup.method.parameters(), setup.method.draw(0, torch.arange(2)))
    assert bool(loss.isfinite().all())


@pytest.mark.parametrize(
    "words", [["net=lenet", "net.draw_width=true"], ["net=gtn", "net.draw_width=true", "method=dd_fixed_init"]]
)
def test_where_widths_can_not_be_drawn_it_is_said(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"net\.draw_width=[tT]rue"):
        build_setup(compose(["data=digits", "threads=1", *words]))
