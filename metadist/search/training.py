"""A candidate trained in one of the ways, and judged: one number, or why there is none.

Design choices
- Candidate i with seed s draws everything by (search.seed, s, i): its number does not depend on who trains it, when, or beside
  whom. Cheap trainings start from other weights than full ones: a candidate's luck there must not help to predict it here.
- Candidates of one shape are trained at once where that is faster, as in every evaluation.
- Nothing that a candidate does ends a search: whatever it raises is written down in one line. A group that fails, by lack of
  memory say, is tried again one by one, so that each answers for itself.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metadist import draw
from metadist.config_search import FREE
from metadist.errors import RunError, UserError
from metadist.evaluate.train import accuracy, at_once, recorded, seen, standard, statistics
from metadist.metagrad.inner import Inner
from metadist.nets.loss import cross_entropy_loss
from metadist.search import free
from metadist.search.space import build
from metadist.search.ways import FULL, Bench, course

if TYPE_CHECKING:
    from metadist.nets.learner import Learner
    from metadist.search.space import Group, Space

NOT_FINITE = "its weights are not finite"


@dataclass(frozen=True)
class Measured:
    """What came of one candidate, way and seed."""

    score: float | None  # accuracy in [0, 1], or what a free proxy gives
    failed: str | None  # why there is none, or only that of a guess, in one line
    seconds: float  # of training and judging it here
    images: int  # training images it saw


def measure(
    bench: Bench, space: Space, way: str, repeat: int, indices: Sequence[int], wanted: Sequence[int]
) -> Iterator[tuple[int, Measured]]:
    """Each of ``wanted`` with what came of it, as soon as it is known.

    indices: candidates of one shape. wanted: some of them; those trained at once are trained all, whoever is wanted.
    repeat: the seed's number.
    """
    if way in FREE:
        parts: list[tuple[int, ...]] = [(i,) for i in wanted]
    else:
        together = _several(bench, space, way, indices)
        parts = [tuple(indices)] if together else [(i,) for i in wanted]
    for part in parts:
        for index, measured in zip(part, _attempt(bench, space, way, repeat, part), strict=True):
            if index in wanted:
                yield index, measured


def _several(bench: Bench, space: Space, way: str, indices: Sequence[int]) -> bool:
    """Whether candidates are trained at once."""
    if len(indices) < 2:
        return False
    images = bench.batch if bench.recorded(way) else course(bench, way, 0).batch
    try:
        return at_once(_group(bench, space, indices[:1]).learner, len(indices), images) > 1
    except (Exception, SystemExit):  # it can't be built: it shall say so when its turn comes
        return False


def _attempt(bench: Bench, space: Space, way: str, repeat: int, part: Sequence[int]) -> list[Measured]:
    """The outcome of each of ``part``; RunError alone, a fault of ours or of the disk, is raised."""
    began = time.perf_counter()
    try:
        if way in FREE:
            return [_free(bench, space, way, part[0])]
        return _trained(bench, space, way, repeat, part)
    except RunError:
        raise
    except (Exception, SystemExit) as e:  # a user's module may call exit
        why = reason(e)
    # Outside of the handler, which would hold on to what the first try has allocated.
    if len(part) == 1:
        return [Measured(None, why, time.perf_counter() - began, 0)]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [measured for i in part for measured in _attempt(bench, space, way, repeat, (i,))]


def reason(error: BaseException) -> str:
    """A candidate's fault in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if memory or (isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)):
        return "out of memory"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"[:200]


def _free(bench: Bench, space: Space, kind: str, index: int) -> Measured:
    began, data = time.perf_counter(), bench.data
    score = free.score(kind, space, index, data.channels, data.size, len(data.classes), bench.seed, bench.init)
    return Measured(score, None, time.perf_counter() - began, 0)


def _group(bench: Bench, space: Space, indices: Sequence[int]) -> Group:
    data, x = bench.data, bench.data.train.x
    return build(space, indices, data.channels, data.size, len(data.classes), bench.init, x.dtype, x.device)


def _trained(bench: Bench, space: Space, way: str, repeat: int, indices: Sequence[int]) -> list[Measured]:
    """Candidates of one shape, trained at once and judged."""
    began, group = time.perf_counter(), _group(bench, space, indices)
    learner = group.learner
    stream = "search full" if way in FULL else "search cheap"
    number = torch.tensor(indices, dtype=torch.int64, device=learner.device)
    theta0 = group.start(draw.key(bench.seed, f"{stream} theta0", repeat, number))
    keys = draw.key(bench.seed, f"{stream} order", repeat, number)
    theta, images, count = _way(bench, learner, way, repeat, theta0, keys)
    buffers = statistics(learner, theta, images, chunk=len(theta))
    finite = (torch.isfinite(theta).all(1) & torch.isfinite(buffers).all(1)).tolist()
    scores = accuracy(learner, theta, buffers, bench.judge(way), chunk=len(theta)).tolist()
    each = (time.perf_counter() - began) / len(indices)
    guess = 1 / len(bench.data.classes) if way in FULL else None  # see metadist.search.table
    return [Measured(s, None, each, count) if ok else Measured(guess, NOT_FINITE, each, count) for s, ok in zip(scores, finite)]


def _way(bench: Bench, learner: Learner, way: str, repeat: int, theta0: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, int]:
    """Weights [n, P], some images trained on [S, B, C, H, W], how many images each network saw."""
    graph = theta0.is_cuda
    alone = len(theta0) == 1 and not graph and not bench.compile
    if bench.recorded(way):
        recipe, steps = bench.set, bench.steps
        loss = bench.lower(cross_entropy_loss(learner))
        inner = Inner(loss, recipe.optimizer, compile=bench.compile, graph=graph, alone=alone)
        # More steps than were recorded: the recorded training over and over.
        turn = [t % len(recipe.order) for t in range(steps)]
        h = recipe.optimizer.schedule(recipe.lr[turn], None if recipe.momentum is None else recipe.momentum[turn])
        order = tuple(itertools.islice(itertools.cycle(recipe.order), steps))
        theta = recorded(inner, theta0, recipe.batches, order, h, chunk=len(theta0))
        return theta, recipe.x, steps * bench.batch
    plan, c = bench.plan, course(bench, way, repeat)
    loss = bench.lower(cross_entropy_loss(learner, plan.weight_decay))
    inner = Inner(loss, plan.optimizer, compile=bench.compile, graph=graph, shared=False, alone=alone)
    theta = standard(
        learner, theta0, c.x, c.y, steps=c.steps, images=c.most, optimizer=plan.optimizer, lr=c.lr, momentum=plan.momentum,
        batch=c.batch, keys=keys, augment=plan.augment, schedule=plan.schedule, chunk=len(theta0), inner=inner,
    )  # fmt: skip
    return theta, seen(learner, c.x, c.batch, draw.key(bench.seed, "search statistics", repeat)), c.images
