"""The whole examination of a distilled set: protocols, baselines, full data, other architectures; one row each."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from metadist.data import Data, baseline
from metadist.evaluate.plan import Plan, Result
from metadist.evaluate.protocols import Evaluation
from metadist.evaluate.recipe import Recipe
from metadist.evaluate.report import Curve, Report, Row
from metadist.evaluate.settings import Settings
from metadist.methods.starts import Starts, fresh
from metadist.nets import Learner
from metadist.synthetic.distilled import DistilledSet

FULL_NETS = 5  # networks on the full data set
CURVE_POINTS = 10  # at most, of accuracy against inner step


class Examination:
    """One set under examination.

    dset, data: data must be normalised as the set is (`metadist.evaluate.fitting.aligned`).
    learner, net: the set's own architecture and its name; starts, described: its initial weights, and in words.
    say: told each row as it is measured.
    """

    def __init__(
        self,
        dset: DistilledSet,
        data: Data,
        learner: Learner,
        net: str,
        starts: Starts,
        described: str,
        settings: Settings,
        say: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """Draw the initial weights; nothing is trained yet."""
        self.dset, self.data, self.net, self.described, self.settings, self.say = dset, data, net, described, settings, say
        self.augmentations = settings.augmentations(data)
        self.recipe = Recipe.of(dset, learner.dtype, learner.device)
        self.judge = self._evaluation(learner, starts, settings.nets)
        self.few = settings.few

    def run(self, others: Mapping[str, Learner] | None = None, poison: tuple[int, int] | None = None) -> Report:
        """Measure everything that was asked for.

        others: learners to transfer to, by name; each from fresh initializations of its own, beside random real images if these
            are among the baselines.
        poison: (attacked class, class it is to be read as) of a malicious set.
        """
        rows = list(self._rows())
        curves = self._curves(rows) if "recorded" in self.settings.protocol else ()
        for name, other in (others or {}).items():
            judge = self._evaluation(other, fresh(other, self.settings.seed), self.few)
            rows += self._distilled(judge, name)
            rows += self._random(judge, name) if "random" in self.settings.baselines else ()
        figures = self.judge.poison(self.recipe, *poison) if poison else None
        return Report(self.dset, self.data.name, self.net, self.described, self.settings, tuple(rows), curves, figures)

    def _evaluation(self, learner: Learner, starts: Starts, nets: int) -> Evaluation:
        s = self.settings
        sizes = {"nets": nets, "trials": s.trials, "seed": s.seed, "chunk": s.chunk}
        return Evaluation(learner, self.data, starts, **sizes, split=s.split, compile=s.compile)

    def _row(self, images: str, training: str, protocol: str, net: str, measure: Callable[[], Result]) -> Row:
        began, count = time.monotonic(), {"none": 0, "all": len(self.data.train)}.get(images, len(self.dset.images))
        row = Row(images, count, training, protocol, net, measure(), time.monotonic() - began)
        self.say(row)
        return row

    def _rows(self) -> Iterator[Row]:
        yield self._row("none", "before training", "none", self.net, self.judge.untrained)
        yield from self._distilled(self.judge, self.net)
        for kind in self.settings.baselines:
            yield from self._random(self.judge, self.net) if kind == "random" else self._baseline(kind)
        if self.settings.full:
            yield self._full()

    def _distilled(self, judge: Evaluation, net: str) -> Iterator[Row]:
        x, y = self.recipe.images
        if "recorded" in self.settings.protocol:
            steps = f"{len(self.recipe.order)} recorded steps"
            yield self._row("distilled", steps, "recorded", net, lambda: judge.recorded(self.recipe))
        yield from self._ordinary("distilled", net, lambda plan: judge.standard(x, y, plan, self.few))

    def _random(self, judge: Evaluation, net: str) -> Iterator[Row]:
        if "recorded" in self.settings.protocol:
            yield self._row("random", self._steps, "recorded", net, lambda: judge.random(self.recipe))
        yield from self._ordinary("random", net, lambda plan: judge.standard_random(self.recipe, plan, self.few))

    def _baseline(self, kind: str) -> Iterator[Row]:
        classes = len(self.data.classes)
        x, y = baseline(kind, self.data.train, classes, -(-len(self.dset.images) // classes), self.settings.seed)
        if "recorded" in self.settings.protocol:
            recipe = self.recipe.on(x, y)
            yield self._row(kind, self._steps, "recorded", self.net, lambda: self.judge.recorded(recipe, recipe.candidates()))
        yield from self._ordinary(kind, self.net, lambda plan: self.judge.standard(x, y, plan, self.few))

    def _ordinary(self, images: str, net: str, measure: Callable[[Plan], Result]) -> Iterator[Row]:
        if self.settings.ordinary is not None:
            for augment in self.augmentations:
                plan = self.settings.plan(augment, real=images != "distilled")
                yield self._row(images, plan.text, self.settings.ordinary, net, functools.partial(measure, plan))

    def _full(self) -> Row:
        train, s = self.data.train, self.settings
        plan = dataclasses.replace(s.plan(self.augmentations[-1], real=True), epochs=s.full_epochs)
        nets = min(s.nets, FULL_NETS)
        return self._row(
            "all", plan.text, s.ordinary or "standard", self.net, lambda: self.judge.standard(train.x, train.y, plan, nets)
        )

    @property
    def _steps(self) -> str:
        return f"{len(self.recipe.order)} ordered steps"

    def _curves(self, rows: Sequence[Row]) -> tuple[Curve, ...]:
        total = len(self.recipe.order)
        pieces = min(total, CURVE_POINTS)
        points = tuple(sorted({round(i * total / pieces) for i in range(pieces + 1)}))
        out = []
        for row in rows:
            if row.protocol == "recorded" and row.images in ("distilled", "random") and row.net == self.net:
                accuracies = self.judge.curve(self.recipe, row.result.rate, points, own_images=row.images == "random")
                out.append(Curve(row.images, points, accuracies))
        return tuple(out)


def glance(
    dset: DistilledSet, data: Data, learner: Learner, net: str, starts: Starts, described: str, settings: Settings | None = None
) -> Report:
    """The short examination at the end of every run: recorded steps on the set and on as many random real images.

    Arguments as ``Examination``; of the settings nets, split, trials, seed, chunk and compile count (default: 20 networks).
    """
    short = dataclasses.replace(settings or Settings(nets=20), protocol=("recorded",), baselines=("random",), full=False)
    return Examination(dset, data, learner, net, starts, described, short).run()
