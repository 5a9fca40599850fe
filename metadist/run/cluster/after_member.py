"""The last line of the workers' batch file: whether this element of the array runs again.

    python -m metadist.run.cluster.after_member <srun's exit status> <run folder>

Preempted, warned, killed: it does, within the limits of ``after``. Sent home by the server, ended by scancel, or unable to
work: it does not. A server that is gone for good cancels what is left of the array itself.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from metadist.run.cluster import scheduler
from metadist.run.cluster.after import limits, requeue
from metadist.run.cluster.record import FAILED, FINISHED, LOST, Slot, left_path, read, verdict, why, write

NO_SERVER = "no server"


def main(argv: list[str]) -> int:
    """Record how this start ended, requeue the element if it shall go on; returns its exit status."""
    status, run_dir = int(argv[0]), Path(argv[1])
    slot = Slot.here()
    end = {**_reason(run_dir, slot, status), "job": slot.job, "start": slot.start, "time": time.time()}
    if end["reason"] == FINISHED:
        return 0
    ends = [read(p) for p in sorted((run_dir / "cluster").glob(f"end-{slot.job}-*.json"))]
    before = [e for e in ends if e.get("start") != slot.start]
    write(run_dir / "cluster" / f"end-{slot.job}-{slot.start}.json", end)
    if scheduler.ask(slot.raw_job).restarts > slot.start:
        print(f"{end['reason']}; SLURM has started it again already", flush=True)
        return int(end["status"])
    cluster = limits(run_dir)
    again, text = verdict(end["reason"], before, cluster.max_num_timeout, cluster.max_restarts)
    print(f"this worker: {text}", flush=True)
    if not again:
        return int(end["status"])
    return requeue(slot, run_dir / "cluster", int(end["status"]), cluster.signal_delay_s)


def _reason(run_dir: Path, slot: Slot, status: int) -> dict[str, Any]:
    if read(run_dir / "summary.json").get("finished"):
        return {"reason": FINISHED, "status": 0}
    faults = [read(p) for p in sorted(slot.fault(run_dir, 0).parent.glob(slot.fault(run_dir, "*").name))]
    hard = sorted((f for f in faults if f and not f["lost"]), key=lambda f: f["time"])
    if hard:
        return {"reason": FAILED, "status": hard[0]["status"]}
    if status > 128:  # one of them was killed, and srun has ended the others for it
        return {"reason": LOST, "status": 1}
    if any(faults):
        return {"reason": NO_SERVER, "status": 1}
    signal = str(read(left_path(run_dir, slot)).get("signal", ""))
    if not signal:
        return {"reason": FAILED if status else FINISHED, "status": status}
    limit = os.environ.get("SLURM_JOB_END_TIME")
    delay = limits(run_dir).signal_delay_s
    return {
        "reason": why(signal, scheduler.ask(slot.raw_job), slot.start, delay, float(limit) if limit else None),
        "status": 143,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
