"""A queue of tasks on a cluster: an array of jobs, each of which works on it. For launch/experts.py and launch/search.py.

Design choices
- Nobody waits for anybody: a worker that finds every task taken leaves its node. An element that was preempted, warned or
  killed runs again (metadist.run.cluster.after_member) and goes on from what it has kept, or another one has by then.
- The same command submits more workers for what is missing; when nothing is, it prints the result.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from metadist.config import Config
from metadist.run.cluster.record import Slot, left_path, write
from metadist.run.signals import SIGNALS, Stop


@dataclass(frozen=True)
class Job:
    """What is submitted.

    folder: of the queue and its results; key: the word that names it. program: of each worker, a module; launcher: whose
    command this is. tasks: how many, for people. open: makes the folder. result: what a finished one prints, else None.
    """

    folder: Path
    key: str
    program: str
    launcher: str
    tasks: int
    open: Callable[[], object]
    result: Callable[[], str | None]


def placed(words: Sequence[str]) -> Callable[[Config], None]:
    """What the machines decide (see metadist.run.cluster.command); a run's meta-batch is no bound of the workers."""
    from metadist.run.cluster.command import place_workers

    def place(config: Config) -> None:
        place_workers(words)(config)
        config.tasks = max(config.tasks, config.workers)

    return place


def submit(words: Sequence[str], config: Config, job: Job) -> int:
    """Print or submit the array; the exit status. Raises UserError."""
    from metadist.run.cluster.batch import LOGS, Executor, Role
    from metadist.run.cluster.command import check_scheduler
    from metadist.run.cluster.mounts import refuse_local

    folder, cluster = job.folder, config.cluster
    role = Role(job.program, "metadist.run.cluster.after_member")
    executor = Executor(folder, dataclasses.replace(cluster, nodes=1), cluster.nodes, role)
    if cluster.name == "print":
        sys.stdout.write(executor.text)
        return 0
    check_scheduler(cluster)
    if cluster.check_mount:
        refuse_local(folder, key=job.key)
    job.open()
    if (text := job.result()) is not None:
        print(text)
        return 0
    (folder / "summary.json").unlink(missing_ok=True)  # a worker that is preempted shall run again
    number = executor.send()
    write(folder / LOGS / "job.json", {"job": number, "cluster": "slurm", "time": time.time(), "words": list(words)})
    print(f"submitted array {number}: {config.workers} workers for {job.tasks} tasks")
    for what, how in (
        ("folder", folder),
        ("logs", f"{folder / LOGS / f'{number}_<element>_<rank>_log.out'} and .err"),
        ("resume", shlex.join(["python", f"launch/{job.launcher}.py", *(w.removeprefix("cluster.") for w in words)])),
        ("cancel", f"scancel {number}"),
    ):
        print(f"  {what:<14} {how}", flush=True)
    return 0


def element(folder: Path, work: Callable[[Path, Stop], str | None], at_once: Callable[[], None] | None = None) -> int:
    """A worker of the array; the exit status, 0 also where a signal ended it with its work kept.

    work: what to print once everything is done, else None. at_once: called by a signal, which ends it there and then; None:
    ``work`` ends by itself.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    slot = Slot.here()

    def leave(name: str) -> None:
        try:
            if at_once is not None:
                at_once()
            _left(folder, slot, name, "what it had finished")
        finally:
            os._exit(0)

    with Stop(at_once=leave if at_once else None) as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            from metadist.run.cluster.rank import place

            place(slot)
            text = work(folder, stop)
        except Exception as e:
            return _fault(folder, slot, e)
    if stop.requested:
        _left(folder, slot, stop.requested, "a checkpoint")
    else:
        print(text if text is not None else "nothing is left to take; others are at work on the rest", flush=True)
    return 0


def _left(folder: Path, slot: Slot, name: str, kept: str) -> None:
    write(left_path(folder, slot), {"signal": name, "time": time.time()})
    print(f"{name}: left with {kept}", flush=True)


def _fault(folder: Path, slot: Slot, error: Exception) -> int:
    from metadist.run.worker import describe

    status, text = describe(error)
    print(text, file=sys.stderr, flush=True)
    write(slot.fault(folder, slot.rank), {"time": time.time(), "status": status, "text": text[-4000:], "lost": False})
    return status


def of_node(config: Config) -> Config:
    """The configuration of a worker: threads are the cores that the scheduler gave it, if nothing else is said."""
    return dataclasses.replace(config, threads=config.threads or int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
