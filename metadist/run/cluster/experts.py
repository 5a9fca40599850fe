"""Experts on a cluster: an array of jobs, each of which works on the same queue; and its worker.

    srun python -u -m metadist.run.cluster.experts <folder of the experts>

Design choices
- Nobody waits for anybody: a worker that finds every task taken leaves its node. An element that was preempted, warned or
  killed runs again (metadist.run.cluster.after_member) and goes on from its group's checkpoint, or another one has by then.
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
from pathlib import Path

from metadist.config import Config
from metadist.run.cluster.record import Slot, left_path, read, write
from metadist.run.signals import SIGNALS, Stop


def submit(words: Sequence[str]) -> int:
    """``launch/experts.py cluster=slurm``: print or submit the array. Raises UserError."""
    from metadist.run.cluster.batch import LOGS, Executor, Role
    from metadist.run.cluster.command import check_scheduler
    from metadist.run.cluster.mounts import refuse_local
    from metadist.run.compose import compose
    from metadist.run.experts import done, experts_dir, groups, outcome
    from metadist.run.experts_command import judge, open_folder
    from metadist.run.experts_job import check

    config = compose(words, _placed(words), lambda c, keys: judge(c, keys, cluster=True))
    check(config)
    folder, cluster = experts_dir(config), config.cluster
    role = Role("metadist.run.cluster.experts", "metadist.run.cluster.after_member")
    executor = Executor(folder, dataclasses.replace(cluster, nodes=1), cluster.nodes, role)
    if cluster.name == "print":
        sys.stdout.write(executor.text)
        return 0
    check_scheduler(cluster)
    if cluster.check_mount:
        refuse_local(folder, key="cache_dir" if config.experts.path is None else "experts.path")
    open_folder(config)
    if all(done(config, folder, task) for task in groups(config)):
        print(outcome(config, folder))
        return 0
    (folder / "summary.json").unlink(missing_ok=True)  # a worker that is preempted shall run again
    job = executor.send()
    write(folder / LOGS / "job.json", {"job": job, "cluster": "slurm", "time": time.time(), "words": list(words)})
    print(f"submitted array {job}: {config.workers} workers for {len(groups(config))} tasks")
    for what, how in (
        ("folder", folder),
        ("logs", f"{folder / LOGS / f'{job}_<element>_<rank>_log.out'} and .err"),
        ("resume", shlex.join(["python", "launch/experts.py", *(w.removeprefix("cluster.") for w in words)])),
        ("cancel", f"scancel {job}"),
    ):
        print(f"  {what:<14} {how}", flush=True)
    return 0


def _placed(words: Sequence[str]) -> Callable[[Config], None]:
    from metadist.run.cluster.command import place_workers

    def place(config: Config) -> None:
        place_workers(words)(config)
        config.tasks = max(config.tasks, config.workers)  # a run's meta-batch: no bound of ours

    return place


def main(argv: Sequence[str]) -> int:
    """Work on the queue of ``argv[0]``; the exit status, 0 also where a signal ended it with a checkpoint."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    folder, slot = Path(argv[0]), Slot.here()
    with Stop() as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            finished = _work(folder, slot, stop)
        except Exception as e:
            return _fault(folder, slot, e)
    if stop.requested:
        write(left_path(folder, slot), {"signal": stop.requested, "time": time.time()})
        print(f"{stop.requested}: left with a checkpoint", flush=True)
    elif not finished:
        print("nothing is left to take; others are at work on the rest", flush=True)
    return 0


def _work(folder: Path, slot: Slot, stop: Stop) -> bool:
    from metadist.run.cluster.rank import place
    from metadist.run.experts import outcome, work
    from metadist.run.folder import config_from_dict

    config = config_from_dict(read(folder / "config.json"))
    place(slot)
    config.threads = config.threads or int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    finished = work(config, folder, lambda: stop.requested is not None, patient=False)
    if finished:
        print(outcome(config, folder), flush=True)
    return finished


def _fault(folder: Path, slot: Slot, error: Exception) -> int:
    from metadist.run.worker import describe

    status, text = describe(error)
    print(text, file=sys.stderr, flush=True)
    write(slot.fault(folder, slot.rank), {"time": time.time(), "status": status, "text": text[-4000:], "lost": False})
    return status


if __name__ == "__main__":
    from metadist.run.worker import leave

    leave(main(sys.argv[1:]))
