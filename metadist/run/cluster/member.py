"""One worker of a parameter server on a cluster; srun starts one a task of the workers' array.

    srun python -u -m metadist.run.cluster.member <run folder> <number of the array's first worker>

A signal ends it at once: its task goes to another worker. Why it came is written down for the batch file's last line
(metadist.run.cluster.after_member), which decides whether this element of the array runs again.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from metadist.run.cluster.record import LOST_STATUS, Slot, left_path, write
from metadist.run.signals import SIGNALS, Stop

if TYPE_CHECKING:
    from metadist.exchange.client import Client


def main(argv: list[str]) -> int:
    """Work for the run's server; the exit status, 0 also where a signal ended it in good order."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    run_dir, slot = Path(argv[0]), Slot.here()
    clients: list[Client] = []

    def depart(name: str) -> None:
        try:
            write(left_path(run_dir, slot), {"signal": name, "time": time.time()})
            for client in clients:
                client.close()
        finally:
            os._exit(0)

    with Stop(at_once=depart):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            return _serve(run_dir, slot, int(argv[1]), clients)
        except Exception as e:
            return _fault(run_dir, slot, e)


def _serve(run_dir: Path, slot: Slot, first: int, clients: list[Client]) -> int:
    import torch

    from metadist.run.cluster.rank import place
    from metadist.run.folder import RunFolder
    from metadist.run.member import serve

    folder = RunFolder.attach(run_dir)
    place(slot)
    torch.set_num_threads(folder.config.threads or int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
    number = first + int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) * slot.local_world + slot.local_rank
    return serve(folder, str(number), clients.append)


def _fault(run_dir: Path, slot: Slot, error: Exception) -> int:
    from metadist.errors import Lost
    from metadist.run.worker import describe

    status, text = describe(error)
    lost = isinstance(error, Lost)
    print(text, file=sys.stderr, flush=True)
    write(slot.fault(run_dir, slot.rank), {"time": time.time(), "status": status, "text": text[-4000:], "lost": lost})
    return LOST_STATUS if lost else status


if __name__ == "__main__":
    from metadist.run.worker import leave

    leave(main(sys.argv[1:]))
