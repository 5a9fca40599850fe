"""p(theta0): where a task's initial weights come from (method.init)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from metadist import draw
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
