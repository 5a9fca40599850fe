"""A sweep: runs one after another, each in a process of its own, and one table of what came out.

Design choices
- All points are composed and validated before the first one starts.
- A process per run: memory, threads and compiled code of one do not weigh on the next, and a crash ends one row only.
- Runs that would share a folder (only circumstance is swept, or run_dir was given) get one each, named by the swept keys.
- Signals are passed on to the running one; after it has stopped, the rest is not started. The same command resumes.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from metadist.identity import default_run_dir
from metadist.run.compose import Point, expand
from metadist.run.listing import read
from metadist.run.table import table

STATUS = {0: "finished", 1: "failed", 2: "refused", 130: "stopped", 140: "stopped", 143: "stopped"}


@dataclass(frozen=True)
class Job:
    """One run of a sweep: the words of its command, the swept keys, its folder."""

    words: tuple[str, ...]
    swept: dict[str, str]
    run_dir: str


def jobs(points: Sequence[Point]) -> list[Job]:
    """The points with a run folder each."""
    places = [p.config.run_dir or default_run_dir(p.config) for p in points]
    shared = Counter(places)
    out = []
    for point, place in zip(points, places):
        if shared[place] > 1:
            name = "_".join(f"{k}-{v}" for k, v in point.swept.items() if k != "run_dir")
            place = f"{place}/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
        words = [w for w in point.overrides if not w.startswith("run_dir=")]
        out.append(Job((*words, f"run_dir={quoted(place)}"), point.swept, place))
    return out


def quoted(text: str) -> str:
    """A value that Hydra's grammar reads as this text: backslashes count only before a quote, and are doubled there."""
    inner = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{inner}'"


class Forward:
    """Signals that arrive while a run works: passed on to it, and remembered."""

    def __init__(self) -> None:
        """No run yet."""
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """A signal came."""
        self.stopped = True
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    @contextmanager
    def installed(self) -> Iterator[Forward]:
        """Catch SIGINT, SIGTERM and SIGUSR2; put the former handlers back at the end."""
        former = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def end_with_parent() -> None:
    """To be run in a child: SIGTERM when its parent ends."""
    # A killed sweep must not leave its run behind (Linux: PR_SET_PDEATHSIG = 1); it stops with a checkpoint.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def run_child(job: Job, forward: Forward) -> int:
    """Run one job in a process of its own and wait for it; its exit status."""
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    forward.child = subprocess.Popen(
        [sys.executable, "-m", "metadist.run.command", *job.words],
        env=os.environ | {"PYTHONPATH": paths},
        process_group=0,  # a Ctrl-C of the terminal then reaches it once, through us, not twice
        preexec_fn=end_with_parent,
    )
    if forward.stopped:  # it came while the process was being made
        forward.child.terminate()
    return forward.child.wait()


def sweep(words: Sequence[str], start: Callable[[Job, Forward], int] = run_child) -> int:
    """Run every combination of ``key=a,b`` and print the table; 0 if all finished, else 1.

    words: Hydra overrides, some with several values. start: runs one job and returns its exit status.
    Raises UserError before anything runs if any combination is refused.
    """
    todo = jobs(expand(words))
    outcome: list[str] = []
    with Forward().installed() as forward:
        for i, job in enumerate(todo):
            if forward.stopped:
                outcome.append("not started")
                continue
            print(f"[{i + 1}/{len(todo)}] {' '.join(f'{k}={v}' for k, v in job.swept.items())} -> {job.run_dir}", flush=True)
            code = start(job, forward)
            outcome.append("stopped" if forward.stopped else STATUS.get(code, f"ended ({code})"))
    print(f"\n{comparison(todo, outcome)}")
    return 0 if set(outcome) == {"finished"} else 1


def comparison(todo: Sequence[Job], outcome: Sequence[str]) -> str:
    """One row a run: folder, swept keys, test accuracy, random real images of the same number, minutes, what became of it."""
    keys = list(dict.fromkeys(k for job in todo for k in job.swept))
    rows = [
        (job.run_dir, *(job.swept.get(k, "-") for k in keys), *read(Path(job.run_dir)).figures, status)
        for job, status in zip(todo, outcome)
    ]
    return table(("run", *keys, "accuracy %", "random real %", "minutes", "status"), rows)
