"""The last line of the batch script: what becomes of a job whose ranks have ended.

    python -m metadist.run.cluster.after <srun's exit status> <run folder, or a sweep's folder>

Design choices
- It stands outside of the ranks, so it is there when all of them were killed at once.
- Stopped with a checkpoint by a preemption or the time limit: requeued. A worker killed or lost: requeued, at most max_restarts
  times. A mistake or a fault that would come again: not.
- A node whose slurmd alone died is given up while its processes run on: SLURM has then requeued the job already, and this start
  is an older one, which must not requeue the newer.
- scancel and `scontrol requeue` kill the batch script itself: nothing here can resurrect what a person ended.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from metadist.config_machine import ClusterConfig
from metadist.run.cluster import scheduler
from metadist.run.cluster.record import (
    FAILED,
    FINISHED,
    LOST,
    LOST_STATUS,
    REFUSED,
    TERMINATED,
    Slot,
    end_path,
    ends,
    folder_of,
    read,
    verdict,
    why,
    write,
)
from metadist.store import newest_step

WARNED = 128 + signal.SIGUSR2
_KILLED_SOON_S = 60.0  # SLURM ends a requeued job's batch script itself


def main(argv: list[str]) -> int:
    """Record how this start ended, requeue the job if it shall go on; returns the job's exit status."""
    status, place = int(argv[0]), Path(argv[1])
    slot, run_dir = Slot.here(), folder_of(place)
    if not (run_dir / "config.json").exists():
        return _unseen(run_dir, status)
    end = _end(run_dir, slot, status)
    if end["reason"] in (FINISHED, REFUSED, FAILED):
        _compare(place)
        _dismiss(run_dir)
        return int(end["status"])
    if scheduler.ask(slot.raw_job).restarts > slot.start:
        print(f"{end['reason']}; SLURM has started the job again already", flush=True)
        return int(end["status"])
    again, text = _decide(run_dir, slot, end)
    if not again:
        print(f"{text}; resume with: sbatch {place / 'cluster' / 'batch.sh'}", flush=True)
        _dismiss(run_dir)
        return int(end["status"])
    print(f"{text} from step {end['step']}", flush=True)
    return requeue(slot, place / "cluster" / "batch.sh", int(end["status"]), limits(run_dir).signal_delay_s)


def _dismiss(run_dir: Path) -> None:
    """A server that has ended for good takes its workers along: they would wait for it, or start in vain."""
    scheduler.cancel(*(str(job) for job in read(run_dir / "cluster" / "job.json").get("workers", [])))


def _end(run_dir: Path, slot: Slot, status: int) -> dict[str, Any]:
    """How this start ended: as rank 0 recorded it, else as the ranks' faults, srun's status and the scheduler tell."""
    incarnation = read(slot.meet(run_dir)).get("incarnation")
    path = end_path(run_dir, incarnation or 0, "" if incarnation else f"-{slot.job}-{slot.start}")
    end = known = read(path)
    if not known or (known["reason"] == TERMINATED and status):  # then srun sent the SIGTERM, because a rank had died
        began = incarnation is not None
        end = {
            **_reason(run_dir, slot, status, began),
            "step": newest_step(run_dir / "checkpoints"),
            "job": slot.job,
            "start": slot.start,
        }
    if end["reason"] not in (FINISHED, REFUSED, FAILED) and _whole(run_dir, incarnation):
        end = {**end, "reason": FINISHED, "status": 0}
    if incarnation != 0 and end != known:  # 0: there was nothing left to do
        write(path, {**end, "time": time.time()})
    return end


def _whole(run_dir: Path, incarnation: int | None) -> bool:
    """Whether the run has its result, by this start's own length: whatever ended it then, nothing is left to be started for."""
    if incarnation is None:
        return False
    # By ``read``, not by RunFolder: a record that this node can't see yet must not stop a requeue.
    config = read(run_dir / "starts" / f"{incarnation:04d}.json").get("config") or read(run_dir / "config.json")
    return bool(read(run_dir / "summary.json").get("steps", -1) >= config.get("steps", math.inf))


def _reason(run_dir: Path, slot: Slot, status: int, began: bool) -> dict[str, Any]:
    if status == 0:
        return {"reason": FINISHED, "status": 0}
    faults = [read(p) for p in sorted(slot.fault(run_dir, 0).parent.glob(slot.fault(run_dir, "*").name))]
    hard = sorted((f for f in faults if f and not f["lost"]), key=lambda f: f["time"])
    if hard:
        print(hard[0]["text"], file=sys.stderr, flush=True)
        return {"reason": REFUSED if hard[0]["status"] == 2 else FAILED, "status": hard[0]["status"]}
    if status == WARNED:  # before rank 0 could listen
        seen, limit = scheduler.ask(slot.raw_job), os.environ.get("SLURM_JOB_END_TIME")
        reason = why("SIGUSR2", seen, slot.start, limits(run_dir).signal_delay_s, float(limit) if limit else None)
        return {"reason": reason, "status": status}
    if status > 128 or status == LOST_STATUS or any(faults):
        return {"reason": LOST, "status": 1}
    if not began:
        _unseen(run_dir, status)
    return {"reason": FAILED, "status": status}


def _decide(run_dir: Path, slot: Slot, end: dict[str, Any]) -> tuple[bool, str]:
    cluster = limits(run_dir)
    own = [e for e in ends(run_dir, slot.job) if e.get("start", 0) != slot.start]
    return verdict(end["reason"], own, cluster.max_num_timeout, cluster.max_restarts)


def limits(run_dir: Path) -> ClusterConfig:
    """The cluster's settings as the run has them."""
    found = read(run_dir / "config.json") or read(run_dir / "search.json")["config"]
    return ClusterConfig(**found["cluster"])


def requeue(slot: Slot, batch: Path, status: int, signal_delay_s: int) -> int:
    """Have this job run again, as the last deed of its batch script; returns the exit status if it is not to be."""
    if trouble := scheduler.requeue(slot.raw_job, max(10.0, 0.5 * signal_delay_s)):
        print(f"error: SLURM refused to requeue it ({trouble}); resume with: sbatch {batch}", file=sys.stderr, flush=True)
        return 1
    time.sleep(_KILLED_SOON_S)
    return status


def _unseen(run_dir: Path, status: int) -> int:
    """The workers ended before the first of them could claim a start."""
    print(f"error: the job ended before its workers had begun (status {status}): every node must see run_dir={run_dir} and "
          f"this Python ({sys.executable}); nodes {os.environ.get('SLURM_JOB_NODELIST', '')}",
          file=sys.stderr, flush=True)  # fmt: skip
    return status or 1


def _compare(place: Path) -> None:
    """In a sweep, renew its table: the last element to end leaves the whole of it."""
    if (place / "sweep.json").exists():
        from metadist.run.cluster.sweep import write_table

        write_table(place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
