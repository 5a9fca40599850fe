"""From a configuration to what every group of experts is trained with."""

from __future__ import annotations

from pathlib import Path

import torch

from metadist import data as data_room
from metadist import nets
from metadist.config import Config
from metadist.data import dsa
from metadist.data.sources import DIGIT_SETS
from metadist.errors import UserError
from metadist.metagrad.execution import compiler_at_hand
from metadist.metagrad.inner import Inner
from metadist.metagrad.optimizers import Optimizer
from metadist.metagrad.sharpness import sharpness_aware
from metadist.nets.loss import cross_entropy_loss, with_l2
from metadist.run.environment import cores
from metadist.run.experts import recipe, time_left
from metadist.run.setup import DTYPES, device_of, with_precision
from metadist.run.trajectories import Job
from metadist.store import clean, experts


def check(config: Config) -> None:
    """Raise UserError for an augmentation that doesn't exist, or that mirrors digits."""
    strategy = config.experts.dsa
    if strategy != "none" and "flip" in dsa.operations(strategy) and config.data.name in DIGIT_SETS:
        raise UserError(f"experts.dsa={strategy} mirrors images, and a mirrored digit of {config.data.name} is no digit; give "
                        f"{dsa.MIRROR_FREE}")  # fmt: skip


def prepare(config: Config, folder: Path) -> Job:
    """Load the data, build the net, make the store's folder or check that it is this recipe's. Raises UserError."""
    check(config)
    device, dtype, c = device_of(config), DTYPES[config.engine.dtype], config.experts
    torch.set_num_threads(config.threads or max(1, cores() // config.workers))
    data = data_room.load(config.data, device, dtype, config.cache_dir, config.smoke)
    learner = nets.build(config.net, data.channels, data.size, len(data.classes), dtype, device)
    loss = with_precision(cross_entropy_loss(learner), config.engine.precision, device)
    loss = sharpness_aware(loss, c.sharpness, c.rho, c.gsam_alpha)
    gpu = device.type == "cuda"
    compile = config.engine.compile == "on" or (config.engine.compile == "auto" and gpu and compiler_at_hand("cuda"))
    inner = Inner(
        with_l2(loss, c.weight_decay) if c.weight_decay else loss,
        Optimizer("momentum" if c.momentum else "sgd"),
        compile=compile,
        graph=gpu,
        shared=False,
    )
    parameters = {name: list(shape) for name, shape in zip(learner.names, learner.shapes)}
    key = experts.prepare(folder, recipe(config), parameters)
    clean(folder)
    left = time_left(config, folder, config.workers)
    return Job(config, data, learner, inner, folder, key, lambda text: print(text, flush=True), left)
