"""What every run is doing: from its folder and the scheduler.

python launch/status.py run=runs/x        one run, or a sweep's folder
python launch/status.py run=all           every run under runs/
python launch/status.py run=all json=true
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metadist.errors import UserError
from metadist.run.cluster import record, scheduler
from metadist.run.cluster.sweep import runs as sweep_runs
from metadist.run.cluster.sweep import text
from metadist.run.cost import duration
from metadist.run.listing import find, percent
from metadist.run.listing import read as row_of
from metadist.run.table import table

USAGE = "usage: python launch/status.py run=<run folder or sweep folder>|all [json=true]"
_FRESH_S = 120.0  # a run without a job that logged so recently is taken to be running


@dataclass(frozen=True)
class Status:
    """What a run is doing. Accuracy: a fraction; left_s: seconds, as the run itself reckons; None: not known."""

    run: str
    job: str
    state: str
    step: int
    steps: int
    left_s: float | None
    accuracy: float | None
    preemptions: int
    timeouts: int
    restarts: int
    nodes: str


def status(run_dir: Path) -> Status:
    """The status of one run."""
    row, progress = row_of(run_dir), newest_progress(run_dir)
    known = record.read(run_dir / "cluster" / "job.json")
    job = str(known.get("job", ""))
    seen = scheduler.ask(job) if job and known.get("cluster") == "slurm" else scheduler.Job("")
    ends = record.ends(run_dir, job if known.get("cluster") == "slurm" else None)
    state = _state(ends, any((run_dir / "starts").glob("*")), row.finished, seen, progress)
    running = state == "running"
    elapsed = time.time() - progress.get("time", 0.0)
    left = progress.get("left_s")
    return Status(
        run=str(run_dir),
        job=job or "-",
        state=state,
        step=row.step if row.finished else max(row.step, int(progress.get("step", 0))),
        steps=row.steps,
        left_s=max(0.0, left - elapsed) if running and left is not None else None,
        accuracy=row.accuracy if row.accuracy is not None else progress.get("valid_accuracy"),
        preemptions=record.count(ends, record.PREEMPTED) + record.count(ends, record.SIGNALLED),
        timeouts=record.count(ends, record.TIMEOUT),
        restarts=record.count(ends, record.LOST),
        nodes=seen.nodes if running else "",
    )


def newest_progress(run_dir: Path) -> dict[str, float]:
    """What the newest start says of itself (metadist.run.monitor)."""
    files = sorted((run_dir / "progress").glob("[0-9]*.json"))
    return record.read(files[-1]) if files else {}


def _state(ends: list[dict[str, Any]], begun: bool, finished: bool, seen: scheduler.Job, progress: dict[str, float]) -> str:
    if finished:
        return "finished"
    words = {"PENDING": "queued", "REQUEUED": "queued", "RUNNING": "running", "CONFIGURING": "starting", "COMPLETING": "ending"}
    if seen.state in words:
        again = seen.state == "PENDING" and seen.restarts
        return "requeued" if again else words[seen.state]
    if seen.state == scheduler.UNREACHABLE:
        return "unknown: the scheduler does not answer"
    if seen.state == "CANCELLED":
        return record.CANCELLED
    if seen.state in ("", scheduler.FORGOTTEN) and time.time() - progress.get("time", 0.0) < _FRESH_S and not ends:
        return "running"
    if ends:
        return str(ends[-1].get("reason"))
    if seen.state not in ("", scheduler.FORGOTTEN):
        return seen.state.lower() if begun else f"{seen.state.lower()} before it began: can every node see the run folder?"
    return "stopped" if progress else "not started"


def show(found: Sequence[Status]) -> str:
    """The table."""
    header = ("run", "job", "state", "step", "left", "accuracy %", "preempted", "time limits", "restarts", "nodes")
    rows = [
        (s.run, s.job, s.state, f"{s.step}/{s.steps}", "-" if s.left_s is None else duration(s.left_s), percent(s.accuracy),
         str(s.preemptions), str(s.timeouts), str(s.restarts), s.nodes or "-")
        for s in found
    ]  # fmt: skip
    return table(header, rows)


def roster(run_dir: Path) -> dict[str, Any]:
    """What a parameter server last said of itself and its workers; {} if the run has none."""
    return record.read(run_dir / "exchange" / "workers.json")


def show_workers(serving: dict[str, Any]) -> str:
    """The table of a server's workers, under a line of its own figures."""
    header = ("worker", "tasks", "accepted", "stale", "duplicate", "refused", "busy %", "pull ms", "push ms", "heard")
    rows = [
        (w["worker"], *(str(w[k]) for k in ("tasks", "accepted", "stale", "duplicate", "refused")), percent(w["utilisation"]),
         *("-" if w[k] is None else f"{w[k]:.1f}" for k in ("pull_ms", "push_ms")), f"{duration(w['silent_s'])} ago")
        for w in serving["workers"]
    ]  # fmt: skip
    counts = "  ".join(f"{k} {v}" for k, v in sorted(serving["counts"].items()))
    when = duration(max(0.0, time.time() - serving["time"]))
    head = f"server, {when} ago: version {serving['version']}  queued {serving['queued']}  {counts}"
    return f"{head}\n{table(header, rows)}" if rows else f"{head}\nno worker is here"


def main(argv: Sequence[str]) -> int:
    """``launch/status.py``. Raises UserError for a wrong word or place."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options = dict(word.split("=", 1) for word in argv if re.match(r"(run|json)=", word))
    if bad := next((w for w in argv if not re.match(r"(run|json)=", w)), None):
        raise UserError(f"{bad} is unknown; {USAGE}")
    if "run" not in options or options.get("json", "false") not in ("true", "false"):
        raise UserError(f"run=... is missing, or json is neither true nor false; {USAGE}")
    place = Path("runs" if options["run"] == "all" else options["run"])
    none = options["run"] == "all" and not any(place.glob("*/config.json"))
    sweep = sweep_runs(place)
    found = [status(folder) for folder in ([] if none else sweep or find([str(place)]))]
    if options.get("json") == "true":
        rows = [asdict(s) | ({"server": serving} if (serving := roster(Path(s.run))) else {}) for s in found]
        print(json.dumps(rows, indent=1))
        return 0
    print(f"no runs yet under {place.absolute()}" if none else show(found))
    if len(found) == 1 and (serving := roster(Path(found[0].run))):
        print(f"\n{show_workers(serving)}")
    if sweep:
        print(f"\n{text(place)}")
    return 0
