"""Law 5: what is approximated can be measured against the exact gradient."""

from __future__ import annotations

import dataclasses

import pytest

from metadist.config import Config, DataConfig, InnerConfig, MethodConfig, NetConfig
from metadist.errors import UserError
from metadist.run.bias import compare, gradient_bias
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


def test_float32_whole_unroll_is_exact_up_to_rounding():
    setup = setup_of()
    whole = compare(setup, setup.method.parameters(), 0)["gradient"]["all"]
    assert whole["cosine"] == pytest.approx(1, abs=1e-9)
    assert whole["relative_error"] < 1e-4


def test_a_window_of_the_whole_training_has_no_bias_and_a_short_one_has():
    whole, short = setup_of("truncated", 6), setup_of("truncated", 1)
    assert compare(whole, whole.method.parameters(), 0)["gradient"]["all"]["relative_error"] < 1e-4
    step = next(s for s in range(50) if short.method.window(s)[0] > 0)  # a window that leaves something out
    figures = compare(short, short.method.parameters(), step)["gradient"]["all"]
    assert 0 < figures["cosine"] < 0.999
    assert figures["relative_error"] > 1e-2


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    import json

    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    with pytest.raises(UserError, match="no checkpoint"):
        gradient_bias(tmp_path)
