"""Learners: a module and its p(theta0), as pure functions of one flat weight vector.

Design choices
- ``build`` makes a learner from the configuration; ``Learner`` takes any ``nn.Module``.
- An option that a net has no use for is refused, not ignored.
- A net that can't take the data's size says so and names ``data.size``.

    learner = build(NetConfig(name="convnet"), channels=3, size=32, classes=10)
    theta = learner.init(draw.key(0, "theta0", 0, torch.arange(8)))  # [8, P]
    logits = torch.vmap(learner, (0, None))(theta, x)  # [8, B, 10]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from metadist.config import NetConfig
from metadist.errors import UserError, unknown
from metadist.nets import custom
from metadist.nets.alexcifar import alexcifar
from metadist.nets.alexnet import alexnet
from metadist.nets.convnet import convnet
from metadist.nets.gtn import gtn
from metadist.nets.learner import Learner
from metadist.nets.lenet import lenet
from metadist.nets.mlp import mlp
from metadist.nets.plain import plain
from metadist.nets.resnet import resnet18, resnet50
from metadist.nets.resnet_cifar import resnet_cifar
from metadist.nets.vgg11 import vgg11
from metadist.nets.weight_norm import weight_normed

__all__ = ["NAMES", "Learner", "build"]

_CONVNET = {"width": "width", "depth": "depth", "norm": "norm", "activation": "act", "pooling": "pooling"}
_MLP = {"width": "width", "depth": "depth", "activation": "act", "dropout": "dropout", "input_dropout": "input_dropout"}
_SIZES = {"width": "width", "depth": "depth"}
# Every family: its function, and its options as {key of NetConfig: argument}.
_FAMILIES: dict[str, tuple[Callable[..., nn.Module], dict[str, str]]] = {
    "mlp": (mlp, _MLP),
    "lenet": (lenet, {}),
    "alexcifar": (alexcifar, {}),
    "convnet": (convnet, _CONVNET),
    "resnet18": (resnet18, {}),
    "resnet50": (resnet50, {}),
    "gtn": (gtn, {"width": "width", "depth": "depth", "draw_width": "widest"}),
    "alexnet": (alexnet, {}),
    "vgg11": (vgg11, {"norm": "norm"}),
    "plain": (plain, _SIZES),
    "resnet_cifar": (resnet_cifar, _SIZES),
}
NAMES: tuple[str, ...] = (*_FAMILIES, "custom")


def _options(cfg: NetConfig) -> dict[str, Any]:
    """The family's arguments; 0 leaves its own default. Raises UserError for an option that it has no use for."""
    known = _FAMILIES[cfg.name][1] if cfg.name in _FAMILIES else {"target": "", "kwargs": ""}
    plain = NetConfig()
    for key in (
        *known,
        "width",
        "depth",
        "draw_width",
        "norm",
        "activation",
        "pooling",
        "dropout",
        "input_dropout",
        "target",
        "kwargs",
    ):
        value = getattr(cfg, key)
        if key not in known and value != getattr(plain, key):
            raise UserError(
                f"net.{key}={value} means nothing to net.name={cfg.name}; leave it out (allowed: {', '.join(known) or 'none'})"
            )
        if key in ("width", "depth") and value < 0:
            raise UserError(f"net.{key}={value} must be 1 or more, or 0 for the net's own default")
    return {name: getattr(cfg, key) for key, name in known.items() if name and getattr(cfg, key)}


def _normed(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: weight_normed(make())


def build(
    cfg: NetConfig,
    channels: int,
    size: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Learner:
    """The learner that ``cfg`` names, for images [B, channels, size, size] and ``classes`` classes.

    Raises UserError for an unknown name or option, images that the net can't take, or a module that can't be imported.
    """
    if cfg.name not in NAMES:
        raise unknown("net.name", cfg.name, NAMES)
    options = _options(cfg)
    make = custom.factory(cfg.target, dict(cfg.kwargs)) if cfg.name == "custom" else None
    # Layers draw when they are built. What of it stays (a user's frozen parameters) must be the same for every worker.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = make() if make else _FAMILIES[cfg.name][0](channels, size, classes, **options)
        if cfg.weight_norm:
            module = weight_normed(module)
            make = _normed(make) if make else None
    return Learner(module, cfg.init, make, dtype, device, classes)
