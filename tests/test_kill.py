"""Killed anywhere and started again, a run ends bit for bit where the uninterrupted run ends. Real processes, real signals.

Every comparison is of all tensors and counters of the last checkpoint and of the bytes of both distilled sets.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import TINY, Nursery, Started, result, same, until
from torch import Tensor

from metadist.exchange.allreduce import Alone
from metadist.run import trainer
from metadist.run.compose import compose
from metadist.run.folder import RunFolder
from metadist.run.signals import Stop
from metadist.store import Checkpoints

RANDOM = ["method=dd_random_init", "steps=60"]
# A meta rate so large that gradients explode; half of it, or a quarter, does not.
ROLLING = [
    "method=dd_random_init",
    "steps=40",
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
    "meta.ema=0",
]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as ours:
        yield ours


def words(at: Path, *more: str) -> list[str]:
    """The command line of the run in ``at``."""
    return [*TINY, *more, f"cache_dir={at / 'cache'}", f"run_dir={at / 'run'}"]


@pytest.fixture(scope="module")
def uninterrupted(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Any], Started]]:
    """What a command line ends with if nothing disturbs it; run once for all tests."""
    known: dict[tuple[str, ...], tuple[dict[str, Any], Started]] = {}

    def of(*more: str) -> tuple[dict[str, Any], Started]:
        if more not in known:
            at = tmp_path_factory.mktemp("uninterrupted")
            started = nursery.run(words(at, *more), at)
            known[more] = result(at / "run"), started
        return known[more]

    return of


def resumed_at(started: Started) -> int:
    """The first step this start did."""
    found = re.search(r"^step (\d+)/", started.out, re.MULTILINE)
    assert found, (started.out, started.err)
    return int(found[1])


def newest(at: Path) -> Path:
    return Checkpoints(at / "run" / "checkpoints", 0).saved()[0].path


def kill_and_resume(nursery: Nursery, at: Path, line: list[str], kills: int, seed: int, most_lines: int) -> list[int]:
    """SIGKILL ``kills`` starts at random instants after their first step line, then let one finish; where each began."""
    rng, began = random.Random(seed), []
    for _ in range(kills):
        started = nursery.start(line, at)
        started.until_lines(rng.randint(1, most_lines))
        time.sleep(rng.random() * 0.03)
        assert started.poll() is None, (started.out, started.err)
        started.kill()
        assert started.wait() == -signal.SIGKILL
        began.append(resumed_at(started))
    began.append(resumed_at(nursery.run(line, at)))
    return began


@pytest.mark.slow
def test_sigkill_of_one_worker(nursery: Nursery, uninterrupted: Any, tmp_path: Path) -> None:
    began = kill_and_resume(nursery, tmp_path, words(tmp_path, *RANDOM), kills=8, seed=1, most_lines=6)
    assert began[0] == 1 and began == sorted(began) and 7 <= began[-1] < 60  # it lost at most what no checkpoint held
    same(result(tmp_path / "run"), uninterrupted(*RANDOM)[0])
    assert len(list((tmp_path / "run" / "incarnations").iterdir())) == 9


@pytest.mark.slow
def test_sigkill_of_random_windows(nursery: Nursery, uninterrupted: Any, tmp_path: Path) -> None:
    more = ["method=truncated", "inner.epochs=3", "inner.window=2", "inner.optimizer=adam", "labels.kind=soft", "steps=30"]
    kill_and_resume(nursery, tmp_path, words(tmp_path, *more), kills=3, seed=2, most_lines=6)
    same(result(tmp_path / "run"), uninterrupted(*more)[0])


@pytest.mark.slow
@pytest.mark.soak
def test_sigkill_of_launchers_and_ranks(nursery: Nursery, uninterrupted: Any, tmp_path: Path) -> None:
    more = [*RANDOM, "steps=240", "workers=2"]
    line, rng, began = words(tmp_path, *more), random.Random(3), []
    for kill in range(20):
        started = nursery.start(line, tmp_path)
        started.until_lines(rng.randint(1, 6))
        time.sleep(rng.random() * 0.05)
        assert started.poll() is None, (started.out, started.err)
        if kill % 2 == 0:
            started.kill()
            assert started.wait() == -signal.SIGKILL
        else:
            number = kill // 2 % 2
            os.kill(started.rank(number), signal.SIGKILL)
            assert started.wait() == 1
            assert started.err.count("\n") == 1 and f"worker {number} was killed (signal 9)" in started.err
        began.append(resumed_at(started))
    began.append(resumed_at(nursery.run(line, tmp_path)))
    assert began[0] == 1 and began == sorted(began) and began[-1] > 10
    same(result(tmp_path / "run"), uninterrupted(*more)[0])


@pytest.mark.slow
def test_sigkill_while_the_result_is_judged_and_written(nursery: Nursery, uninterrupted: Any, tmp_path: Path) -> None:
    more = [*RANDOM, "steps=12"]
    line, rng = words(tmp_path, *more), random.Random(4)
    for _ in range(3):
        started = nursery.start(line, tmp_path)
        until(lambda s=started: "judging" in s.out or s.poll() is not None, "the end of training")
        time.sleep(rng.random() * 0.2)
        if started.poll() is None:
            started.kill()
            started.wait()
    nursery.run(line, tmp_path)
    same(result(tmp_path / "run"), uninterrupted(*more)[0])


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_by_signals_and_resumed(nursery: Nursery, uninterrupted: Any, tmp_path: Path, workers: int) -> None:
    """Also a checkpoint cut short between two starts: it is named, and the one before it used."""
    more = [*RANDOM, "steps=24", f"workers={workers}"]
    line, rng = words(tmp_path, *more), random.Random(5)
    for number, lines in ((signal.SIGTERM, 8), (signal.SIGINT, 3)):
        started = nursery.start(line, tmp_path)
        started.until_lines(lines)
        started.kill(number)
        assert started.wait() == 128 + number, started.err
        said = re.search(rf"stopped by {number.name} at step (\d+) of 24; run the same command again", started.out)
        assert said and started.err == ""
        assert newest(tmp_path).name.startswith(f"step-{int(said[1]):010d}.")  # the step it stopped at is saved
    torn = newest(tmp_path)
    torn.write_bytes(torn.read_bytes()[: rng.randrange(torn.stat().st_size)])
    before = Checkpoints(torn.parent, 0).saved()[1].step
    last = nursery.run(line, tmp_path)
    assert str(torn) in last.err and last.err.count("\n") == 1 and "Traceback" not in last.err
    assert resumed_at(last) == before + 1
    same(result(tmp_path / "run"), uninterrupted(*more)[0])
    again = nursery.run(line, tmp_path)  # finished: the result once more
    assert again.lines() == 0 and again.out.strip() and again.out.strip() in last.out


def test_torn_checkpoints(nursery: Nursery, uninterrupted: Any, tmp_path: Path) -> None:
    """The two newest are cut, one to nothing, one somewhere: both are named and the third is used."""
    more = [*RANDOM, "steps=24", "workers=1"]
    line, rng = words(tmp_path, *more), random.Random(7)
    started = nursery.start(line, tmp_path)
    started.until_lines(11)
    started.kill(signal.SIGTERM)
    assert started.wait() == 143
    saved = Checkpoints(tmp_path / "run" / "checkpoints", 0).saved()
    assert len(saved) == 3
    for torn, keep in zip(saved, (0, rng.randrange(saved[1].path.stat().st_size))):
        torn.path.write_bytes(torn.path.read_bytes()[:keep])
    last = nursery.run(line, tmp_path)
    assert [str(torn.path) in warned for torn, warned in zip(saved[:2], last.err.splitlines(), strict=True)] == [True, True]
    assert resumed_at(last) == saved[2].step + 1
    same(result(tmp_path / "run"), uninterrupted(*more)[0])


@pytest.mark.slow
def test_roll_back_and_recovery_survive_kills(nursery: Nursery, uninterrupted: Any, tmp_path: Path) -> None:
    expected, reference = uninterrupted(*ROLLING)
    back = [tuple(map(int, m)) for m in re.findall(r"rolled back from step (\d+) to (\d+)", reference.out)]
    state = expected["state"]
    assert back and all(there % 12 == 0 and there < here for here, there in back)
    assert state["rollbacks"] == len(back) and state["scale"] == 0.5 ** len(back) and state["skipped"] >= 2 * len(back)
    line = words(tmp_path, *ROLLING)
    kill_and_resume(nursery, tmp_path, line, kills=3, seed=6, most_lines=20)
    same(result(tmp_path / "run"), expected)


@pytest.mark.slow
def test_roll_back_does_not_depend_on_where_stops_left_checkpoints(
    nursery: Nursery, uninterrupted: Any, tmp_path: Path
) -> None:
    line = words(tmp_path, *ROLLING)
    first = int(re.search(r"rolled back from step (\d+)", uninterrupted(*ROLLING)[1].out)[1])  # type: ignore[index]
    for lines in (first - 2, 1):  # a checkpoint just before the roll-back, another inside the bad steps
        started = nursery.start(line, tmp_path)
        started.until_lines(lines)
        started.kill(signal.SIGTERM)
        assert started.wait() == 143
    assert int(newest(tmp_path).name[5:15]) % 12
    nursery.run(line, tmp_path)
    same(result(tmp_path / "run"), uninterrupted(*ROLLING)[0])


def test_a_run_that_cannot_be_saved_ends_clearly(nursery: Nursery, tmp_path: Path) -> None:
    started = nursery.start(
        words(tmp_path, *RANDOM, "meta.explode=1e-9", "meta.max_bad=3", "meta.max_rollbacks=2", "run.log_every=1"), tmp_path
    )
    assert started.wait() == 1
    assert started.err.count("\n") == 1 and started.err.startswith("error: 3 meta-steps in a row") and "meta.lr" in started.err
    assert re.findall(r"rolled back from step 3 to 0 after 3 bad steps; meta rate x (\S+)", started.out) == ["0.5", "0.25"]
    assert "skipped 8  rollbacks 2" in started.out  # of the 9 the last ends the run before it is shown


class Failing(Alone):
    """An exchange whose gradients are not finite at some steps, until the run has rolled back."""

    def __init__(self, bad: set[int], stop_at: int = 0) -> None:
        """stop_at: the number of done steps at which another worker asks to stop."""
        self.bad, self.stop_at = bad, stop_at
        self.seen: list[tuple[int, float]] = []

    def step(self, state: Any, tasks: int, compute: Any, apply: Callable[[Any, Tensor], Any], stop: bool) -> tuple[Any, bool]:
        self.seen.append((state.step, state.factor()))
        if state.step in self.bad and not state.rollbacks:
            before = {k: v.clone() for k, v in state.tensors().items()}
            apply(state, torch.full_like(compute(state, torch.arange(tasks)), torch.nan))
            assert all(torch.equal(v, before[k]) for k, v in state.tensors().items())  # skipped: nothing has moved
        else:
            super().step(state, tasks, compute, apply, stop)
        return state, state.step == self.stop_at


def failing(at: Path, exchange: Failing, *more: str) -> dict[str, Any]:
    at.mkdir(exist_ok=True)
    folder = RunFolder.open(compose(words(at, "method=dd_random_init", "steps=12", "meta.max_bad=3", *more)))
    return trainer.train(folder.config, folder, exchange, Stop())


def test_bad_steps_are_skipped_counted_and_rolled_back(tmp_path: Path) -> None:
    exchange = Failing({1, 4, 5, 6})
    summary = failing(tmp_path, exchange)
    assert [step for step, _ in exchange.seen] == [0, 1, 2, 3, 4, 5, 6, *range(3, 12)]
    assert [factor for _, factor in exchange.seen] == [1.0] * 7 + [0.5] * 9
    assert (summary["skipped"], summary["rollbacks"], summary["steps"]) == (4, 1, 12)


def test_no_anchor_lies_among_bad_steps(tmp_path: Path) -> None:
    """What made the gradients bad is in the state of step 6 already: rolling back there would mend nothing."""
    exchange = Failing({5, 6, 7})
    failing(tmp_path, exchange)
    assert [step for step, _ in exchange.seen] == [0, 1, 2, 3, 4, 5, 6, 7, *range(3, 12)]


@pytest.mark.parametrize("stop_at", [pytest.param(8, marks=pytest.mark.slow), 9, pytest.param(10, marks=pytest.mark.slow)])
def test_the_anchor_survives_a_stop_among_bad_steps(tmp_path: Path, stop_at: int) -> None:
    """Three bad steps after the anchor at 6: a start that begins among them returns there too. The
    checkpoint of step 9 is the newest even when the run was stopped just after it had rolled back."""
    bad = {7, 8, 9}
    failing(tmp_path / "whole", Failing(bad))
    assert failing(tmp_path / "parts", Failing(bad, stop_at))["stopped"] == "SIGTERM"
    resumed = Failing(bad)
    failing(tmp_path / "parts", resumed)
    assert [step for step, _ in resumed.seen] == [*range(min(stop_at, 9), 10), *range(6, 12)]
    same(result(tmp_path / "parts" / "run"), result(tmp_path / "whole" / "run"))
