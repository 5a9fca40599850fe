"""The last line of the workers' batch file, and the table of a server's workers. Small programs on PATH stand for SLURM."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_programs import Programs, make_run, shown, watch_status

from metadist.run.cluster import after, after_member, record, scheduler
from metadist.run.cluster.network import interfaces, server_address

Ending = Callable[[int], tuple[int, str, bool]]


@pytest.fixture
def ending(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> Ending:
    """What becomes of element 2 of array 4712 after its second start: status, output, requeued?"""
    environ = {"JOB_ID": "4720", "ARRAY_JOB_ID": "4712", "ARRAY_TASK_ID": "2", "RESTART_COUNT": "1", "NTASKS": "2"}
    for name, value in environ.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(after, "_KILLED_SOON_S", 0.0)
    slurm.scontrol(shown("RUNNING", restarts="1"))
    make_run(Path("x"), max_restarts=2, max_num_timeout=1)

    def end(code: int) -> tuple[int, str, bool]:
        (slurm.place / "asked").unlink(missing_ok=True)
        done = slurm(str(code), "x", program=after_member.main, mount=True)
        return done.code, done.out, "scontrol requeue 4720" in slurm.asked

    return end


def left(signal: str) -> None:
    record.write(Path("x/cluster/left-4712_2-1.json"), {"signal": signal, "time": 1.0})


def fault(code: int, lost: bool) -> None:
    told = {"time": 1.0, "status": code, "text": "error: x", "lost": lost}
    record.write(Path("x/cluster/fault-4712_2-1-0.json"), told)


def earlier(reason: str, start: int = 0, job: str = "4712_2") -> None:
    record.write(Path(f"x/cluster/end-{job}-{start}.json"), {"reason": reason, "status": 1, "job": job, "start": start})


def test_sent_home_it_ends(ending: Ending) -> None:
    assert ending(0) == (0, "", False)
    record.write(Path("x/summary.json"), {"finished": True})
    assert ending(137) == (0, "", False)  # whatever happened to it after the run was finished


def test_preempted_it_runs_again_as_often_as_it_takes(ending: Ending, slurm: Programs) -> None:
    slurm.scontrol(shown("RUNNING", restarts="1", preempt="2026-11-21T04:30:00"))
    for start in range(2, 9):
        earlier("preempted", start)
    left("SIGUSR2")
    assert ending(0) == (143, "this worker: preempted: requeued\n", True)
    assert record.read(Path("x/cluster/end-4712_2-1.json"))["reason"] == "preempted"


def test_at_its_time_limit_it_runs_again_once(ending: Ending, monkeypatch: pytest.MonkeyPatch, slurm: Programs) -> None:
    slurm.put("scontrol", "case $1 in requeue) exit 0;; esac; echo 'Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    left("SIGUSR2")
    earlier("time limit", job="4712_1")  # another element's does not count
    assert ending(0) == (143, "this worker: time limit: requeued (1 of at most 1 times)\n", True)
    earlier("time limit")
    text = "this worker: time limit, and not requeued: it was 1 times already (max_num_timeout=1)\n"
    assert ending(0) == (143, text, False)


def test_killed_it_runs_again_twice(ending: Ending) -> None:
    left("SIGTERM")  # the other rank of the element, ended by srun
    assert ending(137) == (1, "this worker: worker lost: requeued (1 of at most 2 times)\n", True)
    earlier("worker lost")
    assert ending(137) == (1, "this worker: worker lost: requeued (2 of at most 2 times)\n", True)
    earlier("worker lost", 2)
    assert ending(137)[2] is False


def test_what_a_person_ended_stays_ended(ending: Ending, slurm: Programs) -> None:
    left("SIGTERM")
    assert ending(0) == (143, "this worker: terminated\n", False)
    slurm.scontrol(shown("COMPLETING", restarts="1"))
    assert ending(0) == (143, "this worker: cancelled\n", False)


def test_what_would_come_again_is_not_tried_again(ending: Ending) -> None:
    fault(75, lost=True)
    assert ending(75) == (1, "this worker: no server\n", False)
    fault(2, lost=False)
    assert ending(2) == (2, "this worker: failed\n", False)


def test_a_start_that_slurm_has_replaced_requeues_nothing(ending: Ending, slurm: Programs) -> None:
    slurm.scontrol(shown("RUNNING", restarts="2"))
    assert ending(137) == (1, "worker lost; SLURM has started it again already\n", False)


def test_a_server_that_ended_for_good_takes_its_workers_along(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(after, "_KILLED_SOON_S", 0.0)
    slurm.scontrol(shown("RUNNING"))
    slurm.put("scancel", "exit 0")
    make_run(Path("x"), max_restarts=1)
    record.write(Path("x/cluster/job.json"), {"job": "4711", "cluster": "slurm", "workers": ["4712", "4713"]})
    record.write(Path("x/cluster/meet-4711-0.json"), {"incarnation": 1})
    assert slurm("137", "x", program=after.main, mount=True).code == 1
    assert "scontrol requeue 4711" in slurm.asked and not any(a.startswith("scancel") for a in slurm.asked)
    record.write(Path("x/ends/0001.json"), {"reason": "finished", "status": 0, "step": 9, "job": "4711", "start": 0})
    assert slurm("0", "x", program=after.main, mount=True).code == 0
    assert "scancel 4712 4713" in slurm.asked


def test_elements_that_have_not_ended(slurm: Programs) -> None:
    lines = "; ".join(f"echo '{shown(state)}'" for state in ("RUNNING", "PENDING", "CANCELLED", "COMPLETED"))
    slurm.put("scontrol", lines)
    assert scheduler.active("4712") == 2
    slurm.put("scontrol", "echo 'Invalid job id specified' >&2; exit 1")
    assert scheduler.active("4712") == 0


def test_a_server_listens_where_the_scheduler_reaches_its_node(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    slurm.put("scontrol", "echo 'NodeName=n1 NodeAddr=127.0.0.1 NodeHostName=n1 Version=22.05'")
    assert server_address(None) == "127.0.0.1" == server_address("lo")
    assert "scontrol show node -o n1" in slurm.asked
    slurm.put("scontrol", "echo 'NodeName=n1 NodeAddr=203.0.113.7'")  # not an address of this machine
    assert server_address(None) in {*interfaces().values()}


def test_the_table_of_a_server_s_workers(slurm: Programs) -> None:
    make_run(Path("runs/x"))
    counts = {"tasks": 722, "accepted": 361, "stale": 2, "duplicate": 1, "refused": 0}
    row = {"worker": "3@n2:58", **counts, "utilisation": 0.9458, "pull_ms": 1.26, "push_ms": None, "silent_s": 0.4}
    told = {"version": 399, "queued": 1, "counts": {"accepted": 800, "lost": 1}, "workers": [row], "time": time.time() - 3}
    record.write(Path("runs/x/exchange/workers.json"), told)
    out = watch_status(slurm, "run=runs/x").out.splitlines()
    assert out[4] == "server, 3s ago: version 399  queued 1  accepted 800  lost 1"
    assert out[5].split() == [
        "worker",
        "tasks",
        "accepted",
        "stale",
        "duplicate",
        "refused",
        "busy",
        "%",
        "pull",
        "ms",
        "push",
        "ms",
        "heard",
    ]
    assert out[7].split() == ["3@n2:58", "722", "361", "2", "1", "0", "94.58", "1.3", "-", "0s", "ago"]
    (found,) = json.loads(watch_status(slurm, "run=runs/x", "json=true").out)
    assert found["server"]["workers"] == [row]
    record.write(Path("runs/x/exchange/workers.json"), {**told, "workers": []})
    assert watch_status(slurm, "run=runs/x").out.splitlines()[5] == "no worker is here"
