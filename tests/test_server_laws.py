"""A parameter server with max_staleness=0 makes the synchronous step: allreduce's meta-parameters to 1e-10 in float64.

Real worker processes and the real trainer; one start of the workers serves all cases one after another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import DEADLINE_S, ROOT
from test_laws import CASES, COMMON, close
from test_laws import MLP as SMALL

from metadist import exchange, store
from metadist.exchange import Exchange
from metadist.exchange.allreduce import Alone
from metadist.run import trainer
from metadist.run.compose import compose
from metadist.run.folder import RunFolder
from metadist.run.signals import Stop

MLP = CASES["random-mlp"]
# name: words of the problem, words of the exchange, how many workers
SERVED: dict[str, tuple[list[str], list[str], int]] = {
    "one worker, all tasks at once": (MLP, [], 1),
    "two workers, uneven": (MLP, ["exchange.item=1"], 2),
    "three workers, uneven": (MLP, ["exchange.item=1"], 3),
    "three workers once more": (MLP, ["exchange.item=1"], 3),
    "two shards": (MLP, ["exchange.item=1", "exchange.shards=2"], 2),
    "not encrypted": (MLP, ["exchange.item=1", "exchange.encrypt=false"], 2),
    "a worker too many": ([*MLP, "tasks=2"], ["exchange.item=1"], 3),
    "items of two tasks": ([*MLP, "tasks=4"], ["exchange.item=2"], 3),
    "truncated": (CASES["truncated"], ["exchange.item=1"], 2),
    "poison": (CASES["poison"], ["exchange.item=1"], 2),
}
# A meta rate so large that gradients explode, before the first anchor and after it; half of it, or a quarter, does not.
ROLLING = [
    *SMALL,
    "method=dd_random_init",
    "steps=40",
    "tasks=3",
    "ipc=1",
    "real_batch=16",
    "inner.lr=0.1",
    "meta.optimizer=sgd",
    "meta.beta1=0",
    "meta.lr=1000",
    "meta.schedule=cosine",
    "meta.decay=0.05",
    "meta.clip=1",
    "meta.lr_rate=0.01",
    "meta.explode=1",
    "meta.max_bad=2",
    "meta.max_rollbacks=50",
    "run.checkpoint_every=12",
    "engine.group=1",  # tasks summed one by one, as the server does: in such a run rounding grows by a factor of 10^8
]


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def opened(path: Path, *words: str) -> RunFolder:
    """A run folder; of words for one key the last counts."""
    last = {word.partition("=")[0]: word for word in (*COMMON, *words)}
    return RunFolder.open(compose([*last.values(), f"cache_dir={path.parent.parent / 'cache'}", f"run_dir={path}"]))


def served(path: Path, problem: list[str], words: list[str], workers: int) -> RunFolder:
    return opened(path, *problem, "exchange=server", "exchange.max_staleness=0", *words, f"workers={workers}")


def train(folder: RunFolder, link: Exchange) -> None:
    """Train with the real trainer in this process; what hangs is stopped."""
    stop = Stop()
    watch = threading.Timer(DEADLINE_S / 3, stop.request, ("SIGTERM",))
    watch.start()
    try:
        assert "stopped" not in trainer.train(folder.config, folder, link, stop), f"{folder.path.name} hangs"
        link.close()
    finally:
        watch.cancel()


def server(folder: RunFolder) -> Exchange:
    item = folder.resolve("item", lambda: exchange.server.item_size(folder.config))
    place = exchange.Place(folder.path, "127.0.0.1", item, folder.write, lambda text: None)
    return exchange.connect(folder.config, incarnation=folder.incarnation, place=place)


def serve_all(folders: list[RunFolder], at: Path) -> None:
    """Train all of them with the workers that each asks for, in processes of their own."""
    programs = []
    for label in range(1, max(folder.config.workers for folder in folders) + 1):
        mine = [str(folder.path) for folder in folders if folder.config.workers >= label]
        command = [sys.executable, str(ROOT / "tests" / "server_worker.py"), str(label), *mine]
        with (at / f"worker-{label}.txt").open("w") as out:
            programs.append(subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": str(ROOT)}))
    try:
        for folder in folders:
            train(folder, server(folder))
        for label, program in enumerate(programs, 1):
            assert program.wait(DEADLINE_S) == 0, (at / f"worker-{label}.txt").read_text()
    finally:
        for program in programs:
            program.kill()
            program.wait()


def last(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    """Tensors and counters of the last checkpoint, and what the server's ledger says in it."""
    found = store.Checkpoints(path / "checkpoints", 0).load_newest()
    assert found is not None
    step, tensors, metadata = found
    state = metadata["state"] | {"anchor": metadata["anchor"], "step of the file": step}
    state["test"] = json.loads((path / "summary.json").read_text())["test"]
    return tensors, state, state.pop("exchange").get("ledger")


def compare(path: Path, alone: Path) -> None:
    """The whole last checkpoint and the result: tensors to 1e-10, counters alike."""
    (ours, state, _), (theirs, expected, _) = last(path), last(alone)
    close(ours, theirs)
    for key in ("best_valid", "test"):
        assert str(state.pop(key)) == str(expected.pop(key)), key
    for found in (state, expected):
        (found["anchor"] or {}).pop("exchange", None)
        (found["anchor"] or {}).pop("best_valid", None)
    assert state == expected


def test_without_staleness_any_number_of_workers_makes_the_synchronous_steps(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folders = {name: served(tmp_path / "served" / slug(name), *case) for name, case in SERVED.items()}
    serve_all(list(folders.values()), tmp_path)
    known: dict[str, Path] = {}
    for name, (problem, _, _) in SERVED.items():
        if str(problem) not in known:
            known[str(problem)] = alone = tmp_path / "alone" / slug(name)
            train(opened(alone, *problem), Alone())
        path, alone, config = folders[name].path, known[str(problem)], folders[name].config
        compare(path, alone)
        ledger = last(path)[2]
        assert ledger["low"] * ledger["item"] == 3 * config.tasks and ledger["done"] == []
        assert 1 <= json.loads((path / "summary.json").read_text())["workers"] <= config.workers  # one may come too late
    again = [last(folders[f"three workers{more}"].path) for more in (", uneven", " once more")]
    fewer = last(folders["two workers, uneven"].path)
    for other in (again[1], fewer, last(folders["two shards"].path)):  # items of the same size: the same bits
        assert [k for k, v in again[0][0].items() if v.numpy().tobytes() != other[0][k].numpy().tobytes()] == []
        assert again[0][1:] == other[1:]


@pytest.mark.slow
def test_without_staleness_roll_backs_are_the_synchronous_ones(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = served(tmp_path / "served" / "rolling", ROLLING, ["exchange.item=1"], 2)
    serve_all([folder], tmp_path)
    alone = opened(tmp_path / "alone" / "rolling", *ROLLING)
    train(alone, Alone())
    compare(folder.path, alone.path)
    assert last(folder.path)[1]["rollbacks"] == 3
    assert last(folder.path)[2] == {"item": 1, "low": 120, "done": []}
