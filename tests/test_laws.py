"""N workers = 1 worker: the same meta-gradients and meta-parameters to 1e-10 in float64, for any group size too.

Real processes and the real trainer; one start of each number of workers trains all cases one after another.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from law_worker import train_all
from run_helpers import ROOT

from metadist import store
from metadist.exchange.allreduce import Alone
from metadist.run import local
from metadist.run.compose import compose
from metadist.run.folder import RunFolder

# 5 tasks: 3 + 2 among two workers, 2 + 2 + 1 among three.
COMMON = [
    "data=digits",
    "data.size=8",
    "tasks=5",
    "steps=3",
    "ipc=2",
    "real_batch=8",
    "inner.steps=2",
    "inner.epochs=1",
    "inner.lr=0.02",
    "meta.lr=0.01",
    "meta.lr_rate=null",
    "meta.schedule=constant",
    "meta.clip=0",
    "meta.ema=0",
    "engine.dtype=float64",
    "engine.compile=off",
    "threads=1",
    "device=cpu",
    "eval.every=2",
    "eval.nets=3",
    "eval.final_nets=4",
    "run.log_every=1",
]
MLP = ["net=mlp", "net.width=8", "net.depth=1"]
POOL = ["pretrained.count=4", "pretrained.held_out=0.5", "pretrained.epochs=1"]
CASES = {
    "random-mlp": [*MLP, "method=dd_random_init", "inner.epochs=2", "inner.loss_every=3", "data.augment=crop"],
    "fixed-mlp": [*MLP, "method=dd_fixed_init", "labels.kind=soft", "meta.ema=0.5"],
    "random-lenet": [
        "net=lenet",
        "data.size=16",
        "method=dd_random_init",
        "inner.optimizer=momentum",
        "inner.learn_momentum=true",
    ],
    "truncated": [*MLP, "method=truncated", "inner.window=2", "inner.optimizer=adam", "inner.epochs=3"],
    "pretrained": [*MLP, *POOL, "method=dd_pretrained_init"],
    "poison": [*MLP, *POOL, "method=dd_poison", "method.attack=3", "method.target=5"],
    "batch-norm": ["net=convnet", "net.width=4", "net.depth=1", "net.norm=batch", "method=dd_random_init"],
}
WORLDS = (1, 2, 3)


def folders(base: Path, workers: int, cases: Sequence[str] = tuple(CASES), **more: Any) -> list[RunFolder]:
    """A run folder for each case."""
    words = [f"{k.replace('__', '.')}={v}" for k, v in more.items()]
    cache = f"cache_dir={base.parent / 'cache'}"  # the pool is trained once
    return [
        RunFolder.open(compose([*COMMON, *CASES[name], *words, cache, f"workers={workers}", f"run_dir={base / name}"]))
        for name in cases
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, one worker, all tasks at once."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("laws") / "alone"
    train_all(folders(base, 1, engine__group=5), Alone())
    return base


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def together(request: pytest.FixtureRequest, alone: Path) -> Path:
    """All cases, in processes of their own."""
    base: Path = alone.parent / f"workers-{request.param}"
    listed = base.parent / f"{base.name}.json"
    listed.write_text(json.dumps([str(folder.path) for folder in folders(base, request.param)]))
    frame = RunFolder.open(compose([*COMMON, *MLP, f"workers={request.param}", f"run_dir={base}-frame"]))
    command = [sys.executable, str(ROOT / "tests" / "law_worker.py"), str(listed)]
    assert local.launch(frame, command) == 0
    return base


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and (value.dtype == torch.float64 or name.endswith("/step")), name
        error = (value - other[name]).abs().max() / value.abs().max().clamp(min=1e-300)
        assert error <= 1e-10, (name, float(error))


def compare(one: Path, other: Path) -> None:
    """Buffers of all steps, the whole last checkpoint, and what was decided on the way."""
    buffers = [store.load_tensors(path / "buffers.safetensors")[0] for path in (one, other)]
    assert len(buffers[0]) == 3 and float(buffers[0]["0"][-1]) == 5
    assert float(torch.linalg.vector_norm(buffers[0]["0"][:-2])) > 1e-6  # there is a gradient to compare
    close(*buffers)
    found = [store.Checkpoints(path / "checkpoints", 0).load_newest() for path in (one, other)]
    assert found[0] is not None and found[1] is not None
    assert found[0][0] == found[1][0] == 3
    close(found[0][1], found[1][1])
    counters = [f[2]["state"] for f in found]
    assert counters[0].pop("best_valid") == pytest.approx(counters[1].pop("best_valid"), rel=1e-12)
    assert counters[0] == counters[1]
    tests = [json.loads((path / "summary.json").read_text())["test"]["mean"] for path in (one, other)]
    assert tests[0] == pytest.approx(tests[1], rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_workers(case: str, alone: Path, together: Path) -> None:
    compare(alone / case, together / case)


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2])
def test_any_group_size(group: int, alone: Path) -> None:
    base, cases = alone.parent / f"group-{group}", ("random-mlp", "truncated", "poison", "batch-norm")
    train_all(folders(base, 1, cases, engine__group=group), Alone())
    for case in cases:
        compare(alone / case, base / case)


def test_the_cases_differ(alone: Path) -> None:
    """Every case has gradients of its own: none is compared with a copy of another."""
    first = [store.load_tensors(alone / case / "buffers.safetensors")[0]["0"] for case in CASES]
    assert len({round(float(b[-2]), 9) for b in first}) == len(first)
