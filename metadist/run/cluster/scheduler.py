"""What the scheduler knows of a job: scontrol first, sacct only where scontrol has forgotten it.

Design choices
- scontrol answers from the controller's memory: it is there without accounting, and shows a requeued job as pending where
  accounts still say NODE_FAIL. submitit's watcher caches that as final and is not used.
- A controller that does not answer is no state of the job: ``Job.state`` is then "UNREACHABLE", and one asks again.
"""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime

FINAL = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
}  # fmt: skip
PASSING = {"NODE_FAIL", "PREEMPTED"}  # final only if the job is not requeued after all
UNREACHABLE, FORGOTTEN = "UNREACHABLE", "FORGOTTEN"
_TIMEOUT_S = 20


@dataclass(frozen=True)
class Job:
    """A job as the scheduler sees it.

    state: SLURM's word, or UNREACHABLE (nobody answers), FORGOTTEN (nobody knows it).
    exit_status: of the batch script, 128 + signal if one ended it; None: not known. preempted: it has been told to make room.
    end: when its time is over, seconds since 1970. restarts: requeued so often.
    """

    state: str
    exit_status: int | None = None
    nodes: str = ""
    reason: str = ""
    preempted: bool = False
    end: float | None = None
    restarts: int = 0

    @property
    def final(self) -> bool:
        """Whether it will not run any more (see PASSING)."""
        return self.state in FINAL


def ask(job: str) -> Job:
    """The present state of job `123` or array element `123_4`."""
    code, text = run("scontrol", "show", "job", "-o", job)
    lines = [line for line in text.splitlines() if "JobState=" in line]
    if code == 0 and lines:
        return parse(lines[0])
    if "Invalid job id" not in text:
        return Job(UNREACHABLE, reason=" ".join(text.split())[:200])
    code, text = run("sacct", "-j", job, "-X", "-n", "-P", "-o", "JobID,State,ExitCode,NodeList")
    rows = [line.split("|") for line in text.splitlines() if line.startswith(f"{job}|")]
    if code or not rows:
        return Job(FORGOTTEN)
    return Job(rows[-1][1].split()[0], _status(rows[-1][2]), rows[-1][3])


def active(array: str) -> int:
    """Elements of an array that have not ended; 0 if nobody knows it or nobody answers."""
    code, text = run("scontrol", "show", "job", "-o", array)
    return 0 if code else sum(not parse(line).final for line in text.splitlines() if "JobState=" in line)


def cancel(*jobs: str) -> None:
    """End jobs and arrays, if they are there."""
    if jobs:
        run("scancel", *jobs)


def parse(line: str) -> Job:
    """A line of `scontrol show job -o`."""
    found = dict(re.findall(r"(\S+?)=(.*?)(?=\s+[\w:/]+=|\s*$)", line))
    return Job(
        state=found.get("JobState", FORGOTTEN),
        exit_status=_status(found.get("ExitCode", "")),
        nodes=found.get("NodeList", "").replace("(null)", ""),
        reason=found.get("Reason", "").replace("None", ""),
        preempted=found.get("PreemptTime", "None") not in ("None", "Unknown", ""),
        end=_seconds(found.get("EndTime", "")),
        restarts=int(found.get("Restarts", "0")),
    )


def _status(text: str) -> int | None:
    """`2:0` -> 2, `0:9` -> 137."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    return (128 + int(found[2]) if int(found[2]) else int(found[1])) if found else None


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def run(*command: str) -> tuple[int, str]:
    """Exit status and output, errors included; 127 if there is no such program, 124 if it does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except OSError as e:
        missing = isinstance(e, FileNotFoundError)
        return 127, f"there is no {command[0]} on PATH" if missing else f"{command[0]} can't be run: {e.strerror}"
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]} does not answer"
    return done.returncode, done.stdout + done.stderr


def requeue(job: str, patience_s: float) -> str:
    """Have the job run again; "" or why it can't. A controller that does not answer is asked for ``patience_s`` seconds."""
    until = time.monotonic() + patience_s
    while True:
        code, text = run("scontrol", "requeue", job)
        if code == 0:
            return ""
        if time.monotonic() > until:
            return " ".join(text.split()) or f"scontrol ended with status {code}"
        time.sleep(2)


def partitions() -> list[str]:
    """Names of the partitions; empty if the scheduler does not say."""
    code, text = run("sinfo", "-h", "-o", "%R")
    return sorted(set(text.split())) if code == 0 else []
