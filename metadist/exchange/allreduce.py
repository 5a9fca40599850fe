"""The synchronous exchange: one flat buffer a step through torch.distributed (gloo on CPU, NCCL on GPU).

Design choices
- Tasks are numbered globally; worker r takes a contiguous share. What a task draws depends on its number alone, so any number
  of workers, uneven shares included, sums the same gradients.
- The buffer holds the gradient's sum, the loss's sum, the task count, and a stop flag: all workers leave at the same step.
- Every worker applies the same update to the same state; no parameters travel.
- The launcher hosts the rendezvous store (on a cluster the first worker does: ``host``), workers are its clients. The group
  stands on a prefix unique to each start, so that a restarted run never meets an older one's keys.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metadist.config import Config
from metadist.errors import Lost, RunError
from metadist.synthetic.images import Phi

_POLL_S = 0.1


class Replica(Protocol):
    """A state that an exchange advances: it has the parameters that gradients are taken at."""

    phi: Phi


S = TypeVar("S", bound=Replica)


def share(tasks: int, rank: int, world: int) -> Tensor:
    """The task numbers of one worker: contiguous, sizes differ by at most one."""
    base, extra = divmod(tasks, world)
    first = rank * base + min(rank, extra)
    return torch.arange(first, first + base + (rank < extra))


def host(address: str) -> Any:
    """A TCPStore in this process; its ``port`` is what the workers need.

    address: of the one interface it listens on. The kernel picks the port: a new one for each start.
    """
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


class _Replicated:
    """What is the same for one and for several workers that all hold the state."""

    rank, world, computes = 0, 1, True

    @property
    def workers(self) -> int:
        """All of them compute."""
        return self.world

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all workers."""
        return values

    def spread(self, purpose: str, phi: Phi, count: int, figures: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        """Figures float64 [rows, count] of networks 0 .. count - 1, a share by each worker."""
        device = next(iter(phi.values())).device
        table = torch.zeros(rows, count, dtype=torch.float64, device=device)
        mine = share(count, self.rank, self.world).to(device)
        if len(mine):
            table[:, mine] = figures(mine).to(device)
        return self.sum(table).cpu()

    def snapshot(self) -> dict[str, Any]:
        """Nothing but the state decides the future."""
        return {}

    def restore(self, record: dict[str, Any]) -> None:
        """Nothing to restore."""

    def figures(self) -> tuple[dict[str, float], dict[str, list[int]]]:
        """Nothing of its own to log."""
        return {}, {}


class Alone(_Replicated):
    """The exchange of a single worker."""

    def step(
        self,
        state: S,
        tasks: int,
        compute: Callable[[S, Tensor], Tensor],
        apply: Callable[[S, Tensor], S],
        stop: Callable[[], bool],
    ) -> tuple[S, bool]:
        """Compute all tasks and apply."""
        return apply(state, compute(state, share(tasks, 0, 1))), stop()

    def agree(self, step: int) -> None:
        """There is nobody to disagree with."""

    def close(self, finished: bool = True) -> None:
        """Nothing to leave."""


class AllReduce(_Replicated):
    """The exchange of several workers."""

    def __init__(self, config: Config, rank: int, world: int, store: str, incarnation: int) -> None:
        """Join the group. Raises Lost if the others do not come within exchange.timeout_s."""
        self.rank, self.world = rank, world
        backend = config.exchange.backend
        if backend == "auto":
            # NCCL wants a GPU for each worker; gloo serves workers that share one, too.
            here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            own_gpu = config.device != "cpu" and torch.cuda.is_available() and here <= torch.cuda.device_count()
            backend = "nccl" if own_gpu else "gloo"
        host, port = store.rsplit(":", 1)
        timeout = timedelta(seconds=config.exchange.timeout_s)
        try:
            tcp = dist.TCPStore(host, int(port), world, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
            prefixed = dist.PrefixStore(f"start-{incarnation}", tcp)  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world, timeout=timeout)
            self._store: Any = dist.PrefixStore("close", prefixed)  # type: ignore[attr-defined]
        except (RuntimeError, ValueError) as error:
            raise Lost(f"worker {rank} could not join the others at {store}: {_first_line(error)}") from error

    def step(
        self,
        state: S,
        tasks: int,
        compute: Callable[[S, Tensor], Tensor],
        apply: Callable[[S, Tensor], S],
        stop: Callable[[], bool],
    ) -> tuple[S, bool]:
        """Compute this worker's share, sum over workers, apply the same update everywhere."""
        part = compute(state, share(tasks, self.rank, self.world))
        buffer = self.sum(torch.cat((part, part.new_tensor([float(stop())]))))
        return apply(state, buffer[:-1]), bool(buffer[-1] > 0)

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce in place. Raises Lost when a worker is lost."""
        try:
            dist.all_reduce(values)
        except RuntimeError as error:
            raise Lost(
                f"worker {self.rank} lost another worker ({_first_line(error)}); run the same command again to resume"
            ) from error
        return values

    def agree(self, step: int) -> None:
        """Raise RunError unless all workers are at the same step."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = self.sum(torch.tensor([float(step), float(step) ** 2], dtype=torch.float64, device=device))
        if float(total[0]) != step * self.world or float(total[1]) != step**2 * self.world:
            raise RunError(f"worker {self.rank} found checkpoint {step}, others another; can all see the same run_dir?")

    def close(self, finished: bool = True) -> None:
        """Leave the group, all together, once rank 0 is done. Raises Lost when the launcher is lost.

        Rank 0 alone writes reports, for as long as that takes: a collective would time out, a key in the store does not.
        """
        if not dist.is_initialized():
            return
        try:
            if self.rank == 0:
                self._store.set("done", "1")
            while self.rank and not self._store.check(["done"]):
                time.sleep(_POLL_S)
        except RuntimeError as error:
            raise Lost(f"worker {self.rank} lost its launcher ({_first_line(error)})") from error
        dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
