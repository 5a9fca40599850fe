"""What this machine lets a cluster do, and its processes, found by what they are: a pid on file could by now be another's."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = "slurmctld slurmd munged sbatch srun scontrol squeue sinfo scancel sacct bash ip unshare nsenter setsid mount umount"
DATABASE_PROGRAMS = "slurmdbd sacctmgr mariadbd mariadb-install-db my_print_defaults"
NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc")


def why_not(accounting: bool = True) -> str | None:
    """The reason why no cluster can be brought up on this machine, or None."""
    if sys.platform != "linux":
        return "SLURM needs Linux"
    if os.geteuid() != 0:
        return "the nodes' namespaces need root"
    programs = (PROGRAMS + " " + DATABASE_PROGRAMS * accounting).split()
    if missing := [program for program in programs if shutil.which(program) is None]:
        return f"not installed: {' '.join(missing)}"
    probe = "hostname probe && ip link add br0 type bridge && ip link add a0 type veth peer name b0"  # all of it vanishes
    done = subprocess.run(["unshare", *NAMESPACES, "bash", "-c", probe], capture_output=True, text=True)
    return f"no namespaces or bridges here: {done.stderr.strip()}" if done.returncode else None


def processes() -> Iterator[tuple[int, int, str, list[str]]]:
    """Process id, parent, name and arguments (none for a zombie) of everything that runs."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                head, _, tail = (entry / "stat").read_text(errors="replace").rpartition(") ")
                arguments = (entry / "cmdline").read_text(errors="replace").split("\0")[:-1]
            except (FileNotFoundError, ProcessLookupError):
                continue
            yield int(entry.name), int(tail.split()[1]), head.partition(" (")[2], arguments


def find(name: str, *tail: str, parent: int | None = None) -> int | None:
    """The process with this name whose arguments end so, of any parent unless one is given."""
    for pid, above, called, arguments in processes():
        if called == name and parent in (None, above) and (not tail or tuple(arguments[-len(tail) :]) == tail):
            return pid
    return None


def child(parent: int | None, name: str, *tail: str) -> int | None:
    """The child of a process with this name whose arguments end so; none if there is no parent."""
    return None if parent is None else find(name, *tail, parent=parent)
