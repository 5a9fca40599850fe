"""A run on this machine: in this process for one worker, else one process a worker.

Design choices
- The launcher alone talks to the terminal's signals: ranks live in sessions of their own, a signal reaches each of them once,
  through the launcher. It is held back (blocked) until a rank is ready for it, so that no rank dies of it while it starts.
- The launcher hosts the store where the ranks meet, on loopback and on a port the kernel picked: a new one for each start, so
  neither a port nor a key of an earlier attempt can get in the way. gloo and NCCL are told to use loopback too.
- The first rank that fails ends the others after a moment in which they may say what they saw; one line, or one traceback, is
  printed for all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from metadist.config import Config
from metadist.errors import RunError
from metadist.run.folder import RunFolder
from metadist.run.signals import SIGNALS, Stop, stop_status
from metadist.run.validate import validate
from metadist.run.worker import describe, execute, result_text, threads

WORKER = [sys.executable, "-m", "metadist.run.worker"]
_POLL_S = 0.05
_GRACE_S = 2.0  # between the first failure and the end of the others
_TAIL_BYTES = 4096
_STOPPED = {stop_status(s.name) for s in SIGNALS}


def run(config: Config) -> int:
    """Start or resume the run of ``config``; returns its exit status.

    0: finished (now or before); 2: a user's mistake, one line; 1: a fault on the way, one line, or an unforeseen one with its
    traceback; 130, 143, 140: stopped by SIGINT, SIGTERM, SIGUSR2 with a checkpoint.
    """
    try:
        return _run(config)
    except BrokenPipeError:
        raise  # metadist.run.guard knows how to end quietly
    except KeyboardInterrupt:  # before the run had begun: nothing to save
        return stop_status("SIGINT")
    except Exception as e:
        status, text = describe(e)
        print(text, file=sys.stderr, flush=True)
        return status


def _run(config: Config) -> int:
    validate(config)
    folder = RunFolder.open(config)
    if (summary := folder.finished) is not None:
        print(result_text(summary), flush=True)
        return 0
    if config.exchange.name == "server":
        from metadist.run.local_server import launch as serve

        return serve(folder)
    if config.workers == 1:
        with Stop() as stop:
            return execute(folder, 0, 1, None, stop)
    return launch(folder)


def launch(folder: RunFolder, command: list[str] | None = None) -> int:
    """Run ``folder``'s workers as processes and wait for them; returns the run's exit status.

    command: the program of one rank, its run folder is appended. Raises RunError for a rank that was killed.
    """
    ranks: list[Rank] = []
    lock = threading.Lock()

    def forward(signum: int) -> None:
        with lock:
            for rank in ranks:
                rank.signal(signum)

    def kill() -> None:
        for rank in ranks:
            rank.process.kill()

    from metadist.exchange.allreduce import host

    store = host("127.0.0.1")
    count = threads(folder, folder.config.workers)
    with Stop(on_request=forward, on_abort=kill) as stop:
        try:
            for number in range(folder.config.workers):
                with lock:
                    ranks.append(Rank(number, folder, command or WORKER, f"127.0.0.1:{store.port}", count))
            if stop.requested:  # it came while they were being started
                forward(signal.Signals[stop.requested])
            _wait(ranks)
        finally:
            kill()
            codes = [rank.process.wait() for rank in ranks]
    failed = [rank for rank in ranks if rank.failed]
    return verdict(failed, folder) if failed else max(codes)


def _environment(number: int, folder: RunFolder, store: str, count: int, fault: int) -> dict[str, str]:
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    return os.environ | {
        "RANK": str(number),
        "LOCAL_RANK": str(max(0, number - 1) if folder.config.exchange.name == "server" else number),
        "METADIST_LABEL": str(number),
        "WORLD_SIZE": str(folder.config.workers),
        "METADIST_STORE": store,
        "METADIST_INCARNATION": str(folder.incarnation),
        "METADIST_LAUNCHER": str(os.getpid()),
        "METADIST_FAULT_FD": str(fault),
        "OMP_NUM_THREADS": str(count),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),  # a user's own module is found as it is here
    }


class Rank:
    """One worker process as its launcher sees it. Rank 0 writes to the terminal, the others to logs of their own."""

    def __init__(self, number: int, folder: RunFolder, command: list[str], store: str, count: int) -> None:
        """Start it."""
        self.number, self.log = number, folder.path / f"log-rank{number}.txt"
        self._signalled = self.ended_by_us = False
        self._fault: dict[str, Any] | None = None
        self._pipe, fault = os.pipe()
        os.set_blocking(self._pipe, False)
        old = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited; the rank unblocks them when it is ready
        try:
            with contextlib.ExitStack() as stack:
                output = None if number == 0 else stack.enter_context(self.log.open("ab"))
                self._from = output.tell() if output else 0
                self.process = subprocess.Popen(
                    [*command, str(folder.path)],
                    env=_environment(number, folder, store, count, fault),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(fault,),
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
            os.close(fault)

    def signal(self, signum: int) -> None:
        """Pass a signal on, once."""
        if not self._signalled:
            self._signalled = True
            self.process.send_signal(signum)

    def end(self) -> None:
        """Kill it, and don't hold that against it."""
        if self.process.poll() is None:
            self.ended_by_us = True
            self.process.kill()

    @property
    def failed(self) -> bool:
        """Whether it has ended otherwise than in good order or by this launcher."""
        code = self.process.poll()
        return code not in (None, 0) and code not in _STOPPED and not self.ended_by_us

    @property
    def fault(self) -> dict[str, Any] | None:
        """What the rank said when it failed: time (monotonic seconds), status, text."""
        if self._fault is None:
            with contextlib.suppress(BlockingIOError):
                if record := os.read(self._pipe, 1 << 20):
                    self._fault = json.loads(record)
        return self._fault

    @property
    def tail(self) -> str:
        """The end of what this start wrote into the rank's log."""
        if self.number == 0:
            return ""  # it went to the terminal
        text = self.log.read_bytes()[self._from :]
        return text[-_TAIL_BYTES:].decode(errors="replace").strip()


def _wait(ranks: list[Rank]) -> None:
    """Until all have ended; the first failure ends the others after a grace."""
    deadline = float("inf")
    while any(rank.process.poll() is None for rank in ranks):
        if deadline == float("inf") and any(rank.failed for rank in ranks):
            deadline = time.monotonic() + _GRACE_S
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.end()
        time.sleep(_POLL_S)


def verdict(failed: list[Rank], folder: RunFolder) -> int:
    """Say what the rank that failed first had; those that only lost it come later, with a fault of their own."""
    killed = next((rank for rank in failed if rank.process.returncode < 0), None)
    if killed is not None:
        number = -killed.process.returncode
        if number != signal.SIGKILL and killed.tail:
            print(killed.tail, file=sys.stderr, flush=True)
        raise RunError(
            f"worker {killed.number} was killed (signal {number}); "
            f"run the same command again to resume from step {folder.newest_step}"
        )
    first = min(failed, key=lambda rank: rank.fault["time"] if rank.fault else 0.0)
    text = first.fault["text"] if first.fault else first.tail
    print(text or f"error: worker {first.number} ended with status {first.process.returncode}", file=sys.stderr, flush=True)
    return int(first.fault["status"]) if first.fault else 1
