"""What a meta-step costs: `python -m metadist.run.probe <words>` prints {"step_s": ..., "bytes": ...}; it makes no run folder.

step_s: median of a few whole meta-steps after a warm-up; bytes: peak of live tensors of one task's meta-gradient.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from metadist.metagrad.memory import LiveBytes
from metadist.run.compose import compose
from metadist.run.compute import Compute
from metadist.run.guard import guarded
from metadist.run.job import build

_REPEATS = 3


def main(words: Sequence[str]) -> int:
    """Measure one configuration."""
    config = compose(words)
    if config.threads:
        torch.set_num_threads(config.threads)
    setup = build(config)
    phi = setup.method.parameters()
    compute = Compute(setup.method, config.engine.group or 1, setup.device, static=False)
    with LiveBytes(setup.device) as live:
        compute(phi, 1, torch.arange(1))
    seconds = []
    for step in range(1, 1 + _REPEATS):
        began = time.perf_counter()
        compute(phi, step, torch.arange(config.tasks)).sum().item()
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"step_s": statistics.median(seconds), "bytes": live.peak}))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
