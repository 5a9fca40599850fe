"""The batch script's last line, and the same command on this machine."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from slurm_programs import SLURM, Programs, make_end, make_run, shown, watch_status

from metadist.errors import UserError
from metadist.run.cluster import after, here, record, scheduler
from metadist.run.cluster.network import interfaces, own_address

# --- the batch file's last line -----------------------------------------------------------------------------------------------


@pytest.fixture
def ending(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str, bool]]:
    """What after does at the end of the second start (restart 1, incarnation 2): status, output, errors, requeued?"""
    for name, value in {"JOB_ID": "4711", "RESTART_COUNT": "1", "NTASKS": "2", "JOB_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(after, "_KILLED_SOON_S", 0.0)
    slurm.scontrol(shown("RUNNING", restarts="1"))
    make_run(Path("x"), max_restarts=2, max_num_timeout=1)
    record.write(Path("x/cluster/meet-4711-1.json"), {"incarnation": 2, "store": "n1:1"})

    def end(code: int) -> tuple[int, str, str, bool]:
        (slurm.place / "asked").unlink(missing_ok=True)
        done = slurm(str(code), "x", program=after.main, mount=True)
        assert set(slurm.asked) <= {"scontrol show job -o 4711", "scontrol requeue 4711"}
        return done.code, done.out, done.err, "scontrol requeue 4711" in slurm.asked

    return end


Ending = Callable[..., tuple[int, str, str, bool]]
AGAIN = "resume with: sbatch x/cluster/batch.sh\n"


def test_after_a_preemption(ending: Ending) -> None:
    for _ in range(5):
        make_end(Path("x"), 2, "preempted")
        assert ending(140) == (140, "preempted: requeued from step 7\n", "", True)


@pytest.mark.parametrize(("reason", "code"), [("cancelled", 0), ("cancelled", 137), ("terminated", 0)])
def test_after_a_cancellation(reason: str, code: int, ending: Ending) -> None:
    make_end(Path("x"), 2, reason, 143)
    assert ending(code) == (143, f"{reason}; {AGAIN}", "", False)


@pytest.mark.parametrize("code", [137, 75, 134])
def test_srun_terminates_the_others_when_a_worker_is_killed(code: int, ending: Ending) -> None:
    make_end(Path("x"), 2, "terminated", 143)  # so rank 0 saw it
    assert ending(code) == (1, "worker lost: requeued (1 of at most 2 times) from step 0\n", "", True)
    assert record.read(Path("x/ends/0002.json"))["reason"] == "worker lost"


def test_srun_terminates_the_others_after_a_fault(ending: Ending) -> None:
    make_end(Path("x"), 2, "terminated", 143)
    fault(1, 3.0, 2, "error: data.path=nowhere is no folder")
    assert ending(2) == (2, "", "error: data.path=nowhere is no folder\n", False)
    assert record.read(Path("x/ends/0002.json"))["reason"] == "refused"


def test_after_the_time_limit(ending: Ending) -> None:
    make_end(Path("x"), 2, "time limit")
    assert ending(140) == (140, "time limit: requeued (1 of at most 1 times) from step 7\n", "", True)
    make_end(Path("x"), 1, "time limit", start=0, job="4000")  # an earlier job's does not count
    assert ending(140)[3]
    make_end(Path("x"), 1, "time limit", start=0)
    text = "time limit, and not requeued: it was 1 times already (max_num_timeout=1); "
    assert ending(140) == (140, text + AGAIN, "", False)


def test_after_a_worker_was_killed(ending: Ending) -> None:
    (Path("x/checkpoints")).mkdir()
    for step in (8, 12):
        Path(f"x/checkpoints/step-{step:010d}.inc-0001.safetensors").touch()
    assert ending(137) == (1, "worker lost: requeued (1 of at most 2 times) from step 12\n", "", True)
    told = record.read(Path("x/ends/0002.json"))
    assert (told["reason"], told["status"], told["step"], told["job"], told["start"]) == ("worker lost", 1, 12, "4711", 1)
    make_end(Path("x"), 1, "worker lost", 1, start=0)
    assert ending(137) == (1, "worker lost: requeued (2 of at most 2 times) from step 12\n", "", True)
    make_end(Path("x"), 0, "worker lost", 1, start=5)
    text = "worker lost, and not requeued: it was 2 times already (max_restarts=2); "
    assert ending(137) == (1, text + AGAIN, "", False)


def fault(rank: int, when: float, code: int, text: str, lost: bool = False, start: int = 1) -> None:
    told = {"time": when, "status": code, "text": text, "lost": lost}
    record.write(Path(f"x/cluster/fault-4711-{start}-{rank}.json"), told)


def test_after_a_lost_peer_only(ending: Ending) -> None:
    fault(0, 1.0, 1, "error: lost worker 1", lost=True)
    assert ending(75) == (1, "worker lost: requeued (1 of at most 2 times) from step 0\n", "", True)


def test_after_a_mistake(ending: Ending) -> None:
    fault(0, 1.0, 1, "error: lost worker 1", lost=True)
    fault(1, 3.0, 2, "error: the later one")
    fault(3, 2.0, 2, "error: data.path=nowhere is no folder")
    fault(2, 0.5, 1, "error: of the earlier start", start=0)
    assert ending(75) == (2, "", "error: data.path=nowhere is no folder\n", False)
    assert record.read(Path("x/ends/0002.json"))["reason"] == "refused"


def test_after_a_fault(ending: Ending) -> None:
    fault(1, 3.0, 1, "Traceback\nZeroDivisionError")
    assert ending(137) == (1, "", "Traceback\nZeroDivisionError\n", False)
    assert record.read(Path("x/ends/0002.json"))["reason"] == "failed"


def test_after_a_finish(ending: Ending) -> None:
    assert ending(0) == (0, "", "", False)
    assert record.read(Path("x/ends/0002.json"))["reason"] == "finished"


@pytest.mark.parametrize(
    ("reason", "code"), [("time limit", 0), ("preempted", 0), ("terminated", 137), (None, 137), (None, 140)]
)
@pytest.mark.parametrize("done", [400, 399])
def test_stopped_or_killed_when_its_result_was_there(done: int, reason: str | None, code: int, ending: Ending) -> None:
    """The warning may come while the last lines are written: what is finished by its own length needs no further start."""
    config = record.read(Path("x/config.json"))
    record.write(Path("x/starts/0002.json"), {"config": config})
    record.write(Path("x/config.json"), {**config, "steps": 100})  # as the run began; the start at hand prolongs it
    record.write(Path("x/summary.json"), {"steps": done})
    if reason:
        make_end(Path("x"), 2, reason)
    status, _, _, requeued = ending(code)
    assert requeued == (done < 400) and (status == 0) == (done == 400)
    assert (record.read(Path("x/ends/0002.json"))["reason"] == "finished") == (done == 400)


def test_after_a_start_that_never_began(ending: Ending) -> None:
    Path("x/cluster/meet-4711-1.json").unlink()
    line = (
        "error: the job ended before its workers had begun (status 3): every node must see run_dir=x and this Python "
        f"({sys.executable}); nodes n[1-2]\n"
    )
    assert ending(3) == (3, "", line, False)
    Path("x/config.json").unlink()
    assert ending(3) == (3, "", line, False)
    assert ending(0)[0] == 1  # a run folder that is not there is no success


def test_after_a_warning_while_it_started(ending: Ending, slurm: Programs) -> None:
    Path("x/cluster/meet-4711-1.json").unlink()
    slurm.scontrol(shown("RUNNING", restarts="1", preempt="2026-11-21T04:30:00"))
    assert ending(140) == (140, "preempted: requeued from step 0\n", "", True)
    assert record.read(Path("x/ends/0000-4711-1.json"))["reason"] == "preempted"


def test_after_a_start_that_slurm_has_replaced(ending: Ending, slurm: Programs) -> None:
    slurm.scontrol(shown("RUNNING", restarts="2"))
    assert ending(137) == (1, "worker lost; SLURM has started the job again already\n", "", False)


def test_after_a_requeue_that_is_refused(ending: Ending, slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    slurm.scontrol(shown("RUNNING", restarts="1"), requeue="echo 'Requested operation is presently disabled' >&2; exit 1")
    make_end(Path("x"), 2, "preempted")
    error = "error: SLURM refused to requeue it (Requested operation is presently disabled); "
    assert ending(140) == (1, "preempted: requeued from step 7\n", error + AGAIN, True)
    assert 45 <= sum(slept) <= 48  # half of the 90 s of warning


def test_a_warning_is_the_time_limit_s_where_nobody_answers(
    ending: Ending, slurm: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    Path("x/cluster/meet-4711-1.json").unlink()
    slurm.put("scontrol", "case $1 in requeue) exit 0;; esac; echo 'Unable to contact slurm controller' >&2; exit 1")
    assert ending(140) == (140, "time limit: requeued (1 of at most 1 times) from step 0\n", "", True)


# --- the same on this machine -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cluster_local_runs_to_the_end(slurm: Programs) -> None:
    words = ["cluster=local", "wait=true", "smoke=true", "nodes=2", "mem_gb=1", "partition=none", "run_dir=runs/x"]
    environ = {**os.environ, "PATH": f"{slurm.bin}:/usr/bin:/bin", "HOME": str(slurm.place), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SLURM), *words], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "note: cluster=local does not read mem_gb=1 partition=none\n"
    assert "test accuracy" in done.stdout and slurm.received is None
    run = slurm.place / "runs/x"
    config = json.loads((run / "config.json").read_text())
    assert (config["workers"], config["threads"]) == (2, 1)
    assert json.loads((run / "summary.json").read_text())["finished"] is True
    assert stat.S_IMODE((run / "cluster").stat().st_mode) == 0o700
    assert json.loads((run / "cluster/job.json").read_text())["cluster"] == "local"
    log = next((run / "cluster").glob("local-*_0_log.out")).read_text()
    assert done.stdout.endswith(log) and done.stdout.startswith("started process ")
    (row,) = json.loads(watch_status(slurm, "run=all", "json=true").out)
    assert (row["state"], row["step"], row["steps"]) == ("finished", 3, 3)
    assert slurm.asked == []  # a process of this machine is no business of the scheduler's


def test_interfaces() -> None:
    assert interfaces()["lo"] == "127.0.0.1" == own_address("lo") == own_address(None)
    with pytest.raises(UserError, match=r"exchange.interface=none0 is no network interface of .* allowed there: .*lo"):
        own_address("none0")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands cluster=local starts."""
    commands: list[list[str]] = []

    def popen(command: list[str], **how: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(pid=4711)

    monkeypatch.setattr(here.subprocess, "Popen", popen)
    return commands


@pytest.mark.parametrize(
    ("word", "unread"),
    [
        ("additional_parameters.nice=3", True),
        ("cluster.mem_gb=3", True),
        ("exchange.interface=lo", True),
        ("'setup=[echo a]'", True),
        ("cpus_per_task=2", False),
        ("cluster.nodes=1", False),
    ],
)
def test_what_cluster_local_leaves_out(word: str, unread: bool, slurm: Programs, started: list[list[str]]) -> None:
    word = word.strip("'")
    done = slurm("cluster=local", "smoke=true", word, "run_dir=x", mount=True)
    assert done.code == 0 and done.err == (f"note: cluster=local does not read {word}\n" if unread else "")
    words = started[0][started[0].index("metadist.run.command") + 1 :]
    threads = 2 if word.startswith("cpus") else 1
    assert words == ["smoke=true", "workers=1", f"threads={threads}", f"run_dir='{slurm.place}/x'"]
    assert f"  resume         python launch/slurm.py cluster=local smoke=true {shlex.quote(word)} run_dir=x\n" in done.out


def test_cluster_local_where_a_file_stands(slurm: Programs, started: list[list[str]]) -> None:
    Path("x").write_text("")
    done = slurm("cluster=local", "run_dir=x", mount=True)
    assert (done.code, done.err) == (2, f"error: run_dir={slurm.place}/x can't be made (Not a directory); give another\n")
    assert started == []
