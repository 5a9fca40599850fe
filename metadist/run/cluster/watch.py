"""wait=true: a job's output as it comes, what the scheduler does with it, and at the end its own status."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from metadist.run.cluster import scheduler
from metadist.run.cluster.record import ends, read
from metadist.run.cluster.scheduler import FORGOTTEN, PASSING, UNREACHABLE, Job

POLL_S = 1.0
SETTLED_S = 15.0  # a state that may still turn into a requeue counts as final after so long
LOST_SIGHT_S = 60.0  # and so does a job that nobody knows


class Tail:
    """What was appended to a file since the last look."""

    def __init__(self, path: Path, from_end: bool = False) -> None:
        """from_end: leave out what stands there already."""
        self._path, self._at = path, path.stat().st_size if from_end and path.exists() else 0

    def __call__(self) -> str:
        """The new text; "" if there is none."""
        try:
            with self._path.open("rb") as f:
                f.seek(self._at)
                new = f.read()
        except FileNotFoundError:
            return ""
        self._at += len(new)
        return new.decode(errors="replace")


def wait(job: str, run_dir: Path, tails: list[Tail], ask: Callable[[str], Job] = scheduler.ask, poll_s: float = POLL_S) -> int:
    """Show a job until its end; its exit status."""
    shown, since, silent = "", time.monotonic(), True
    while True:
        now = ask(job)
        silent &= not _show(tails)
        state = f"{now.state} {now.nodes or now.reason}".strip()
        if state != shown:
            print(f"[job {job}: {state}]", file=sys.stderr, flush=True)
            shown, since = state, time.monotonic()
        quiet = time.monotonic() - since
        unsure = (now.state in PASSING and quiet < SETTLED_S) or (now.state == FORGOTTEN and quiet < LOST_SIGHT_S)
        ended = now.final or now.state == FORGOTTEN
        if now.state == FORGOTTEN and read(run_dir / "summary.json").get("finished"):
            unsure = False  # without accounting: the run itself knows
        if ended and not unsure:
            break
        time.sleep(poll_s)
    time.sleep(poll_s)  # the last lines may still be on their way
    silent &= not _show(tails)
    if silent and now.final and now.state not in ("COMPLETED", "CANCELLED"):
        print(
            f"error: the job ended {now.state} without a word: can every node see run_dir={run_dir}?",
            file=sys.stderr,
            flush=True,
        )
    return status_of(now, run_dir, job)


def _show(tails: list[Tail]) -> bool:
    new = [tail() for tail in tails]
    print("".join(new), end="", flush=True)
    return any(new)


def status_of(now: Job, run_dir: Path, job: str) -> int:
    """The exit status of a job that has ended: the scheduler's, else the run folder's."""
    if now.state == "COMPLETED":
        return 0
    found = ends(run_dir, job)
    if now.state in (FORGOTTEN, UNREACHABLE):
        if read(run_dir / "summary.json").get("finished"):
            return 0
        return int(found[-1]["status"]) if found else 1
    if now.state == "CANCELLED":
        return 143
    return now.exit_status or 1
