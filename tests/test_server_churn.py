"""Whoever dies of a parameter server's run, it goes on; without staleness it ends bit for bit where the quiet one ends.

Real processes, SIGKILL and SIGSTOP. What a run ought to end with is computed in the test's own process, without a server.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_helpers import DEADLINE_S, ROOT, Nursery, Started, until
from server_helpers import (
    ENDLESS,
    SERVER,
    Start,
    alone,
    applied,
    finished,
    gone,
    incarnation,
    labels,
    names,
    process,
    roster,
    said,
    same,
    saved,
    starting,
    stop,
    words,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as ours:
        yield ours


@pytest.fixture
def start(nursery: Nursery, tmp_path: Path) -> Iterator[Start]:
    with starting(nursery, tmp_path) as one:
        yield one


def stopped_like_one_process(started: Started, at: Path, *more: str) -> None:
    """End the run: it is where a single process is after as many steps, and no task is missing or counted twice."""
    step = stop(started)
    found, state = saved(at)
    assert found == step and applied(at) == 3 * step
    same(state, alone(at / "alone", *more, stopped_at=step))


def test_workers_are_killed_and_held_again_and_again_and_the_run_ends_where_a_quiet_one_ends(
    start: Start, tmp_path: Path
) -> None:
    more = [*SERVER, *ENDLESS, "workers=3", "exchange.heartbeat_s=0.2"]
    started, rng = start(*more), random.Random(1)
    until(lambda: labels(tmp_path) == {"1", "2", "3"}, "three workers")
    first = names(tmp_path)
    frozen = process(started, 2)
    os.kill(frozen, signal.SIGSTOP)
    for number in (1, 3):
        started.until_lines(started.lines() + rng.randint(1, 10))
        time.sleep(0.02 * rng.random())
        os.kill(process(started, number), signal.SIGKILL)
        said(started, rf"worker {number} was killed \(signal 9\); it is started again, the others go on")
    said(started, r"worker 2 is lost \(silent for \d+ s\)")
    os.kill(frozen, signal.SIGCONT)
    until(lambda: labels(tmp_path) == {"1", "2", "3"} and len(names(tmp_path) - first) == 2, "the return of all")
    assert f"2@{os.uname().nodename}:{frozen}" in names(tmp_path)  # the very process
    lines = started.lines()
    started.until_lines(lines + 5)
    stopped_like_one_process(started, tmp_path, *more)


def sending(port: int) -> set[int]:
    """Inodes of connections to ``port`` that hold over a megabyte which the other side has not taken."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[9]) for row in rows if int(row[2].split(":")[1], 16) == port and int(row[4].split(":")[0], 16) > 1_000_000}


def sockets(pid: int) -> set[int]:
    links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    return {int(link[8:-1]) for link in links if link.startswith("socket:[")}


def hold_while_it_gets(started: Started, server: int, port: int, worker: int, rng: random.Random) -> None:
    """Stop the server at an instant when a gradient of this worker is on its way."""
    end = time.monotonic() + DEADLINE_S
    while True:
        started.until_lines(started.lines() + 1)
        time.sleep(0.2 * rng.random())
        os.kill(server, signal.SIGSTOP)
        for _ in range(100):
            if sending(port) & sockets(worker):
                return
            time.sleep(0.002)
        os.kill(server, signal.SIGCONT)  # it was between two versions, when nobody sends
        assert time.monotonic() < end, "this worker never sends"


def test_a_worker_is_killed_in_the_middle_of_its_gradient(start: Start, tmp_path: Path) -> None:
    """Gradients of 16 MB; the server is held until one is stuck on its way."""
    more = [*SERVER, *ENDLESS, "workers=2", "data.size=64", "ipc=100", "meta.ema=0"]
    started, rng = start(*more), random.Random(2)
    until(lambda: labels(tmp_path) == {"1", "2"}, "two workers")
    server = process(started, 0)
    port = int(json.loads((tmp_path / "run/exchange/server.json").read_text())["addresses"][0].rpartition(":")[2])
    for number in (1, 2):
        worker = process(started, number)
        hold_while_it_gets(started, server, port, worker, rng)
        os.kill(worker, signal.SIGKILL)
        os.kill(server, signal.SIGCONT)
        said(started, rf"worker {number} was killed")
    lines = started.lines()
    started.until_lines(lines + 2)
    stopped_like_one_process(started, tmp_path, *more)


