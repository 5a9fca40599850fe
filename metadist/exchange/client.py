"""A worker's side of the parameter server: pull, compute, push; the line is kept by a thread of its own.

Design choices
- The thread owns all sockets: it says hello, beats, finds a server that came back elsewhere, while the main thread computes.
- A lease dies with its connection. What was computed for it is then dropped, and the server hands the task out again.
- With shards the thread gathers a version from all of them, and tells the server of a gradient once all have it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from torch import Tensor

from metadist.errors import Lost, RunError
from metadist.exchange import wire
from metadist.exchange.carrier import Carrier
from metadist.exchange.hub import BEATS
from metadist.exchange.keys import Secret, Serving, find_server
from metadist.exchange.line import Line
from metadist.exchange.wire import Header, Layout
from metadist.exchange.work import Judge, Leave, Settings, Work, facts

_LOOK_S = 0.5  # between looks at the address while there is no line
_LOOK_OPEN_S = 5.0  # and while there is one


class Client:
    """One worker's connection to its run's server. ``next`` and ``push`` are for the main thread."""

    def __init__(self, run_dir: Path, layout: Layout, identity: str, settings: Settings) -> None:
        """Start looking for the server."""
        self._thread = threading.Thread(target=self._run, name="metadist-worker", daemon=True)
        self._run_dir, self._layout, self._identity, self._settings = run_dir, layout, identity, settings
        self._context: zmq.Context[Any] = zmq.Context()
        self._lines: list[Line] = []  # to the server, and to its shards
        self._serving = Serving()
        self._looked = self._beaten = 0.0
        self._inbox: queue.Queue[Work | Judge | Leave | Exception] = queue.Queue()
        self._todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._running = True
        self._pulling: float | None = None  # since when the main thread waits
        self._asked = False  # for what it waits for, on this connection
        self._session = 0  # of the connection: a lease of an earlier one is void
        self._of: dict[int, int] = {}  # lease -> session
        self._held: tuple[int, Tensor] | None = None  # version and parameters
        self._carrier = Carrier(layout)
        self._gauges: dict[str, float] = {}
        self._pushed_at: dict[int, float] = {}
        self._last_heard = time.monotonic()
        self._thread.start()

    # --- the main thread's side

    def next(self, busy_s: float = 0.0) -> Work | Judge | Leave:
        """The next thing to do; waits for it.

        busy_s: seconds spent at work since the last call. Raises RunError if the server refuses this worker, Lost if there is
        none for exchange.patience seconds.
        """
        self._do(lambda: self._pull(busy_s))
        while True:
            with contextlib.suppress(queue.Empty):
                if isinstance(found := self._inbox.get(timeout=0.5), Exception):  # bounded: signals are handled between
                    raise found
                return found

    def push(self, work: Work, grad: Tensor, loss: float) -> None:
        """Send the gradient's sum [P] over the work's tasks (CPU, as on the wire; don't change it before ``next`` returned)."""
        self._do(lambda: self._push(work, grad, loss))

    def judged(self, work: Judge, table: Tensor) -> None:
        """Send the figures [rows, n] of the judged networks, float64 on the CPU."""
        self._do(lambda: self._judged(work.lease, wire.block(table)))

    def close(self) -> None:
        """Say good-bye and end the thread."""
        self._do(self._leave)
        self._thread.join(5.0)

    def _do(self, what: Callable[[], None]) -> None:
        self._todo.put(what)
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_w, b"x")

    # --- the thread's side

    def _run(self) -> None:
        try:
            while self._running:
                self._turn()
        except Exception as e:
            self._inbox.put(e)
        finally:
            for line in self._lines:
                line.close(500)
            self._context.term()

    def _turn(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_r, zmq.POLLIN)
        for line in self._lines:
            poller.register(line.socket, zmq.POLLIN)
        if self._wake_r in dict(poller.poll(round(1000 * min(0.25, self._settings.beat_s / 4)))):
            os.read(self._wake_r, 4096)
        for number, line in enumerate(self._lines):
            for header, content in line.messages():
                self._heard(number, header, content)
            if line.refused:
                raise RunError(f"the server at {line.address} refused this worker: {line.refused}")
        while not self._todo.empty():
            self._todo.get()()
        self._keep()

    @property
    def _open(self) -> bool:
        return bool(self._lines) and all(line.open for line in self._lines)

    def _keep(self) -> None:
        """Look for the server, say hello, beat, give up."""
        now, beat = time.monotonic(), self._settings.beat_s
        silent = any(now - line.heard > BEATS * beat for line in self._lines)
        if now - self._looked > (_LOOK_OPEN_S if self._open and not silent else _LOOK_S):
            self._looked = now
            found = find_server(self._run_dir)
            if found.addresses and (found != self._serving or silent):
                self._connect(found)
            if silent and self._settings.finished():
                self._deliver(Leave("finished"))
        if beat_due := now - self._beaten > beat:
            self._beaten = now
        for line in self._lines:
            if not line.open:
                line.hello()
            elif beat_due:
                line.send({"k": "ping"})
        self._last_heard = max([self._last_heard, *(line.heard for line in self._lines if line.open)])
        if not self._open and now - self._last_heard > self._settings.patience_s:
            raise Lost(f"no server answered for exchange.patience={self._settings.patience_s:g} s; is the server of "
                       f"run_dir={self._run_dir} running?")  # fmt: skip

    def _connect(self, found: Serving) -> None:
        for line in self._lines:
            line.close()
        self._serving = found
        self._settings = dataclasses.replace(self._settings, encrypt=found.encrypt, beat_s=found.beat_s)
        self._new_session()
        secret = Secret.read(self._run_dir)
        said = facts(self._identity, self._layout, secret.run, self._settings.label)
        longest = self._layout.size * self._layout.dtype.itemsize
        self._lines = [Line(self._context, a, secret, self._settings.encrypt, said, longest) for a in found.addresses]

    def _new_session(self) -> None:
        self._session += 1
        self._carrier.forget()
        self._held = None
        self._asked = False

    def _heard(self, number: int, header: Header, content: Any) -> None:
        kind = header["k"]
        if kind == "unknown":  # the server, or a shard, has lost us; the line says hello again by itself
            self._new_session()
        elif kind == "welcome":
            self._ask()
        elif kind == "work":
            self._work(header, content)
        elif kind == "judge":
            self._judge(header, content)
        elif kind == "pushed":
            self._verdict(header)
        elif kind == "leave":
            self._deliver(Leave(wire.text(header, "why")))
        elif kind in ("version", "gone", "kept", "full"):
            self._from_shard(number, header, content)

    def _pull(self, busy_s: float) -> None:
        self._gauges["busy_s"] = self._gauges.get("busy_s", 0.0) + busy_s
        self._pulling = time.monotonic()
        self._asked = False
        self._ask()

    def _ask(self) -> None:
        """Ask for work, once a connection, if the main thread waits for it."""
        if self._pulling is None or self._asked or not self._open or self._carrier.laying:
            return  # the server would take a pull that overtakes a gradient for giving its task up
        self._asked = True
        have = {"have": self._held[0]} if self._held is not None else {}
        self._lines[0].send({"k": "pull", **have, **self._gauges})
        self._gauges = {}

    def _work(self, header: Header, content: Any) -> None:
        lease, version = wire.number(header, "lease"), wire.number(header, "version")
        self._of[lease] = self._session
        if content is not None:
            self._held = version, wire.values(content, self._layout.wire, self._layout.size)
        if self._held is not None and self._held[0] == version:
            self._hand_out(header)
        else:
            self._carrier.fetch(self._lines[1:], header)

    def _hand_out(self, header: Header) -> None:
        assert self._held is not None
        if self._pulling is not None:
            waited = wire.real(header, "waited_ms")
            self._gauges["pull_ms"] = max(0.0, 1000 * (time.monotonic() - self._pulling) - waited)
        lease, *numbers = (wire.number(header, k) for k in ("lease", "step", "first", "count"))
        self._deliver(Work(lease, *self._held, *numbers))

    def _judge(self, header: Header, content: Any) -> None:
        phi = wire.values(content or b"", self._layout.dtype, self._layout.size)
        lease, *numbers = (wire.number(header, k) for k in ("lease", "first", "count", "all"))
        self._of[lease] = self._session
        self._deliver(Judge(lease, phi, wire.text(header, "purpose"), *numbers))

    def _deliver(self, what: Work | Judge | Leave) -> None:
        if self._pulling is not None:
            self._pulling = None
            self._inbox.put(what)

    def _push(self, work: Work, grad: Tensor, loss: float) -> None:
        if self._of.get(work.lease) != self._session or not self._open:
            self._forget(work.lease)
            return
        self._pushed_at[work.lease] = time.monotonic()
        header = {"k": "push", "lease": work.lease, "loss": loss}
        if len(self._lines) > 1:
            self._carrier.lay(self._lines[1:], header, grad)
        else:
            self._lines[0].send(header, wire.block(grad))

    def _judged(self, lease: int, content: Any) -> None:
        if self._of.pop(lease, None) == self._session and self._open:
            self._lines[0].send({"k": "judged", "lease": lease}, content)

    def _verdict(self, header: Header) -> None:
        if (lease := int(header.get("lease", 0))) in self._pushed_at:
            self._gauges["push_ms"] = 1000 * (time.monotonic() - self._pushed_at[lease])
        self._forget(lease)

    def _forget(self, lease: int) -> None:
        self._of.pop(lease, None)
        self._pushed_at.pop(lease, None)
        self._carrier.forget(lease)

    def _from_shard(self, number: int, header: Header, content: Any) -> None:
        done = self._carrier.heard(number - 1, len(self._lines) - 1, header, content)
        if done is None:
            return
        outcome, order, flat = done
        if flat is not None:
            self._held = wire.number(order, "version"), flat
            return self._hand_out(order)
        if outcome == "failed":  # asking anew gives the lease back
            self._forget(order["lease"])
            self._asked = False
        else:
            self._lines[0].send(order)
        self._ask()

    def _leave(self) -> None:
        self._running = False
        if self._open:
            self._lines[0].send({"k": "bye"})
