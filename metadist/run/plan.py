"""Before the first step: how the work is executed (group size, compilation), resolved once, and what the run will cost.

Design choices
- The memory of one task is measured by a trial task, not guessed; as many tasks as engine.memory_gb holds run at once.
- compile=auto, where a compiler is at hand: on a GPU always; on a CPU if the remaining steps, at the speed of an uncompiled
  trial step, would repay a minute or so of compilation.
- Decisions depend on the clock and the machine, so they are written into the run folder and reused.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from metadist.errors import UserError
from metadist.exchange import Exchange
from metadist.exchange.allreduce import share
from metadist.exchange.server import batch_of
from metadist.metagrad.execution import compiler_at_hand
from metadist.metagrad.memory import LiveBytes, group_size
from metadist.run.compute import Compute
from metadist.run.cost import disk_mb, estimate, megabytes, peak_memory_mb
from metadist.run.folder import RunFolder
from metadist.run.monitor import Monitor
from metadist.run.product import Job, Product
from metadist.run.state import MetaState

COMPILE_S = 60.0  # what compilation of step and adjoint takes on a CPU, rounded up
SAVED = 0.35  # the fraction of a step's time that it saves there (benchmarks/engine.py)


class Decisions(NamedTuple):
    """How a run is executed."""

    group: int
    compile: bool


def decide(setup: Job, folder: RunFolder, exchange: Exchange, step: int) -> Decisions:
    """Resolve group size and compilation for this number of workers, or read what was resolved before.

    Raises UserError if compilation is wanted, or recorded, where no compiler is.
    """
    most = len(share(setup.config.tasks, 0, exchange.world))
    return _decide(setup, folder, most, setup.config.steps - step, f"group-{exchange.world}", "compile")


def decide_for_server(setup: Job, folder: RunFolder, item: int) -> Decisions:
    """The same for a worker of a server, which computes ``item`` tasks at once; the first of a kind of device resolves it."""
    config, kind = setup.config, setup.device.type
    rounds = config.steps * batch_of(config) // (item * max(config.workers, 1))
    return _decide(setup, folder, item, rounds, f"group-server-{kind}", f"compile-server-{kind}", anyone=True)


def _decide(
    setup: Job, folder: RunFolder, most: int, rounds: int, group_name: str, compile_name: str, anyone: bool = False
) -> Decisions:
    """most: tasks of one round of compute; rounds: how many are left."""
    engine = setup.config.engine
    group = min(engine.group or int(folder.resolve(group_name, lambda: _group(setup, most), anyone)), most)
    if engine.compile == "auto":
        compile = bool(folder.resolve(compile_name, lambda: _worth_compiling(setup, group, most, rounds), anyone))
    else:
        compile = engine.compile == "on"
    if compile and not compiler_at_hand(setup.device.type):
        what = "engine.compile=on" if engine.compile == "on" else "this run was compiled at its first start, and going on so"
        raise UserError(
            f"{what} needs a compiler (g++, on a GPU gcc) and Python's headers; install them or give engine.compile=off"
        )
    return Decisions(group, compile)


def _group(setup: Job, most: int) -> int:
    one = Compute(setup.method, 1, setup.device, static=False)
    with LiveBytes(setup.device) as live:
        one(setup.method.parameters(), 0, torch.arange(1))
    return group_size(setup.config.engine.memory_gb * 1e9, max(live.peak, 1), most)


def _worth_compiling(setup: Job, group: int, most: int, rounds: int) -> bool:
    if not compiler_at_hand(setup.device.type):
        return False
    if setup.device.type == "cuda":
        return True
    if setup.config.method.match == "class":  # little of a meta-step is the training that compilation speeds up
        return False
    compute = Compute(setup.method, group, setup.device, setup.static)
    seconds = _trial(setup, compute, most)
    return seconds * SAVED * rounds > 2 * COMPILE_S


def _trial(setup: Job, compute: Compute, tasks: int) -> float:
    """Seconds of one meta-step's compute on the initial parameters, after a warm-up. Nothing is applied."""
    phi = setup.method.parameters()
    for _ in range(2):
        began = time.perf_counter()
        compute(phi, 1, torch.arange(tasks)).sum().item()  # a step like most: the first has no carried learner to train
    return time.perf_counter() - began


def serving(setup: Job, state: MetaState, item: int, folder: RunFolder) -> str:
    """What a server says before it serves; what a meta-step takes depends on the workers that come."""
    config, left = setup.config, setup.config.steps - state.step
    batch = batch_of(config)
    size = sum(p.numel() * p.element_size() for p in state.phi.values()) / 1e6
    return (
        f"this run: {left} meta-steps of {batch} tasks through a parameter server, {item} handed out at once, at most "
        f"{config.exchange.max_staleness} versions old; {megabytes(size)} of parameters; run folder {folder.path}"
    )


def announce(
    setup: Job, product: Product, compute: Compute, state: MetaState, folder: RunFolder, exchange: Exchange, monitor: Monitor
) -> None:
    """Say what the run will cost, measured by a trial step; all workers take part, so that they contend as they will."""
    config = setup.config
    if state.step >= config.steps:
        return
    seconds = _trial(setup, compute, len(share(config.tasks, exchange.rank, exchange.world)))
    compute.spent()
    left = config.steps - state.step
    evaluation = product.evaluation_s(state, exchange)
    checkpoint = sum(t.numel() * t.element_size() for t in state.tensors().values()) * 2 / 1e6
    images = sum(p.numel() for p in state.phi.values()) * 4 / 1e6
    scalars = left // config.run.log_every * (12 + len(product.scalars(state.phi)))
    anchors = left // config.run.anchor_every if config.run.anchor_every else 0
    disk = disk_mb(checkpoint, images, config.run.keep, anchors, scalars, (left // config.run.image_every + 2) * images)
    peak = peak_memory_mb(setup.device)
    text = estimate(seconds, left, peak, disk, evaluation_s=evaluation, workers=exchange.world, tasks=config.tasks)
    monitor.say(text)
    how = f"groups of {compute.group}, {'compiled' if setup.is_compiled else 'not compiled'}, {setup.device}"
    monitor.say(f"{how}; run folder {folder.path}")