def test_the_server_is_killed_and_its_workers_wait_then_the_launcher_and_all_is_resumed(start: Start, tmp_path: Path) -> None:
    more = [*SERVER, *ENDLESS, "workers=2", "exchange.shards=2", "run.checkpoint_every=7"]
    started = start(*more)
    until(lambda: labels(tmp_path) == {"1", "2"}, "two workers")
    before, lines = names(tmp_path), started.lines()
    os.kill(process(started, 0), signal.SIGKILL)
    killed = time.monotonic()
    said(started, r"the server was killed \(signal 9\); it starts again from step \d+, the workers wait")
    lines = started.lines()
    started.until_lines(lines + 1)
    seconds = time.monotonic() - killed
    print(f"from SIGKILL of the server to the next meta-step: {seconds:.1f} s")
    assert seconds < 40 and incarnation(tmp_path) == 2
    until(lambda: labels(tmp_path) == {"1", "2"} and saved(tmp_path)[0] > 0, "the same workers")
    assert names(tmp_path) == before

    def children(pid: int) -> list[int]:
        own = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return own + [q for p in own for q in children(p)]

    everybody = children(started.pid)
    assert len(everybody) == 5  # server, two shards, two workers
    started.kill()
    assert started.wait() == -signal.SIGKILL
    until(lambda: gone(everybody), "the end of all")
    more += [f"steps={saved(tmp_path)[0] + 5}"]
    last = start(*more)
    assert last.wait() == 0, (last.out, last.err)
    same(finished(tmp_path), alone(tmp_path / "alone", *more))


class Outsiders:
    """Workers that somebody else starts for a run; each keeps its label."""

    def __init__(self, at: Path) -> None:
        self.at, self.there = at, dict[int, subprocess.Popen[bytes]]()
        self.joined: Counter[int] = Counter()
        self.left: Counter[int] = Counter()

    def join(self, label: int) -> None:
        environment = os.environ | {"METADIST_LABEL": str(label), "PYTHONPATH": str(ROOT)}
        self.joined[label] += 1
        with (self.at / f"outsider-{label}.txt").open("ab") as out:
            command = [sys.executable, "-m", "metadist.run.member", str(self.at / "run")]
            self.there[label] = subprocess.Popen(command, stdout=out, stderr=out, env=environment)

    def end(self, label: int, number: signal.Signals) -> None:
        """End one and see how it ends."""
        gone = self.there.pop(label)
        assert gone.poll() is None, (self.at / f"outsider-{label}.txt").read_text()
        gone.send_signal(number)
        assert gone.wait(DEADLINE_S) in (0, -number)  # 0: it had time for a last word
        self.left[number] += 1

    def close(self) -> None:
        """End all that are left."""
        for program in self.there.values():
            program.kill()
            program.wait()


@pytest.mark.soak
def test_a_worker_of_somebody_else_finds_a_server_that_came_back_otherwise_and_leaves_a_run_that_ended_without_it(
    start: Start, tmp_path: Path
) -> None:
    more, others = [*SERVER, "workers=1", "run.checkpoint_every=50"], Outsiders(tmp_path)
    started = start(*more, "steps=100000")
    try:
        until(lambda: labels(tmp_path) == {"1"}, "the run's own worker")
        others.join(9)
        until(lambda: labels(tmp_path) == {"1", "9"}, "the one who joins")
        stop(started)
        started = start(*more, "steps=100000", "exchange.encrypt=false", "exchange.shards=2", "exchange.heartbeat_s=0.5")
        until(lambda: incarnation(tmp_path) == 2 and labels(tmp_path) == {"1", "9"}, f"its return: {started.out}{started.err}")
        others.there[9].send_signal(signal.SIGSTOP)
        last = f"steps={stop(started) + 5}"
        started = start(*more, last)
        assert started.wait() == 0, (started.out, started.err)
        others.there[9].send_signal(signal.SIGCONT)
        assert others.there[9].wait(DEADLINE_S) == 0
        assert (tmp_path / "outsider-9.txt").read_text() == ""
    finally:
        others.close()
    same(finished(tmp_path), alone(tmp_path / "alone", *more, last))
    assert f"steps={applied(tmp_path) // 3}" == last


def test_a_server_that_is_killed_after_its_result_was_written_leaves_a_finished_run(start: Start, tmp_path: Path) -> None:
    """It waits for a worker that is held to say good-bye."""
    started = start(*SERVER, "workers=2", "steps=40")
    server, worker = process(started, 0), process(started, 2)
    said(started, "judging the set of step")
    os.kill(worker, signal.SIGSTOP)
    until(lambda: (tmp_path / "run" / "summary.json").exists(), "the result")
    os.kill(server, signal.SIGKILL)
    assert started.wait() == 0 and started.out.count("trained on 10 distilled images") == 1, (started.out, started.err)
    assert "Traceback" not in started.err and started.err.count("\n") <= 1
    same(finished(tmp_path), alone(tmp_path / "alone", *SERVER, "steps=40"))


