"""A pool of trained networks to start from (method.init=pretrained): read from a file, or trained here, many at once.

Network i of the pool is a function of (config.seed, i): its initialization and its order of images are drawn by counter.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metadist import draw, store
from metadist.config import Config
from metadist.data import Data, load
from metadist.errors import UserError
from metadist.evaluate.train import standard
from metadist.metagrad.optimizers import Optimizer
from metadist.nets import Learner


def pool(config: Config, learner: Learner, data: Data, identity: dict[str, Any]) -> Tensor:
    """The pool [count, P] in learner.dtype on the learner's device, from pretrained.path or trained (and cached) here.

    data: the run's own data; pretrained.data names another set, given the same size and channels.
    identity: what the weights depend on beside ``config.pretrained`` (net, data, seed...): the key of the cache.
    Raises UserError for a file of other weights and for a data set of other images or classes.
    """
    if config.pretrained.path is not None:
        weights = _read(Path(config.pretrained.path).expanduser(), learner.size)
    else:
        recipe = {"version": 1, **identity, "pretrained": dataclasses.asdict(config.pretrained)}
        made = store.cached(config.cache_dir, "pretrained", recipe, lambda: {"theta": _train(config, learner, data).cpu()})
        weights = made["theta"]
    return weights.to(learner.device, learner.dtype)


def _read(path: Path, size: int) -> Tensor:
    if not path.is_file():
        raise UserError(f"pretrained.path={path} is no file; give a safetensors file of weights [count, {size}]")
    try:
        tensors, _ = store.load_tensors(path)
    except store.Torn as error:
        raise UserError(f"pretrained.path={path} can't be read: {error}") from error
    fits = [t for t in tensors.values() if t.dim() == 2 and t.shape[1] == size and len(t) >= 2]
    if len(fits) != 1:
        shapes = ", ".join(f"{k} {list(t.shape)}" for k, t in tensors.items())
        raise UserError(
            f"pretrained.path={path} holds {shapes}; it must hold one tensor [count >= 2, {size}], this net's weights"
        )
    return fits[0]


def source(config: Config, data: Data) -> Data:
    """What the pool is trained on: the run's own data, or pretrained.data resized to its images (UserError if they misfit)."""
    name = config.pretrained.data
    if name is None or name == config.data.name:
        return data
    own = dataclasses.replace(config.data, name=name, size=data.size, augment="none")
    other = load(own, data.train.x.device, data.train.x.dtype, config.cache_dir, config.smoke)
    if other.channels != data.channels or len(other.classes) != len(data.classes):
        raise UserError(
            f"pretrained.data={name} has {other.channels} channels and {len(other.classes)} classes, data={config.data.name} "
            f"{data.channels} and {len(data.classes)}; choose sets that agree"
        )
    return other


def _train(config: Config, learner: Learner, data: Data) -> Tensor:
    c, split = config.pretrained, source(config, data).train
    # Minutes may pass before the run's own first line; the process that holds the cache's lock says so, once.
    name = c.data or config.data.name
    print(f"training {c.count} networks on {name} for {c.epochs} epochs to start from (kept in {config.cache_dir})", flush=True)
    ids = torch.arange(c.count, device=learner.device)
    return standard(
        learner,
        learner.init(draw.key(config.seed, "pretrained-theta0", 0, ids)),
        split.x,
        split.y,
        epochs=c.epochs,
        optimizer=Optimizer("adam", eps=1e-8),
        lr=c.lr,
        batch=c.batch,
        keys=draw.key(config.seed, "pretrained-order", 0, ids),
        chunk=config.eval.chunk,
    )
