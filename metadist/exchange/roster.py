"""The workers of a server as it sees them: what each has in hand, what it has done, how fast its line is."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from metadist.exchange import wire
from metadist.exchange.door import Peer
from metadist.exchange.ledger import ACCEPTED, Lease
from metadist.exchange.wire import Header

_GAUGES = ("pull_ms", "push_ms")


@dataclass
class Worker:
    """One worker. waiting: since when it waits for work; have: the version it holds; judging: its part of an evaluation."""

    peer: Peer
    joined: float = field(default_factory=time.monotonic)
    lease: Lease | None = None
    judging: int | None = None
    waiting: float | None = None
    have: int = -1
    counts: Counter[str] = field(default_factory=Counter)
    busy_s: float = 0.0
    last: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name among the run's workers: "2" of "2@host:4711"."""
        return self.peer.name.partition("@")[0]

    @property
    def waited(self) -> float:
        """Seconds since it asked for work."""
        return 0.0 if self.waiting is None else time.monotonic() - self.waiting

    def report(self, header: Header) -> None:
        """What it says of its own time since its last message: busy_s, pull_ms, push_ms."""
        given = {name: wire.real(header, name) for name in ("busy_s", *_GAUGES) if name in header}
        for name, value in given.items():
            if not math.isfinite(value):
                continue
            if name == "busy_s":
                self.busy_s += min(max(value, 0.0), 1e6)
            else:
                self.last[name] = min(max(value, 0.0), 1e9)

    def count(self, verdict: str, tasks: int) -> None:
        """Keep a verdict on a push."""
        self.counts[verdict] += 1
        self.counts["tasks"] += tasks * (verdict == ACCEPTED)


class Roster:
    """All workers that are there."""

    def __init__(self) -> None:
        """Nobody yet."""
        self.workers: dict[bytes, Worker] = {}
        self.seen: set[str] = set()  # labels of all that ever joined
        self._since, self._busy = time.monotonic(), dict[str, float]()

    def join(self, peer: Peer) -> Worker:
        """Somebody new."""
        worker = self.workers[peer.routing] = Worker(peer)
        self.seen.add(worker.label)
        return worker

    def leave(self, worker: Worker) -> None:
        """He is gone."""
        self.workers.pop(worker.peer.routing, None)

    def namesakes(self, peer: Peer) -> list[Worker]:
        """Workers of the same name on other connections."""
        return [w for w in self.workers.values() if w.peer.name == peer.name and w.peer is not peer]

    def waiting(self) -> list[Worker]:
        """Those who wait for work, the longest first."""
        return sorted((w for w in self.workers.values() if w.waiting is not None), key=lambda w: w.waiting or 0.0)

    def rows(self) -> list[dict[str, Any]]:
        """For people: one row a worker."""
        now = time.monotonic()
        return [
            {
                "worker": w.peer.name,
                "tasks": w.counts["tasks"],
                **{k: w.counts[k] for k in ("accepted", "stale", "duplicate", "refused")},
                "utilisation": min(1.0, w.busy_s / max(now - w.joined, 1e-9)),
                **{k: w.last.get(k) for k in _GAUGES},
                "silent_s": now - w.peer.heard,
            }
            for w in sorted(self.workers.values(), key=lambda w: w.peer.name)
        ]

    def figures(self) -> dict[str, float]:
        """Since the last call: mean pull_ms and push_ms, and of each worker the fraction of time it was at work."""
        now, before = time.monotonic(), self._busy
        span = max(now - self._since, 1e-9)
        out: dict[str, float] = {"workers_alive": float(len(self.workers))}
        for name in _GAUGES:
            given = [w.last[name] for w in self.workers.values() if name in w.last]
            if given:
                out[name] = sum(given) / len(given)
        for w in self.workers.values():
            spent = w.busy_s - before.get(w.peer.name, 0.0)
            out[f"utilisation/{w.label}"] = min(1.0, max(0.0, spent) / span)
        self._since, self._busy = now, {w.peer.name: w.busy_s for w in self.workers.values()}
        return out
