"""What the simulation is made of: seconds by size, workers by speed, and the all-reduce, which needs no events.

Design choices
- All-reduce: the slowest worker's tasks, then a ring's bytes and a tree's latency (log2 N; gloo's ring has N), then the update:
  the best of both. A failure costs it the steps since the newest checkpoint, and a restart of all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from metadist.config import RunConfig

Curve = tuple[tuple[float, float], ...]  # (MB, seconds), sizes ascending
SMALL = 0.0003  # MB of a message without numbers


@dataclass(frozen=True)
class Costs:
    """Seconds. io, hub, part: curves over MB [(MB, seconds)...], of one item: a pull and a push together.

    io, hub: the threads of a server's process. part: adding one gradient. step: a meta-step's summing up and publishing beside
    that; apply: its update. pull, push: delays of a message besides. gather: a worker's, of a version from shards.
    per_worker: of a hub's turn for each worker known; per_parked: that waits; per_queued: for each gradient that waits.
    latency, bandwidth: of all-reduce, MB/s. link: MB/s of a server's network card, each way.
    """

    io: Curve
    hub: Curve
    part: Curve
    step: Curve
    apply: Curve
    pull: Curve
    push: Curve
    gather: Curve
    per_worker: float
    per_parked: float
    per_queued: float
    latency: float
    bandwidth: float
    link: float = math.inf

    def at(self, name: str, mb: float) -> float:
        """A curve's value: straight lines between the sizes that were measured, and on beyond the last."""
        points = getattr(self, name)
        (x0, y0), (x1, y1) = next((pair for pair in itertools.pairwise(points) if mb <= pair[1][0]), points[-2:])
        return max(0.0, y0 + (y1 - y0) * (mb - x0) / (x1 - x0))

    def allreduce(self, mb: float, workers: int) -> float:
        """One all-reduce."""
        return self.latency * math.log2(workers) + ring(mb, workers) / min(self.bandwidth, self.link)


def ring(mb: float, workers: int) -> float:
    """MB that each worker sends in an all-reduce."""
    return 2 * mb * (workers - 1) / workers


@dataclass(frozen=True)
class Crew:
    """Workers. factors: seconds of each one's task relative to task_s; sigma: of the logarithm of each task's length.

    failures: of a worker in an hour; restart_s: until it, or the whole all-reduce, is back.
    """

    factors: tuple[float, ...]
    task_s: float
    sigma: float = 0.0
    failures: float = 0.0
    restart_s: float = 120.0

    @property
    def allowed(self) -> float:
        """Tasks a second that their summed speed allows."""
        return sum(1 / (self.task_s * f) for f in self.factors)

    def draws(self, seed: int) -> Iterator[float]:
        """Lengths of tasks relative to their mean, without end."""
        generator = np.random.default_rng(seed)
        while True:
            yield from np.exp(self.sigma * generator.standard_normal(4096) - self.sigma**2 / 2).tolist()


def allreduce_speed(crew: Crew, mb: float, costs: Costs, tasks: int = 0, seed: int = 0, hours: float = 12.0) -> dict[str, Any]:
    """exchange=allreduce with ``crew``; tasks: of a meta-step, 0: one for each worker."""
    workers = len(crew.factors)
    shares = (tasks or workers) // workers
    generator = np.random.default_rng(seed)
    draws = 400 if crew.sigma else 1
    lengths = np.zeros((draws, workers))
    for _ in range(shares):
        normal = generator.standard_normal((draws, workers))
        lengths += crew.task_s * np.array(crew.factors) * np.exp(crew.sigma * normal - crew.sigma**2 / 2)
    each = lengths.max(axis=1) + costs.allreduce(mb, workers) + costs.at("apply", mb)
    speed = shares * workers / each.mean()
    if crew.failures:
        speed *= _progress(each, crew, generator, 3600 * hours)
    return {"tasks_per_s": float(speed), "share": float(speed / crew.allowed)}


def _progress(each: np.ndarray, crew: Crew, generator: np.random.Generator, horizon: float) -> float:
    """The fraction of steps that last, of those that would be made without failures in that time."""
    keep, rate = RunConfig(), crew.failures * len(crew.factors) / 3600
    now = saved_at = 0.0
    done = saved = 0
    failure = float(generator.exponential(1 / rate))
    for length in itertools.cycle(each.tolist()):
        if now >= horizon:
            break
        if now + length > failure:
            now, done = failure + crew.restart_s, saved
            saved_at = now
            failure = now + float(generator.exponential(1 / rate))
            continue
        now, done = now + length, done + 1
        if done % keep.checkpoint_every == 0 or now - saved_at >= keep.checkpoint_s:
            saved, saved_at = done, now
    return float(done * each.mean() / now)
