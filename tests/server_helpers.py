"""Whole runs of exchange=server for the tests: their words, what they leave, what they ought to leave."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from run_helpers import TINY, Nursery, Started, until

from metadist.exchange.allreduce import Alone
from metadist.run import trainer
from metadist.run.compose import compose
from metadist.run.folder import RunFolder
from metadist.run.signals import Stop
from metadist.store import Checkpoints

# One task at a time, whoever computes it: the sums of any number of workers are those of one process to the bit.
RANDOM = ["method=dd_random_init", "engine.group=1"]
SERVER = [*RANDOM, "exchange=server", "exchange.item=1", "exchange.max_staleness=0"]
ENDLESS = ["steps=100000", "run.checkpoint_every=50", "eval.every=70"]
Start = Callable[..., Started]


def words(at: Path, *more: str) -> list[str]:
    """The command line of the run in ``at``; of words for one key the last counts."""
    last = {word.partition("=")[0]: word for word in (*TINY, *more)}
    return [*last.values(), f"cache_dir={at / 'cache'}", f"run_dir={at / 'run'}"]


@contextmanager
def starting(nursery: Nursery, at: Path) -> Iterator[Start]:
    """A function that starts the run in ``at`` by its words; what a failed test leaves behind is ended."""
    begun: list[Started] = []

    def start(*more: str) -> Started:
        begun.append(nursery.start(words(at, *more), at))
        return begun[-1]

    try:
        yield start
    finally:
        for started in begun:
            if started.poll() is None:
                started.kill()
                started.wait()


def roster(at: Path) -> dict[str, Any]:
    """What the server wrote of its workers, some seconds ago."""
    path = at / "run" / "exchange" / "workers.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"version": 0, "counts": {}, "workers": []}
    return found


def names(at: Path) -> set[str]:
    """Workers that are there: 1@host:4711."""
    return {row["worker"] for row in roster(at)["workers"]}


def labels(at: Path) -> set[str]:
    """Their labels: 1."""
    return {name.partition("@")[0] for name in names(at)}


def incarnation(at: Path) -> int:
    """Of the newest server that listens."""
    path = at / "run" / "exchange" / "server.json"
    return int(json.loads(path.read_text())["incarnation"]) if path.exists() else 0


def saved(at: Path) -> tuple[int, dict[str, Any]]:
    """Step and content of the newest checkpoint: tensors' bytes, counters, the anchor's counters; without the ledger."""
    found = Checkpoints(at / "run" / "checkpoints", 0).load_newest()
    assert found is not None
    step, tensors, metadata = found
    out: dict[str, Any] = {k: (v.dtype, tuple(v.shape), v.numpy().tobytes()) for k, v in tensors.items()}
    for name in ("state", "anchor"):
        out |= {f"{name}/{k}": v for k, v in (metadata[name] or {}).items() if k != "exchange"}
    return step, out


def applied(at: Path) -> int:
    """Tasks that the newest checkpoint counts as applied."""
    found = Checkpoints(at / "run" / "checkpoints", 0).load_newest()
    assert found is not None
    ledger = found[2]["state"]["exchange"]["ledger"]
    assert ledger["low"] not in ledger["done"] and all(item > ledger["low"] for item in ledger["done"])
    return int((ledger["low"] + len(set(ledger["done"]))) * ledger["item"])


def finished(at: Path) -> dict[str, Any]:
    """All that a finished run decided: its last checkpoint and both distilled sets."""
    files = ("distilled.safetensors", "distilled-last.safetensors")
    return saved(at)[1] | {name: (at / "run" / name).read_bytes() for name in files}


class StoppedAt(Alone):
    """An exchange that is asked to stop at a step."""

    def __init__(self, last: int) -> None:
        self.last = last

    def step(self, state: Any, tasks: int, compute: Any, apply: Any, stop: Any) -> tuple[Any, bool]:
        return super().step(state, tasks, compute, apply, lambda: state.step == self.last)


def alone(at: Path, *more: str, stopped_at: int = 0) -> dict[str, Any]:
    """What the same run ends with in this process, without any server; ``more``: the words that are not TINY's.

    stopped_at: the step at which it is stopped; then what it has saved there.
    """
    at.mkdir()
    torch.set_num_threads(1)
    own = [word for word in more if not word.startswith(("exchange", "workers="))]
    folder = RunFolder.open(compose(words(at, *own)))
    trainer.train(folder.config, folder, StoppedAt(stopped_at), Stop())
    return saved(at)[1] if stopped_at else finished(at)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal to the bit; names what is not."""
    assert one.keys() == other.keys()
    assert [k for k in one if one[k] != other[k]] == []


def process(started: Started, number: int) -> int:
    """Process number of the server (0) or a worker, once it is there."""

    def found() -> int | None:
        try:
            return started.rank(number)
        except (StopIteration, FileNotFoundError, ProcessLookupError):
            return None

    pid = until(lambda: found() or (started.poll() is not None and -1), f"process {number}")
    assert pid > 0, (started.out, started.err)
    return int(pid)


def gone(pids: list[int]) -> bool:
    """Whether all of them have ended, be they collected or not."""

    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "gone"

    return all(state(pid) in ("gone", "Z", "X") for pid in pids)


def said(started: Started, pattern: str, count: int = 1) -> None:
    """Wait until the run has said so, so many times."""

    def there() -> bool:
        return len(re.findall(pattern, started.out + started.err)) >= count

    until(lambda: there() or started.poll() is not None, f"{pattern!r} in {started.out}{started.err}")
    assert there(), (started.out, started.err)


def stop(started: Started, number: int = signal.SIGTERM) -> int:
    """End a run by a signal to its launcher; the step it was saved at."""
    started.kill(number)
    assert started.wait() == 128 + number, (started.out, started.err)
    found = re.search(rf"stopped by {signal.Signals(number).name} at step (\d+) of", started.out)
    assert found, started.out
    return int(found[1])
