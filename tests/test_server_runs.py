"""Whole runs of exchange=server: what is applied and logged, signals at any time, faults of single workers, users' mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_helpers import ROOT, Nursery, Started
from server_helpers import (
    SERVER,
    Start,
    alone,
    applied,
    finished,
    incarnation,
    process,
    roster,
    said,
    same,
    saved,
    starting,
    stop,
    words,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import metadist
from metadist.errors import UserError
from metadist.run.command import main


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as ours:
        yield ours


@pytest.fixture
def start(nursery: Nursery, tmp_path: Path) -> Iterator[Start]:
    with starting(nursery, tmp_path) as one:
        yield one


@pytest.mark.slow
def test_an_asynchronous_run_applies_every_task_once_and_logs_what_its_workers_do(start: Start, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append((incarnation(tmp_path), roster(tmp_path)["version"]))

    thread = threading.Thread(target=watch)
    thread.start()
    started = start(*SERVER, "workers=3", "exchange.max_staleness=4", "steps=400")
    status = started.wait()
    done.set()
    thread.join()
    assert status == 0 and started.err == "", (started.out, started.err)

    assert applied(tmp_path) == 3 * 400 and saved(tmp_path)[0] == 400
    assert seen == sorted(seen) and len({version for _, version in seen}) > 1
    counts = roster(tmp_path)["counts"]
    assert (
        counts["accepted"] >= 1200 - 64 and set(counts) <= {"accepted", "stale", "lost", "refused"} and counts["refused"] == 0
    )

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["workers"] == 3 and summary["steps"] == 400

    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    last = {tag: values[-1].value for tag, values in scalars.items()}
    for name in ("accepted", "stale", "duplicate", "lost", "refused", "workers_alive", "queue_length"):
        assert [v.step for v in scalars[f"server/{name}"]] == list(range(1, 401)), name
    assert last["server/accepted"] == 1200 and last["server/workers_alive"] == 3
    assert last["server/duplicate"] == last["server/lost"] == last["server/refused"] == 0
    assert 0 <= last["server/queue_length"] <= 64 and 0 < last["server/pull_ms"] < 1000 and 0 < last["server/push_ms"] < 1000
    for n in (1, 2, 3):
        given = [v.value for v in scalars[f"utilisation/{n}"]]
        assert min(given) >= 0 and max(given) <= 1 and sum(given) / len(given) > 0.05, n
    histograms = events.Histograms("server/staleness")
    weights = Counter[float]()
    for found in histograms:
        value = found.histogram_value
        assert value.min >= 0 and value.max <= 4
        weights["count"] += value.num
        weights["sum"] += value.sum
    assert weights["count"] == 1200 and 0 < weights["sum"] < 4 * 1200  # every applied gradient, and some were behind

    lines = started.out.splitlines()
    assert [line.split("/")[0] for line in lines if line.startswith("step ")] == [f"step {n}" for n in range(1, 401)]
    others = [line for line in lines if not line.startswith("step ")]
    assert re.match(
        r"this run: 400 meta-steps of 3 tasks through a parameter server, 1 handed out at once, at most 4 versions", others[0]
    )
    assert re.fullmatch(r"serving at tcp://127\.0\.0\.1:\d+", others[1]) and others[2].startswith("judging the set of step ")
    assert len(others) == 7 and [(tmp_path / "run" / f"log-rank{n}.txt").read_text() for n in (1, 2, 3)] == [""] * 3


@pytest.mark.slow
def test_signals_at_any_time_end_a_run_promptly_and_the_same_command_resumes_it(start: Start, tmp_path: Path) -> None:
    """Before the first version, in a validation, while the result is judged: a kill, then a signal that finds it ending."""
    more = [*SERVER, "workers=1", "steps=12", "eval.nets=150", "eval.final_nets=150", "eval.chunk=2", "run.checkpoint_every=4"]

    def ended(started: Started, number: signal.Signals) -> float:
        began = time.monotonic()
        stop(started, number)
        assert started.err == ""
        return time.monotonic() - began

    spent = {}
    started = start(*more)
    process(started, 1)
    spent["before the first version"] = ended(started, signal.SIGINT)
    assert saved(tmp_path)[0] == 0 and applied(tmp_path) == 0

    started = start(*more)
    said(started, r"step 7/12 ")
    spent["in a validation"] = ended(started, signal.SIGTERM)
    assert saved(tmp_path)[0] == 7 and applied(tmp_path) == 21

    started = start(*more)
    said(started, "judging the set of step")
    assert saved(tmp_path)[0] == 12
    started.kill()
    assert started.wait() == -signal.SIGKILL

    started = start(*more)
    said(started, "judging the set of step")
    began = time.monotonic()
    started.kill(signal.SIGTERM)
    assert started.wait() == 0 and started.err == "" and "trained on 10 distilled images" in started.out
    spent["while the result is judged"] = time.monotonic() - began
    print({when: round(seconds, 1) for when, seconds in spent.items()})
    assert max(spent.values()) < 20
    same(finished(tmp_path), alone(tmp_path / "alone", *more))
    assert applied(tmp_path) == 3 * 12


NET = """
import os

