"""The server's ear and mouth: a thread that hands out work, takes gradients, and notices who is gone.

Design choices
- It shares the ledger with the trainer's thread under one lock, ``changed``, which is notified at every change. It never waits
  for the trainer, so workers are answered while a meta-step is applied or a set is judged.
- A pull that can't be answered yet is parked: nobody polls, and a new version reaches all who wait for it at once.
- Silence of five heartbeats is death. What the worker had in hand goes to others.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq
from torch import Tensor

from metadist.errors import RunError
from metadist.exchange import wire
from metadist.exchange.door import Door, Peer
from metadist.exchange.judging import Judging
from metadist.exchange.ledger import REFUSED, Lease, Ledger
from metadist.exchange.roster import Roster, Worker
from metadist.exchange.wire import Header, Layout, Malformed

BEATS = 5  # heartbeats of silence after which somebody is given up
_RECORD_S = 2.0


@dataclass
class Pushed:
    """What a worker sent for a lease. part: the gradient's sum [P] as it came; None: it lies with the shards."""

    part: Tensor | None
    loss: float


class Hub:
    """Serves ``door``, from ``start`` to ``stop``, in a thread of its own.

    beat_s: between heartbeats. record: writes the roster for people; say: logs a line.
    """

    def __init__(
        self,
        door: Door,
        layout: Layout,
        ledger: Ledger,
        beat_s: float,
        record: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
        inline: bool = True,
    ) -> None:
        """inline: parameters and gradients travel with these messages; else through shards."""
        self._thread = threading.Thread(target=self._run, name="metadist-server", daemon=True)
        self.door, self.layout, self.ledger, self.inline = door, layout, ledger, inline
        self.changed = threading.Condition()
        self.roster = Roster()
        self.drops: list[int] = []  # leases whose gradient nobody will ask the shards for
        self.failure: Exception | None = None
        self._beat_s, self._record, self._say = beat_s, record, say
        self._content: Any = None
        self._judging: Judging | None = None
        self._leaving = ""
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._recorded = 0.0
        self._running = True

    # --- the trainer's side

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def publish(self, content: Any) -> int:
        """Offer new parameters: a buffer, or with shards None; returns their version."""
        with self.changed:
            self._content = content
            version = self.ledger.publish()
        self._wake()
        return version

    def judge(self, judging: Judging | None) -> None:
        """Hand out the parts of an evaluation from now on, before tasks; None: no longer."""
        with self.changed:
            self._judging = judging
        self._wake()

    def dismiss(self, why: str, seconds: float) -> None:
        """Tell every worker to leave, wait until they have."""
        with self.changed:
            self._leaving = why
            self._wake()
            self.changed.wait_for(lambda: not self.roster.workers or self.failure is not None, seconds)

    def stop(self) -> None:
        """End the thread and close the door."""
        self._running = False
        self._wake()
        self._thread.join()
        os.close(self._wake_r)
        os.close(self._wake_w)

    def check(self) -> None:
        """Raise what the thread died of."""
        if self.failure is not None:
            if isinstance(self.failure, RunError):
                raise self.failure
            raise RuntimeError("the server's thread failed") from self.failure

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is awake
            os.write(self._wake_w, b"x")

    # --- the thread's side

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as e:
            with self.changed:
                self.failure = e
                self.changed.notify_all()
        finally:
            self.door.close()

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in (self.door.socket, self.door.monitor, self._wake_r):
            poller.register(source, zmq.POLLIN)
        while self._running:
            woken = dict(poller.poll(round(1000 * self._beat_s / 4)))
            if self._wake_r in woken:
                os.read(self._wake_r, 4096)
            with self.changed:
                self.door.watch()
                for peer, header, content in self.door.messages():
                    self._guarded(peer, header, content)
                self._expire()
                self._serve_waiting()
                self.changed.notify_all()
                due = time.monotonic() - self._recorded >= _RECORD_S
                record = self._state() if due else None
            if record is not None:
                self._recorded = time.monotonic()
                self._record(record)
        self._record(self._state())

    def _state(self) -> dict[str, Any]:
        ledger = self.ledger
        return {
            "version": ledger.version,
            "queued": ledger.queued,
            "counts": dict(ledger.counts) | {"refused": sum(self.door.refusals.values())},
            "workers": self.roster.rows(),
            "time": time.time(),
        }

    def _guarded(self, peer: Peer, header: Header, content: Any) -> None:
        try:
            self._handle(self._worker(peer), header, content)
        except Malformed as e:
            self.door.refuse("a malformed message", name=peer.name, detail=str(e))
            worker = self.roster.workers.get(peer.routing)
            if worker is not None:
                self._release(worker, REFUSED)
                self.door.send(peer, {"k": "pushed", "verdict": REFUSED, "why": str(e)})

    def _worker(self, peer: Peer) -> Worker:
        known = self.roster.workers.get(peer.routing)
        if known is None or known.peer is not peer:
            for old in self.roster.namesakes(peer):  # it has come back on another connection
                self._lose(old)
            known = self.roster.join(peer)
        return known

    def _handle(self, worker: Worker, header: Header, content: Any) -> None:
        kind = header.get("k")
        if kind == "pull":
            self._release(worker, "lost")  # whoever asks for work has none in hand
            worker.have = wire.number(header, "have") if "have" in header else -1
            worker.waiting = time.monotonic()
            worker.report(header)
        elif kind == "push":
            self._push(worker, header, content)
        elif kind == "judged":
            self._judged(worker, header, content)
        elif kind == "ping":
            self.door.send(worker.peer, {"k": "pong"})
        elif kind == "bye":
            self._lose(worker, said=True)
        else:
            raise Malformed("a message of no known kind")

    def _push(self, worker: Worker, header: Header, content: Any) -> None:
        number, loss = wire.number(header, "lease"), wire.real(header, "loss")
        part = wire.values(content or b"", self.layout.wire, self.layout.size) if self.inline else None
        own = worker.lease is not None and worker.lease.number == number
        verdict = self.ledger.push(number, Pushed(part, loss)) if own else self.ledger.miss(number)
        worker.lease = None if own else worker.lease
        worker.count(verdict, self.ledger.plan.item)
        if part is None and not self.ledger.holds(number):
            self.drops.append(number)
        worker.report(header)
        self.door.send(worker.peer, {"k": "pushed", "verdict": verdict, "lease": number})

    def _judged(self, worker: Worker, header: Header, content: Any) -> None:
        number = wire.number(header, "lease")
        if self._judging is not None and worker.judging == number:
            self._judging.put(number, content or b"")
        worker.judging = None

    def _serve_waiting(self) -> None:
        for worker in self.roster.waiting():
            if self._leaving:
                self.door.send(worker.peer, {"k": "leave", "why": self._leaving})
                worker.waiting = None
            elif self._judging is not None and (part := self._judging.issue()) is not None:
                worker.judging, worker.waiting = part, None
                self.door.send(worker.peer, {"k": "judge", "lease": part, **self._judging.header(part)}, self._judging.content)
            elif (lease := self.ledger.issue()) is not None:
                self._send_work(worker, lease)

    def _send_work(self, worker: Worker, lease: Lease) -> None:
        step, first = self.ledger.plan.where(lease.item)
        header = {"k": "work", "lease": lease.number, "version": lease.base, "step": step, "first": first,
                  "count": self.ledger.plan.item, "waited_ms": 1000 * worker.waited}  # fmt: skip
        worker.lease, worker.waiting = lease, None
        self.door.send(worker.peer, header, self._content if worker.have != lease.base else None)

    def _expire(self) -> None:
        latest = time.monotonic() - BEATS * self._beat_s
        for worker in [w for w in self.roster.workers.values() if w.peer.heard < latest]:
            self._lose(worker)

    def _lose(self, worker: Worker, said: bool = False) -> None:
        self._release(worker, "lost")
        self.roster.leave(worker)
        self.door.forget(worker.peer)
        if not self._leaving:
            what = "has left" if said else f"is lost (silent for {time.monotonic() - worker.peer.heard:.0f} s)"
            self._say(f"worker {worker.label} {what}; {len(self.roster.workers)} at work")

    def _release(self, worker: Worker, reason: str) -> None:
        if worker.lease is not None:
            self.ledger.give_back(worker.lease.number, reason)
            if not self.inline:
                self.drops.append(worker.lease.number)
            worker.lease = None
        if worker.judging is not None and self._judging is not None:
            self._judging.give_back(worker.judging)
        worker.judging = None
