"""How long a run's evaluations will take: counted in networks and images, priced by a few steps and images of a trial.

Training a network and judging it are priced apart: a test split twice as large doubles the latter alone, and in trajectory
matching, which records hundreds of steps, the former is nearly everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metadist.config import Config
from metadist.evaluate.protocols import DRAWS
from metadist.evaluate.recipe import RATES
from metadist.evaluate.settings import Settings
from metadist.evaluate.train import chunks, predictions, recorded, statistics
from metadist.exchange.allreduce import share
from metadist.run.judge import CURVE_NETS, REPORT_NETS
from metadist.run.setup import Setup
from metadist.synthetic.images import Phi

STEPS, IMAGES = 8, 500  # of the trial, at most
CURVE_PASSES = 11  # points of an accuracy's curve, at most


class Pace(NamedTuple):
    """Seconds: of one network's recorded training, of its verdict on one image, of making the set's batches once."""

    training: float
    image: float
    making: float


class Amount(NamedTuple):
    """What is left to do: networks trained, images judged (all networks together), times that the set is made."""

    trainings: float
    images: float
    makings: float

    def seconds(self, pace: Pace) -> float:
        """At that pace."""
        return self.trainings * pace.training + self.images * pace.image + self.makings * pace.making


def report(config: Config, valid: int, test: int, curve: int) -> Amount:
    """Of the short report at a run's end (metadist.run.judge.examine), which one worker makes.

    valid, test: images of the splits; curve: of the test split that curves are drawn from.
    """
    fixed = config.method.init == "fixed"
    nets = 1 if fixed else min(config.eval.final_nets, REPORT_NETS)
    drawn = nets if nets > 1 else DRAWS  # a single start is used again for each draw of random images
    trials = min(Settings.trials, drawn) * (1 + len(RATES[config.inner.optimizer]))
    chunk = min(config.eval.chunk, CURVE_NETS)
    curves = min(nets, chunk) + min(drawn, chunk)
    images = trials * valid + (2 * nets + drawn) * test + curves * CURVE_PASSES * curve
    return Amount(nets + trials + drawn + curves, images, 1)


def left(config: Config, step: int, valid: int, test: int, ways: int = 1) -> Amount:
    """Of all validations after ``step`` and of the final judgement by ``ways`` of training: what all workers do together."""
    every, fixed = config.eval.every, config.method.init == "fixed"
    rounds = -(-config.steps // every) - step // every
    each, last = (1, 1) if fixed else (config.eval.nets, config.eval.final_nets)
    last *= ways
    return Amount(rounds * each + last, rounds * each * valid + last * test, rounds + 1)


def pace(setup: Setup, phi: Phi, world: int) -> Pace:
    """Measured on as many networks at once as a worker's validations have. Nothing is kept."""
    config, synthetic = setup.config, setup.synthetic
    mine = max(1, len(share(config.eval.nets, 0, world)))
    size = len(next(chunks(mine, config.eval.chunk))[0])
    theta0, valid = setup.starts.held_out(size, "validation"), setup.data.valid.x[:IMAGES]
    with torch.no_grad():
        making, batches = _timed(lambda: synthetic.batches(phi)[0])[0], synthetic.batches(phi)
        h, steps = synthetic.schedule(phi), min(STEPS, len(synthetic.order))

        def train() -> Tensor:
            return recorded(setup.inner, theta0, batches, synthetic.order[:steps], h[:steps], chunk=size)

        training, theta = _timed(train)
        seen = statistics(setup.learner, theta, batches[0], chunk=size)
        judging = _timed(lambda: predictions(setup.learner, theta, seen, valid, chunk=size))[0]
    return Pace(training / len(theta0) * len(synthetic.order) / steps, judging / len(theta0) / len(valid), making)


def _timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of the second of two calls (the first compiles), and its result."""
    for _ in range(2):
        began = time.perf_counter()
        result = work()
        result.sum().item()  # a GPU is waited for
    return time.perf_counter() - began, result