from torch import nn

LABEL = os.environ.get("METADIST_LABEL", "")
if LABEL in os.environ["NO_LICENCE"].split(","):
    raise ImportError("no licence on this machine")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if LABEL in os.environ["NO_LUCK"].split(",") and self.calls > 30:
            raise RuntimeError("a library of this machine's")
        return self.body(x)
"""


def own_net(at: Path, *more: str, licence: str = "", luck: str = "") -> tuple[int, str, list[str]]:
    """A run of a user's net that fails on some of the workers: exit status, output, lines on stderr."""
    (at / "nets_of_mine.py").write_text(NET)
    command = [sys.executable, str(ROOT / "launch" / "local.py")]
    own = [w for w in words(at, *more, "net.target=nets_of_mine.Net") if not w.startswith(("net.width", "net.depth", "net="))]
    environment = os.environ | {"NO_LICENCE": licence, "NO_LUCK": luck}
    own = [*own, "net=custom"]
    done = subprocess.run([*command, *own], cwd=at, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_a_worker_that_meets_a_fault_of_its_own_is_named_in_one_line_and_the_others_finish(tmp_path: Path) -> None:
    status, out, said = own_net(tmp_path, *SERVER, "workers=3", "steps=60", licence="2", luck="3")
    assert status == 0 and "step 60/60" in out and "trained on 10 distilled images" in out, (out, said)
    assert len(said) == 2, said
    said.sort()  # either may be the first
    assert (
        "worker 2 has ended, the others go on: net.target=nets_of_mine.Net can't be imported: ImportError: no licence"
        in said[0]
    )
    assert said[1].startswith("worker 3 has ended, the others go on: ") and "a library of this machine's" in said[1]
    assert "Traceback" in (tmp_path / "run" / "log-rank3.txt").read_text()
    assert applied(tmp_path) == 3 * 60


@pytest.mark.slow
def test_when_all_workers_meet_the_same_fault_the_run_ends_with_it(tmp_path: Path) -> None:
    status, out, said = own_net(tmp_path, *SERVER, "workers=2", "steps=60", licence="1,2")
    assert status == 2 and "step " not in out, (out, said)
    assert said[-1] == "error: net.target=nets_of_mine.Net can't be imported: ImportError: no licence on this machine"
    assert len(said) <= 3


MISTAKES = {
    "exchange.item=2": "exchange.item=2 does not divide tasks=3",
    "exchange.item=3 exchange.batch=4": "exchange.item=3 does not divide exchange.batch=4",
    "exchange.max_staleness=-1": "exchange.max_staleness=-1 is out of range; allowed: at least 0",
    "exchange.backend=gloo": "exchange.backend is not read by this run: it belongs to exchange=allreduce",
    "engine.dtype=float64 exchange.wire=bfloat16": "float64 is exact, use full",
    "exchange.wire=int8": "exchange.wire=int8 is unknown",
    "exchange.shards=0": "exchange.shards=0 is out of range; allowed: at least 1",
    "exchange.queue=1": "exchange.queue=1 holds less than a meta-step's gradients",
    "exchange.heartbeat_s=0": "exchange.heartbeat_s=0.0 is out of range; allowed: above 0",
    "exchange.deadline_s=-1": "at least 0",
    "method=lower_bound": "leave exchange=server out",
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_mistake_is_one_line_before_any_work(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = [] if "method=lower_bound" in wrong else ["method=dd_random_init"]
    assert main(words(tmp_path, *method, "exchange=server", *wrong.split())) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and MISTAKES[wrong] in err, err
    assert not (tmp_path / "run" / "exchange").exists()


def test_keys_of_the_server_alone_are_refused_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("exchange.max_staleness=3", "exchange.shards=2", "exchange.heartbeat_s=1", "exchange.encrypt=false"):
        assert main([*words(tmp_path), word]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and word.split("=")[0] in err and "exchange=server" in err, err


def test_the_python_api_says_that_a_server_is_several_processes(tmp_path: Path) -> None:
    keys = {"exchange.name": "server", "data.size": 8, "device": "cpu", "steps": 2}
    with pytest.raises(UserError, match=r"launch/local\.py"):
        metadist.distil("digits", run_dir=str(tmp_path / "run"), **keys)
    assert not (tmp_path / "run" / "exchange").exists()
