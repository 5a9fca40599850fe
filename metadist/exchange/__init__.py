"""How workers make one meta-step together. ``connect`` gives the exchange that the configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from metadist.config import Config
from metadist.errors import unknown
from metadist.exchange.allreduce import AllReduce, Alone

S = TypeVar("S")
NAMES = ("allreduce",)


class Exchange(Protocol):
    """Workers of one run."""

    rank: int
    world: int

    def step(
        self, state: S, tasks: int, compute: Callable[[S, Tensor], Tensor], apply: Callable[[S, Tensor], S], stop: bool
    ) -> tuple[S, bool]:
        """One meta-step: compute this worker's tasks, combine, apply; also whether any worker asked to stop."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all workers, in place."""
        ...

    def close(self) -> None:
        """Leave, once rank 0 is done: the others wait for it."""
        ...


def connect(config: Config, rank: int = 0, world: int = 1, store: str | None = None, incarnation: int = 0) -> Exchange:
    """The exchange of this worker.

    rank, world: which worker this is, of how many.
    store: host:port of the rendezvous that the launcher hosts; needed unless world is 1.
    incarnation: number of this start, so that a restart never meets an older one's messages.
    """
    if config.exchange.name != "allreduce":
        raise unknown("exchange", config.exchange.name, NAMES)
    if world == 1:
        return Alone()
    if store is None:
        raise ValueError("more than one worker needs a rendezvous store")
    return AllReduce(config, rank, world, store, incarnation)
