"""One worker of a parameter server: pull, compute, push, until the server says that the run is finished.

    METADIST_LABEL=3 python -m metadist.run.member <run_dir>

Design choices
- It may come at any time and go at any time: nothing in it is worth saving. A signal ends it at once, with a word to the
  server, which hands its task out again.
- All it needs is the run folder: configuration, secret, address. It looks for the server by itself, for exchange.patience.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from metadist.errors import Lost
from metadist.exchange.client import Client
from metadist.exchange.keys import find_server
from metadist.exchange.wire import Layout
from metadist.exchange.work import Judge, Leave, Settings, Work
from metadist.identity import identity_hash
from metadist.run import origins, plan
from metadist.run.compute import Compute
from metadist.run.folder import RunFolder
from metadist.run.job import build, product
from metadist.run.product import Job
from metadist.run.signals import SIGNALS, Stop

_POLL_S = 0.2


class Staging:
    """Between the wire and the device: on a GPU through pinned memory, which is copied to and from without waiting.

    On a CPU parameters are copied, too: what arrives lies at any address, and the last bits of a matrix product depend on it.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Allocate."""
        self.device, pinned = device, device.type == "cuda"
        self._layout = layout
        self._down = torch.empty(layout.size, dtype=layout.wire, pin_memory=pinned)
        self._up = torch.empty(layout.size, dtype=layout.dtype, pin_memory=pinned)

    def up(self, flat: Tensor) -> Tensor:
        """Parameters as they came [P] -> on the device, in their own type."""
        return self._up.copy_(flat).to(self.device, non_blocking=True, copy=True)

    def down(self, grad: Tensor) -> Tensor:
        """A gradient [P] -> on the CPU, as on the wire; valid until the next call."""
        self._down.copy_(grad)
        return self._down


def serve(folder: RunFolder, label: str, connected: Callable[[Client], None]) -> int:
    """Work for the run's server until it is finished; returns the exit status.

    label: this worker's name among the run's. connected: told of the connection, to close it if a signal comes.
    Raises Lost if there is no server for exchange.patience seconds, RunError if it refuses this worker.
    """
    if folder.finished is not None:
        return 0
    setup = build(folder.config)
    folder = _meet(folder)
    origins.check(setup.origins, folder)
    item = int(folder.resolve("item", lambda: None))
    decided = plan.decide_for_server(setup, folder, item)
    setup = setup.compiled(decided.compile)
    compute = Compute(setup.method, decided.group, setup.device, setup.static)
    c = folder.config.exchange
    layout = Layout.of(setup.method.parameters(), c.wire)
    finished = lambda: RunFolder.attach(folder.path).finished is not None  # noqa: E731
    settings = Settings(label, c.encrypt, c.heartbeat_s, c.patience, finished)
    client = Client(folder.path, layout, identity_hash(folder.config), settings)
    connected(client)
    try:
        work(client, setup, compute, layout)
    finally:
        client.close()
    return 0


def _meet(folder: RunFolder) -> RunFolder:
    """Wait for a server; the folder as its start sees it."""
    patience = folder.config.exchange.patience
    until = time.monotonic() + patience
    while not (incarnation := find_server(folder.path).incarnation):
        if time.monotonic() > until:
            raise Lost(f"no server came up in run_dir={folder.path} for exchange.patience={patience:g} s")
        time.sleep(_POLL_S)
    return RunFolder.attach(folder.path, incarnation)


def work(client: Client, setup: Job, compute: Compute, layout: Layout) -> None:
    """Do what the server asks for until it says leave."""
    staging, busy = Staging(layout, setup.device), 0.0
    while not isinstance(what := client.next(busy), Leave):
        began = time.perf_counter()
        if isinstance(what, Judge):
            client.judged(what, _judge(what, setup, layout).to("cpu", torch.float64))
        else:
            _compute(client, what, compute, layout, staging)
        busy = time.perf_counter() - began


def _compute(client: Client, what: Work, compute: Compute, layout: Layout, staging: Staging) -> None:
    tasks = torch.arange(what.first, what.first + what.count)
    total = compute(layout.split(staging.up(what.phi)), what.step, tasks)
    client.push(what, staging.down(total[:-2]), float(total[-2]))


def _judge(what: Judge, setup: Job, layout: Layout) -> Tensor:
    phi = layout.split(what.phi.to(setup.device, copy=True))
    return product(setup).share(phi, what.purpose, what.first, what.count, what.all)


def main(arguments: list[str] | None = None) -> int:
    """Run one worker as the environment says; returns its exit status."""
    from metadist.run.worker import describe, die_with, tell

    environ = os.environ
    if "METADIST_LAUNCHER" in environ:
        die_with(int(environ["METADIST_LAUNCHER"]))
    clients: list[Client] = []

    def depart(name: str) -> None:
        for client in clients:
            client.close()
        os._exit(0)

    with Stop(at_once=depart):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # held back by the launcher until now
        try:
            folder = RunFolder.attach(Path((sys.argv[1:] if arguments is None else arguments)[0]))
            if folder.config.threads:  # else what the launcher put into OMP_NUM_THREADS
                torch.set_num_threads(folder.config.threads)
            return serve(folder, environ.get("METADIST_LABEL", "1"), clients.append)
        except Exception as e:
            status, text = describe(e)
            tell(status, text, rank_is_shown=False)
            return status


if __name__ == "__main__":
    from metadist.run.worker import leave

    leave(main())
