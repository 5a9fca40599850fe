"""The ways a candidate is trained: in full, and cheaply, each as long as the distilled set trains.

Design choices
- Cost is counted in images seen. The distilled set says how many: its recorded steps times its batch. Real images, random
  images, a coreset and the start of full training (its last batch cut to what is left; at most all of it) get as many, so that
  what is compared is the images and not the time.
- Apart from the recorded steps of a set, every way is ordinary shuffled training on some images: a ``Course``.
- Images that stand in for the distilled ones are drawn once for all candidates, so that these are compared on equal terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from metadist import draw
from metadist.data import Data, baseline
from metadist.data.splits import Split
from metadist.errors import UserError
from metadist.evaluate.plan import Plan
from metadist.evaluate.recipe import Recipe
from metadist.metagrad.mixed import Loss

FULL = ("truth", "retrained")  # judged on the test split
SUBSETS = ("random_real", "coreset")
HALVING = "halving-"  # and the number of the round


@dataclass(frozen=True, eq=False)
class Bench:
    """What all candidates of a search are trained and judged with."""

    data: Data  # normalised as the distilled set's networks see it
    recipe: Recipe | None  # the set's recorded training
    plan: Plan  # of full training; its one rate serves all ways on real images
    steps: int  # of a cheap training
    set_lr: float  # of shuffled training on the set; 0: its recorded steps
    coreset: str  # kmeans | kcenter
    eta: int  # how much longer each round of halving trains
    seed: int
    init: str
    lower: Callable[[Loss], Loss]  # the loss in the precision asked for
    compile: bool = False

    @property
    def batch(self) -> int:
        """Images of a step of the set."""
        return self.set.x.shape[1]

    @property
    def set(self) -> Recipe:
        """The recorded training. Raises UserError without one."""
        if self.recipe is None:
            raise UserError("this way of training costs what the distilled set's does: give set=")
        return self.recipe

    def judge(self, way: str) -> Split:
        """Who judges: full training the test split, all else validation."""
        return self.data.test if way in FULL else self.data.valid

    def recorded(self, way: str) -> bool:
        """Whether a way is the set's own ordered steps."""
        return way == "distilled" and not self.set_lr


@dataclass(frozen=True, eq=False)
class Course:
    """Ordinary shuffled training."""

    x: Tensor  # [N, C, H, W]
    y: Tensor  # int64 [N] or float [N, K]
    batch: int  # images a step
    lr: float
    steps: int  # of the schedule
    most: int = 0  # images that a network sees, the last batch cut to what is left of them; 0: those of all steps

    @property
    def images(self) -> int:
        """Seen by a network; the last batch of a pass may be smaller than the others."""
        size = len(self.x)
        passes, rest = divmod(self.steps, -(-size // min(self.batch, size)))
        every = passes * size + rest * min(self.batch, size)
        return min(every, self.most) if self.most else every


def course(bench: Bench, way: str, repeat: int) -> Course:
    """The ordinary training that a way is.

    way: one of FULL, of the proxies that train ("distilled" with bench.set_lr), or a round of halving.
    repeat: which subset, of SUBSETS.
    """
    train, plan = bench.data.train, bench.plan
    lr = plan.candidates[0]
    if way in FULL or way == "early_stop":
        each = -(-len(train) // min(plan.batch, len(train)))
        steps = plan.epochs * each
        return Course(train.x, train.y, plan.batch, lr, steps, 0 if way in FULL else bench.steps * bench.batch)
    steps = bench.steps
    if way == "distilled":
        x, y = bench.set.images
        return Course(x, y, bench.batch, bench.set_lr, steps)
    if way in SUBSETS:
        x, y = subset(bench, "random" if way == "random_real" else bench.coreset, repeat)
        return Course(x, y, bench.batch, lr, steps)
    if way.startswith(HALVING):
        # A round never trains longer than full training does.
        longest = plan.epochs * len(train) // bench.batch
        steps = max(steps, min(steps * bench.eta ** int(way.removeprefix(HALVING)), longest))
    return Course(train.x, train.y, bench.batch, lr, steps)


@functools.lru_cache(maxsize=8)
def subset(bench: Bench, kind: str, repeat: int) -> tuple[Tensor, Tensor]:
    """As many real images, or centroids, as the set has, every class in turn: (x [N, C, H, W], y int64 [N]).

    kind: of ``metadist.data.baseline``. repeat: which draw.
    Raises UserError if a class has too few.
    """
    classes, count = len(bench.data.classes), len(bench.set.images[1])
    high, low = draw.bits(draw.key(bench.seed, "search subset", 0, repeat), 2).tolist()
    x, y = baseline(kind, bench.data.train, classes, -(-count // classes), ((high << 32) | low) >> 1)
    return x[:count], y[:count]


def cost(bench: Bench, way: str) -> int:
    """Training images that a network sees."""
    if bench.recorded(way):
        return bench.steps * bench.batch
    return course(bench, way, 0).images
