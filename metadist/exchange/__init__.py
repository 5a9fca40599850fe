"""How workers make one meta-step together. ``connect`` gives the exchange that the configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from metadist.config import Config
from metadist.errors import UserError, unknown
from metadist.exchange.allreduce import AllReduce, Alone, Replica
from metadist.exchange.server import Place, Server
from metadist.synthetic.images import Phi

S = TypeVar("S", bound=Replica)
NAMES = ("allreduce", "server")

__all__ = ["Exchange", "Place", "connect"]


class Exchange(Protocol):
    """One process of a run that holds the meta-state.

    rank, world: which of how many such processes. computes: whether it computes tasks itself.
    """

    rank: int
    world: int
    computes: bool

    @property
    def workers(self) -> int:
        """Processes that compute tasks."""
        ...

    def step(
        self,
        state: S,
        tasks: int,
        compute: Callable[[S, Tensor], Tensor],
        apply: Callable[[S, Tensor], S],
        stop: Callable[[], bool],
    ) -> tuple[S, bool]:
        """One meta-step: compute tasks, combine, apply; also whether any worker was asked to stop (then maybe without it)."""
        ...

    def spread(self, purpose: str, phi: Phi, count: int, figures: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        """An evaluation, shared out: float64 [rows, count], from ``figures`` (numbers of networks -> [rows, n])."""
        ...

    def agree(self, step: int) -> None:
        """Raise RunError unless all processes that hold the state are at this step."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint must keep besides the state, JSON-able."""
        ...

    def restore(self, record: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        ...

    def figures(self) -> tuple[dict[str, float], dict[str, list[int]]]:
        """Values and distributions to log, since the last call."""
        ...

    def close(self, finished: bool = True) -> None:
        """Leave, once rank 0 is done: the others wait for it. finished: there is nothing more to do for anybody."""
        ...


def connect(
    config: Config, rank: int = 0, world: int = 1, store: str | None = None, incarnation: int = 0, place: Place | None = None
) -> Exchange:
    """The exchange of this process.

    rank, world: which worker this is, of how many.
    store: host:port of the rendezvous that the launcher hosts; needed by allreduce unless world is 1.
    incarnation: number of this start, so that a restart never meets an older one's messages.
    place: where a server stands; needed by exchange=server.
    Raises UserError where a server is wanted, but nobody started one.
    """
    if config.exchange.name == "server":
        if place is None:
            raise UserError("exchange=server is several processes; start it with launch/local.py or launch/slurm.py")
        return Server(config, incarnation, place)
    if config.exchange.name != "allreduce":
        raise unknown("exchange", config.exchange.name, NAMES)
    if world == 1:
        return Alone()
    if store is None:
        raise ValueError("more than one worker needs a rendezvous store")
    return AllReduce(config, rank, world, store, incarnation)
