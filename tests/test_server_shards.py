"""Shards of the parameter server as real processes: what they hand out, what they sum, and what becomes of it when one dies."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq
from server_cases import BEAT_S, DEADLINE_S, LAYOUT, Asking, Stage, heard, item_of, until

from metadist.config import Config
from metadist.config_machine import ExchangeConfig
from metadist.errors import Lost
from metadist.exchange import shard as shard_module
from metadist.exchange import wire
from metadist.exchange.carrier import Carrier
from metadist.exchange.client import Client
from metadist.exchange.door import Door
from metadist.exchange.hub import Hub
from metadist.exchange.keys import Secret
from metadist.exchange.ledger import Ledger, Plan
from metadist.exchange.line import Line
from metadist.exchange.server import Place, Server
from metadist.exchange.shard import Shard
from metadist.exchange.shards import Shards
from metadist.exchange.wire import Layout
from metadist.exchange.work import Leave, Settings, Work, facts
from metadist.identity import identity_hash

MOST = 6  # gradients that a shard keeps


def numbers(seed: int, layout: Layout = LAYOUT) -> torch.Tensor:
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(layout.dtype)


class Hand:
    """A worker's hold on shards, without a server."""

    def __init__(self, shards: Shards, secret: Secret, layout: Layout) -> None:
        self.layout, self.carrier, self.context = layout, Carrier(layout), zmq.Context()
        said = facts("c", layout, secret.run, "hand")
        longest = layout.size * layout.dtype.itemsize
        self.lines = [Line(self.context, address, secret, True, said, longest) for address in shards.addresses]
        for line in self.lines:
            until(lambda one=line: one.socket.poll(10, zmq.POLLOUT), "a connection")
            line.hello()
            until(lambda one=line: heard(one) or one.open, "a welcome")

    def ask(self, lease: int, version: int) -> None:
        self.carrier.fetch(self.lines, {"k": "work", "lease": lease, "version": version})

    def lay(self, lease: int, grad: torch.Tensor) -> None:
        self.carrier.lay(self.lines, {"k": "push", "lease": lease, "loss": 0.0}, grad.to(self.layout.wire))

    def done(self) -> list[Any]:
        found = []
        for number, line in enumerate(self.lines):
            for header, content in heard(line):
                found.append(self.carrier.heard(number, len(self.lines), header, content))
        return [one for one in found if one is not None]

    def outcome(self) -> tuple[str, torch.Tensor | None]:
        """What comes of the next thing that is complete."""
        name, _, flat = until(self.done, "an answer")[0]
        return name, flat

    def close(self) -> None:
        for line in self.lines:
            line.close()
        self.context.term()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def secret(folder: Path) -> Secret:
    return Secret.make(folder)


def shards_of(secret: Secret, count: int, layout: Layout = LAYOUT, most: int = MOST) -> Shards:
    said = {"protocol": wire.PROTOCOL, "run": secret.run, "config": "c", "layout": layout.digest, "incarnation": 1}
    return Shards(count, "127.0.0.1", secret, True, said, layout, most)


@pytest.fixture(scope="module")
def shards(secret: Secret) -> Iterator[Shards]:
    made = shards_of(secret, 3)
    yield made
    made.close()


@pytest.fixture
def hand(shards: Shards, secret: Secret) -> Iterator[Hand]:
    made = Hand(shards, secret, LAYOUT)
    yield made
    made.close()


versions = iter(range(10, 1000, 10))


def test_a_version_is_gathered_bit_for_bit_and_only_the_newest_two_are_kept(shards: Shards, hand: Hand) -> None:
    version = next(versions)
    for number in range(3):
        shards.publish(version + number, numbers(version + number))
    shards.sum([], [])
    for number, expected in enumerate(("failed", "gathered", "gathered")):
        hand.ask(number + 1, version + number)
        name, flat = hand.outcome()
        assert name == expected
        assert flat is None if number == 0 else torch.equal(flat, numbers(version + number))


def test_a_version_that_is_yet_to_come_is_waited_for(shards: Shards, hand: Hand) -> None:
    version = next(versions)
    shards.publish(version, numbers(1))
    hand.ask(1, version + 1)
    hand.ask(2, version)
    assert torch.equal(hand.outcome()[1], numbers(1)) and hand.done() == []
    shards.publish(version + 1, numbers(2))
    assert torch.equal(hand.outcome()[1], numbers(2))


def test_weighted_sums_are_those_of_one_process(shards: Shards, hand: Hand) -> None:
    grads = [numbers(seed) for seed in range(5)]
    for lease, grad in enumerate(grads, 1):
        hand.lay(lease, grad)
        assert hand.outcome() == ("laid", None)
    weights = [1.0, 0.5, 3.0**-0.7]
    found = shards.sum([5, 1, 3], weights)
    local = sum(w * g for w, g in zip(weights, (grads[4], grads[0], grads[2]), strict=True))
    assert ((found - local).abs() <= 1e-15 * local.abs().clamp(min=1)).all()
    shards.drop([2])
    assert torch.equal(shards.sum([4], [1.0]), grads[3])
    assert torch.equal(shards.sum([], []), torch.zeros(LAYOUT.size, dtype=torch.float64))
    with pytest.raises(Lost, match="shard 0 has lost gradients"):
        shards.sum([2], [1.0])
    shards.mend()
    hand.lay(9, grads[1])
    assert hand.outcome() == ("laid", None)
    assert torch.equal(shards.sum([9], [2.0]), 2 * grads[1])


