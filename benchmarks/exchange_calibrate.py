"""From what was measured to the simulation's costs; the pieces that section ``wire`` does not measure are measured here."""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from exchange_costs import SMALL, Costs, Curve, ring
from exchange_parts import SPAWN, Shape, floats

from metadist.exchange.allreduce import AllReduce, host
from metadist.exchange.door import Door, Peer
from metadist.exchange.hub import Hub
from metadist.exchange.keys import Secret
from metadist.exchange.ledger import Ledger, Plan
from metadist.exchange.roster import Worker
from metadist.run.state import MetaState


def _median(do: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        do()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _reduce(rank: int, world: int, store: str, sizes: list[float], pipe: Connection) -> None:
    torch.set_num_threads(1)
    exchange = AllReduce(Shape(1, 8, world, name="allreduce").config, rank, world, store, 1)
    for mb in sizes:
        values = torch.ones(floats(mb))
        exchange.sum(values)
        pipe.send(_median(functools.partial(exchange.sum, values), 15 if mb > 10 else 100))
    exchange.close()


def gloo(world: int, sizes: list[float]) -> list[float]:
    """Seconds of an all-reduce of each size by so many processes."""
    store, pipes, programs = host("127.0.0.1"), [], []
    for rank in range(world):
        ours, theirs = SPAWN.Pipe()
        args = (rank, world, f"127.0.0.1:{store.port}", sizes, theirs)
        programs.append(SPAWN.Process(target=_reduce, args=args, daemon=True))
        programs[-1].start()
        pipes.append(ours)
    times = [max(pipe.recv() for pipe in pipes) for _ in sizes]
    for program in programs:
        program.join()
    return times


def turn() -> dict[str, float]:
    """What a turn of the hub costs for each worker it knows, for each that waits, and ``take`` for each gradient queued."""
    known, found = 4096, dict[str, float]()
    plan = Plan(10**9, known, 1, 2 * known, 4, 4 * known)
    with tempfile.TemporaryDirectory() as folder:
        secret, shape = Secret.make(Path(folder)), Shape(1)
        door = Door("127.0.0.1", secret, False, {"incarnation": 1}, 64, lambda text: None)
        hub = Hub(door, shape.layout, Ledger(plan), 1e9, lambda record: None, lambda text: None)

        def look() -> None:
            hub._expire()
            hub._serve_waiting()

        nobody = _median(look, 200)
        for n in range(known):
            peer = Peer(b"%d" % n, f"{n}@host:1", "worker", b"", time.monotonic())
            hub.roster.workers[peer.routing] = Worker(peer)
        found["per_worker"] = (_median(look, 50) - nobody) / known
        for worker in hub.roster.workers.values():
            worker.waiting = time.monotonic()
        found["per_parked"] = (_median(look, 50) - nobody) / known - found["per_worker"]  # nothing is published: none gets work
        door.close()
    ledger = Ledger(plan)
    ledger.publish()
    for _ in range(known):
        ledger.push(ledger.issue().number, None)  # type: ignore[union-attr]
    return found | {"per_queued": _median(ledger.take, 50) / known}


def apply_seconds(mb: float) -> float:
    """The update of a meta-step."""
    state, total = MetaState({"images": torch.zeros(floats(mb))}, Shape(1).config.meta, 1), torch.ones(floats(mb) + 2)
    return _median(lambda: state.apply(total), 5 if mb > 10 else 40)


def measure(sizes: list[float]) -> dict[str, Any]:
    """Everything that this module measures, for so many MB."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {
        "sizes": sizes,
        "gloo": {n: gloo(n, sizes) for n in (2, 4)},
        "turn": turn(),
        "apply": [apply_seconds(mb) for mb in sizes],
    }
    torch.set_num_threads(before)
    return found


def fit_allreduce(sizes: list[float], times: dict[Any, list[float]]) -> tuple[float, float]:
    """(latency, MB/s) of latency * log2(N) + a ring's bytes / bandwidth, from the smallest size and from the largest."""
    latency = statistics.mean(seconds[0] / math.log2(int(n)) for n, seconds in times.items())
    pace = [(t[-1] - latency * math.log2(int(n))) / ring(sizes[-1], int(n)) for n, t in times.items()]
    return latency, 1 / statistics.mean(pace)


def costs(wired: dict[str, Any], measured: dict[str, Any]) -> Costs:
    """The simulation's costs, with encryption, from section ``wire`` and ``measure``."""
    rows = {(r["megabytes"], r["shards"]): r["seconds"] for r in wired["rows"] if r["encrypt"]}
    floods = {round(r["megabytes"], 4): r for r in wired["floods"] if r["encrypt"]}
    sizes = measured["sizes"]
    curves: dict[str, dict[float, float]] = {k: {} for k in ("io", "hub", "part", "step", "pull", "push")}
    for mb in sizes:
        used, n = floods[mb]["cpu_s"], floods[mb]["tasks"]
        wall = {k: v["median"] for k, v in rows[mb, 1].items()}
        # n items' sum and one step: of one item when idle, of n items when flooded
        part = min(wall["server"], max(0.0, (n * used["trainer"] - wall["server"]) / (n - 1)))
        found = {"io": used["io"], "hub": used["hub"], "part": part, "step": wall["server"] - part}
        found |= {what: max(0.0, wall[what] - (used["io"] + used["hub"]) / 2) for what in ("pull", "push")}
        for name, seconds in found.items():
            curves[name][mb] = seconds
    latency, bandwidth = fit_allreduce(sizes, measured["gloo"])
    flat: dict[str, Curve] = {k: tuple(v.items()) for k, v in curves.items()}
    flat |= {"apply": tuple(zip(sizes, measured["apply"])), "gather": ((0.0, 0.0), (1.0, 0.0))}
    plain = Costs(**flat, **measured["turn"], latency=latency, bandwidth=bandwidth)
    return _with_gather(plain, {mb: rows[mb, 2]["pull"]["median"] for mb in sizes[1:]})


def _with_gather(c: Costs, pulls: dict[float, float]) -> Costs:
    """What a pull from two shards takes beyond its parts is the worker's gathering."""

    def known(mb: float) -> float:
        def half(size: float) -> float:
            return (c.at("io", size) + c.at("hub", size)) / 2 + c.at("pull", size)

        return half(SMALL) + half(mb / 2)

    return replace(c, gather=((0.0, 0.0), *((mb, max(0.0, took - known(mb))) for mb, took in pulls.items())))
