"""The workers of a queue on this machine: processes of one program that read their configuration from a folder."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from metadist.errors import RunError
from metadist.run.queue import run_workers
from metadist.run.signals import SIGNALS, Stop, stop_status


def together(program: str, folder: Path, workers: int, threads: int, out: IO[str] | None = None) -> tuple[int, str]:
    """Run ``python -m program folder`` so many times at once until all have ended: (exit status, what to say about it).

    threads: of each. out: where they print; None: as this process does. Raises RunError if all of them were killed.
    """
    paths = os.pathsep.join(p for p in sys.path if p)  # a user's own module is found as it is here
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
    status, text = run_workers([sys.executable, "-m", program, str(folder)], workers, environment, out)
    if status == 1 and text.startswith("worker"):  # all of them were killed: nobody has said anything
        raise RunError(f"{text}; run the same command again to go on")
    return status, text


def worker(work: Callable[[Stop], bool], at_once: Callable[[str], None] | None = None) -> int:
    """One of these processes; its exit status.

    work: True once everything is done, False if it left because it was asked to. at_once: see ``Stop``.
    """
    from metadist.run.worker import describe

    with Stop(at_once=at_once) as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # held back by the launcher until now
        try:
            os.environ.setdefault("LOCAL_RANK", os.environ.get("METADIST_WORKER", "0"))  # of several GPUs, which
            finished = work(stop)
        except Exception as e:
            status, text = describe(e)
            print(text, file=sys.stderr, flush=True)
            return status
    return 0 if finished else stop_status(stop.requested or "SIGTERM")
