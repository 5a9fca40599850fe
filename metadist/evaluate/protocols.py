"""What a set is worth: many networks trained on it, and on what it has to beat, by the same rules.

Design choices
- Two protocols. ``recorded``: the set's own ordered steps and rates. ``standard``: ordinary shuffled minibatches.
- A rate that has to be chosen is chosen from a stated grid by the mean accuracy of a few networks on the VALIDATION split; the
  split that judges is used once, by the rate that won.
- Networks start from ``Starts.held_out``: never a start that the set was trained with (but for a fixed one: its purpose).
- Networks are measured chunk by chunk; what is kept of each is its accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metadist import draw
from metadist.data import Data
from metadist.data.splits import Split
from metadist.errors import unknown
from metadist.evaluate.plan import Plan, Rate, Result
from metadist.evaluate.recipe import Recipe, random_indices
from metadist.evaluate.statistics import Summary
from metadist.evaluate.train import accuracy, chunks, ordinary, predictions, seen, standard, statistics
from metadist.metagrad.inner import Inner
from metadist.methods.poison import Figures, figures
from metadist.methods.starts import Starts
from metadist.nets import Learner
from metadist.nets.loss import cross_entropy_loss
from metadist.synthetic.distilled import DistilledSet

SPLITS = ("test", "valid")
CURVE_IMAGES = 2500  # of the judging split that a curve is drawn from
CHOICE_IMAGES = 2500  # of the validation split, at most, that a rate is chosen on: networks differ by more than images do
DRAWS = 20  # networks of ordinary training, and where there is one start only, but images or shuffling differ
# (weights [g, P], numbers int64 [g] of the networks, rate) -> (trained weights [g, P], what they were trained on, in batches)
Train = Callable[[Tensor, Tensor, Rate], tuple[Tensor, Tensor]]


class Evaluation:
    """A learner, real data, starts and a judge.

    learner: the architecture; data: normalised as the set's networks see it.
    starts: where initial weights come from; ``nets`` of them, or as many as are held out.
    nets: networks a measurement; trials: networks that choose a rate.
    split: "test" | "valid": who judges.
    seed: of shuffling and of random images; chunk: networks at once; compile: the training steps.
    Raises UserError for another split.
    """

    def __init__(
        self,
        learner: Learner,
        data: Data,
        starts: Starts,
        *,
        nets: int = 200,
        trials: int = 5,
        split: str = "test",
        seed: int = 0,
        chunk: int = 20,
        compile: bool = False,
    ) -> None:
        """Draw the initial weights."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        self.learner, self.data, self.trials, self.seed, self.chunk = learner, data, trials, seed, chunk
        self.judge: Split = getattr(data, split)
        self.theta0 = starts.held_out(nets)
        self.compile = compile
        self.graph = self.theta0.is_cuda

    def untrained(self) -> Result:
        """Before any training; BatchNorm's statistics are those of some training images."""
        x = self._for_statistics(self.data.train.x, 256)
        return self._measure(lambda theta, _numbers, _rate: (theta, x), (None,), self.theta0)

    def recorded(self, recipe: Recipe, rates: Sequence[Rate] = (None,)) -> Result:
        """Protocol (a): ordered steps on a shared recipe, at its recorded rates or the best of ``rates``."""
        inner = self._inner(recipe)

        def train(theta: Tensor, _numbers: Tensor, rate: Rate) -> tuple[Tensor, Tensor]:
            return inner.train(theta, recipe.batches, recipe.order, recipe.at(rate).h), recipe.x

        return self._measure(train, rates, self.theta0)

    def random(self, recipe: Recipe) -> Result:
        """Protocol (a) on as many random real images, drawn anew for each network; the best of ``recipe.candidates()``."""
        theta0, rows = self._drawn(recipe)
        inner, real = self._inner(recipe, shared=False), self.data.train

        def train(theta: Tensor, numbers: Tensor, rate: Rate) -> tuple[Tensor, Tensor]:
            own = recipe.on(real.x[rows[numbers]], real.y[rows[numbers]])
            return inner.train(theta, own.batches, own.order, own.at(rate).h), own.x

        return self._measure(train, recipe.candidates(), theta0)

    def standard(self, x: Tensor, y: Tensor, plan: Plan, nets: int = DRAWS) -> Result:
        """Protocol (b): ordinary training of at most ``nets`` networks on images x [N, C, H, W], labels y [N] or [N, K]."""
        random = plan.augment != "none" or len(x) > plan.batch
        return self._standard(x, y, plan, self._repeated(nets) if random else self.theta0[:nets], None)

    def standard_random(self, recipe: Recipe, plan: Plan, nets: int = DRAWS) -> Result:
        """Protocol (b) on as many random real images as the recipe has, drawn anew for each network."""
        theta0, rows = self._drawn(recipe, nets)
        return self._standard(self.data.train.x, self.data.train.y, plan, theta0, rows)

    def poison(self, recipe: Recipe, attack: int, target: int) -> dict[str, Summary]:
        """After the recorded steps: accuracy, accuracy on class ``attack``, the fraction of that class read as ``target``."""
        inner, parts = self._inner(recipe), []
        for index, count in chunks(len(self.theta0), self.chunk):
            theta = inner.train(self.theta0[index], recipe.batches, recipe.order, recipe.h)
            buffers = statistics(self.learner, theta, recipe.x)
            guesses = predictions(self.learner, theta, buffers, self.judge.x, chunk=len(theta))[:count]
            parts.append(torch.stack(figures(guesses, self.judge.y, attack, target)))
        values = torch.cat(parts, dim=1).cpu()
        return {name: Summary.of(v) for name, v in zip(Figures._fields, values, strict=True)}

    def curve(self, recipe: Recipe, rate: Rate, points: Sequence[int], own_images: bool = False) -> Tensor:
        """Accuracy after each of ``points`` (ascending, in [0, T]) steps, for a picture: float64 [len(points), n].

        At most ``chunk`` networks are followed, on CURVE_IMAGES of the judging split at most.
        own_images: train each on its own random real images instead.
        """
        theta0, rows = self._drawn(recipe, self.chunk) if own_images else (self.theta0[: self.chunk], None)
        if rows is not None:
            recipe = recipe.on(self.data.train.x[rows], self.data.train.y[rows])
        inner, h, out, before = self._inner(recipe, shared=not own_images), recipe.at(rate).h, [], 0
        state, judge = recipe.optimizer.init(theta0), self.judge.thinned(CURVE_IMAGES)
        for point in points:
            with torch.no_grad():
                state = inner.advance(state, recipe.batches, recipe.order[before:point], h[before:point])
            out.append(self._accuracy(state[0], recipe.x, judge))
            before = point
        return torch.stack(out)

    def _inner(self, recipe: Recipe, shared: bool = True) -> Inner:
        loss = cross_entropy_loss(self.learner)
        return Inner(loss, recipe.optimizer, compile=self.compile, graph=self.graph, shared=shared)

    def _repeated(self, nets: int) -> Tensor:
        """At most ``nets`` starts; a single one is used over and over, for what is drawn beside it."""
        return self.theta0[:nets] if len(self.theta0) > 1 else self.theta0.expand(min(nets, DRAWS), -1)

    def _drawn(self, recipe: Recipe, nets: int | None = None) -> tuple[Tensor, Tensor]:
        theta0 = self._repeated(len(self.theta0) if nets is None and len(self.theta0) > 1 else nets or DRAWS)
        classes = len(self.data.classes)
        keys = draw.key(self.seed, "random images", 0, torch.arange(len(theta0), device=theta0.device))
        return theta0, random_indices(self.data.train, classes, -(-len(recipe.images[1]) // classes), keys)

    def _standard(self, x: Tensor, y: Tensor, plan: Plan, theta0: Tensor, rows: Tensor | None) -> Result:
        optimizer = plan.optimizer
        inner = ordinary(self.learner, optimizer, plan.weight_decay, self.compile, self.graph)
        keys = draw.key(self.seed, "shuffle", 0, torch.arange(len(theta0), device=theta0.device))

        def train(theta: Tensor, numbers: Tensor, rate: Rate) -> tuple[Tensor, Tensor]:
            index = None if rows is None else rows[numbers]
            theta = standard(
                self.learner, theta, x, y, optimizer=optimizer, lr=rate or 0.0, momentum=plan.momentum, keys=keys[numbers],
                epochs=plan.epochs, batch=plan.batch, augment=plan.augment, schedule=plan.schedule,
                chunk=len(theta), index=index, inner=inner,
            )  # fmt: skip
            return theta, self._for_statistics(x if index is None else x[index], plan.batch)

        return self._measure(train, plan.candidates, theta0)

    def _for_statistics(self, x: Tensor, batch: int) -> Tensor:
        return seen(self.learner, x, batch, draw.key(self.seed, "statistics"))

    def _measure(self, train: Train, rates: Sequence[Rate], theta0: Tensor) -> Result:
        tried: dict[Rate, float] = {}
        if len(rates) > 1:
            some = self.data.valid.thinned(CHOICE_IMAGES)
            for rate in rates:
                tried[rate] = float(self._score(train, rate, theta0[: self.trials], some).mean())
        best = max(tried, key=lambda r: tried[r]) if tried else rates[0]
        return Result(self._score(train, best, theta0, self.judge), best, tried)

    def _score(self, train: Train, rate: Rate, theta0: Tensor, split: Split) -> Tensor:
        out = []
        for index, count in chunks(len(theta0), self.chunk):
            numbers = index.to(theta0.device)
            theta, images = train(theta0[numbers], numbers, rate)
            out.append(self._accuracy(theta, images, split)[:count])
        return torch.cat(out)

    def _accuracy(self, theta: Tensor, images: Tensor, split: Split) -> Tensor:
        buffers = statistics(self.learner, theta, images, chunk=len(theta))
        return accuracy(self.learner, theta, buffers, split, chunk=len(theta))


def baseline_random(
    learner: Learner,
    data: Data,
    dset: DistilledSet,
    starts: Starts,
    n: int,
    *,
    split: str = "test",
    seed: int = 0,
    chunk: int = 20,
    compile: bool = False,
) -> Summary:
    """What as many random real images give by as many steps: the figure that stands beside every distilled set.

    Arguments as ``Evaluation``; n: networks, each of which draws its own images (20 for a fixed start). The rate is chosen on
    validation.
    """
    recipe = Recipe.of(dset, learner.dtype, learner.device)
    judge = Evaluation(learner, data, starts, nets=n, split=split, seed=seed, chunk=chunk, compile=compile)
    return judge.random(recipe).summary
