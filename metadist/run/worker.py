"""One rank of a run: a process that ``metadist.run.local`` (or a cluster's launcher) starts, or this very process.

    RANK=0 WORLD_SIZE=2 METADIST_INCARNATION=1 METADIST_STORE=127.0.0.1:4711 python -m metadist.run.worker <run_dir>

Design choices
- The configuration comes from the run folder, everything else from the environment: RANK, WORLD_SIZE, LOCAL_RANK,
  METADIST_INCARNATION (claimed once by the launcher), METADIST_STORE (host:port of a TCPStore that the LAUNCHER hosts: every
  rank is a client), METADIST_LAUNCHER (its process number) and METADIST_FAULT_FD (a pipe).
- A fault travels to the launcher through the pipe with the time it happened, so that one line is printed for all ranks, and
  it is the one of the rank that failed first, not of those that merely lost it.
- A rank dies with its launcher, whatever kills that (Linux: parent-death signal).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metadist.errors import RunError, UserError
from metadist.run.environment import cores
from metadist.run.folder import RunFolder
from metadist.run.signals import SIGNALS, Stop, stop_status

_PR_SET_PDEATHSIG = 1
_FAULT_BYTES = 16384  # less than a pipe holds: the write never blocks
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}

# folder, rank, world, store (None: alone), stop -> summary
Body = Callable[[RunFolder, int, int, str | None, Stop], dict[str, Any]]


def train_rank(folder: RunFolder, rank: int, world: int, store: str | None, stop: Stop) -> dict[str, Any]:
    """Connect to the other ranks and train; returns the trainer's summary. With exchange=server this process is the server.

    store: where the ranks meet, host:port; the host is the interface a server listens on.
    """
    from metadist import exchange
    from metadist.exchange.server import item_size
    from metadist.run import trainer

    config, place = folder.config, None
    if config.exchange.name == "server":
        item = int(folder.resolve("item", lambda: item_size(config)))
        ip = (store or "127.0.0.1:0").rsplit(":", 1)[0]
        place = exchange.Place(
            folder.path, ip, item, folder.write, lambda text: print(text, flush=True), lambda: stop.requested is not None
        )
    link = exchange.connect(config, rank, world, store, folder.incarnation, place)
    summary = trainer.train(config, folder, link, stop)
    link.close(finished="stopped" not in summary)
    return summary


def describe(error: BaseException) -> tuple[int, str]:
    """Exit status and text of a fault: one line for a user's mistake (2) or a fault on the way (1), else its traceback (1)."""
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, RunError):
        return 1, f"error: {error}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return 1, "error: out of memory; lower engine.memory_gb or engine.group and run the same command again to resume"
    if isinstance(error, BrokenPipeError):
        return 141, "error: the reader of this run's output went away; run the same command again to resume"
    if isinstance(error, OSError) and error.errno in _DISK:
        return 1, f"error: {error.filename or 'the disk'}: {error.strerror}; mend that and run the same command again to resume"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def result_text(summary: dict[str, Any]) -> str:
    """What a finished run prints: the summary's "text", or its plain values, one a line."""
    if isinstance(text := summary.get("text"), str):
        return text
    return "\n".join(f"{k}: {v}" for k, v in summary.items() if isinstance(v, str | int | float))


def threads(folder: RunFolder, world: int) -> int:
    """Threads of one rank: as configured, or cores / workers as resolved at the first start with so many workers."""
    return folder.config.threads or int(folder.resolve(f"threads-{world}", lambda: max(1, cores() // world)))


def execute(
    folder: RunFolder, rank: int, world: int, store: str | None, stop: Stop, body: Body = train_rank, count: int = 0
) -> int:
    """Run ``body`` with ``count`` threads (0: the run's own number), print its outcome at rank 0, return the exit status.

    0: finished; 128 + number: stopped by that signal with a checkpoint (the summary's "stopped" names it, "steps" says where).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or threads(folder, world))
    try:
        summary = body(folder, rank, world, store, stop)
    finally:
        torch.set_num_threads(before)
    stopped = summary.get("stopped")
    if rank == 0:
        where = f"stopped by {stopped} at step {summary.get('steps')} of {folder.config.steps}"
        print(f"{where}; run the same command again to resume" if stopped else result_text(summary), flush=True)
    return stop_status(stopped) if stopped else 0


def die_with(launcher: int) -> None:
    """Ask the kernel to kill this process when its parent ``launcher`` ends; leave at once if it has already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != launcher:  # it ended before the request stood
        os._exit(1)


def main(arguments: list[str] | None = None, body: Body = train_rank) -> int:
    """Run one rank as the environment says; returns its exit status. Faults go to the launcher, without one to stderr."""
    environ = os.environ
    if "METADIST_LAUNCHER" in environ:
        die_with(int(environ["METADIST_LAUNCHER"]))
    with Stop() as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # held back by the launcher until now
        try:
            run_dir = Path((sys.argv[1:] if arguments is None else arguments)[0])
            rank, world = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
            folder = RunFolder.attach(run_dir, int(environ["METADIST_INCARNATION"]), rank)
            return execute(folder, rank, world, environ.get("METADIST_STORE"), stop, body)
        except Exception as e:
            status, text = describe(e)
            tell(status, text, rank_is_shown=environ.get("RANK", "0") == "0")
            return status


def tell(status: int, text: str, rank_is_shown: bool) -> None:
    """Report a fault to the launcher, if there is one; print it unless the launcher will (``rank_is_shown``)."""
    fault = os.environ.get("METADIST_FAULT_FD")
    if fault is not None:
        # CLOCK_MONOTONIC is one clock for all processes of a machine.
        record = {"time": time.monotonic(), "status": status, "text": text[-_FAULT_BYTES // 4 :]}
        os.write(int(fault), json.dumps(record).encode())
    if fault is None or not rank_is_shown:  # the launcher prints the first fault; the other ranks' go to their own logs
        print(text, file=sys.stderr, flush=True)


def leave(status: int) -> None:
    """End this process. With a fault it leaves at once: tidying up would wait for peers that are gone."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)
    sys.exit(0)


if __name__ == "__main__":
    leave(main())
