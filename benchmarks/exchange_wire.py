"""Section ``wire``: pulls and pushes of the real exchange beside bare sockets and bare ZeroMQ; what they cost the server.

Design choices
- Ways take turns, a repetition of each after the other, on one machine at once.
- A push is timed from the call to the verdict's arrival: nobody waits for it, but until then it is no push.
- A pull is timed from the call of ``next`` to its return, of a server at rest: the pull right behind a push would be timed
  with the meta-step that the push sets off. That one's wait for the new version, which the server says, is ``server``.
- What the server's process pays is counted in CPU seconds of its threads: the simulation is made of these.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import zmq
from exchange_bare import Peer, bare
from exchange_parts import SPAWN, Others, Shape, Watched, floats, middle, serving

from metadist.exchange import wire
from metadist.exchange.keys import Secret, find_server
from metadist.exchange.line import Line
from metadist.exchange.work import Work, facts
from metadist.identity import identity_hash

Times = dict[str, list[float]]
SIZES = (0.004, 1.2, 3.0, 40.0)  # MB
_WARM = 5
_START_S = 12.0  # for two processes to start


def _next(client: Watched) -> Work:
    found = client.next()
    assert isinstance(found, Work)
    return found


def _real(client: Watched, work: Work, grad: torch.Tensor, times: Times) -> Work:
    """Push, wait for the new version, pull it once more."""
    began = time.perf_counter()
    client.push(work, grad, 0.0)
    verdict, came = client.verdicts.get()
    assert verdict == "accepted"
    times["push"].append(came - began)
    _next(client)
    times["server"].append(client.waited_s)
    client.forget_parameters()
    began = time.perf_counter()
    work = _next(client)
    times["pull"].append(time.perf_counter() - began)
    return work


def _bare(name: str, peer: Peer, size: int, times: Times) -> None:
    for what, do in (("push", peer.push), ("pull", peer.pull)):
        began = time.perf_counter()
        do(size)
        times[f"{name} {what}"].append(time.perf_counter() - began)


def case(shape: Shape, repeats: int) -> dict[str, Any]:
    """One row: medians in seconds, ratios to bare sockets and to bare ZeroMQ."""
    times: Times = {f"{way}{what}": [] for way in ("", "sockets ", "zmq ") for what in ("push", "pull")} | {"server": []}
    size = shape.floats * 4
    with tempfile.TemporaryDirectory() as folder, Others() as others, serving(shape, Path(folder)), bare() as peers:
        client = Watched(shape, Path(folder), "1")
        work, grad = _next(client), torch.ones(shape.floats)
        for turn in range(repeats + _WARM):
            if turn == _WARM:
                times = {k: [] for k in times}
            work = _real(client, work, grad, times)
            for name in sorted(peers, reverse=bool(turn % 2)):
                _bare(name, peers[name], size, times)
        client.close()
    found = {k: middle(v) for k, v in times.items()}
    ratios = {
        f"{what} / {way}": found[what]["median"] / found[f"{way} {what}"]["median"]
        for what in ("pull", "push")
        for way in ("sockets", "zmq")
    }
    return {"megabytes": size / 1e6, "encrypt": shape.encrypt, "shards": shape.shards, "repeats": repeats,
            "seconds": found, "ratios": ratios, "others_cores": others.cores}  # fmt: skip


def _hurry(shape: Shape, folder: str, first: int, lines: int, seconds: float) -> None:
    """A process of workers without a thread each: as many lines, which push as soon as there is work."""
    torch.set_num_threads(1)
    context, secret = zmq.Context(), Secret.read(Path(folder))
    address = find_server(Path(folder)).addresses[0]
    grad, poller = wire.block(torch.ones(shape.floats)), zmq.Poller()
    known, have = dict[Any, Line](), dict[Any, int]()
    for n in range(first, first + lines):
        said = facts(identity_hash(shape.config), shape.layout, secret.run, str(n))
        line = Line(context, address, secret, shape.encrypt, said, shape.floats * 4)
        poller.register(line.socket, zmq.POLLIN)
        known[line.socket] = line
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        for line in known.values():
            line.hello()
        for socket, _ in poller.poll(100):
            for header, content in known[socket].messages():
                if header["k"] == "work":
                    have[socket] = header["version"] if content is not None else have[socket]
                    known[socket].send({"k": "push", "lease": header["lease"], "loss": 0.0}, grad)
                if header["k"] in ("work", "welcome"):
                    known[socket].send({"k": "pull", "have": have.get(socket, 0)} if socket in have else {"k": "pull"})


def flood(megabytes: float, encrypt: bool, quick: bool) -> dict[str, Any]:
    """The server with more to do than it can: items it takes in a second, CPU seconds of its threads for one.

    Every worker pulls every version once, on average: a version takes as many items as there are workers.
    """
    lines, seconds = (16, 2.0 if quick else 6.0) if megabytes < 10 else (6, 20.0)
    shape = Shape(floats(megabytes), 2 * lines, 2 * lines, max_staleness=4, encrypt=encrypt)
    with tempfile.TemporaryDirectory() as folder, serving(shape, Path(folder)) as server:
        crowd = [
            SPAWN.Process(target=_hurry, args=(shape, folder, first, lines, _START_S + seconds), daemon=True)
            for first in (0, lines)
        ]
        for program in crowd:
            program.start()
        time.sleep(_START_S)
        steps, began, before = server.asked()
        time.sleep(seconds - 1.0)
        later, ended, after = server.asked()
        for program in crowd:
            program.join()
    items = (later - steps) * shape.tasks
    used = {k: (after[k] - before[k]) / max(items, 1) for k in after}
    about = {"megabytes": shape.floats * 4e-6, "encrypt": encrypt, "tasks": shape.tasks}
    return about | {"items_per_s": items / max(ended - began, 1e-9), "cpu_s": used}


def run(quick: bool) -> dict[str, Any]:
    """The section; the simulation needs all sizes, those of --quick are close together."""
    rows, sizes = [], SIZES[:2] if quick else SIZES
    for mb, shards, encrypt in itertools.product(sizes, (1, 2), (False, True)):
        if shards == 1 or mb > SIZES[0]:
            rows.append(case(Shape(floats(mb), encrypt=encrypt, shards=shards), 10 if quick else 30 if mb > 10 else 200))
            show(rows[-1:], head=len(rows) == 1)
    floods = [flood(mb, encrypt, quick) for encrypt in (False, True) for mb in sizes]
    show_floods(floods)
    return {"rows": rows, "floods": floods}


def show(rows: list[dict[str, Any]], head: bool = True) -> None:
    """Rows of the table."""
    if head:
        print(f"\n{'wire, medians in ms':<30}{'pull':>8}{'push':>8} |{'zmq':>7}{'':>8} |{'sockets':>7}{'':>8} | "
              "ratio to sockets (to zmq)       others")  # fmt: skip
    for r in rows:
        ms = {k: 1e3 * v["median"] for k, v in r["seconds"].items()}
        what = f"{r['megabytes']:g} MB, {r['shards']} shard{'s' * (r['shards'] > 1)}{', CURVE' * r['encrypt']}"
        x = r["ratios"]
        print(f"{what:<30}{ms['pull']:>8.2f}{ms['push']:>8.2f} |{ms['zmq pull']:>7.2f}{ms['zmq push']:>8.2f} |"
              f"{ms['sockets pull']:>7.2f}{ms['sockets push']:>8.2f} | pull {x['pull / sockets']:.2f} ({x['pull / zmq']:.2f})  "
              f"push {x['push / sockets']:.2f} ({x['push / zmq']:.2f})  {r['others_cores']:.1f} cores", flush=True)  # fmt: skip


def show_floods(rows: list[dict[str, Any]]) -> None:
    """What a server can take."""
    print(f"\n{'one server, flooded':<30}{'items/s':>9}   CPU ms an item: {'hub':>8}{'io':>9}{'trainer':>9}")
    for r in rows:
        ms = {k: 1e3 * v for k, v in r["cpu_s"].items()}
        name = f"{r['megabytes']:g} MB{', CURVE' * r['encrypt']}"
        print(f"{name:<30}{r['items_per_s']:>9.1f}{'':19}{ms['hub']:>8.3f}{ms['io']:>9.3f}{ms['trainer']:>9.3f}")
