"""Workers and servers that come, go, fall silent and come back: heartbeats, patience, parked pulls, the last word."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from server_cases import DEADLINE_S, LAYOUT, LONGEST, Asking, Honest, Stage, gradient, heard, item_of, until, work_for

from metadist.errors import Lost, RunError
from metadist.exchange import wire
from metadist.exchange.client import Client
from metadist.exchange.door import Door
from metadist.exchange.hub import Hub
from metadist.exchange.judging import Judging
from metadist.exchange.keys import Secret
from metadist.exchange.ledger import Ledger
from metadist.exchange.line import Line
from metadist.exchange.work import Judge, Leave, Settings, Work, facts

SOON_S = 0.2  # between heartbeats, where silence is to be noticed soon


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path, beat_s=getattr(request, "param", 2.0))
    yield made
    made.close()


soon = pytest.mark.parametrize("stage", [SOON_S], indirect=True, ids=["soon"])


def waiting(stage: Stage) -> int:
    with stage.hub.changed:
        return len(stage.hub.roster.waiting())


def test_pulls_that_wait_are_all_answered_when_a_version_comes(stage: Stage) -> None:
    asking = [Asking(stage.client(label)) for label in "12"]
    until(lambda: waiting(stage) == 2, "two waiting workers")
    assert stage.ledger.counts == {} and not any(a.found for a in asking)
    assert stage.publish() == 0
    works = [a.answer() for a in asking]
    assert sorted(item_of(w) for w in works) == [0, 1] and {w.version for w in works} == {0}
    for work, a in zip(works, asking, strict=True):
        a.client.push(work, gradient(item_of(work)), float(item_of(work)))
        assert item_of(a.client.next()) in (2, 3)
    stage.update()
    assert sorted(stage.applied) == [0, 1]
    assert {w["tasks"] for w in stage.hub.roster.rows()} == {1}
    for a in asking:
        a.client.close()


def test_whoever_asks_for_work_has_none_in_hand(stage: Stage) -> None:
    client = stage.client("1")
    stage.publish()
    first, again = client.next(), client.next()
    assert item_of(first) == item_of(again) == 0 and again.lease > first.lease
    assert torch.equal(again.phi, first.phi) and stage.ledger.counts == {"lost": 1}
    client.close()


def test_a_dismissed_worker_leaves_when_its_work_is_done_and_the_server_waits_for_it(stage: Stage) -> None:
    stage.publish()
    busy, parked = stage.client("1"), Asking(stage.client("2"))
    work = busy.next()
    parked.answer()
    parked = Asking(parked.client)
    assert isinstance(parked.answer(), Work)
    farewell = threading.Thread(target=stage.hub.dismiss, args=("finished", DEADLINE_S), daemon=True)
    farewell.start()
    until(lambda: stage.hub._leaving, "the dismissal")
    assert parked.client.next() == Leave("finished")
    parked.client.close()
    until(lambda: len(stage.hub.roster.workers) == 1, "one worker less")
    assert farewell.is_alive()
    busy.push(work, gradient(item_of(work)), float(item_of(work)))
    assert busy.next() == Leave("finished") and stage.ledger.counts["accepted"] == 1
    busy.close()
    farewell.join(DEADLINE_S)
    assert not farewell.is_alive() and stage.said == []


def test_a_worker_without_a_server_waits_for_its_patience_and_no_longer(tmp_path: Path) -> None:
    client = Client(tmp_path, LAYOUT, "c", Settings("1", True, 2.0, 0.3))
    text = f"no server answered for exchange.patience=0.3 s; is the server of run_dir={tmp_path} running?"
    with pytest.raises(Lost) as error:
        client.next()
    assert str(error.value) == text
    client.close()


@pytest.mark.parametrize("stage", [0.1], indirect=True)
def test_a_worker_gets_to_its_server_however_fast_the_heartbeat(stage: Stage) -> None:
    client = stage.client("1", patience_s=DEADLINE_S)
    stage.publish()
    assert item_of(client.next()) == 0
    client.close()


@soon
def test_a_server_that_goes_away_is_waited_for_as_long_as_patience_lasts(stage: Stage) -> None:
    asking = Asking(stage.client("1", patience_s=1.5))
    until(lambda: waiting(stage) == 1, "a waiting worker")
    stage.stop()
    assert isinstance(asking.answer(), Lost) and "exchange.patience=1.5 s" in str(asking.answer())
    asking.client.close()


@soon
def test_a_server_that_comes_back_elsewhere_is_found_by_those_who_wait_and_those_at_work(stage: Stage) -> None:
    busy = stage.client("2")
    stage.publish()
    work = busy.next()
    honest = Honest(stage.client("1"))  # not before: it would leave nothing for the other
    until(lambda: waiting(stage) == 1 and stage.ledger.queued == 5, "all that can be done without the other's item")
    stage.applied += [g.item for g in stage.taken()]
    first = stage.port
    stage.come_back()
    assert stage.port != first and stage.ledger.done == 2
    until(lambda: stage.update() or (waiting(stage) >= 0 and len(stage.applied) >= 20), "updates")
    busy.push(work, gradient(item_of(work)), float(item_of(work)))
    asking = Asking(busy)  # the other may have had all there was to do
    until(lambda: stage.update() or asking.found, "work")
    again = asking.answer()
    assert isinstance(again, Work) and busy._lines[0].incarnation == 2 and again.phi[0] == again.version
    assert item_of(work) in stage.applied and stage.ledger.counts["duplicate"] == stage.ledger.counts["stale"] == 0
    busy.close()
    stage.hub.dismiss("finished", DEADLINE_S)
    assert honest.leave() == "finished"


def hold(folder: Path, pipe: Connection) -> None:
    """A worker that keeps its first item until it is told to go on."""
    client = Client(folder, LAYOUT, "c", Settings("child", True, SOON_S, DEADLINE_S))
    for _ in range(2):
        work = client.next()
        assert isinstance(work, Work)
        pipe.send(item_of(work))
        pipe.recv()
        client.push(work, gradient(item_of(work)), float(item_of(work)))
    Honest(client).join()


@soon
def test_a_worker_that_falls_silent_loses_its_item_and_comes_back_as_if_it_were_new(stage: Stage) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", "metadist.exchange"])
    pipe, theirs = context.Pipe()
    child = context.Process(target=hold, args=(stage.folder, theirs), daemon=True)
    child.start()
    theirs.close()
    stage.publish()
    assert pipe.poll(DEADLINE_S) and pipe.recv() == 0
    with stage.hub.changed:
        (worker,) = stage.hub.roster.workers.values()
    until(lambda: worker.peer.received > 8, "more heartbeats than may be missed")
    assert worker.lease is not None and stage.ledger.counts == {}
    os.kill(child.pid or 0, signal.SIGSTOP)
    honest = Honest(stage.client("1"))
    until(lambda: stage.update() or 0 in stage.applied, "its item from another")
    assert stage.ledger.counts["lost"] == 1 and len(stage.said) == 1
    assert stage.said[0].startswith("worker child is lost (silent for ") and stage.said[0].endswith(" s); 1 at work")
    os.kill(child.pid or 0, signal.SIGCONT)
    pipe.send("go on")
    until(lambda: stage.update() or pipe.poll(), "work for it again")
    item = pipe.recv()
    pipe.send("go on")
    until(lambda: stage.update() or item in stage.applied, "what it pushed")
    stage.hub.dismiss("finished", DEADLINE_S)
    child.join(DEADLINE_S)
    assert child.exitcode == 0 and honest.leave() == "finished" and stage.ledger.counts["lost"] == 1


def test_one_that_comes_back_on_another_connection_takes_its_own_place(stage: Stage) -> None:
    before, after = stage.opened("2"), stage.opened("2")
    lease, item = work_for(stage, before)
    assert work_for(stage, after)[1] == item and stage.ledger.counts == {"lost": 1}
    assert [w.label for w in stage.hub.roster.workers.values()] == ["2"]
    before.send({"k": "push", "lease": lease, "loss": 0.0}, bytes(LONGEST))
    assert until(lambda: heard(before), "an answer")[0][0] == {"k": "unknown"}
    assert not before.open and stage.ledger.queued == 0


def test_a_push_that_does_not_count_takes_no_gradient_from_the_shards(tmp_path: Path) -> None:
    stage = Stage(tmp_path, shards=("tcp://127.0.0.1:1",))
    line, thief = stage.opened("2"), stage.opened("3")
    stage.hub.publish(None)
    line.send({"k": "pull"})
    lease = until(lambda: heard(line), "work")[0][0]["lease"]
    for sender, verdict in ((thief, "duplicate"), (line, "accepted"), (line, "duplicate")):
        sender.send({"k": "push", "lease": lease, "loss": 0.0})
        assert until(lambda one=sender: heard(one), "a verdict")[0][0]["verdict"] == verdict
    drops = list(stage.hub.drops)
    stage.close()
    assert drops == []


def test_the_parts_of_an_evaluation_go_before_tasks_and_out_again_if_their_figures_are_none(stage: Stage) -> None:
    stage.publish()
    phi, clients = gradient(3), [stage.client(label) for label in "12"]
    judging = Judging("validation", 2, 5, 3, wire.block(phi))
    stage.hub.judge(judging)
    parts: list[Any] = [client.next() for client in clients]
    assert [(p.purpose, p.first, p.count, p.all) for p in parts] == [("validation", 0, 3, 5), ("validation", 3, 2, 5)]
    assert all(isinstance(p, Judge) and torch.equal(p.phi, phi) for p in parts)
    for number, wrong in enumerate((torch.zeros(2, 2), torch.full((2, 3), torch.nan)), 1):
        clients[0].judged(parts[0], wrong.double())
        parts[0] = clients[0].next()
        assert parts[0].first == 0 and stage.door.refusals == {"a malformed message": number}
    assert "(a block of 32 bytes, 48 expected)" in stage.said[-1]
    clients[1].close()
    until(lambda: len(stage.hub.roster.workers) == 1, "one worker less")
    for _ in range(2):
        networks = torch.arange(parts[0].first, parts[0].first + parts[0].count)
        clients[0].judged(parts[0], torch.stack((networks, 10 * networks)).double())
        parts[0] = clients[0].next()
    assert judging.complete and judging.table.tolist() == [[0, 1, 2, 3, 4], [0, 10, 20, 30, 40]]
    assert isinstance(parts[0], Work) and parts[0].version == 0
    stage.hub.judge(None)
    clients[0].close()


@pytest.mark.parametrize(
    ("fault", "told"), [(RunError("the disk is full"), "the disk is full"), (KeyError("x"), "thread failed")]
)
def test_what_ends_the_servers_thread_is_told_to_the_trainer(stage: Stage, fault: Exception, told: str) -> None:
    def record(row: dict[str, Any]) -> None:
        raise fault

    door = Door("127.0.0.1", stage.secret, True, {}, LONGEST, stage.said.append)
    hub = Hub(door, LAYOUT, Ledger(stage.ledger.plan), 2.0, record, stage.said.append)
    hub.start()
    until(lambda: hub.failure, "the failure")
    with pytest.raises(RunError if isinstance(fault, RunError) else RuntimeError, match=told):
        hub.check()
    hub.stop()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[tuple[Door, Line]]:
    """A door that nobody serves yet, and one who has just knocked."""
    secret, context = Secret.make(tmp_path), zmq.Context()
    said = facts("c", LAYOUT, secret.run, "1")
    made = Door("127.0.0.1", secret, True, said | {"incarnation": 1}, LONGEST, lambda text: None)
    line = Line(context, made.address, secret, True, said, LONGEST)
    yield made, line
    line.close()
    context.term()
    made.close()


def test_a_hello_is_said_as_soon_as_there_is_a_connection(door: tuple[Door, Line]) -> None:
    made, line = door
    line.hello()
    until(lambda: line.socket.poll(10, zmq.POLLOUT), "a connection")
    line.hello()
    assert made.socket.poll(500)


def test_a_hello_that_was_said_twice_opens_the_line(door: tuple[Door, Line]) -> None:
    made, line = door
    until(lambda: line.socket.poll(10, zmq.POLLOUT), "a connection")
    for _ in range(2):
        line._said = 0.0
        line.hello()
    until(lambda: list(made.messages()) or heard(line) or line.open, "a welcome")
    line.send({"k": "ping"})
    assert made.socket.poll(10_000) and [header["k"] for _, header, _ in made.messages()] == ["ping"]


def test_a_worker_that_leaves_was_no_stranger_however_late_its_arrival_is_looked_at(door: tuple[Door, Line]) -> None:
    made, line = door
    until(lambda: line.socket.poll(10, zmq.POLLOUT), "a connection")
    line.hello()
    until(lambda: list(made.messages()) or heard(line) or line.open, "a welcome")
    made.watch()
    line.close()
    assert made.monitor.poll(10_000)
    made.watch()
    assert not made.refusals
