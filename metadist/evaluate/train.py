"""Training many learners at once, and what they then know. Nothing here is differentiated through.

Design choices
- n networks are one tensor [n, P], trained under vmap in chunks of equal size. The last chunk is filled up with copies, which
  are thrown away: one shape, so that a compiled or captured step is made once.
- Ordinary training shuffles for each network on its own, by a permutation drawn from that network's key: its result does not
  depend on which networks it was trained beside.
- BatchNorm's statistics are re-estimated on the images that were trained on, never on test images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from metadist import draw
from metadist.data import dsa
from metadist.data.augment import augment as moved
from metadist.data.splits import Split
from metadist.errors import unknown
from metadist.metagrad.inner import Inner
from metadist.metagrad.mixed import Batch
from metadist.metagrad.optimizers import Optimizer
from metadist.nets.learner import Learner
from metadist.nets.loss import cross_entropy_loss

SCHEDULES = ("constant", "half", "half_anew")
DSA = "dsa:"  # before a strategy
LARGE_BATCH = 64  # images that keep a CPU busy with one network
JUDGED = 500  # images that a network judges at once
JUDGED_CPU = 32  # of a convolutional one on a CPU: what lies between its layers then fits the caches, which halves the time


def chunks(n: int, chunk: int) -> Iterator[tuple[Tensor, int]]:
    """Indices of n networks in chunks of one common size of at most ``chunk``: (int64 [size], how many of them count)."""
    pieces = -(-n // max(chunk, 1))
    size = -(-n // max(pieces, 1))
    for start in range(0, n, max(size, 1)):
        yield torch.arange(start, start + size).clamp(max=n - 1), min(size, n - start)


def in_chunks(function: Callable[..., Tensor], n: int, chunk: int, *per_net: Tensor) -> Tensor:
    """``function`` applied to chunks of tensors [n, ...]; its results [size, ...] put together again: [n, ...]."""
    out = []
    for index, count in chunks(n, chunk):
        out.append(function(*(t[index.to(t.device)] for t in per_net))[:count])
    return torch.cat(out)


def _convolutional(learner: Learner) -> bool:
    return any(len(shape) == 4 for shape in learner.shapes)


def at_once(learner: Learner, chunk: int, images: int) -> int:
    """How many networks to run at once on batches of ``images``: ``chunk``, or 1 where that is faster.

    On a CPU convolutions of several networks (grouped ones) are slower than one network after another as soon as a batch
    fills the cores by itself: 1.3 to 4 times with 100 images and more. A GPU, and small batches, want many networks.
    """
    return 1 if _convolutional(learner) and images >= LARGE_BATCH and learner.device.type == "cpu" else chunk


def recorded(inner: Inner, theta0: Tensor, batches: Batch, order: Sequence[int], h: Tensor, *, chunk: int = 20) -> Tensor:
    """Weights [n, P] after the recorded, ordered steps.

    inner: loss, optimizer and execution.
    theta0: [n, P].
    batches: (x [S, B, C, H, W], y [S, B] or [S, B, K]) if inner.shared, else each network's own, with [n, ...] in front.
    order: batch index of each of the T steps.
    h: [T, K] from ``Optimizer.schedule``.
    chunk: networks at once.
    """

    def train(theta: Tensor, *own: Tensor) -> Tensor:
        return inner.train(theta, own or batches, order, h)

    return in_chunks(train, len(theta0), chunk, theta0, *(() if inner.shared else batches))


def ordinary(
    learner: Learner, optimizer: Optimizer, weight_decay: float = 0.0, compile: bool = False, graph: bool = False
) -> Inner:
    """The ``Inner`` of ordinary training, to be shared by several calls of ``standard`` (it is compiled once)."""
    return Inner(cross_entropy_loss(learner, weight_decay), optimizer, compile=compile, graph=graph, shared=False)


def standard(
    learner: Learner,
    theta0: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int = 0,
    steps: int = 0,
    images: int = 0,
    optimizer: Optimizer,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    batch: int = 128,
    keys: Tensor,
    augment: str = "none",
    schedule: str = "constant",
    chunk: int = 20,
    index: Tensor | None = None,
    inner: Inner | None = None,
) -> Tensor:
    """Weights [n, P] after ordinary shuffled minibatch training of n networks, each with a shuffling of its own.

    theta0: [n, P]. x: [N, C, H, W]; y: int64 [N] or float [N, K].
    epochs: passes; a last batch that is not full is used as it is. steps: their number, in place of epochs.
    images: leave after so many, the last batch cut to what is left of them, the schedule being that of all; 0: after all.
    lr: rate; momentum: of "momentum", Adam's beta1; weight_decay: l2 in the loss; batch: images a step, at most N.
    keys: int64 [n, 2], one a network, for shuffling and augmentation.
    augment: of every batch anew: none | crop | flip | crop_flip | dsa:<strategy> (each network's step draws an operation, each
        image what is done by it).
    schedule: constant | half (a tenth of the rate from half of the steps on) | half_anew (there the optimizer starts anew).
    chunk: networks at once.
    index: int64 [n, M]: the images (rows of x) that each network trains on; None: all N, for all networks.
    inner: from ``ordinary``, to reuse what was compiled; must have been made with this learner, optimizer and decay.
    Raises UserError for an unknown schedule or augmentation.
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    run = inner if inner is not None else ordinary(learner, optimizer, weight_decay)
    size = len(x) if index is None else index.shape[1]
    each = -(-size // min(batch, size))
    steps = steps or epochs * each
    anew = steps // 2 if schedule == "half_anew" else 0
    rates, momenta = _rates(steps, lr, momentum, schedule, theta0)
    h = torch.cat([optimizer.schedule(rates[part], momenta[part]) for part in (slice(0, anew), slice(anew, None))])

    def train(theta: Tensor, keys: Tensor, *own: Tensor) -> Tensor:
        state = optimizer.init(theta)
        for t, (key, rows) in enumerate(_cut(itertools.islice(_order(keys, size, batch, -(-steps // each)), steps), images)):
            if t == anew:
                state = optimizer.init(state[0])
            rows = own[0].gather(1, rows) if own else rows
            shown = _augmented(augment, key, x[rows])
            state = run.advance(state, (shown.unsqueeze(1), y[rows].unsqueeze(1)), (0,), h[t : t + 1])
        return state[0]

    keys = keys.to(theta0.device)
    several = at_once(learner, chunk, min(batch, size))
    with torch.no_grad():
        return in_chunks(train, len(theta0), several, theta0, keys, *(() if index is None else (index,)))


def _augmented(kind: str, keys: Tensor, x: Tensor) -> Tensor:
    """Images [n, B, C, H, W] of one step of n networks, by their keys [n, 2]."""
    if not kind.startswith(DSA):
        return moved(kind, keys, x)
    return dsa.apply(dsa.parameters(kind.removeprefix(DSA), keys, x.shape[1], x.shape[-1], x.dtype), x)


def _rates(steps: int, lr: float, momentum: float, schedule: str, like: Tensor) -> tuple[Tensor, Tensor]:
    rates = torch.full((steps,), lr, dtype=like.dtype, device=like.device)
    if schedule != "constant":
        rates[steps // 2 :] *= 0.1
    return rates, torch.full_like(rates, momentum)


def _order(keys: Tensor, size: int, batch: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(the step's keys [n, 2], the rows it takes [n, B]) of each step: every epoch a new permutation for each network."""
    for epoch in range(epochs):
        key = draw.split(keys, epoch)
        for i, rows in enumerate(torch.split(draw.permutation(draw.split(key, 0), size), batch, dim=1)):
            yield draw.split(key, 1 + i), rows


def _cut(order: Iterable[tuple[Tensor, Tensor]], images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps that show a network its first ``images``, the last one cut to what is left; 0: all steps."""
    left = images
    for key, rows in order:
        yield key, rows[:, :left] if images else rows
        left -= rows.shape[1]
        if images and left <= 0:
            return


def seen(learner: Learner, x: Tensor, batch: int, key: Tensor) -> Tensor:
    """At most ten batches of the images [..., N, C, H, W] that were trained on, in a drawn order: [..., S, B, C, H, W].

    What ``statistics`` takes; S = 0 without BatchNorm.
    """
    if not learner.buffers_size:
        return x[..., :0, :, :, :].unsqueeze(-5)
    n = x.shape[-4]
    batch = min(batch, n)
    chosen = draw.permutation(key, n)[: min(10, n // batch) * batch]
    return x.index_select(x.dim() - 4, chosen.to(x.device)).reshape(*x.shape[:-4], -1, batch, *x.shape[-3:])


@torch.no_grad()
def statistics(learner: Learner, theta: Tensor, x: Tensor, *, chunk: int = 20) -> Tensor:
    """BatchNorm statistics [n, Q] of trained networks on the images they were trained on (Q = 0 without BatchNorm).

    theta: [n, P].
    x: training images as batches [S, B, C, H, W], or each network's own [n, S, B, C, H, W]; averaged over S.
    chunk: networks at once.
    """
    if not learner.buffers_size:
        return theta.new_zeros(len(theta), 0)
    own = x.dim() == 6

    def average(theta: Tensor, *given: Tensor) -> Tensor:
        batches = given[0].unbind(1) if own else x.unbind(0)
        return torch.stack([vmap(learner.statistics, in_dims=(0, 0 if own else None))(theta, b) for b in batches]).mean(0)

    return in_chunks(average, len(theta), chunk, theta, *((x,) if own else ()))


@torch.no_grad()
def predictions(
    learner: Learner, theta: Tensor, buffers: Tensor, x: Tensor, *, chunk: int = 20, batch: int | None = None
) -> Tensor:
    """Predicted classes int64 [n, N] of n networks.

    theta: [n, P]; buffers: [n, Q] from ``statistics``.
    x: images [N, C, H, W].
    chunk: networks at once; batch: images at once, None: as many as is fast.
    """
    size = batch or (JUDGED_CPU if theta.device.type == "cpu" and _convolutional(learner) else JUDGED)

    def predict(theta: Tensor, buffers: Tensor) -> Tensor:
        parts = [vmap(learner.predict, in_dims=(0, 0, None))(theta, buffers, part).argmax(-1) for part in torch.split(x, size)]
        return torch.cat(parts, dim=1)

    return in_chunks(predict, len(theta), at_once(learner, chunk, len(x)), theta, buffers)


def accuracy(
    learner: Learner, theta: Tensor, buffers: Tensor, split: Split, *, chunk: int = 20, batch: int | None = None
) -> Tensor:
    """Fraction of a split's images that each network gets right: float64 [n] on the CPU. Arguments as ``predictions``."""
    guesses = predictions(learner, theta, buffers, split.x, chunk=chunk, batch=batch)
    return (guesses == split.y).to(torch.float64).mean(1).cpu()
