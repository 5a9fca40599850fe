"""Section ``steps``: meta-steps a second of both exchanges, of real processes whose meta-gradient is a nap of a given length.

Design choices
- All but the nap is real: AllReduce over gloo; Server, Hub, Ledger, Client; the update of the meta-parameters by Adam.
- A nap needs no core: four workers and a server on four cores disturb each other no more than on five machines.
- What the workers' summed speed allows is reckoned from the naps they took: sum over workers of tasks / seconds asleep.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from exchange_parts import SPAWN, Others, Shape, Watched, floats, serving
from torch import Tensor

from metadist.exchange.allreduce import AllReduce, host
from metadist.exchange.work import Leave, Work
from metadist.run.member import Staging
from metadist.run.state import MetaState

NAP_S = 0.05
WORKERS = 4
_WARM_S, _START_S = 1.5, 120.0


@dataclass(frozen=True)
class Nap:
    """How long a worker's tasks take. mean_s: on average; sigma: of the logarithm, 0: all alike."""

    mean_s: float
    sigma: float
    seed: int

    def lengths(self) -> Callable[[], float]:
        """A stream of them."""
        generator = random.Random(self.seed)
        shift = math.log(self.mean_s) - self.sigma**2 / 2 if self.mean_s else 0.0
        return lambda: generator.lognormvariate(shift, self.sigma) if self.sigma else self.mean_s


# name: seconds of each worker's tasks relative to NAP_S, sigma
CREWS: dict[str, tuple[tuple[float, ...], float]] = {
    "equal": ((1, 1, 1, 1), 0.0),
    "one 4x slower": ((1, 1, 1, 4), 0.0),
    "random lengths": ((1, 1, 1, 1), 0.7),
}
# exchange, max_staleness, tasks a meta-step
WAYS = [("allreduce", 0, 4), ("server", 0, 4), ("server", 4, 4), ("server", 4, 16)]


class Sleeper:
    """Sleeps, and remembers what it slept since ``reset``."""

    def __init__(self, nap: Nap) -> None:
        """Nothing yet."""
        self._next = nap.lengths()
        self.reset()

    def reset(self) -> None:
        """Forget."""
        self.tasks, self.seconds = 0, 0.0

    def __call__(self, tasks: int) -> None:
        """Sleep for so many tasks."""
        for _ in range(tasks):
            self.seconds += (length := self._next())
            self.tasks += 1
            if length:
                time.sleep(length)


def _member(shape: Shape, folder: str, number: int, nap: Nap, pipe: Connection) -> None:
    """A worker of a server; at each word from the pipe it says what it slept."""
    torch.set_num_threads(1)
    client, sleep = Watched(shape, Path(folder), str(number)), Sleeper(nap)
    staging = Staging(shape.layout, torch.device("cpu"))
    busy = 0.0
    while not isinstance(what := client.next(busy), Leave):
        assert isinstance(what, Work)
        began = time.perf_counter()
        if pipe.poll():
            pipe.recv()
            pipe.send((sleep.tasks, sleep.seconds))
        grad = staging.up(what.phi)
        sleep(what.count)
        client.push(what, staging.down(grad), 0.0)
        busy = time.perf_counter() - began


def _rank(shape: Shape, store: str, rank: int, nap: Nap, window: float, pipe: Connection) -> None:
    """A worker of an all-reduce: warms up, works for ``window`` seconds, says (meta-steps, seconds, tasks, seconds asleep)."""
    torch.set_num_threads(1)
    exchange, sleep = AllReduce(shape.config, rank, shape.workers, store, 1), Sleeper(nap)
    state, total = MetaState(shape.phi, shape.config.meta, 1), torch.zeros(shape.floats + 2)
    total[-1] = 1.0

    def compute(_: Any, tasks: Tensor) -> Tensor:
        sleep(len(tasks))
        return total

    until = began = 0.0

    def stop() -> bool:
        return rank == 0 and time.monotonic() > until

    for seconds in (_WARM_S, window):
        sleep.reset()
        steps, over, began = 0, False, time.monotonic()
        until = began + seconds
        while not over:
            state, over = exchange.step(state, shape.tasks, compute, lambda s, t: s.apply(t), stop)
            steps += 1
    pipe.send((steps, time.monotonic() - began, sleep.tasks, sleep.seconds))
    exchange.close()


