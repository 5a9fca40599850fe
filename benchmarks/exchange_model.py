"""exchange=server in virtual time: a discrete-event simulation around the package's own ``Ledger``.

Design choices
- A process of the server is two queues in a row, as in the program: ZeroMQ's thread moves bytes, the hub's thread handles
  messages in turns (all that have come; a turn looks at every worker once). The trainer sums, applies and publishes beside it.
- Shards are alike and are asked all at once, so one stands for all. They share the server's network card, not its threads.
- What a message costs the worker and the wire themselves is a delay that nobody queues for.
- A worker that fails is back after a restart; its item is missed after five heartbeats, and goes out again.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from exchange_costs import SMALL, Costs, Crew
from exchange_parts import Shape, floats

from metadist.config import RunConfig
from metadist.config_machine import ExchangeConfig
from metadist.exchange.hub import BEATS
from metadist.exchange.ledger import Lease, Ledger
from metadist.exchange.server import plan_of


class Queue:
    """Something that serves one after the other. busy: seconds at work so far."""

    def __init__(self) -> None:
        """Free."""
        self._free = self.busy = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """When what comes now will be done."""
        self._free = max(now, self._free) + seconds
        self.busy += seconds
        return self._free


Hop = tuple[Queue | None, float]  # None: a delay that nobody queues for


class ServerRun:
    """exchange=server with ``crew``. tasks: of a meta-step; 0: one for each worker."""

    def __init__(
        self, crew: Crew, mb: float, costs: Costs, shards: int = 1, max_staleness: int = 4, tasks: int = 0, seed: int = 0
    ) -> None:
        """Nobody has asked for anything yet."""
        self.crew, self.mb, self.costs, self.shards = crew, mb, costs, shards
        self.workers = len(crew.factors)
        self.tasks = tasks or self.workers
        config = Shape(floats(mb), self.tasks, self.workers, max_staleness).config
        self.ledger = Ledger(plan_of(config, 1, round(mb * 1e6)))
        self.now, self.peak = 0.0, 0
        self.io, self.hub, self.shard_io, self.shard, self.trainer = (Queue() for _ in range(5))
        self._in, self._out = Queue(), Queue()  # the network card
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._draw = crew.draws(seed).__next__
        self._mail: list[tuple[int, Lease | None, int]] = []  # (worker, pushed lease, its start)
        self._turning = self._summing = False
        self._waiting: deque[int] = deque()
        self._lease: list[Lease | None] = [None] * self.workers
        self._have, self._start = [-1] * self.workers, [0] * self.workers
        beats = self.workers / ExchangeConfig().heartbeat_s * costs.at("hub", SMALL) / 2
        self._left = max(0.05, 1 - beats)  # of the hub's time, after the workers' signs of life
        self._fate = np.random.default_rng(seed + 1)
        self.versions: list[float] = []  # when each was published

    def run(self, steps: int) -> ServerRun:
        """So many meta-steps."""
        self.ledger.publish()
        for worker in range(self.workers):
            self._at(self.now, self._arrive, worker, None, 0)
            if self.crew.failures:
                self._doom(worker)
        while len(self.versions) < steps:
            self.now, _, what, arguments = heapq.heappop(self._events)
            what(*arguments)
        return self

    def speed(self, warm: int) -> float:
        """Tasks a second from meta-step ``warm`` on."""
        return (len(self.versions) - warm) * self.tasks / (self.versions[-1] - self.versions[warm - 1])

    def load(self) -> dict[str, float]:
        """Fraction of the time each thread is busy."""
        threads = ("io", "hub", "trainer", "shard_io", "shard")
        card = max(self._in.busy, self._out.busy) / self.now
        return {n: getattr(self, n).busy / self.now for n in threads} | {"card": card}

    def _at(self, when: float, what: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, arguments))

    def _travel(self, hops: list[Hop], then: Callable[..., None], *arguments: Any) -> None:
        """Through queues and delays, one after the other; then ``then``."""
        if not hops:
            then(*arguments)
            return
        queue, seconds = hops[0]
        when = queue.serve(self.now, seconds) if queue is not None else self.now + seconds
        self._at(when, self._travel, hops[1:], then, *arguments)

    def _card(self, card: Queue, mb: float) -> list[Hop]:
        return [(card, mb / self.costs.link)] if self.costs.link < math.inf else []

    # --- a worker

    def _finish(self, worker: int, lease: Lease, start: int) -> None:
        """Its tasks are computed: it pushes, and pulls right behind."""
        if start != self._start[worker]:
            return
        c, part = self.costs, self.mb / self.shards
        hops = self._card(self._in, self.mb)
        if self.shards == 1:
            hops += [(self.io, c.at("io", part) / 2), (None, c.at("push", part))]
        else:  # first to the shards, then a word to the server
            hops += [(self.shard_io, c.at("io", part) / 2), (self.shard, c.at("hub", part) / 2), (None, c.at("push", part))]
            hops += [(self.io, c.at("io", SMALL) / 2), (None, c.at("push", SMALL))]
        self._travel(hops, self._arrive, worker, lease, start)

    def _begin(self, worker: int, lease: Lease, start: int) -> None:
        """The server has sent an order."""
        c, part, fresh = self.costs, self.mb / self.shards, self._have[worker] != lease.base
        self._have[worker] = lease.base
        size = part if fresh and self.shards == 1 else SMALL
        hops = [*self._card(self._out, size), (self.io, c.at("io", size) / 2), (None, c.at("pull", size))]
        if fresh and self.shards > 1:
            hops += [
                (self.shard, c.at("hub", part) / 2),
                *self._card(self._out, self.mb),
                (self.shard_io, c.at("io", part) / 2),
            ]
            hops += [(None, c.at("pull", part) + c.at("gather", self.mb))]
        length = self.crew.task_s * self.crew.factors[worker] * self._draw()
        self._travel([*hops, (None, length)], self._finish, worker, lease, start)

    def _doom(self, worker: int) -> None:
        self._at(self.now + float(self._fate.exponential(3600 / self.crew.failures)), self._fail, worker)

    def _fail(self, worker: int) -> None:
        self._start[worker] += 1
        if (lease := self._lease[worker]) is not None:
            self._at(self.now + BEATS * ExchangeConfig().heartbeat_s, self._missed, lease)
        if worker in self._waiting:
            self._waiting.remove(worker)
        self._lease[worker], self._have[worker] = None, -1
        self._at(self.now + self.crew.restart_s, self._arrive, worker, None, self._start[worker])
        self._doom(worker)

    def _missed(self, lease: Lease) -> None:
        self.ledger.give_back(lease.number)
        self._arrive(-1, None, 0)

    # --- the server

    def _arrive(self, worker: int, lease: Lease | None, start: int) -> None:
        """A message for the hub: a pull, after a push if there is a lease; -1: just a turn."""
        self._mail.append((worker, lease, start))
        if not self._turning:
            self._turn()

    def _turn(self) -> None:
        c, mail = self.costs, self._mail
        self._mail, self._turning = [], True
        each = c.at("hub", self.mb if self.shards == 1 else SMALL)
        cost = len(mail) * each + c.per_worker * self.workers
        cost += c.per_parked * len(self._waiting) + c.per_queued * self.ledger.queued
        self._at(self.hub.serve(self.now, cost / self._left), self._turned, mail)

    def _turned(self, mail: list[tuple[int, Lease | None, int]]) -> None:
        for worker, lease, start in mail:
            if worker < 0 or start != self._start[worker]:
                continue
            if lease is not None:
                self.ledger.push(lease.number, None)
                self._lease[worker] = None
            self._waiting.append(worker)
        self._serve_waiting()
        self._turning = False
        if self._mail:
            self._turn()

    def _serve_waiting(self) -> None:
        self._sum()
        while self._waiting and (lease := self.ledger.issue()) is not None:
            worker = self._waiting.popleft()
            self._lease[worker] = lease
            self._begin(worker, lease, self._start[worker])

    def _sum(self) -> None:
        if self._summing or self.ledger.waiting < self.tasks or not (taken := self.ledger.take()):
            return
        self._summing = True
        self.peak = max(self.peak, len(taken) + self.ledger.queued)
        c, part = self.costs, self.mb / self.shards
        own = c.at("step", self.mb) + c.at("apply", self.mb)
        hops: list[Hop] = []
        if self.shards == 1:
            own += len(taken) * c.at("part", part)
        else:  # they sum; one sum and one version go through the server
            hops = [(self.shard, len(taken) * c.at("part", part)), (self.io, c.at("io", self.mb))]
        self._travel([*hops, (self.trainer, own)], self._publish)

    def _publish(self) -> None:
        self.ledger.publish()
        self.versions.append(self.now)
        self._summing = False
        self._serve_waiting()


def server_speed(run: ServerRun, steps: int, warm: int) -> dict[str, Any]:
    """What a run comes to. The server's own failures, one process's, are reckoned in: it resumes from its checkpoint."""
    run.run(steps)
    rate = run.crew.failures / 3600
    speed = run.speed(warm) / (1 + rate * (run.crew.restart_s + RunConfig().checkpoint_s / 2))
    counts = run.ledger.counts
    out = {"tasks_per_s": speed, "share": speed / run.crew.allowed, "load": run.load(), "kept_gb": run.peak * run.mb / 1e3}
    return out | {"stale": counts["stale"] / max(1, counts["accepted"]), "versions": len(run.versions)}
