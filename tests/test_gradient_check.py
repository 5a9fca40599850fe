"""Law 5: what is approximated can be measured against the exact gradient."""

from __future__ import annotations

import pytest

from metadist.config import Config, DataConfig, InnerConfig, MethodConfig, NetConfig
from metadist.run import gradient_check
from metadist.run.setup import build


def setup_of(gradient: str = "unrolled", window: int = 0):
    config = Config(
        method=MethodConfig(name="truncated" if window else "dd_random_init", gradient=gradient),
        inner=InnerConfig(steps=2, epochs=3, lr=0.5, window=window),
        data=DataConfig(size=8),
        net=NetConfig(name="mlp", width=16, init="default"),
        tasks=3,
        ipc=1,
        real_batch=32,
    )
    return build(config)


def bias(setup, step: int):
    phi = setup.method.parameters()
    right = gradient_check.gradient(gradient_check.exact(setup), {k: v.double() for k, v in phi.items()}, step)
    return {b.parameter: b for b in gradient_check.compare(gradient_check.gradient(setup, phi, step), right)}["all"]


def test_float32_whole_unroll_is_exact_up_to_rounding():
    whole = bias(setup_of(), 0)
    assert whole.cosine == pytest.approx(1, abs=1e-9)
    assert whole.relative_error < 1e-4


def test_a_window_of_the_whole_training_has_no_bias_and_a_short_one_has():
    whole, short = setup_of("truncated", 6), setup_of("truncated", 1)
    assert bias(whole, 0).relative_error < 1e-4
    step = next(s for s in range(50) if short.method.window(s)[0] > 0)  # a window that leaves something out
    assert 0 < bias(short, step).cosine < 0.999
    assert bias(short, step).relative_error > 1e-2