def naps(crew: str, nap_s: float) -> list[Nap]:
    """One for each worker."""
    factors, sigma = CREWS[crew]
    return [Nap(nap_s * f, sigma, n) for n, f in enumerate(factors)]


def allreduce(shape: Shape, each: list[Nap], window: float) -> dict[str, float]:
    """Tasks a second, measured and allowed."""
    store = host("127.0.0.1")
    pipes, programs = zip(*(SPAWN.Pipe() for _ in each), strict=True), []
    ours, theirs = pipes
    for n, nap in enumerate(each):
        args = (shape, f"127.0.0.1:{store.port}", n, nap, window, theirs[n])
        programs.append(SPAWN.Process(target=_rank, args=args, daemon=True))
        programs[-1].start()
    answers = [pipe.recv() for pipe in ours]
    for program in programs:
        program.join()
    steps, seconds = answers[0][:2]
    return {"tasks_per_s": steps * shape.tasks / seconds, "allowed": sum(a[2] / max(a[3], 1e-9) for a in answers)}


def server(shape: Shape, each: list[Nap], window: float) -> dict[str, float]:
    """Tasks a second, measured and allowed; CPU seconds of the server's threads a second."""
    with tempfile.TemporaryDirectory() as folder, serving(shape, Path(folder)) as served:
        ours, theirs = zip(*(SPAWN.Pipe() for _ in each), strict=True)
        programs = [
            SPAWN.Process(target=_member, args=(shape, folder, n, nap, theirs[n]), daemon=True) for n, nap in enumerate(each)
        ]
        for program in programs:
            program.start()
        for pipe in ours:  # all have begun
            pipe.send("?")
            if not pipe.poll(_START_S):
                raise RuntimeError("a worker did not come up")
            pipe.recv()
        time.sleep(_WARM_S)
        first, began, cpu = served.asked()
        slept = _slept(ours)
        time.sleep(window)
        last, ended, later = served.asked()
        slept = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(slept, _slept(ours))]
        for program in programs:
            program.kill()
            program.join()
    cores = sum(later.values()) - sum(cpu.values())
    allowed = sum(n / max(s, 1e-9) for n, s in slept)
    return {
        "tasks_per_s": (last - first) * shape.tasks / (ended - began),
        "allowed": allowed,
        "server_cores": cores / (ended - began),
    }


def _slept(pipes: Any) -> list[tuple[int, float]]:
    for pipe in pipes:
        pipe.send("?")
    return [pipe.recv() for pipe in pipes]


def run(quick: bool) -> dict[str, Any]:
    """The section: every way with every crew."""
    window, mb = (2.0, 0.1) if quick else (6.0, 1.2)
    crews, ways = (list(CREWS)[1:2], WAYS[::2]) if quick else (list(CREWS), WAYS)
    base, rows = Shape(floats(mb), workers=WORKERS, encrypt=True, still=False), []
    with Others() as others:
        for crew in crews:
            for name, stale, tasks in ways:
                shape = replace(base, name=name, max_staleness=stale, tasks=tasks)
                found = (server if name == "server" else allreduce)(shape, naps(crew, NAP_S), window)
                about = {"crew": crew, "exchange": name, "max_staleness": stale, "tasks": tasks}
                rows.append(about | {"share": found["tasks_per_s"] / found["allowed"]} | found)
                show(rows[-1:], head=len(rows) == 1)
    print(f"others kept {others.cores:.1f} cores busy")
    about = {"workers": WORKERS, "nap_s": NAP_S, "megabytes": mb, "encrypt": True, "window_s": window}
    return about | {"rows": rows, "others_cores": others.cores}


def show(rows: list[dict[str, Any]], head: bool = True) -> None:
    """Rows of the table."""
    if head:
        print(f"\n{'steps':<18}{'exchange':<38}{'tasks/s':>8}{'allowed':>9}  share of what the workers' speed allows")
    for r in rows:
        stale = f", max_staleness={r['max_staleness']}" if r["exchange"] == "server" else ""
        name = f"{r['exchange']}{stale}, tasks={r['tasks']}"
        print(f"{r['crew']:<18}{name:<38}{r['tasks_per_s']:>8.1f}{r['allowed']:>9.1f}  {r['share']:.1%}", flush=True)
