"""The typed configuration of trajectory matching and of a teacher's part in it (see ``metadist.config``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrajectoryConfig:
    """method.gradient=trajectory: which segments of expert trajectories are matched, and by what training."""

    epochs: int = 2  # M: a segment's length in the expert's epochs
    min_start: int = 0  # first start epoch that is drawn
    max_start: int = 20  # start epochs are drawn below this
    grow: int = 0  # meta-steps over which that bound grows from grow_from to max_start; 0: it is there at once
    grow_from: int = 0  # 0: min_start + 1
    batch: int = 0  # images of an inner step, by a new permutation each pass; 0: all / inner.steps
    replay: int = 500  # steps of the recorded training (validation, the finished set): the inner steps over and over


@dataclass
class KdConfig:
    """method.loss=distillation: (1 - alpha) cross-entropy + alpha scale KL(teacher || student), both softened by T."""

    alpha: float = 0.5  # weight of the soft term
    T: float = 3.0  # temperature
    scale: float | None = None  # null: T^2, which keeps the soft term's gradient at the size of the hard one's
