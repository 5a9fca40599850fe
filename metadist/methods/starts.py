"""p(theta0): where a task's initial weights come from (method.init)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from metadist import draw
from metadist.config_trajectory import TrajectoryConfig
from metadist.errors import UserError
from metadist.nets import Learner
from metadist.nets.widths import narrowed


class Starts(Protocol):
    """A distribution of initial weights, with draws for training and others, never seen there, for evaluation."""

    def sample(self, step: int, tasks: Tensor) -> Tensor:
        """Initial weights [G, P] of these tasks of this meta-step."""
        ...

    def held_out(self, count: int, purpose: str = "evaluation") -> Tensor:
        """At most ``count`` initial weights [n, P] that ``sample`` never gives (a fixed one has no other: n = 1).

        purpose: the stream they are drawn from; "validation" chooses checkpoints, "evaluation" judges at the end.
        """
        ...


class Fixed:
    """method.init=fixed: one theta0, drawn once, for training and evaluation alike."""

    def __init__(self, learner: Learner, seed: int, device: torch.device) -> None:
        """Draw it."""
        self.theta0 = learner.init(draw.key(seed, "theta0", 0, torch.zeros(1, dtype=torch.int64, device=device)))

    def sample(self, step: int, tasks: Tensor) -> Tensor:
        """The same weights for every task."""
        return self.theta0.expand(len(tasks), -1).contiguous()

    def held_out(self, count: int, purpose: str = "evaluation") -> Tensor:
        """The same weights."""
        return self.theta0


class Random:
    """method.init=random: a fresh draw of the net's own p(theta0) for every task."""

    def __init__(self, learner: Learner, seed: int, device: torch.device) -> None:
        """Remember where to draw."""
        self.learner, self.seed, self.device = learner, seed, device

    def sample(self, step: int, tasks: Tensor) -> Tensor:
        """Weights of these tasks."""
        return self.learner.init(draw.key(self.seed, "theta0", step, tasks))

    def held_out(self, count: int, purpose: str = "evaluation") -> Tensor:
        """Draws of another stream."""
        return self.learner.init(draw.key(self.seed, purpose, 0, torch.arange(count, device=self.device)))


class RandomWidth(Random):
    """method.init=random with net.draw_width: every draw is a network of its own width (see metadist.nets.widths)."""

    def sample(self, step: int, tasks: Tensor) -> Tensor:
        """Weights of these tasks."""
        return narrowed(self.learner, super().sample(step, tasks), draw.key(self.seed, "width", step, tasks))

    def held_out(self, count: int, purpose: str = "evaluation") -> Tensor:
        """Draws of another stream."""
        keys = draw.key(self.seed, f"{purpose} width", 0, torch.arange(count, device=self.device))
        return narrowed(self.learner, super().held_out(count, purpose), keys)


def fresh(learner: Learner, seed: int, draw_width: bool = False) -> Random:
    """Random initializations of a learner on its device, of random widths if the net has them."""
    return (RandomWidth if draw_width else Random)(learner, seed, learner.device)


class Pretrained:
    """method.init=pretrained: networks drawn from a pool of trained ones; the last of them are kept for evaluation."""

    def __init__(self, pool: Tensor, held_out: float, seed: int) -> None:
        """pool: [count, P]. held_out: the fraction kept for evaluation, at least one network on each side."""
        kept = min(max(1, round(len(pool) * held_out)), len(pool) - 1)
        self.train, self.kept, self.seed = pool[: len(pool) - kept], pool[len(pool) - kept :], seed

    def sample(self, step: int, tasks: Tensor) -> Tensor:
        """Networks drawn with replacement from the training part."""
        return self.train[draw.integers(draw.key(self.seed, "theta0", step, tasks), (), len(self.train))]

    def held_out(self, count: int, purpose: str = "evaluation") -> Tensor:
        """``count`` networks of the kept part: its first ones; for validation its last ones (they overlap if it is small)."""
        return self.kept[-count:] if purpose == "validation" else self.kept[:count]


class Experts(Protocol):
    """Trajectories of experts; metadist.store.experts holds them in files.

    key: SHA-256 of how they were made; count: how many; epochs: E, snapshots are 0 ... E; size: P.
    """

    key: str
    count: int
    epochs: int
    size: int

    def weights(self, expert: int, epochs: Sequence[int]) -> Tensor:
        """[len(epochs), P] after so many epochs."""
        ...


class Expert(Random):
    """method.init=expert: points of expert trajectories; sets are judged from fresh initializations.

    config: which segments. Raises UserError for experts of other sizes, and for segments past a trajectory's end.
    """

    def __init__(self, learner: Learner, experts: Experts, config: TrajectoryConfig, seed: int) -> None:
        """Check that experts, net and segments agree."""
        super().__init__(learner, seed, learner.device)
        self.experts, self.config = experts, config
        last, given = config.max_start - 1 + config.epochs, f"trajectory.max_start={config.max_start}"
        most = f"allowed with trajectory.epochs={config.epochs}: at most {experts.epochs + 1 - config.epochs}"
        if experts.size != learner.size:
            raise UserError(f"the experts have {experts.size} weights, this run's net {learner.size}; take experts of the same "
                            "net, channels, size and classes")  # fmt: skip
        if config.epochs > experts.epochs:
            raise UserError(f"trajectory.epochs={config.epochs} is longer than the experts' {experts.epochs} epochs; allowed: "
                            f"1 to {experts.epochs}")  # fmt: skip
        if config.max_start > experts.epochs + 1:
            raise UserError(f"{given} names more start epochs than the {experts.epochs + 1} snapshots of these experts; {most}")
        if last > experts.epochs:
            raise UserError(f"{given} asks for snapshot {last} of experts that end at {experts.epochs}; {most}")

    def bound(self, step: int) -> int:
        """Start epochs of this meta-step are below it: trajectory.max_start, or on the way there."""
        c = self.config
        if step >= c.grow:
            return c.max_start
        first = c.grow_from or c.min_start + 1
        return first + (c.max_start - first) * step // c.grow

    def segments(self, step: int, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [G, P] at the start and at the end of these tasks' segments, each of an expert of its own."""
        key, low = draw.key(self.seed, "segment", step, tasks), self.config.min_start
        experts = draw.integers(draw.split(key, 0), (), self.experts.count)
        starts = low + draw.integers(draw.split(key, 1), (), self.bound(step) - low)
        pairs = zip(experts.tolist(), starts.tolist(), strict=True)
        ends = torch.stack([self.experts.weights(i, (t, t + self.config.epochs)) for i, t in pairs])
        ends = ends.to(self.device, self.learner.dtype)
        return ends[:, 0].contiguous(), ends[:, 1].contiguous()

    def sample(self, step: int, tasks: Tensor) -> Tensor:
        """Weights of experts, at the start of a segment."""
        return self.segments(step, tasks)[0]
