"""Random windows of a long unroll (RaT-BPTT, Feng et al. 2023, arXiv 2310.11982).

A training of T steps is too long to differentiate whole, and a window fixed at its end sees only late training. So each
meta-step draws a window [start, start + W): the steps before it are run without gradient, those inside are differentiated,
the meta-loss is taken at its end, later steps are not run. It is an approximation of the whole gradient, and named as one.
"""

from __future__ import annotations

from metadist import draw
from metadist.methods.dd import Window


def random_window(steps: int, window: int, every: int, seed: int) -> Window:
    """The window of each meta-step, the same for all its tasks, start uniform on 0 ... steps - window.

    steps: T. window: W in [1, T]. every: meta-loss at every k-th step of the window as well as at its end; 0: the end only.
    """

    def at(step: int) -> tuple[int, tuple[int, ...]]:
        start = int(draw.integers(draw.key(seed, "window", step), (), steps - window + 1))
        points = range(start + 1, start + window + 1)
        return start, tuple(t for t in points if t == start + window or (every and (t - start) % every == 0))

    return at
