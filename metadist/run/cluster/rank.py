"""One rank of a run on a cluster; srun starts one a task.

    srun python -u -m metadist.run.cluster.rank <run folder, or a sweep's folder>

Design choices
- Rank 0 claims the incarnation, hosts the rendezvous store on a port that the kernel picks, and publishes both in the
  run folder under the job's number and restart count: nothing of an earlier start is ever
  met, although host, job and port repeat.
- Signals are held back from the first line on, before torch is imported, until somebody listens.
- SIGUSR2 and SIGTERM lead to a checkpoint at a common step. Before the first step and after the last there is nothing to save:
  then they end the process at once.
- Rank 0 asks the scheduler why it was told to stop and leaves the answer in ``ends/``; the batch script's last line
  (metadist.run.cluster.after) acts on it. Ranks that stop in good order leave with 0: srun kills nobody for it, and its own
  status tells whether a rank died otherwise.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from metadist.run.cluster.record import LOST_STATUS, Slot, end_path, folder_of, read, why, write
from metadist.run.signals import SIGNALS, Stop, stop_status

_POLL_S = 0.1
_FAREWELL_S = 60.0  # rank 0 waits so long for the others to leave the store


def main(argv: list[str]) -> int:
    """Run this rank; its exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    slot = Slot.here()
    run_dir = folder_of(Path(argv[0]))
    with Stop(at_once=lambda name: _leave_at_once(run_dir, slot, name)) as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            return _run(run_dir, slot, stop)
        except Exception as e:
            return _fault(run_dir, slot, e, stop.requested)


def _run(run_dir: Path, slot: Slot, stop: Stop) -> int:
    from metadist.run.cluster.network import choose_interface, server_address
    from metadist.run.folder import RunFolder
    from metadist.run.worker import execute

    seen = RunFolder.attach(run_dir)
    place(slot)
    if slot.world > 1:
        choose_interface(seen.config.exchange.interface)
    store = None
    if slot.rank == 0 and seen.config.exchange.name == "server":
        folder = RunFolder.open(seen.config)
        _own(run_dir, slot)
        where: str | None = f"{server_address(seen.config.exchange.interface)}:0"  # the port is the kernel's affair
        write(slot.meet(run_dir), {"incarnation": folder.incarnation, "store": where, "time": time.time()})
    elif slot.rank == 0:
        folder = RunFolder.open(seen.config)
        where, store = _host(slot, seen.config.exchange.interface)
        _own(run_dir, slot)
        write(slot.meet(run_dir), {"incarnation": folder.incarnation, "store": where, "time": time.time()})
    else:
        met = _meet(run_dir, slot, seen.config.exchange.timeout_s)
        where, folder = met["store"], RunFolder.attach(run_dir, met["incarnation"], slot.rank)
    if not folder.incarnation:
        return _again(folder) if slot.rank == 0 else 0
    threads = folder.config.threads or int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    status = execute(folder, slot.rank, slot.world, where, stop, count=threads)
    _farewell(slot, where, store)
    if stop.requested and status:
        return _stopped(run_dir, slot, stop.requested)
    return status


def place(slot: Slot) -> None:
    """Say which of the node's GPUs is this rank's."""
    own = any(f"SLURM_{name}" in os.environ for name in ("GPUS_PER_TASK", "TRES_PER_TASK"))  # a rank sees its own GPU only
    os.environ["LOCAL_RANK"] = "0" if own else str(slot.local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = "1" if own else str(slot.local_world)


def _host(slot: Slot, interface: str | None) -> tuple[str | None, Any]:
    if slot.world == 1:
        return None, None
    from metadist.exchange.allreduce import host
    from metadist.run.cluster.network import own_address

    address = own_address(interface)
    store = host(address)
    return f"{address}:{store.port}", store


def _own(run_dir: Path, slot: Slot) -> None:
    """The run belongs to this job now: batch.sh may have been submitted by hand."""
    path = run_dir / "cluster" / "job.json"
    if (known := read(path)).get("job") != slot.job:
        write(path, {**known, "job": slot.job, "cluster": "slurm", "time": time.time()})


def _meet(run_dir: Path, slot: Slot, timeout_s: float) -> dict[str, Any]:
    """What rank 0 published. Raises Lost if it never does."""
    from metadist.errors import Lost

    until = time.monotonic() + timeout_s
    path = slot.meet(run_dir)
    while not (met := read(path) if path in path.parent.iterdir() else {}):  # a listing: file systems cache absence
        if time.monotonic() > until:
            raise Lost(f"worker {slot.rank} waited {timeout_s:g} s for worker 0; its log says what became of it")
        time.sleep(_POLL_S)
    return met


def _farewell(slot: Slot, where: str | None, store: Any) -> None:
    """The store lives in rank 0: it stays until all have left it."""
    import contextlib
    from datetime import timedelta

    if where is None or slot.world == 1:
        return
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    with contextlib.suppress(RuntimeError):  # a peer that is gone already has nothing to wait for
        if store is None:
            name, port = where.rsplit(":", 1)
            TCPStore(name, int(port), slot.world, is_master=False, timeout=timedelta(seconds=5)).add("left", 1)
        until = time.monotonic() + _FAREWELL_S
        while store is not None and store.add("left", 0) < slot.world - 1 and time.monotonic() < until:
            time.sleep(_POLL_S / 10)


def _again(folder: Any) -> int:
    from metadist.run.worker import result_text

    print(result_text(folder.finished), flush=True)
    return 0


def _leave_at_once(run_dir: Path, slot: Slot, name: str) -> None:
    """In the thread that heard the signal: the main thread may be busy importing, compiling, or judging."""
    status = stop_status(name)
    try:
        status = _stopped(run_dir, slot, name)
    finally:
        os._exit(status if slot.rank == 0 else 0)


def _stopped(run_dir: Path, slot: Slot, name: str) -> int:
    """Rank 0 records why the run was told to stop; the status this rank leaves with."""
    if slot.rank:
        return 0
    from metadist.run.cluster import scheduler
    from metadist.run.folder import RunFolder

    folder = RunFolder.attach(run_dir)
    limit = os.environ.get("SLURM_JOB_END_TIME")
    reason = why(
        name,
        scheduler.ask(slot.raw_job),
        slot.start,
        folder.config.cluster.signal_delay_s,
        float(limit) if limit else None,
    )
    step, status = folder.newest_step, stop_status(name)
    if incarnation := read(slot.meet(run_dir)).get("incarnation"):
        record = {"reason": reason, "status": status, "step": step, "job": slot.job, "start": slot.start, "time": time.time()}
        write(end_path(run_dir, incarnation), record)
        status = 0  # the batch script's last line knows: any other status than 0 is then another rank's
    print(f"{reason} at step {step} of {folder.config.steps}; the checkpoint is complete", flush=True)
    return status


def _fault(run_dir: Path, slot: Slot, error: Exception, told: str | None) -> int:
    from metadist.errors import Lost
    from metadist.run.worker import describe

    lost = isinstance(error, Lost)
    if lost and told is not None:  # the other one left before this one had come to the step on which all agree
        return _stopped(run_dir, slot, told)
    status, text = describe(error)
    print(text, file=sys.stderr, flush=True)
    record = {"time": time.time(), "status": status, "text": text[-4000:], "lost": lost}
    try:
        write(slot.fault(run_dir, slot.rank), record)
    except Exception as e:  # a run folder that can't be written: the log has it
        print(f"error: {e}", file=sys.stderr, flush=True)
    return LOST_STATUS if lost else status


if __name__ == "__main__":
    from metadist.run.worker import leave

    leave(main(sys.argv[1:]))
