"""The typed configuration of expert trajectories, of matching them, and of a teacher's part in it (see ``metadist.config``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ExpertsConfig:
    """Expert trajectories (launch/experts.py): ordinary training on real data, a snapshot of the weights an epoch."""

    count: int = 100  # networks
    epochs: int = 50  # of training; snapshots are 0 to epochs
    images: int = 0  # training images of an epoch, drawn anew for each; 0: all
    lr: float = 0.01  # constant rate
    momentum: float = 0.0  # 0: plain SGD
    weight_decay: float = 0.0  # l2 over all weights
    batch: int = 256  # real images a step
    dsa: str = "none"  # strategy, operations joined by underscores: color_crop_cutout_flip_scale_rotate
    sharpness: str = "none"  # none | sam: gradients at the worst point nearby | gsam: less of the surrogate gap, too
    rho: float = 0.01  # sam, gsam: distance to that point
    gsam_alpha: float = 0.3  # gsam: weight of the gap
    group: int = 10  # networks of a task, trained at once where that is faster
    seed: int = 0  # of their initializations, orders of images and augmentation
    path: str | None = None  # a store's folder; null: cache_dir/experts/<hash of everything that made it>


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