def test_a_shard_that_is_full_says_so_and_has_room_again_when_a_gradient_is_dropped(shards: Shards, hand: Hand) -> None:
    for lease in range(100, 100 + MOST):
        hand.lay(lease, numbers(lease))
        assert hand.outcome()[0] == "laid"
    hand.lay(200, numbers(0))
    assert hand.outcome()[0] == "failed"
    shards.drop(list(range(100, 100 + MOST)))
    shards.sum([], [])
    hand.lay(201, numbers(201))
    assert hand.outcome()[0] == "laid"
    assert torch.equal(shards.sum([201], [1.0]), numbers(201))


def test_a_worker_whose_version_is_gone_asks_anew_and_gets_the_newest(shards: Shards, folder: Path) -> None:
    version = next(versions)
    for number in range(3):
        shards.publish(version + number, numbers(version + number))
    shards.sum([], [])
    stage = Stage(folder, shards=tuple(shards.addresses))
    asking = Asking(stage.client("1"))
    stage.ledger.made = version
    stage.hub.publish(None)
    until(lambda: stage.ledger.counts["lost"] >= 2, "that it asks anew")
    assert not asking.found
    stage.ledger.made = version + 2
    stage.hub.publish(None)
    work = asking.answer()
    assert (work.version, item_of(work)) == (version + 2, 0) and torch.equal(work.phi, numbers(version + 2))
    until(lambda: stage.hub.drops, "leases that nobody will ask for")
    assert work.lease not in stage.hub.drops
    asking.client.close()
    stage.close()


STEPS, TASKS = 40, 4
SPREAD = Layout(("images",), ((STEPS * TASKS,),), torch.float32, torch.bfloat16)


class State:
    """Counts what is applied: every item's gradient is its own unit vector."""

    def __init__(self) -> None:
        self.phi = {"images": numbers(0, SPREAD)}
        self.published = [self.phi["images"]]
        self.applied = torch.zeros(SPREAD.size)

    def apply(self, total: torch.Tensor) -> State:
        assert total[-2:].tolist() == [TASKS / 2, TASKS]
        self.applied += total[:-2]
        self.phi = {"images": numbers(len(self.published), SPREAD)}
        self.published.append(self.phi["images"])
        return self


class Unit(threading.Thread):
    """A worker that answers with unit vectors, and looks at what it is given."""

    def __init__(self, client: Client, state: State) -> None:
        super().__init__(daemon=True)
        self.client, self.state, self.error = client, state, list[Exception]()
        self.start()

    def run(self) -> None:
        try:
            while not isinstance(what := self.client.next(), Leave):
                assert isinstance(what, Work) and torch.equal(what.phi, self.state.published[what.version].bfloat16())
                grad = torch.zeros(SPREAD.size, dtype=torch.bfloat16)
                grad[what.step * TASKS + what.first] = 1.0
                self.client.push(what, grad, 0.5)
        except Exception as e:
            self.error.append(e)
        finally:
            self.client.close()


def served(folder: Path, said: list[str], **exchange: Any) -> Server:
    keys = {"shards": 2, "wire": "bfloat16", "max_staleness": 2, "heartbeat_s": 0.2, "patience": DEADLINE_S} | exchange
    config = Config(steps=STEPS, tasks=TASKS, exchange=ExchangeConfig(name="server", **keys))
    place = Place(folder, "127.0.0.1", 1, lambda name, data: (folder / name).write_bytes(data), said.append)
    return Server(config, 1, place)


def test_a_shard_that_is_killed_is_mended_and_every_item_is_applied_exactly_once(tmp_path: Path) -> None:
    said: list[str] = []
    server, state = served(tmp_path, said), State()
    server._start(state.phi)
    identity = identity_hash(server.config)
    workers = [Unit(Client(tmp_path, SPREAD, identity, Settings(n, True, 0.2, DEADLINE_S)), state) for n in "12"]
    lost = -1.0
    for step in range(STEPS):
        if step == 10:
            until(lambda: server._hub and server._hub.ledger.queued >= 2, "gradients that lie with the shards")
            lost = server.figures()[0]["lost"]
            victim = server._shards._programs[1]
            victim.kill()
        state, leave = server.step(state, TASKS, lambda s, t: t, State.apply, lambda: False)
        assert not leave
    values, spread = server.figures()
    assert torch.equal(state.applied, torch.ones(SPREAD.size))
    assert values["lost"] >= lost + 2 and max(spread["staleness"]) <= 2
    assert [line for line in said if line.endswith("another takes its place, and its tasks are computed again")]
    server.close()
    for pipe in (victim.stdin, victim.stdout):
        pipe.close()
    for worker in workers:
        worker.join(DEADLINE_S)
        assert not worker.is_alive() and not worker.error


