"""The exchange: shares of tasks, and all-reduce between real processes over gloo on loopback."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from metadist.config import Config
from metadist.config_machine import ExchangeConfig
from metadist.errors import RunError, UserError
from metadist.exchange import connect
from metadist.exchange.allreduce import Alone, host, share

DEADLINE_S = 60.0  # only reached by a defect


@pytest.mark.parametrize("tasks", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_partition_the_tasks(tasks: int, world: int) -> None:
    parts = [share(tasks, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(parts), torch.arange(tasks))  # all of them, once, in order
    sizes = [len(p) for p in parts]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert all(p.dtype == torch.int64 for p in parts)


def configured(timeout_s: float = DEADLINE_S) -> Config:
    return Config(device="cpu", exchange=ExchangeConfig(timeout_s=timeout_s))


def test_one_worker_needs_nobody() -> None:
    alone = connect(configured())
    assert isinstance(alone, Alone) and (alone.rank, alone.world) == (0, 1)
    state, leave = alone.step(10.0, 4, lambda s, t: t * s, lambda s, total: s + float(total.sum()), lambda: False)
    assert (state, leave) == (70.0, False)
    assert alone.step(0.0, 1, lambda s, t: t, lambda s, total: s, lambda: True)[1] is True
    assert alone.sum(torch.tensor([3.0])).tolist() == [3.0]


def test_unknown_exchange() -> None:
    config = configured()
    config.exchange.name = "alreduce"
    with pytest.raises(UserError, match=r"exchange=alreduce is unknown; did you mean allreduce\?"):
        connect(config)


def one_worker(pipe: Connection, rank: int, world: int, address: str, timeout_s: float, body: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        pipe.send(("done", BODIES[body](connect(configured(timeout_s), rank, world, address, 1), pipe)))
    except RunError as error:
        pipe.send(("fault", str(error)))


def together(world: int, body: str, timeout_s: float = DEADLINE_S) -> tuple[list[Any], list[Connection], Any]:
    """Start ``world`` processes that run ``body``; the caller keeps the store until they have ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", "metadist.exchange"])
    store = host("127.0.0.1")
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe()
        processes.append(
            context.Process(
                target=one_worker, args=(theirs, rank, world, f"127.0.0.1:{store.port}", timeout_s, body), daemon=True
            )
        )
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    return processes, pipes, store


def heard(pipe: Connection) -> Any:
    assert pipe.poll(DEADLINE_S), "a worker says nothing"
    return pipe.recv()


def meta_steps(link: Any, pipe: Connection) -> str:
    """Five tasks, task t of step s contributes (t + 1) * (s + 1) and one to the count; rank 1 asks to stop at step 2."""
    seen: list[Any] = []

    def compute(step: int, tasks: torch.Tensor) -> torch.Tensor:
        return torch.stack(((tasks + 1.0).sum() * (step + 1), torch.tensor(float(len(tasks))))).double()

    def apply(step: int, total: torch.Tensor) -> int:
        seen.append(total.tolist())
        return step + 1

    step, leave = 0, False
    while not leave:
        step, leave = link.step(step, 5, compute, apply, lambda at=step: link.rank == 1 and at >= 2)
    total = link.sum(torch.tensor([link.rank + 1, 10], dtype=torch.int64))
    link.close()
    return json.dumps({"steps": step, "seen": seen, "sum": total.tolist(), "rank": link.rank, "world": link.world})


def wait_for_the_dead(link: Any, pipe: Connection) -> str:
    link.sum(torch.ones(3))
    pipe.send(("joined", os.getpid()))
    if link.rank == 0:
        time.sleep(2 * DEADLINE_S)  # it is killed here
    link.sum(torch.ones(3))
    return "it came back"


def wait_for_the_late(link: Any, pipe: Connection) -> str:
    link.sum(torch.ones(3))
    if link.rank == 0:
        pipe.recv()  # alive, but never there
    link.sum(torch.ones(3))
    return "it came"


BODIES = {"steps": meta_steps, "dead": wait_for_the_dead, "late": wait_for_the_late}


@pytest.mark.parametrize("world", [2, 3])
def test_sums_and_a_common_stop(world: int) -> None:
    processes, pipes, _store_kept = together(world, "steps")
    for rank, pipe in enumerate(pipes):
        kind, text = heard(pipe)
        assert kind == "done", text
        found = json.loads(text)
        assert found["seen"] == [[15.0, 5.0], [30.0, 5.0], [45.0, 5.0]]  # without the flag
        assert found["steps"] == 3 and (found["rank"], found["world"]) == (rank, world)
        assert found["sum"] == [sum(range(1, world + 1)), 10 * world]
    for process in processes:
        process.join(DEADLINE_S)
        assert process.exitcode == 0


def test_a_dead_worker_is_noticed_at_once() -> None:
    processes, pipes, _store_kept = together(2, "dead")
    victim = heard(pipes[0])[1]
    assert heard(pipes[1])[0] == "joined"
    os.kill(victim, signal.SIGKILL)
    kind, text = heard(pipes[1])  # long before the timeout
    assert kind == "fault" and text.startswith("worker 1 lost another worker") and "\n" not in text
    assert "run the same command again to resume" in text
    for process in processes:
        process.join(DEADLINE_S)


def test_a_silent_worker_is_given_up_after_the_timeout() -> None:
    processes, pipes, _store_kept = together(2, "late", timeout_s=3.0)
    kind, text = heard(pipes[1])
    assert kind == "fault" and text.startswith("worker 1 lost another worker") and "\n" not in text
    for process in processes:
        process.kill()
        process.join(DEADLINE_S)


def test_a_worker_that_never_comes() -> None:
    """One process of a world of two."""
    context = multiprocessing.get_context("forkserver")
    store = host("127.0.0.1")
    ours, theirs = context.Pipe()
    process = context.Process(target=one_worker, args=(theirs, 1, 2, f"127.0.0.1:{store.port}", 2.0, "steps"), daemon=True)
    process.start()
    kind, text = heard(ours)
    assert kind == "fault" and text.startswith("worker 1 could not join the others at 127.0.0.1:") and "\n" not in text
    process.join(DEADLINE_S)
    assert process.exitcode == 0
