"""The asynchronous exchange as the trainer sees it: it publishes, waits for gradients, applies. It computes no task itself.

Design choices
- The trainer is the same as everywhere: meta-parameters, optimizer, schedule, average, checkpoints and TensorBoard stay in it.
- With max_staleness=0 a meta-step is the synchronous one: the same tasks, summed by their numbers, divided by their count.
- Damping weighs a gradient of staleness t by (1 + t)^-damping, but counts its tasks in full: old news makes a shorter step.
- Evaluations are handed out to the workers, too; where there is none, or the run is to stop, this process judges what is left.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from metadist.config import Config
from metadist.errors import Lost
from metadist.exchange import wire
from metadist.exchange.allreduce import Replica
from metadist.exchange.door import Door
from metadist.exchange.hub import Hub
from metadist.exchange.judging import Judging
from metadist.exchange.keys import Secret, Serving
from metadist.exchange.ledger import Gradient, Ledger, Plan
from metadist.exchange.shards import Shards
from metadist.exchange.wire import Layout
from metadist.identity import identity_hash
from metadist.synthetic.images import Phi

S = TypeVar("S", bound=Replica)
_LONELY_S = 60.0  # without any worker; then it says so
_GOODBYE_S = 10.0
_JUDGE_ALONE_S = 30.0  # an evaluation without any worker waits so long for one
QUEUE_BYTES, QUEUE_MOST = 1e9, 64  # unapplied gradients, if exchange.queue does not say


@dataclass(frozen=True)
class Place:
    """Where a server stands. ip: of the interface to listen on; item: tasks handed out at once; write: a file of the run
    folder, fenced; say: a line for people; stop: whether the run is to stop.
    """

    run_dir: Any
    ip: str
    item: int
    write: Callable[[str, bytes], Any]
    say: Callable[[str], None]
    stop: Callable[[], bool] = lambda: False


def item_size(config: Config) -> int:
    """Tasks handed out at once: as configured, else a worker's share as far as it divides tasks and batch."""
    if config.exchange.item:
        return config.exchange.item
    share = -(-config.tasks // max(config.workers, 1))
    common = math.gcd(config.tasks, batch_of(config))
    return max(d for d in range(1, common + 1) if common % d == 0 and d <= share)


def batch_of(config: Config) -> int:
    """Tasks of a meta-step's update."""
    return (config.exchange.batch if config.exchange.name == "server" else 0) or config.tasks


def plan_of(config: Config, item: int, gradient_bytes: int) -> Plan:
    """The ledger's sizes."""
    c = config.exchange
    batch = batch_of(config)
    room = c.queue or max(4, min(QUEUE_MOST, int(QUEUE_BYTES / gradient_bytes)))
    return Plan(config.steps * batch // item, config.tasks, item, batch, c.max_staleness, max(room, 2 * batch // item))


class Server:
    """The exchange of a server process. ``rank`` and ``world`` are those of a process that is alone with the state."""

    rank, world, computes = 0, 1, False

    def __init__(self, config: Config, incarnation: int, place: Place) -> None:
        """Nothing listens before the first ``step``: only then are the parameters' shapes known."""
        self.config, self.incarnation, self.place = config, incarnation, place
        self._hub: Hub | None = None
        self._shards: Shards | None = None
        self._known: dict[str, Any] = {"item": place.item, "low": 0, "done": []}
        self._stop = place.stop

    @property
    def workers(self) -> int:
        """Workers that have taken part since the start."""
        return len(self._hub.roster.seen) if self._hub is not None else 0

    # --- one meta-step

    def step(
        self,
        state: S,
        tasks: int,
        compute: Callable[[S, Tensor], Tensor],
        apply: Callable[[S, Tensor], S],
        stop: Callable[[], bool],
    ) -> tuple[S, bool]:
        """Publish the parameters, wait for enough gradients, apply them; nothing is applied if ``stop`` turns true before."""
        self._stop, phi = stop, state.phi
        hub = self._start(phi)
        flat = hub.layout.flat(phi)
        content = flat.to("cpu", hub.layout.wire, copy=True)
        if self._shards is None:
            hub.publish(wire.block(content))
        else:
            self._shards.publish(hub.ledger.made, content)
            hub.publish(None)
        while taken := self._collect(hub):
            try:
                total = self._sum(hub, taken, flat)
            except Lost as e:
                self._mend(hub, taken, e)
                continue
            return apply(state, total), stop()
        return state, True

    def _collect(self, hub: Hub) -> list[Gradient]:
        """The gradients of one update; [] if the run is to stop before they are there."""
        began, deadline, warned = time.monotonic(), self.config.exchange.deadline_s, False
        while True:
            hub.check()
            waited = time.monotonic() - began
            with hub.changed:
                if taken := hub.ledger.take(late=0 < deadline <= waited):
                    return taken
                if self._stop():
                    return []
                hub.changed.wait(min(0.2, max(0.001, deadline - waited)) if deadline else 0.2)
            if not warned and waited > _LONELY_S and not hub.roster.workers:
                warned = True
                self.place.say("no worker is here; the server waits for one")
            if self._shards is not None and not self._shards.alive:
                self._mend(hub, [], Lost("a shard is lost"))

    def _sum(self, hub: Hub, taken: list[Gradient], like: Tensor) -> Tensor:
        """[gradient sum..., loss sum, task count] on the parameters' device."""
        made = hub.ledger.made - 1  # the version before this update
        weights = [(1.0 + made - g.base) ** -self.config.exchange.damping for g in taken]
        if self._shards is not None:
            with hub.changed:
                drops, hub.drops, hub.ledger.dropped = hub.drops + hub.ledger.dropped, [], []
            self._shards.drop(drops)
            summed = self._shards.sum([g.lease for g in taken], weights)
        else:
            summed = torch.zeros(hub.layout.size, dtype=like.dtype)
            for gradient, weight in zip(taken, weights, strict=True):
                summed.add_(gradient.content.part.to(like.dtype), alpha=weight)
        tail = [sum(g.content.loss for g in taken), float(len(taken) * hub.ledger.plan.item)]
        return torch.cat((summed, torch.tensor(tail, dtype=like.dtype))).to(like.device)

    def _mend(self, hub: Hub, taken: list[Gradient], why: Lost) -> None:
        """A shard is gone, and with it what it kept: those tasks go out again."""
        assert self._shards is not None
        self.place.say(f"{why}; another takes its place, and its tasks are computed again")
        with hub.changed:
            if taken:
                hub.ledger.untake(taken)
            hub.drops += [*(g.lease for g in taken), *hub.ledger.recall()]
        self._shards.mend()
        self._announce(hub, self._shards)

    # --- evaluation

    def spread(self, purpose: str, phi: Phi, count: int, figures: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        """Figures float64 [rows, count] of networks 0 .. count - 1, by the workers."""
        hub = self._start(phi)
        content = wire.block(hub.layout.flat(phi).to("cpu", copy=True))
        chunk = min(self.config.eval.chunk, -(-count // max(1, len(hub.roster.workers))))
        judging = Judging(purpose, rows, count, chunk, content)
        hub.judge(judging)
        alone_since = time.monotonic()
        try:
            while not judging.complete:
                hub.check()
                if hub.roster.workers:
                    alone_since = time.monotonic()
                alone = self._stop() or time.monotonic() - alone_since > _JUDGE_ALONE_S
                if alone and self._judge_one(hub, judging, figures):
                    continue
                with hub.changed:
                    hub.changed.wait_for(lambda: judging.complete or hub.failure is not None, 0.2)
        finally:
            hub.judge(None)
        return judging.table

    def _judge_one(self, hub: Hub, judging: Judging, figures: Callable[[Tensor], Tensor]) -> bool:
        """False: all parts are out."""
        with hub.changed:
            part = judging.issue()
        if part is not None:
            table = figures(judging.networks(part))
            with hub.changed:
                judging.put(part, wire.block(table.to("cpu", torch.float64)))
        return part is not None

    # --- the run's life

    def agree(self, step: int) -> None:
        """There is nobody to disagree with."""

    def snapshot(self) -> dict[str, Any]:
        """Which tasks are applied."""
        if self._hub is None:
            return {"ledger": self._known}
        with self._hub.changed:
            return {"ledger": self._hub.ledger.snapshot()}

    def restore(self, record: dict[str, Any]) -> None:
        """Go on from a snapshot: of a checkpoint, or of the anchor that a roll-back returns to."""
        self._known = record["ledger"]
        if self._hub is not None:
            with self._hub.changed:
                self._hub.drops += self._hub.ledger.restore(self._known)

    def figures(self) -> tuple[dict[str, float], dict[str, list[int]]]:
        """What to log: values, and the staleness of every gradient applied since the last call."""
        if self._hub is None:
            return {}, {}
        hub = self._hub
        with hub.changed:
            values = {k: float(hub.ledger.counts[k]) for k in ("accepted", "stale", "duplicate", "lost")}
            values |= {"refused": float(sum(hub.door.refusals.values()) + hub.ledger.counts["refused"])}
            values |= {"queue_length": float(hub.ledger.queued), **hub.roster.figures()}
            staleness = sorted(hub.ledger.staleness.elements())
            hub.ledger.staleness.clear()
        return values, {"staleness": staleness}

    def close(self, finished: bool = True) -> None:
        """Stop serving. A finished run sends its workers home; else they wait for another start."""
        if self._hub is not None and finished:
            self._hub.dismiss("finished", _GOODBYE_S)
        if self._hub is not None:
            self._hub.stop()
            self._hub = None
        if self._shards is not None:
            self._shards.close()
            self._shards = None

    def _start(self, phi: Phi) -> Hub:
        if self._hub is not None:
            return self._hub
        c, place = self.config.exchange, self.place
        layout = Layout.of(phi, c.wire)
        secret = Secret.make(place.run_dir)
        facts = {"protocol": wire.PROTOCOL, "run": secret.run, "config": identity_hash(self.config), "layout": layout.digest,
                 "incarnation": self.incarnation}  # fmt: skip
        longest = layout.size * layout.dtype.itemsize
        plan = plan_of(self.config, place.item, layout.size * layout.wire.itemsize)
        ledger = Ledger(plan)
        ledger.restore(self._known)
        if c.shards > 1:
            self._shards = Shards(c.shards, place.ip, secret, c.encrypt, facts, layout, 2 * plan.queue + 256)
        door = Door(place.ip, secret, c.encrypt, facts, longest, place.say)
        self._hub = Hub(door, layout, ledger, c.heartbeat_s, self._record, place.say, inline=self._shards is None)
        self._hub.start()
        self._announce(self._hub, self._shards)
        place.say(f"serving at {door.address}{f' with {c.shards} shards' if self._shards else ''}")
        return self._hub

    def _announce(self, hub: Hub, shards: Shards | None) -> None:
        addresses, c = (hub.door.address, *(shards.addresses if shards is not None else [])), self.config.exchange
        serving = Serving(self.incarnation, addresses, c.encrypt, c.heartbeat_s)
        self.place.write("exchange/server.json", serving.record())

    def _record(self, record: dict[str, Any]) -> None:
        self.place.write("exchange/workers.json", (json.dumps(record, indent=1) + "\n").encode())
