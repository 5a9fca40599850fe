"""The typed configuration of architecture search with distilled data (see ``metadist.config``)."""

from __future__ import annotations

from dataclasses import dataclass, field

TRAINED = ("distilled", "real_steps", "early_stop", "random_real", "coreset")  # proxies that train a candidate
FREE = ("params", "flops", "synflow")  # and those that only look at it


@dataclass
class SearchConfig:
    """Architecture search (launch/search.py): candidates ranked by cheap trainings, and by full training."""

    set: str | None = None  # run folder, file or shipped name of the distilled set; its size is what the proxies may cost
    space: str = "convnets"  # convnets: 720 of them | cells: NAS-Bench-201's 15,625 | import path of your own class
    width: int = 0  # convnets: their least width; cells: channels of the stem; 0: as published, 32 and 16
    cells: int = 0  # space=cells: cells of each of the three stages; 0: as published, 5
    candidates: int = 64  # drawn from the space; 0: all of it
    proxy: list[str] = field(default_factory=lambda: [*TRAINED, *FREE])  # the first finds the best if there is no truth
    seeds: int = 2  # full trainings of a candidate
    proxy_seeds: int = 1  # cheap ones of each kind
    epochs: int = 10  # of full training, as all below to schedule
    lr: float = 0.01  # SGD's rate
    momentum: float = 0.9  # its momentum
    weight_decay: float = 0.0005  # l2 over all weights
    batch: int = 128  # real images a step
    schedule: str = "half"  # half: a tenth of the rate from half of the steps on | constant
    steps: int = 0  # of a cheap training; 0: the set's own number
    set_lr: float = 0.0  # proxy=distilled: rate of shuffled training on the set; 0: its recorded, ordered steps and rates
    draws: int = 1  # random subsets, and coresets, that a candidate is trained on for each of proxy_seeds
    coreset: str = "kmeans"  # kmeans: centroids | kcenter: real images, farthest first
    group: int = 16  # candidates of one shape in a task, trained at once where that is faster
    best: int = 5  # candidates that a search ends with
    truth: str = "train"  # train: all candidates in full | none: the best alone | a JSON file of {architecture: accuracy}
    halving: int = 0  # eta: keep the best 1/eta by the set, train these eta times as long on real data, and so on; 0: no
    seed: int = 0  # of the candidates, their initializations and orders of images, the subsets
    init: str = "default"  # xavier | kaiming | orthogonal | default
