"""A user at a login node of the tests' cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
# A small run of float64 whose steps last long enough to be interrupted; checkpoints by the second, too.
SMALL = [
    "engine.dtype=float64",
    "engine.compile=off",
    "steps=60",
    "inner.epochs=4",
    "real_batch=16",
    "eval.every=20",
    "eval.nets=2",
]
SMALL += ["eval.final_nets=2", "run.checkpoint_every=10", "run.log_every=1", "check_mount=false", "signal_delay_s=30"]
FOUR = ["method=dd_random_init", "nodes=4"]


class Launcher:
    """The commands of a user at a login node of ``cluster``."""

    def __init__(self, cluster: Cluster, place: Path) -> None:
        self.cluster, self.place = cluster, place

    def __call__(self, *words: str, program: str = "slurm", check: bool = True) -> subprocess.CompletedProcess[str]:
        environ = {**self.cluster.environ(), "OMP_NUM_THREADS": "1", "HOME": str(self.place)}
        command = [sys.executable, str(ROOT / "launch" / f"{program}.py"), *words]
        done = subprocess.run(command, cwd=self.place, env=environ, capture_output=True, text=True, timeout=300)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, name: str, *words: str) -> tuple[str, Path]:
        """A job's number and its run folder."""
        done = self(*FOUR, *SMALL, f"run_dir={name}", *words)
        return re.findall(r"submitted job (\d+)", done.stdout)[0], self.place / name

    def until(self, predicate: Callable[[], object], seconds: float = 90, what: str = "it") -> None:
        end = time.monotonic() + seconds
        while not predicate():
            assert time.monotonic() < end, f"waited {seconds:g} s in vain for {what}"
            time.sleep(0.1)

    def at_step(self, folder: Path, step: int, start: int = 1) -> None:
        """Until start ``start`` of the run has logged ``step`` or a later one."""
        lines = re.compile(r"^step (\d+)/", re.M)

        def there() -> bool:
            log = folder / "log.txt"
            begun = (folder / "starts" / f"{start:04d}.json").exists()
            return begun and log.exists() and any(int(s) >= step for s in lines.findall(log.read_text())[self.seen :])

        self.until(there, what=f"step {step} of start {start}: {self.logs(folder)}")

    seen = 0  # lines of steps that belong to earlier starts

    def forget(self, folder: Path) -> None:
        """Steps logged so far are those of earlier starts."""
        self.seen = len(re.findall(r"^step ", (folder / "log.txt").read_text(), re.M))

    def state(self, job: str) -> str:
        return self.cluster.job(job).get("JobState", "")

    def requeued(self, job: str, folder: Path, times: int = 1, seconds: float = 90) -> None:
        """Wait until the job has been requeued so often."""
        end = time.monotonic() + seconds
        while int(self.cluster.job(job).get("Restarts", "0")) < times:
            assert time.monotonic() < end, f"not requeued: {self.cluster.job(job)} {ends(folder)} {self.logs(folder)}"
            time.sleep(0.1)

    def ended(self, job: str, seconds: float = 120) -> str:
        """Wait for a final state and return it."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.until(lambda: self.state(job) in final, seconds, f"the end of job {job}: {self.cluster.job(job)}")
        return self.state(job)

    def logs(self, folder: Path) -> str:
        return "\n".join(
            f"--- {p.name}\n{p.read_text()}" for p in sorted((folder / "cluster").glob("*_log.*")) if p.stat().st_size
        )


def ends(folder: Path) -> list[str]:
    return [json.loads(p.read_text())["reason"] for p in sorted((folder / "ends").glob("*.json"))]
