"""What a start ran on: recorded beside every result."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """What a start runs on: versions, processor, host, git commit of metadist ("+dirty" if changed; None: no checkout)."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": cores(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
    } | ({"slurm": _slurm()} if "SLURM_JOB_ID" in os.environ else {})


def packages() -> list[str]:
    """Every installed package with its version."""
    return sorted({f"{d.name}=={d.version}" for d in metadata.distributions() if d.name})


def _processor() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def _git(*args: str) -> str | None:
    """What git says about the checkout that metadist runs from; None if it runs from none."""
    package = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        command = ["git", "-C", str(package.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout

    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        # A package installed into somebody's own repository must not report that repository's commit.
        if Path(git("rev-parse", "--show-toplevel").strip()) / "metadist" == package:
            return git(*args).rstrip("\n")
    return None


def _commit() -> str | None:
    commit = _git("rev-parse", "HEAD")
    return commit and commit + ("+dirty" if _git("status", "--porcelain") else "")


def changed_code() -> bytes:
    """What the running checkout has that its commit has not: git's diff, then the names of unknown files. Empty if nothing."""
    diff, status = _git("diff", "HEAD"), _git("status", "--porcelain")
    unknown = [line for line in (status or "").splitlines() if line.startswith("??")]
    return "\n".join([*filter(None, [diff]), *unknown, ""] if diff or unknown else []).encode()


def _slurm() -> dict[str, str]:
    """What the scheduler says of this job."""
    names = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_NODELIST", "JOB_PARTITION", "CLUSTER_NAME")
    return {name.lower(): os.environ[f"SLURM_{name}"] for name in names if f"SLURM_{name}" in os.environ}
