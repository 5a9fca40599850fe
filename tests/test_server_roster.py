"""What the server keeps besides its ledger: the parts of an evaluation, the roster of workers, what a checkpoint knows."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metadist.config import Config
from metadist.config_machine import ExchangeConfig
from metadist.exchange import roster, wire
from metadist.exchange.door import Peer
from metadist.exchange.judging import Judging
from metadist.exchange.ledger import Ledger, Plan
from metadist.exchange.roster import Roster
from metadist.exchange.server import Place, Server, item_size, plan_of
from metadist.exchange.wire import Malformed


def table_of(judging: Judging, part: int) -> torch.Tensor:
    return judging.networks(part).double() * torch.tensor([[1.0], [10.0]])


def test_an_evaluation_gives_each_network_once_and_what_comes_back_again() -> None:
    judging = Judging("validation", 2, 7, 3, b"")
    parts = [judging.issue() for _ in range(3)]
    assert judging.issue() is None
    assert [judging.networks(p).tolist() for p in parts if p] == [[0, 1, 2], [3, 4, 5], [6]]
    assert judging.header(parts[1] or 0) == {"purpose": "validation", "first": 3, "count": 3, "all": 7}
    judging.give_back(parts[1] or 0)
    judging.give_back(parts[1] or 0)
    assert judging.issue() == parts[1] and judging.issue() is None
    for part in parts:
        assert not judging.complete
        judging.put(part or 0, wire.block(table_of(judging, part or 0).view(-1)))
    assert judging.complete
    assert judging.table.tolist() == [list(range(7)), list(range(0, 70, 10))]
    judging.put(parts[0] or 0, wire.block(torch.zeros(6, dtype=torch.float64)))
    judging.give_back(parts[0] or 0)
    assert judging.table[0, 2] == 2 and judging.issue() is None


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(0), torch.full((6,), math.nan), torch.full((6,), math.inf)])
def test_an_evaluation_refuses_other_sizes_and_figures_that_are_none(wrong: torch.Tensor) -> None:
    judging = Judging("validation", 2, 3, 5, b"")
    part = judging.issue()
    with pytest.raises(Malformed):
        judging.put(part or 0, wire.block(wrong.double()))
    assert not judging.complete and judging.table.isnan().all()


def test_figures_of_this_very_process_are_taken_as_they_are() -> None:
    judging = Judging("validation", 2, 3, 5, b"")
    part = judging.issue()
    judging.put(part or 0, wire.block(table_of(judging, part or 0)))
    assert judging.complete


def peer(name: str) -> Peer:
    return Peer(name.encode(), name, "worker", b"", 0.0)


def test_the_roster_knows_who_waits_and_for_how_long_each_was_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(roster, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    there = Roster()
    first, second = there.join(peer("1@a:7")), there.join(peer("2@b:8"))
    first.waiting, second.waiting, first.joined, second.joined = 99.0, 98.0, 100.0, 100.0
    assert there.waiting() == [second, first] and second.waited == 2.0
    twin = Peer(b"other", "1@a:7", "worker", b"", 0.0)
    assert there.namesakes(twin) == [first] and there.namesakes(first.peer) == []
    clock[0] = 110.0
    for header in ({"busy_s": 3.0, "pull_ms": 4.0}, {"busy_s": 1, "pull_ms": 8.0}, {"busy_s": -5.0}):
        first.report(header)
    second.report({"busy_s": 1e9, "pull_ms": 2})
    assert there.figures() == {"workers_alive": 2.0, "pull_ms": 5.0, "utilisation/1": 0.4, "utilisation/2": 1.0}
    first.count("accepted", 3)
    first.count("stale", 3)
    row: dict[str, Any] = there.rows()[0]
    assert (row["worker"], row["tasks"], row["accepted"], row["stale"], row["utilisation"]) == ("1@a:7", 3, 1, 1, 0.4)
    there.leave(second)
    assert there.waiting() == [first] and there.seen == {"1", "2"}
    clock[0] = 120.0
    assert there.figures() == {"workers_alive": 1.0, "pull_ms": 8.0, "utilisation/1": 0.0}


def test_a_report_that_is_no_number_does_not_stay() -> None:
    worker = Roster().join(peer("1@a:7"))
    worker.report({"busy_s": 2.0, "pull_ms": 3.0})
    worker.report({"busy_s": math.nan, "pull_ms": math.inf, "push_ms": math.nan})
    assert (worker.busy_s, worker.last) == (2.0, {"pull_ms": 3.0})


def server_of(folder: Path, **exchange: Any) -> Server:
    config = Config(exchange=ExchangeConfig(name="server", **exchange))
    return Server(config, 1, Place(folder, "127.0.0.1", 1, lambda name, data: None, lambda text: None))


@pytest.mark.parametrize(
    ("tasks", "workers", "batch", "size"), [(8, 2, 0, 4), (8, 3, 0, 2), (8, 30, 0, 1), (6, 1, 4, 2), (6, 1, 0, 6), (7, 2, 0, 1)]
)
def test_an_item_is_a_workers_share_as_far_as_it_divides(tasks: int, workers: int, batch: int, size: int) -> None:
    config = Config(tasks=tasks, workers=workers, exchange=ExchangeConfig(name="server", batch=batch))
    assert item_size(config) == size
    config.exchange.item = 1
    assert item_size(config) == 1


def test_the_ledgers_sizes_follow_the_configuration_and_the_gradients_bytes() -> None:
    config = Config(steps=10, tasks=8, exchange=ExchangeConfig(name="server", batch=6, max_staleness=3))
    assert plan_of(config, 2, 1000) == Plan(30, 8, 2, 6, 3, 64)
    assert plan_of(config, 2, 10**8).queue == 10 and plan_of(config, 2, 10**9).queue == 6
    config.exchange.queue = 7
    assert plan_of(config, 2, 1000).queue == 7


def test_a_roll_back_to_the_very_start_hands_out_the_first_tasks_again(tmp_path: Path) -> None:
    server = server_of(tmp_path)
    start = json.loads(json.dumps(server.snapshot()))
    ledger = Ledger(Plan(total=8, tasks=4, item=1, batch=4, max_staleness=0, queue=8))
    server._hub = SimpleNamespace(ledger=ledger, changed=threading.Condition(), drops=[])  # type: ignore[assignment]
    ledger.publish()
    for lease in list(iter(ledger.issue, None)):
        ledger.push(lease.number, None)
    assert len(ledger.take()) == 4 and server.snapshot()["ledger"]["low"] == 4
    server.restore(start)
    ledger.publish()
    assert [lease.item for lease in iter(ledger.issue, None)] == [0, 1, 2, 3]


def test_a_server_that_is_to_stop_judges_by_itself_what_no_worker_is_there_for(tmp_path: Path) -> None:
    server = server_of(tmp_path, encrypt=False)
    server._stop = lambda: True
    phi = {"images": torch.arange(6.0).view(2, 3)}
    table = server.spread("evaluation", phi, 45, lambda some: torch.stack((some.double(), 10 * some.double())), 2)
    assert table.tolist() == [list(range(45)), list(range(0, 450, 10))]
    assert server.workers == 0 and server.snapshot() == {"ledger": {"item": 1, "low": 0, "done": []}}
    server.close()