def serving(pipe: Connection, folder: Path) -> None:
    made = shards_of(Secret.make(folder), 2)
    pipe.send([program.pid for program in made._programs])
    pipe.recv()


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_shards_end_with_their_server_even_if_it_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", "metadist.exchange"])
    pipe, theirs = context.Pipe()
    child = context.Process(target=serving, args=(theirs, tmp_path), daemon=True)
    child.start()
    assert pipe.poll(DEADLINE_S)
    pids = pipe.recv()
    assert len(pids) == 2 and not any(gone(pid) for pid in pids)
    os.kill(child.pid or 0, signal.SIGKILL)
    until(lambda: all(gone(pid) for pid in pids), "the end of its shards")
    child.join(DEADLINE_S)


class Noted:
    """Stands for shards: which gradients were summed, and which it was told to drop."""

    alive = True

    def __init__(self) -> None:
        self.done: list[int] = []

    def publish(self, version: int, flat: torch.Tensor) -> None: ...

    def drop(self, leases: list[int]) -> None:
        self.done += leases

    def sum(self, leases: list[int], weights: list[float]) -> torch.Tensor:
        self.done += leases
        return torch.zeros(SPREAD.size)


def test_every_accepted_gradient_leaves_the_shards_again(tmp_path: Path) -> None:
    server, shards = served(tmp_path, []), Noted()
    ledger = Ledger(Plan(total=9, tasks=1, item=1, batch=1, max_staleness=1, queue=8))
    hub = Hub(None, SPREAD, ledger, BEAT_S, lambda row: None, lambda text: None, inline=False)  # type: ignore[arg-type]
    server._hub, server._shards = hub, shards  # type: ignore[assignment]
    out, accepted = list[int](), set[int]()

    def work() -> bool:
        out.extend(lease.number for lease in iter(ledger.issue, None))
        overtaking = [*out[1:], *out[:1]] if ledger.made else out[1:2]
        for number in overtaking if ledger.made == ledger.version else []:
            out.remove(number)
            accepted.add(number)
            assert ledger.push(number, SimpleNamespace(loss=0.0)) == "accepted"
        return False

    state = SimpleNamespace(phi={"images": numbers(0, SPREAD)})
    for _ in range(6):
        server.step(state, 1, lambda s, t: t, lambda s, total: s, work)
    assert ledger.counts["stale"] >= 1
    assert accepted - set(shards.done) == {gradient.lease for gradient in ledger._queue}


@pytest.fixture
def quick_shard(secret: Secret, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Door, list[float]]]:
    """A shard in this process, and how far its clock is ahead."""
    said = {"protocol": wire.PROTOCOL, "run": secret.run, "config": "c", "layout": LAYOUT.digest, "incarnation": 1}
    door, ahead = Door("127.0.0.1", secret, True, said, LAYOUT.size * 8, lambda text: None), [0.0]
    monkeypatch.setattr(shard_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0]))
    read, write = os.pipe()
    with open(read) as order:  # noqa: PTH123
        monkeypatch.setattr(shard_module, "sys", SimpleNamespace(stdin=order))
        thread = threading.Thread(target=Shard(door, LAYOUT.size, LAYOUT.wire, LAYOUT.dtype, MOST).serve, daemon=True)
        thread.start()
        yield door, ahead
        os.close(write)
        thread.join(DEADLINE_S)
        door.close()


class Program:
    """Stands for a shard's process."""

    def __init__(self) -> None:
        self.pid, self.status = 0, None
        self.stdin, self.stdout = io.StringIO(), io.StringIO()

    def poll(self) -> int | None:
        return self.status

    def wait(self, seconds: float | None = None) -> int | None:
        return self.status


@pytest.fixture
def server(quick_shard: tuple[Door, list[float]], secret: Secret, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shards]:
    """The server's hold on that one shard."""
    monkeypatch.setattr(Shards, "_start", lambda *_: Program())
    monkeypatch.setattr(Shards, "_address", lambda *_: quick_shard[0].address)
    made = shards_of(secret, 1)
    yield made
    made.close()


def test_a_server_is_known_to_its_shards_however_long_a_meta_step_takes(
    quick_shard: tuple[Door, list[float]], server: Shards, secret: Secret
) -> None:
    worker = Hand(server, secret, LAYOUT)
    quick_shard[1][0] = 700.0
    for _ in range(2):
        worker.lines[0].send({"k": "ping"})
        until(lambda: heard(worker.lines[0]), "an answer")
    quick_shard[1][0] = 0.0
    worker.close()
    server.publish(1, numbers(1))
    server._lines[0].send({"k": "collect"})
    assert [header["k"] for header, _ in until(lambda: heard(server._lines[0]), "an answer")] == ["sum"]


def test_nothing_of_a_dead_shard_stays_open(server: Shards) -> None:
    dead: Any = server._programs[0]
    dead.status = -9
    assert not server.alive and server.mend() == [0] and server.alive
    server.publish(1, numbers(1))
    assert torch.equal(server.sum([], []), torch.zeros(LAYOUT.size, dtype=torch.float64))
    assert dead.stdin.closed and dead.stdout.closed
