"""A parameter server in the test's own process: a door, a hub and a ledger, honest workers, and lines for anybody else.

Every gradient says which item it belongs to, and every version which one it is, so that whatever is applied can be told.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zmq

from metadist.exchange import wire
from metadist.exchange.client import Client
from metadist.exchange.door import Door
from metadist.exchange.hub import Hub
from metadist.exchange.keys import Secret, Serving
from metadist.exchange.ledger import Gradient, Ledger, Plan
from metadist.exchange.line import Line
from metadist.exchange.wire import Layout
from metadist.exchange.work import Leave, Settings, Work, facts

DEADLINE_S = 20.0  # only reached by a defect
NUMBERS = 64
PLAN = Plan(total=10_000, tasks=4, item=1, batch=2, max_staleness=2, queue=16)
LAYOUT = Layout(("images", "rate"), ((6, 10), (4,)), torch.float64, torch.float64)
LONGEST = NUMBERS * 8
BEAT_S = 2.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition``."""
    end = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} does not happen"
        time.sleep(0.002)
    return found


def resident_mb() -> float:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def item_of(work: Work) -> int:
    return (work.step * PLAN.tasks + work.first) // PLAN.item


def gradient(item: int) -> torch.Tensor:
    return torch.arange(NUMBERS, dtype=torch.float64) + 1000.0 * item


class Stage:
    """A server without a trainer: ``update`` is a meta-step.

    said: its log; applied: items of all updates; honest: a worker that is there all the time, if a test wants one.
    """

    honest: Honest

    def __init__(self, folder: Path, encrypt: bool = True, beat_s: float = BEAT_S, shards: tuple[str, ...] = ()) -> None:
        self.folder, self.encrypt, self.beat_s, self.shards = folder, encrypt, beat_s, shards
        self.secret = Secret.make(folder)
        self.context: zmq.Context[Any] = zmq.Context()
        self.said: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.applied: list[int] = []
        self._lines: list[Line] = []
        self.incarnation = 0
        self.start(Ledger(PLAN))

    def start(self, ledger: Ledger) -> None:
        """One more start of the server, at another port."""
        self.incarnation += 1
        known = {"protocol": wire.PROTOCOL, "run": self.secret.run, "config": "c", "layout": LAYOUT.digest}
        known |= {"incarnation": self.incarnation}
        self.door = Door("127.0.0.1", self.secret, self.encrypt, known, LONGEST, self.said.append)
        self.hub = Hub(self.door, LAYOUT, ledger, self.beat_s, self.records.append, self.said.append, not self.shards)
        self.hub.start()
        self.up = True
        serving = Serving(self.incarnation, (self.door.address, *self.shards), self.encrypt, self.beat_s)
        (self.folder / "exchange" / "server.json").write_bytes(serving.record())

    def stop(self) -> None:
        """The server goes away without a word."""
        if self.up:
            self.hub.stop()
        self.up = False

    def come_back(self) -> None:
        """Another start takes over what was applied."""
        self.stop()
        ledger = Ledger(PLAN)
        ledger.restore(json.loads(json.dumps(self.ledger.snapshot())))
        self.start(ledger)

    @property
    def ledger(self) -> Ledger:
        return self.hub.ledger

    @property
    def port(self) -> int:
        return int(self.door.address.rpartition(":")[2])

    def refused(self, reason: str) -> int:
        with self.hub.changed:
            return self.door.refusals[reason]

    def publish(self) -> int:
        return self.hub.publish(wire.block(torch.full((NUMBERS,), float(self.ledger.made), dtype=torch.float64)))

    def update(self, times: int = 1) -> None:
        """Publish, wait for an update's gradients, look at every number of them."""
        for _ in range(times):
            self.publish()
            for found in self.taken():
                assert torch.equal(found.content.part, gradient(found.item)) and found.content.loss == found.item
                self.applied.append(found.item)
        assert len(set(self.applied)) == len(self.applied), "an item was applied twice"

    def taken(self) -> list[Gradient]:
        """The next update's gradients; waits for them."""
        found: list[Gradient] = []
        with self.hub.changed:
            assert self.hub.changed.wait_for(lambda: found.extend(self.ledger.take()) or found, DEADLINE_S)
        self.hub.check()
        return found

    def rest(self) -> None:
        """Wait until all workers wait, and not only because the hub has not yet seen what there is to do."""
        with self.hub.changed:
            assert self.hub.changed.wait_for(lambda: self._nothing_to_do() and self._all_wait(), DEADLINE_S)

    def _all_wait(self) -> bool:
        return all(w.waiting is not None for w in self.hub.roster.workers.values())

    def _nothing_to_do(self) -> bool:
        ledger = self.ledger
        return not ledger.published or ledger._would_be_stale() or ledger.queued >= PLAN.queue

    def line(self, label: str, **other: Any) -> Line:
        """Somebody with the run's keys; ``other``: what he says of himself instead of the truth."""
        said = facts("c", LAYOUT, self.secret.run, label) | other
        line = Line(self.context, self.door.address, self.secret, self.encrypt, said, LONGEST)
        self._lines.append(line)
        until(lambda: line.socket.poll(10, zmq.POLLOUT), "a connection")
        line.hello()
        return line

    def opened(self, label: str) -> Line:
        line = self.line(label)
        until(lambda: list(heard(line)) and line.open, "a welcome")
        return line

    def client(self, label: str, patience_s: float = DEADLINE_S, identity: str = "c") -> Client:
        return Client(self.folder, LAYOUT, identity, Settings(label, self.encrypt, self.beat_s, patience_s))

    def close(self) -> None:
        self.stop()
        for line in self._lines:
            line.close()
        self.context.destroy(0)


def work_for(stage: Stage, line: Line) -> tuple[int, int]:
    """Ask for work on a line; the lease, and which item it is of."""
    line.send({"k": "pull"})
    stage.publish()
    header = until(lambda: [h for h, _ in heard(line) if h["k"] == "work"], "work")[0]
    return header["lease"], header["step"] * PLAN.tasks + header["first"]


def heard(line: Line) -> list[tuple[dict[str, Any], Any]]:
    """What has come on a line within a moment."""
    line.socket.poll(20)
    return list(line.messages())


class Honest(threading.Thread):
    """A worker that does what it is asked for until it is told to leave."""

    def __init__(self, client: Client) -> None:
        super().__init__(daemon=True)
        self.client, self.done, self.error, self.why = client, list[int](), list[Exception](), ""
        self.start()

    def run(self) -> None:
        try:
            while not isinstance(what := self.client.next(0.001), Leave):
                assert isinstance(what, Work) and torch.equal(what.phi, torch.full_like(what.phi, float(what.version)))
                self.client.push(what, gradient(item_of(what)), float(item_of(what)))
                self.done.append(item_of(what))
            self.why = what.why
        except Exception as e:
            self.error.append(e)
        finally:
            self.client.close()

    def leave(self) -> str:
        """Wait until it has left; the server's word for why."""
        self.join(DEADLINE_S)
        assert not self.is_alive() and not self.error, self.error
        return self.why


class Asking(threading.Thread):
    """One call of ``Client.next``, and what came of it."""

    def __init__(self, client: Client) -> None:
        super().__init__(daemon=True)
        self.client, self.found = client, list[Any]()
        self.start()

    def run(self) -> None:
        try:
            self.found.append(self.client.next())
        except Exception as e:
            self.found.append(e)

    def answer(self) -> Any:
        return until(lambda: self.found, "an answer")[0]
