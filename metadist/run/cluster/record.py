"""What a cluster's job leaves in the run folder, and what is concluded from it.

cluster/job.json             the newest submission: job, command
cluster/batch.sh             what sbatch received; may be submitted again by hand
cluster/<job>_<rank>_log.*   output of every rank, of all starts
cluster/meet-<job>-<n>.json  where the ranks of the job's n-th start meet
cluster/fault-*.json         what a rank died of
ends/<incarnation>.json      how that start ended: reason, status, step
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadist.run.cluster.scheduler import Job
from metadist.store import atomic_write

TIMEOUT, PREEMPTED, SIGNALLED = "time limit", "preempted", "signalled"
CANCELLED, TERMINATED, REQUEUED = "cancelled", "terminated", "requeued"
LOST, FAILED, REFUSED, FINISHED = "worker lost", "failed", "refused", "finished"
LOST_STATUS = 75  # EX_TEMPFAIL: a rank that lost another one
_GRID_S = 90  # a warning signal may come up to a minute early, and is looked at somewhat late


def read(path: Path) -> dict[str, Any]:
    """A record; empty if it is not there or not readable."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, record: dict[str, Any]) -> None:
    """Put a record at ``path``, whole or not at all."""
    atomic_write(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def folder_of(place: Path, environ: dict[str, str] | None = None) -> Path:
    """The run folder of this job: ``place`` itself, or of a sweep's folder the one that belongs to this array element."""
    runs = read(place / "sweep.json").get("runs")
    return place if runs is None else Path(runs[int((environ or dict(os.environ))["SLURM_ARRAY_TASK_ID"])])


@dataclass(frozen=True)
class Slot:
    """One rank's place in a job, from the job's environment."""

    job: str
    start: int
    rank: int
    world: int
    local_rank: int
    local_world: int
    raw_job: str

    @classmethod
    def here(cls) -> Slot:
        """Raises KeyError outside of a SLURM job."""
        e = os.environ
        array = f"{e['SLURM_ARRAY_JOB_ID']}_{e['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in e else None
        world, nodes = int(e.get("SLURM_NTASKS", "1")), int(e.get("SLURM_JOB_NUM_NODES", "1"))
        return cls(
            job=array or e["SLURM_JOB_ID"],
            start=int(e.get("SLURM_RESTART_COUNT", "0")),
            rank=int(e.get("SLURM_PROCID", "0")),
            world=world,
            local_rank=int(e.get("SLURM_LOCALID", "0")),
            local_world=-(-world // nodes),
            raw_job=e["SLURM_JOB_ID"],
        )

    def meet(self, run_dir: Path) -> Path:
        """Where rank 0 says how to join it."""
        return run_dir / "cluster" / f"meet-{self.job}-{self.start}.json"

    def fault(self, run_dir: Path, rank: int | str) -> Path:
        """Where a rank of this start says what it died of."""
        return run_dir / "cluster" / f"fault-{self.job}-{self.start}-{rank}.json"


def left_path(run_dir: Path, slot: Slot) -> Path:
    """Where a worker of a server says which signal ended it."""
    return run_dir / "cluster" / f"left-{slot.job}-{slot.start}.json"


def end_path(run_dir: Path, incarnation: int, suffix: str = "") -> Path:
    """How a start ended; with a suffix, one that ended before it had claimed an incarnation."""
    return run_dir / "ends" / f"{incarnation:04d}{suffix}.json"


def ends(run_dir: Path, job: str | None = None) -> list[dict[str, Any]]:
    """How the starts of a run ended, oldest first; those of one job if it is given."""
    found = [read(p) for p in sorted((run_dir / "ends").glob("[0-9]*.json"))]
    return [e for e in found if job is None or e.get("job") == job]


def count(found: list[dict[str, Any]], reason: str) -> int:
    """How many starts ended for that reason."""
    return sum(e.get("reason") == reason for e in found)


def why(signal: str, job: Job, start: int, signal_delay_s: int, end: float | None = None, now: float | None = None) -> str:
    """Why a job was told to stop: the signal does not say it, the scheduler does.

    signal: SIGUSR2, SIGTERM or SIGINT, as seen. job: as the scheduler sees it now. start: this start's number of restarts.
    end: when the job's time is over, where the scheduler can't be asked. now: seconds since 1970.
    """
    if job.preempted:
        return PREEMPTED
    if job.restarts > start:
        return REQUEUED  # by `scontrol requeue`: SLURM starts it again
    if job.state in ("CANCELLED", "COMPLETING") and signal != "SIGUSR2":
        return CANCELLED
    if signal != "SIGUSR2":
        return TERMINATED
    end = job.end if job.end is not None else end
    late = end is not None and end - (time.time() if now is None else now) <= signal_delay_s + _GRID_S
    return TIMEOUT if late else SIGNALLED


def verdict(reason: str, before: list[dict[str, Any]], max_num_timeout: int, max_restarts: int) -> tuple[bool, str]:
    """Whether a start that ended for ``reason`` is followed by another, and what to say.

    before: how the earlier starts of the same job ended.
    """
    if reason in (PREEMPTED, SIGNALLED):
        return True, f"{reason}: requeued"
    limits = {TIMEOUT: ("max_num_timeout", max_num_timeout), LOST: ("max_restarts", max_restarts)}
    if reason not in limits:
        return False, reason
    (name, most), done = limits[reason], count(before, reason)
    if done < most:
        return True, f"{reason}: requeued ({done + 1} of at most {most} times)"
    return False, f"{reason}, and not requeued: it was {most} times already ({name}={most})"
