"""Trajectory matching (Cazenavette et al. 2022, arXiv 2203.11932): train on the distilled images as experts train on real ones.

A task is a segment of one expert's training, from its weights theta* after t epochs to those after t + M. A student that starts
at theta*_t and takes N steps on distilled images, augmented, shall arrive where the expert did:

    loss = |theta_N - theta*_{t+M}|^2 / |theta*_t - theta*_{t+M}|^2

differentiated exactly, through all N steps, in the memory of their weights. The expanding window of start epochs and learned
soft labels are DATM's (Guo et al. 2024, arXiv 2310.05773). With a ``Guide`` (method=mtt_kd) a frozen teacher's soft targets
join the student's loss; the teacher sees what the student sees, and gradients flow through it into the pixels.

Design choices
- What a step sees is drawn up front: which images (a new permutation each pass) and what DSA does to each of them. The batches
  of all steps are then a function of the pixels, differentiated by autograd a few steps at a time and made again in its
  backward pass: its activations are never all there.
- Without augmentation, and all images at every step, students of all segments share their one batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metadist import draw
from metadist.config import Config
from metadist.data import Data, dsa
from metadist.metagrad.inner import Inner
from metadist.metagrad.mixed import Batch, Loss
from metadist.methods.dd import Distillation, whole
from metadist.methods.starts import Starts
from metadist.nets.teacher import Teacher
from metadist.synthetic.images import Images, Phi

_AT_ONCE = 1024  # images that are augmented, or shown to the teacher, at once


class Guide(NamedTuple):
    """method.loss=distillation: the teacher, and the student's loss of a batch (x, y, the teacher's logits)."""

    teacher: Teacher
    loss: Loss


class Segments(Starts, Protocol):
    """Starts that are points of expert trajectories."""

    def segments(self, step: int, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [G, P] at the start and at the end of these tasks' segments."""
        ...


class Segment(NamedTuple):
    """What the tasks of one group draw.

    theta0, target: [G, P] the expert's weights at the two ends.
    rows: int64 [G, N, B], the images of each step.
    augmentation: [G, N, B, WIDTH] of ``metadist.data.dsa``; [0] without augmentation.
    """

    theta0: Tensor
    target: Tensor
    rows: Tensor
    augmentation: Tensor


class Trajectory(Distillation):
    """The method. Arguments as ``Distillation``; starts: with segments; guide: the teacher, if one takes part."""

    def __init__(
        self, config: Config, data: Data, synthetic: Images, inner: Inner, starts: Segments, guide: Guide | None = None
    ) -> None:
        """Keep the pieces."""
        count, n = synthetic.count, synthetic.inner_steps
        self.batch = config.trajectory.batch or count // config.inner.steps
        self.alike = config.dsa == "none" and self.batch == count
        inner = inner.but(shared=self.alike) if guide is None else inner.but(shared=self.alike, loss=guide.loss)
        super().__init__(config, data, synthetic, inner, starts, whole(n, 0))
        self.images, self.segments, self.guide = synthetic, starts, guide

    def draw(self, step: int, tasks: Tensor) -> Any:
        """Everything random of these tasks [G] of this meta-step: a function of (seed, step, task) alone."""
        seed, strategy, count, n = self.config.seed, self.config.dsa, self.images.count, self.images.inner_steps
        passes = draw.split(draw.key(seed, "rows", step, tasks)[:, None], torch.arange(-(-n * self.batch // count)))
        rows = draw.permutation(passes, count).flatten(1)[:, : n * self.batch].view(len(tasks), n, self.batch)
        augmentation = torch.zeros(0, dtype=self.images.dtype, device=self.images.device)
        if strategy != "none":
            keys = draw.split(draw.key(seed, "dsa", step, tasks)[:, None], torch.arange(n))
            # Drawn in float32 whatever the type: the exact gradient in float64 is that of the same augmentation.
            augmentation = dsa.parameters(strategy, keys, self.batch, self.images.shape[-1]).to(self.images.dtype)
        return Segment(*self.segments.segments(step, tasks), rows, augmentation)

    def loss(self, phi: Phi, task: Any) -> Tensor:
        """How far the students [G] end from where their experts did, in units of the experts' own way."""
        n = self.images.inner_steps
        order = (0,) * n if self.alike else range(n)
        theta = self.inner.unroll(task.theta0, self.batches(phi, task), order, self.synthetic.schedule(phi)[:n])[0]
        away, way = theta - task.target, task.theta0 - task.target
        value: Tensor = away.square().sum(1) / way.square().sum(1)
        return value

    def batches(self, phi: Phi, task: Segment) -> Batch:
        """What the students see: images [G, N, B, C, H, W], labels [G, N, B] or [G, N, B, K], the teacher's logits.

        Where all see the same at every step, [1, B, ...].
        """
        x, y = phi["images"], self.images.labels(phi)
        if self.alike:
            seen: Batch = (x[None], *(() if self.guide is None else (self.guide.teacher(x)[None],)))
            return (seen[0], y[None], *seen[1:])
        steps = max(1, _AT_ONCE // (len(task.rows) * self.batch))
        rows, augmentation = torch.split(task.rows, steps, 1), task.augmentation
        pieces = torch.split(augmentation, steps, 1) if len(augmentation) else [augmentation] * len(rows)
        parts = [
            checkpoint(self._seen, x, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in zip(rows, pieces, strict=True)
        ]
        seen = tuple(torch.cat(same, 1) for same in zip(*parts, strict=True))
        return (seen[0], y[task.rows], *seen[1:])

    def _seen(self, images: Tensor, rows: Tensor, augmentation: Tensor) -> Batch:
        """Augmented images [G, n, B, C, H, W] of n steps, and the teacher's logits on them [G, n, B, K]."""
        x = images[rows]
        x = dsa.apply(augmentation, x) if len(augmentation) else x
        return (x,) if self.guide is None else (x, self.guide.teacher(x.flatten(0, 2)).view(*rows.shape, -1))
