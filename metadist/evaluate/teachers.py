"""The teacher of a distillation: read from a file, or trained here like any network, once, and kept in the cache.

Design choices
- Ordinary training on the run's own training split, by SGD with momentum; the rate drops to a tenth at half of the steps.
- It is a function of (net, data, config.teacher, config.seed): runs that differ in anything else share one teacher.
- Its file holds its weights and its recipe, class names among it: another data set's teacher is refused, not misread.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metadist import draw, nets, store
from metadist.config import Config
from metadist.data import Data
from metadist.errors import UserError
from metadist.evaluate.train import accuracy, standard, statistics
from metadist.identity import for_recipe
from metadist.metagrad.optimizers import Optimizer
from metadist.nets import Learner
from metadist.nets.teacher import Teacher

_FOR_STATISTICS = 20  # batches of training images that BatchNorm's statistics are the mean of


def teacher(config: Config, data: Data, dtype: torch.dtype) -> Teacher:
    """The teacher that config.teacher names, for the classes and images of ``data``, on its device.

    Raises UserError for a file that is missing, or holds another net's weights or a teacher for other classes.
    """
    learner = nets.build(config.teacher.net, data.channels, data.size, len(data.classes), dtype, data.train.x.device)
    if config.teacher.path is not None:
        found = _read(Path(config.teacher.path).expanduser(), learner, data, config.teacher.net.name)
    else:
        found = store.cached(config.cache_dir, "teacher", recipe(config, data, dtype), lambda: _train(config, learner, data))
    return Teacher(learner, *(found[name].to(learner.device, dtype) for name in ("theta", "buffers")))


def recipe(config: Config, data: Data, dtype: torch.dtype) -> dict[str, Any]:
    """All that a teacher trained here depends on."""
    elsewhere = {"root", "download", "augment"}  # its augmentation is teacher.augment
    teacher = {k: v for k, v in dataclasses.asdict(config.teacher).items() if k != "path"}
    images = {k: v for k, v in dataclasses.asdict(config.data).items() if k not in elsewhere} | {"name": data.name}
    return {
        "version": 1,
        "teacher": teacher | {"net": for_recipe("net", teacher["net"])},
        "data": for_recipe("data", images),
        "classes": list(data.classes),
        "seed": config.seed,
        "dtype": str(dtype),
        "smoke": config.smoke,
    }


def _read(path: Path, learner: Learner, data: Data, net: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"teacher.path={path} is no file; give a safetensors file of a teacher's weights, or leave it out")
    try:
        tensors, head = store.load_tensors(path)
    except store.Torn as error:
        raise UserError(f"teacher.path={path} can't be read: {error}") from error
    told = head.get("recipe")
    made_for = told.get("classes") if isinstance(told, dict) else None
    if isinstance(made_for, list) and made_for != list(data.classes):
        names = [", ".join(map(str, c if len(c) < 5 else (*c[:4], "..."))) for c in (made_for, data.classes)]
        raise UserError(f"teacher.path={path} is a teacher for {len(made_for)} classes ({names[0]}), this data has "
                        f"{len(data.classes)} ({names[1]}); give a teacher for these, or leave it out")  # fmt: skip
    wanted = {"theta": learner.size, "buffers": learner.buffers_size}
    tensors = {"buffers": torch.zeros(0)} | tensors
    given = {name: list(tensors[name].shape) if name in tensors else "nothing" for name in wanted}
    if given != {name: [size] for name, size in wanted.items()}:
        raise UserError(
            f"teacher.path={path} holds theta {given['theta']} and buffers {given['buffers']}; teacher.net.name={net} for "
            f"{len(data.classes)} classes has theta [{learner.size}] and buffers [{learner.buffers_size}]"
        )
    return tensors


def _train(config: Config, learner: Learner, data: Data) -> dict[str, Tensor]:
    t, split = config.teacher, data.train
    # Minutes may pass before the run's own first line; the process that holds the cache's lock says so, once.
    print(f"training the teacher, {t.net.name}, for {t.epochs} epochs (kept in {config.cache_dir})", flush=True)
    one = torch.zeros(1, dtype=torch.int64, device=learner.device)
    theta = standard(
        learner,
        learner.init(draw.key(config.seed, "teacher-theta0", 0, one)),
        split.x,
        split.y,
        epochs=t.epochs,
        optimizer=Optimizer("momentum"),
        lr=t.lr,
        momentum=t.momentum,
        weight_decay=t.weight_decay,
        batch=t.batch,
        keys=draw.key(config.seed, "teacher-order", 0, one),
        augment=t.augment,
        schedule="half",
    )
    batch = min(t.batch, len(split.x))
    rows = draw.permutation(draw.key(config.seed, "teacher-statistics"), len(split.x)).to(split.x.device)
    seen = split.x[rows[: min(_FOR_STATISTICS, len(rows) // batch) * batch].view(-1, batch)]
    buffers = statistics(learner, theta, seen)
    print(f"the teacher's validation accuracy: {100 * float(accuracy(learner, theta, buffers, data.valid)):.1f} %", flush=True)
    return {"theta": theta[0].cpu(), "buffers": buffers[0].cpu()}
