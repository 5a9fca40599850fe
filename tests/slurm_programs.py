"""Small programs on PATH that stand for SLURM's."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from metadist.config import Config
from metadist.config_machine import ClusterConfig
from metadist.run.cluster import record, status
from metadist.run.cluster.command import main
from metadist.run.guard import guarded

ROOT = Path(__file__).resolve().parents[1]
SLURM = ROOT / "launch" / "slurm.py"

# As SLURM 23 prints them, on one line each.
LINE = (
    "JobId=4711 JobName=metadist-x UserId=me(1000) GroupId=me(1000) MCS_label=N/A Priority=4294901758 Nice=0 Account=(null) "
    "QOS=normal WCKey=*submitit JobState={state} Reason={reason} Dependency=(null) Requeue=1 Restarts={restarts} BatchFlag=1 "
    "Reboot=0 ExitCode={code} RunTime=00:01:02 TimeLimit=01:00:00 TimeMin=N/A SubmitTime=2026-11-21T03:59:00 "
    "EligibleTime=2026-11-21T03:59:00 AccrueTime=2026-11-21T03:59:00 StartTime=2026-11-21T04:00:00 EndTime={end} Deadline=N/A "
    "PreemptEligibleTime=2026-11-21T04:00:00 PreemptTime={preempt} SuspendTime=None SecsPreSuspend=0 "
    "LastSchedEval=2026-11-21T04:00:00 Scheduler=Main Partition=main AllocNode:Sid=login:812 ReqNodeList=(null) "
    "ExcNodeList=n9 NodeList={nodes} BatchHost=n1 NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:* "
    "ReqTRES=cpu=2,mem=2000M,node=2,billing=2 AllocTRES=cpu=2,mem=2000M,node=2,billing=2 Socks/Node=* "
    "NtasksPerN:B:S:C=1:0:*:* CoreSpec=* MinCPUsNode=1 MinMemoryNode=0 MinTmpDiskNode=0 Features=(null) DelayBoot=00:00:00 "
    "OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null) Command=/home/me/my runs/x/cluster/batch.sh "
    "WorkDir=/home/me StdErr=/home/me/my runs/x/cluster/4711_0_log.err StdIn=/dev/null "
    "StdOut=/home/me/my runs/x/cluster/4711_0_log.out Power= "
)
SINFO = "echo main; echo high; echo main"
UNKNOWN_JOB = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


def shown(state: str = "RUNNING", **given: str) -> str:
    """A line of `scontrol show job -o`."""
    rest = {
        "reason": "None",
        "restarts": "0",
        "code": "0:0",
        "end": "2026-11-21T05:00:00",
        "preempt": "None",
        "nodes": "n[1-2]",
    }
    return LINE.format(state=state, **{**rest, **given})


class Programs:
    """SLURM's programs, faked in a folder that is all of PATH; this process works beside it."""

    def __init__(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self.bin, self._capsys = place, place / "bin", capsys
        self.bin.mkdir()

    def put(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\nprintf '%s\\n' \"{name} $*\" >> {shlex.quote(str(self.place / 'asked'))}\n{script}\n")
        path.chmod(0o755)

    def scontrol(self, line: str, requeue: str = "exit 0") -> None:
        (self.place / "line").write_text(line + "\n")
        self.put("scontrol", f"case $1 in show) /bin/cat {self.place / 'line'};; requeue) {requeue};; esac")

    @property
    def asked(self) -> list[str]:
        path = self.place / "asked"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def received(self) -> bytes | None:
        path = self.place / "received"
        return path.read_bytes() if path.exists() else None

    def __call__(
        self, *words: str, program: Callable[[list[str]], int] = main, mount: bool = False
    ) -> SimpleNamespace:  # code, out, err
        self._capsys.readouterr()
        code = program([*words, *([] if mount else ["check_mount=false"])])
        said = self._capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)


def make_run(place: Path, **cluster: int) -> Path:
    """A run folder of job 4711."""
    config = Config(cluster=ClusterConfig(**cluster), steps=400, run_dir=str(place))
    record.write(place / "config.json", dataclasses.asdict(config))
    record.write(place / "cluster/job.json", {"job": "4711", "cluster": "slurm"})
    return place


def make_end(run: Path, incarnation: int, reason: str, code: int = 140, start: int = 1, job: str = "4711") -> None:
    told = {"reason": reason, "status": code, "step": 7, "job": job, "start": start}
    record.write(record.end_path(run, incarnation), told)


def watch_status(slurm: Programs, *words: str) -> SimpleNamespace:
    return slurm(*words, program=lambda argv: guarded(status.main, argv), mount=True)
