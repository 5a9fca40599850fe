"""The announced cost of evaluations: the networks and images that are counted are those that are then trained and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from metadist.evaluate import protocols, train
from metadist.evaluate.protocols import CURVE_IMAGES
from metadist.exchange import Alone
from metadist.metagrad.inner import Inner
from metadist.run import forecast, judge
from metadist.run.compose import compose
from metadist.run.forecast import Amount, Pace
from metadist.run.setup import Setup, build

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["data=digits", "net=mlp", "net.width=8", "net.depth=1", "ipc=1", "tasks=1", "inner.steps=1", "inner.epochs=12",
        "eval.every=4", "eval.nets=2", "threads=1", "device=cpu", "engine.compile=off"]  # fmt: skip


class Counted:
    """Networks trained, whole recorded trainings being 1 each, and images judged."""

    def __init__(self, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainings = self.images = 0.0
        self.steps: list[int] = []
        advance, predictions = Inner.advance, train.predictions

        def counted(inner: Inner, state: Any, batches: Any, order: Any, h: Any) -> Any:
            self.trainings += len(state[0]) * len(order) / len(setup.synthetic.order)
            self.steps.append(len(order))
            return advance(inner, state, batches, order, h)

        def judged(learner: Any, theta: Any, buffers: Any, x: Any, **more: Any) -> Any:
            self.images += len(theta) * len(x)
            return predictions(learner, theta, buffers, x, **more)

        monkeypatch.setattr(Inner, "advance", counted)
        for module in (train, judge, forecast):
            monkeypatch.setattr(module, "predictions", judged)
        assert protocols.accuracy is train.accuracy  # which looks ``predictions`` up where it was replaced


@pytest.mark.parametrize(("init", "final"), [("random", 3), ("random", 1), ("fixed", 3)])
def test_the_report_is_counted_as_it_is_made(init: str, final: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([*TINY, f"method=dd_{init}_init", f"eval.final_nets={final}"])
    setup = build(config)
    chosen = judge.distilled(setup, setup.method.parameters(), 0, {})
    seen = Counted(setup, monkeypatch)
    judge.examine(setup, chosen)
    valid, test = len(setup.data.valid), setup.data.test
    found = forecast.report(config, valid, len(test), len(test.thinned(CURVE_IMAGES)))
    assert found.trainings == pytest.approx(seen.trainings) and found.images == seen.images


def test_validations_are_counted_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([*TINY, "steps=10", "eval.final_nets=3"])
    setup = build(config)
    valid, test, phi = len(setup.data.valid), len(setup.data.test), setup.method.parameters()
    seen = Counted(setup, monkeypatch)
    for _ in (8, 10):  # what a run that goes on at step 4 has before it
        judge.outcomes(setup, phi, "validation", 2, Alone())
    judge.outcomes(setup, phi, "evaluation", 3, Alone())
    assert forecast.left(config, 4, valid, test) == Amount(seen.trainings, seen.images, 3) == Amount(7, 4 * valid + 3 * test, 3)
    fixed = compose([*TINY, "method=dd_fixed_init", "steps=10"])
    assert forecast.left(fixed, 0, valid, test) == Amount(4, 3 * valid + test, 4)


def test_the_trial_takes_a_few_steps_whatever_the_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = build(compose([*TINY, "inner.epochs=40", "eval.nets=6", "eval.chunk=4"]))
    phi, before = setup.method.parameters(), torch.get_rng_state()
    seen = Counted(setup, monkeypatch)
    pace = forecast.pace(setup, phi, 1)
    assert seen.steps == [forecast.STEPS] * 2 and seen.trainings == pytest.approx(2 * 3 * forecast.STEPS / 40)
    assert min(pace) > 0 and torch.equal(torch.get_rng_state(), before)


def test_a_large_test_split_makes_judging_dear_and_training_not() -> None:
    config = compose([*TINY, "steps=10", "eval.final_nets=200"])
    once, twice = (forecast.left(config, 0, 100, test) for test in (1000, 2000))
    assert once.seconds(Pace(1, 0, 0)) == twice.seconds(Pace(1, 0, 0)) == 206
    assert twice.seconds(Pace(0, 1, 0)) - once.seconds(Pace(0, 1, 0)) == 200 * 1000
    assert once.seconds(Pace(0, 0, 2)) == 8


def test_a_run_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from metadist.run.command import main

    monkeypatch.setattr(forecast, "pace", lambda setup, phi, world: Pace(100.0, 0.0, 0.0))
    assert main([*TINY, "steps=2", "eval.final_nets=2", f"run_dir={tmp_path / 'run'}"]) == 0
    # One round of 2, the last 2; the report: 2 of the set, 2 x 8 rates and 2 of random images, 4 curves.
    assert "evaluation 46m40s; " in capsys.readouterr().out