# A set that is learned well in a few hundred steps; nothing in it depends on how many steps there will be.
LEARNING = [
    "method=dd_random_init",
    "net.width=0",
    "net.depth=0",
    "net.init=default",
    "inner.steps=1",
    "inner.epochs=10",
    "inner.lr=0.03",
    "tasks=4",
    "real_batch=128",
    "meta.lr=0.02",
    "meta.lr_rate=0.01",
    "meta.clip=0.1",
    "engine.group=0",
    "eval.every=100",
    "eval.nets=10",
    "eval.final_nets=100",
    "run.checkpoint_every=100",
]


@pytest.mark.soak
def test_ten_workers_come_and_go_for_three_minutes_and_every_task_counts_once(
    nursery: Nursery, start: Start, tmp_path: Path
) -> None:
    more = [*LEARNING, "exchange=server", "exchange.item=1", "exchange.max_staleness=4", "exchange.heartbeat_s=1", "workers=1"]
    started, rng, others = start(*more, "steps=100000"), random.Random(10), Outsiders(tmp_path)
    began, versions = time.monotonic(), [0]
    try:
        while time.monotonic() < began + 180:
            label = rng.randint(2, 11)
            if label not in others.there:
                others.join(label)
            elif f"{label}" in labels(tmp_path):  # it is at work, not still starting
                others.end(label, rng.choice((signal.SIGTERM, signal.SIGKILL)))
            pause = time.monotonic() + 2 * rng.random()
            while time.monotonic() < pause:
                versions.append(roster(tmp_path)["version"])
                time.sleep(0.05)
            assert started.poll() is None, (started.out, started.err)
        assert versions == sorted(versions)
        step = stop(started)
        assert started.err == "" and applied(tmp_path) == 4 * step
        steps = [int(n) for n in re.findall(r"^step (\d+)/", started.out, re.MULTILINE)]
        assert steps == list(range(1, len(steps) + 1)) and step - len(steps) in (0, 1)
        last = start(*more, f"steps={step + 100}")  # those who are left find the next start by themselves
        assert last.wait() == 0, (last.out, last.err)
        assert {program.wait(DEADLINE_S) for program in others.there.values()} <= {0}
    finally:
        others.close()
    assert min(others.left.values()) >= 3 and sum(others.joined.values()) >= 20
    assert applied(tmp_path) == 4 * (step + 100)
    counts = roster(tmp_path)["counts"]
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    nursery.run(words(quiet, *LEARNING, f"steps={step + 100}", "workers=4"), quiet, times=4)
    churned, calm = (json.loads((at / "run" / "summary.json").read_text()) for at in (tmp_path, quiet))
    print(f"{step} steps with {sum(others.joined.values())} comings and {dict(others.left)} goings, {counts}: "
          f"accuracy {churned['test']}, quiet {calm['test']}")  # fmt: skip
    assert calm["test"]["n"] == churned["test"]["n"] == 100
    assert calm["test"]["mean"] > 0.8 and abs(churned["test"]["mean"] - calm["test"]["mean"]) < 0.02


# With a larger meta rate on the learned rates these go to where training just holds, and what a stale step adds there costs
# some networks points (benchmarks/LOG.md).
MNIST = [
    *LEARNING,
    "data=mnist",
    "data.size=14",
    "meta.lr=0.05",
    "meta.lr_rate=0.005",
    "meta.schedule=cosine",
    "meta.decay=0.05",
    "meta.ema=0.9",
    "steps=300",
    "workers=3",
    "eval.every=50",
    "eval.nets=20",
    "eval.final_nets=200",
]


@pytest.mark.soak
@pytest.mark.skipif("METADIST_DATA" not in os.environ, reason="needs MNIST below METADIST_DATA")
def test_stale_gradients_cost_less_than_a_point_of_accuracy_on_mnist(nursery: Nursery, tmp_path: Path) -> None:
    tests = {}
    for name, more in {"allreduce": [], "server": ["exchange=server", "exchange.max_staleness=4"]}.items():
        at = tmp_path / name
        at.mkdir()
        nursery.run(words(at, *MNIST, *more, f"data.root={os.environ['METADIST_DATA']}"), at, times=4)
        tests[name] = json.loads((at / "run" / "summary.json").read_text())["test"]
    print(tests)
    assert applied(tmp_path / "server") == 300 * 4
    assert [test["n"] for test in tests.values()] == [200, 200] and max(test["ci95"] for test in tests.values()) < 0.004
    assert tests["server"]["mean"] > tests["allreduce"]["mean"] - 0.01 and tests["allreduce"]["mean"] > 0.75
