"""What the sections of ``exchange.py`` share: the real server in a process of its own, a real worker's connection, statistics.

Design choices
- Server and worker are the package's own classes; only the trainer's update and the worker's meta-gradient are stand-ins.
- Processes are spawned, not forked: a fork would inherit threads' locks. They meet in a run folder, as in a run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metadist.config import Config
from metadist.config_machine import ExchangeConfig
from metadist.exchange.client import Client
from metadist.exchange.server import Place, Server
from metadist.exchange.wire import Header, Layout
from metadist.exchange.work import Settings
from metadist.identity import identity_hash
from metadist.run.state import MetaState

SPAWN = multiprocessing.get_context("spawn")
_WAIT_S = 60.0


@dataclass(frozen=True)
class Shape:
    """A run to be measured. floats: of the parameters; still: a meta-step changes nothing and costs its exchange alone."""

    floats: int
    tasks: int = 1
    workers: int = 1
    max_staleness: int = 0
    encrypt: bool = False
    shards: int = 1
    still: bool = True
    name: str = "server"

    @property
    def config(self) -> Config:
        """The configuration that server and workers agree on."""
        exchange = ExchangeConfig(self.name, max_staleness=self.max_staleness, item=1)
        exchange.encrypt, exchange.shards = self.encrypt, self.shards
        return Config(exchange=exchange, steps=10**9, tasks=self.tasks, workers=self.workers, device="cpu")

    @property
    def phi(self) -> dict[str, Tensor]:
        """The parameters at the start."""
        return {"images": torch.zeros(self.floats)}

    @property
    def layout(self) -> Layout:
        """How they lie."""
        return Layout.of(self.phi, "full")


def floats(megabytes: float) -> int:
    """Numbers in so many MB of float32."""
    return round(megabytes * 1e6 / 4)


def thread_seconds() -> dict[str, float]:
    """CPU seconds of this process: "trainer" (main thread), "hub" (its other Python threads), "io" (ZeroMQ's)."""
    out = {"trainer": 0.0, "hub": 0.0, "io": 0.0}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            zmqs = (task / "comm").read_text().startswith("ZMQbg")
            name = "trainer" if int(task.name) == os.getpid() else "io" if zmqs else "hub"
            out[name] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return out


def _serve(shape: Shape, folder: str, pipe: Connection) -> None:
    """The server's process: meta-steps until the pipe says stop; "?" asks for (steps, when the last ended, CPU seconds)."""
    torch.set_num_threads(1)
    path, over = Path(folder), threading.Event()

    def write(name: str, content: bytes) -> None:
        (path / f"{name}.new").write_bytes(content)
        (path / f"{name}.new").replace(path / name)

    config, done = shape.config, (0, time.monotonic())
    server = Server(config, 1, Place(path, "127.0.0.1", config.exchange.item, write, lambda text: None))

    def listen() -> None:
        while pipe.recv() == "?":
            pipe.send((*done, thread_seconds()))
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    state = MetaState(shape.phi, config.meta, 1)
    apply: Callable[[MetaState, Tensor], MetaState] = (lambda s, _: s) if shape.still else (lambda s, total: s.apply(total))
    while not over.is_set():
        state, _ = server.step(state, config.tasks, lambda s, t: t, apply, over.is_set)
        done = done[0] + 1, time.monotonic()
    server.close()


class Served:
    """A running server, by its pipe."""

    def __init__(self, pipe: Connection) -> None:
        """Take over."""
        self._pipe = pipe

    def asked(self) -> tuple[int, float, dict[str, float]]:
        """Meta-steps so far, when the last of them ended (monotonic seconds), CPU seconds of the server's threads."""
        self._pipe.send("?")
        return self._pipe.recv()  # type: ignore[no-any-return]


@contextlib.contextmanager
def serving(shape: Shape, folder: Path) -> Iterator[Served]:
    """A server for ``shape`` in ``folder``, from its first meta-step on."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve, args=(shape, str(folder), theirs))
    process.start()
    try:
        until = time.monotonic() + _WAIT_S
        while not (folder / "exchange" / "server.json").exists():
            if time.monotonic() > until or not process.is_alive():
                raise RuntimeError("the server did not come up")
            time.sleep(0.02)
        yield Served(ours)
    finally:
        with contextlib.suppress(OSError):
            ours.send("stop")
        process.join(_WAIT_S)
        process.kill()


class Watched(Client):
    """A client that shows when a verdict came (``verdicts``) and how long the server let the last pull wait (``waited_s``)."""

    def __init__(self, shape: Shape, folder: Path, label: str) -> None:
        """Connect."""
        self.verdicts: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        self.waited_s = 0.0
        c = shape.config.exchange
        settings = Settings(label, c.encrypt, c.heartbeat_s, c.patience)
        super().__init__(folder, shape.layout, identity_hash(shape.config), settings)

    def _verdict(self, header: Header) -> None:
        super()._verdict(header)
        self.verdicts.put((header["verdict"], time.perf_counter()))

    def _hand_out(self, header: Header) -> None:
        self.waited_s = float(header["waited_ms"]) / 1000
        super()._hand_out(header)

    def forget_parameters(self) -> None:
        """The next pull carries them again, even if they are the same. Only between calls, when the thread is idle."""
        self._held = None


def middle(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, mid, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": mid, "low": low, "high": high}


class Others:
    """How many cores other programs of this machine keep busy meanwhile; ``cores`` is valid after the block."""

    cores = float("nan")

    def __enter__(self) -> Others:
        """Begin."""
        self._before = self._now()
        return self

    def __exit__(self, *_: Any) -> None:
        """End; children must have ended, else theirs counts as others'."""
        wall, busy, own = (b - a for a, b in zip(self._before, self._now(), strict=True))
        self.cores = max(0.0, (busy - own) / wall)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        ticks = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        busy = (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.monotonic(), busy, sum(u.ru_utime + u.ru_stime for u in own)
