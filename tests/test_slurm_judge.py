"""Why a job ended, what the scheduler says of it, and what waiting and status make of that."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from slurm_programs import UNKNOWN_JOB, Programs, make_end, make_run, shown, watch_status

from metadist.run.cluster import record, scheduler, watch
from metadist.run.cluster.scheduler import FORGOTTEN, UNREACHABLE, Job

# --- why it was stopped, and what becomes of it -------------------------------------------------------------------------------

NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("signal", "job", "reason"),
    [
        # preempted beats everything
        ("SIGUSR2", Job("RUNNING", preempted=True, end=NOW + 5), "preempted"),
        ("SIGTERM", Job("COMPLETING", preempted=True, restarts=3), "preempted"),
        ("SIGINT", Job("CANCELLED", preempted=True), "preempted"),
        # a requeue by hand
        ("SIGTERM", Job("COMPLETING", restarts=1), "requeued"),
        ("SIGTERM", Job("PENDING", restarts=1), "requeued"),
        # scancel
        ("SIGTERM", Job("COMPLETING"), "cancelled"),
        ("SIGTERM", Job("CANCELLED"), "cancelled"),
        ("SIGTERM", Job("RUNNING"), "terminated"),
        ("SIGTERM", Job(UNREACHABLE), "terminated"),
        # the warning comes up to a minute early, and is looked at somewhat late: 30 + 90 s
        ("SIGUSR2", Job("RUNNING", end=NOW + 120), "time limit"),
        ("SIGUSR2", Job("RUNNING", end=NOW + 121), "signalled"),
        ("SIGUSR2", Job("COMPLETING", end=NOW + 10), "time limit"),
        ("SIGUSR2", Job("RUNNING", end=NOW - 5), "time limit"),
        ("SIGUSR2", Job("RUNNING"), "signalled"),
        ("SIGUSR2", Job("RUNNING", end=NOW + 8 * 60), "signalled"),  # of timeout_min=9: submitit calls it a time-out
    ],
)
def test_why_it_was_stopped(signal: str, job: Job, reason: str) -> None:
    assert record.why(signal, job, 0, 30, now=NOW) == reason


def test_why_where_the_controller_does_not_answer() -> None:
    for seconds, reason in ((120, "time limit"), (121, "signalled")):
        assert record.why("SIGUSR2", Job(UNREACHABLE), 0, 30, end=NOW + seconds, now=NOW) == reason
    # what the scheduler says goes before what the environment said at the start (the limit may have been raised)
    assert record.why("SIGUSR2", Job("RUNNING", end=NOW + 9999), 0, 30, end=NOW + 1, now=NOW) == "signalled"
    assert record.why("SIGTERM", Job("COMPLETING", restarts=2), 2, 30, now=NOW) == "cancelled"  # requeued before, not now


def before(*reasons: str) -> list[dict[str, object]]:
    return [{"reason": r} for r in reasons]


@pytest.mark.parametrize(
    ("reason", "earlier", "limits", "verdict"),
    [
        ("time limit", (), (1, 3), (True, "time limit: requeued (1 of at most 1 times)")),
        (
            "time limit",
            ("time limit",),
            (1, 3),
            (False, "time limit, and not requeued: it was 1 times already (max_num_timeout=1)"),
        ),
        (
            "time limit",
            ("preempted", "worker lost", "time limit"),
            (3, 0),
            (True, "time limit: requeued (2 of at most 3 times)"),
        ),
        ("time limit", (), (0, 3), (False, "time limit, and not requeued: it was 0 times already (max_num_timeout=0)")),
        ("worker lost", ("worker lost",), (0, 2), (True, "worker lost: requeued (2 of at most 2 times)")),
        (
            "worker lost",
            ("worker lost",) * 2,
            (9, 2),
            (False, "worker lost, and not requeued: it was 2 times already (max_restarts=2)"),
        ),
        ("preempted", ("preempted",) * 100, (0, 0), (True, "preempted: requeued")),
        ("signalled", ("signalled",) * 100, (0, 0), (True, "signalled: requeued")),
        *((r, (), (9, 9), (False, r)) for r in ("cancelled", "terminated", "requeued", "failed", "refused", "finished")),
    ],
)
def test_what_becomes_of_it(reason: str, earlier: tuple[str, ...], limits: tuple[int, int], verdict: tuple[bool, str]) -> None:
    assert record.verdict(reason, before(*earlier), *limits) == verdict


# --- what the scheduler says --------------------------------------------------------------------------------------------------


def local_time(*when: int) -> float:
    return time.mktime((*when, 0, 0, -1))


def test_parsing_what_scontrol_shows() -> None:
    end = local_time(2026, 11, 21, 5, 0, 0)
    assert scheduler.parse(shown()) == Job("RUNNING", 0, "n[1-2]", "", False, end, 0)
    gone = shown("FAILED", reason="NonZeroExitCode", code="2:0", restarts="4")
    assert scheduler.parse(gone) == Job("FAILED", 2, "n[1-2]", "NonZeroExitCode", False, end, 4)
    killed = shown("COMPLETING", code="0:9", preempt="2026-11-21T04:30:00")
    assert scheduler.parse(killed) == Job("COMPLETING", 137, "n[1-2]", "", True, end, 0)
    waiting = shown("PENDING", reason="BeginTime", nodes="(null)", end="Unknown", preempt="Unknown", restarts="1")
    assert scheduler.parse(waiting) == Job("PENDING", 0, "", "BeginTime", False, None, 1)
    array = shown("PENDING", nodes="", end="Unknown").replace("JobId=4711", "JobId=4712 ArrayJobId=4711 ArrayTaskId=1-2%2")
    assert scheduler.parse(array) == Job("PENDING", 0, "", "", False, None, 0)


def test_exit_status() -> None:
    found = {text: scheduler._status(text) for text in ("2:0", "0:9", "0:0", "1:15", "", "0:0:0")}
    assert found == {"2:0": 2, "0:9": 137, "0:0": 0, "1:15": 143, "": None, "0:0:0": None}


def test_states() -> None:
    assert all(Job(s).final for s in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"))
    assert not any(Job(s).final for s in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", FORGOTTEN, UNREACHABLE))


def test_who_is_asked(slurm: Programs) -> None:
    slurm.scontrol(shown("RUNNING"))
    slurm.put("sacct", "echo '4711|FAILED|1:0|n1'")
    assert scheduler.ask("4711").state == "RUNNING" and slurm.asked == ["scontrol show job -o 4711"]
    slurm.put("scontrol", UNKNOWN_JOB)
    assert scheduler.ask("4711") == Job("FAILED", 1, "n1")
    assert slurm.asked[-1].startswith("sacct -j 4711 ")
    slurm.put("sacct", "echo '47110|FAILED|1:0|n1'; echo '4711|CANCELLED by 1000|0:15|n[1-2]'; echo '4711_1|FAILED|1:0|n1'")
    assert scheduler.ask("4711") == Job("CANCELLED", 143, "n[1-2]")
    assert scheduler.ask("4711_1") == Job("FAILED", 1, "n1")
    assert scheduler.ask("99") == Job(FORGOTTEN)
    slurm.put("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert scheduler.ask("4711") == Job(FORGOTTEN)
    (slurm.bin / "sacct").unlink()
    assert scheduler.ask("4711") == Job(FORGOTTEN)
    slurm.put("scontrol", "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    assert scheduler.ask("4711") == Job(
        UNREACHABLE, reason="slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    )
    (slurm.bin / "scontrol").unlink()
    assert scheduler.ask("4711") == Job(UNREACHABLE, reason="there is no scontrol on PATH")


def test_a_program_that_hangs(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_TIMEOUT_S", 0.2)
    slurm.put("scontrol", "exec /bin/sleep 5")
    assert scheduler.ask("4711") == Job(UNREACHABLE, reason="scontrol does not answer")


def test_a_program_that_can_t_be_run(slurm: Programs) -> None:
    (slurm.bin / "scontrol").chmod(0o644)
    assert scheduler.ask("4711") == Job(UNREACHABLE, reason="scontrol can't be run: Permission denied")


def test_partitions(slurm: Programs) -> None:
    assert scheduler.partitions() == ["high", "main"]
    (slurm.bin / "sinfo").unlink()
    assert scheduler.partitions() == []


def test_requeue_is_patient(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(scheduler, "time", clock)
    refuse = "echo 'Unable to contact slurm controller' >&2; exit 1"
    slurm.put("scontrol", f"test -e {slurm.place}/up && exit 0; test $(/bin/grep -c requeue asked) -ge 3 && : > up; {refuse}")
    assert scheduler.requeue("4711", 60.0) == "" and len(slept) == 3
    assert slurm.asked == ["scontrol requeue 4711"] * 4
    slurm.put("scontrol", refuse)
    slept.clear()
    assert scheduler.requeue("4711", 10.0) == "Unable to contact slurm controller" and sum(slept) == 12
    slurm.put("scontrol", "exit 3")
    slept.clear()
    assert scheduler.requeue("4711", 0.0) == "scontrol ended with status 3"


# --- waiting ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """watch.wait on a list of states, the last of which stays."""
    monkeypatch.setattr(watch, "SETTLED_S", 0.1)
    monkeypatch.setattr(watch, "LOST_SIGHT_S", 0.1)

    def wait(*states: Job, tails: list[watch.Tail] | None = None) -> int:
        left = list(states)
        silent = [watch.Tail(tmp_path / "none")]
        return watch.wait("4711", tmp_path, tails or silent, lambda job: left.pop(0) if len(left) > 1 else left[0], poll_s=0.01)

    return wait


@pytest.mark.parametrize(
    ("states", "code"),
    [
        # submitit takes the first NODE_FAIL for the end
        ([Job("RUNNING"), Job("NODE_FAIL", 0), Job("PENDING"), Job("RUNNING"), Job("COMPLETED", 0)], 0),
        ([Job("RUNNING"), Job("PREEMPTED", 0), Job("PENDING"), Job("FAILED", 2)], 2),
        ([Job("RUNNING"), Job("NODE_FAIL", 0)], 1),
        ([Job("RUNNING"), Job("FAILED", 2)], 2),
        ([Job("FAILED", 137)], 137),
        ([Job("FAILED", None)], 1),
        ([Job("TIMEOUT", 0)], 1),
        ([Job("OUT_OF_MEMORY", 0)], 1),
        ([Job("RUNNING"), Job("CANCELLED", 0)], 143),
        ([Job("PENDING"), Job(UNREACHABLE), Job(UNREACHABLE), Job("COMPLETED", 0)], 0),
        ([Job(FORGOTTEN), Job("RUNNING"), Job("COMPLETED", 0)], 0),
        ([Job(FORGOTTEN)], 1),
    ],
)
def test_the_status_of_waiting(states: list[Job], code: int, scripted: Callable[..., int]) -> None:
    assert scripted(*states) == code


def test_each_state_is_told_once(scripted: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    run = Job("RUNNING", nodes="n[1-2]")
    scripted(Job("PENDING", reason="Resources"), Job("PENDING", reason="Resources"), run, run, Job("COMPLETED", 0, "n[1-2]"))
    said = capsys.readouterr()
    assert said.err == "[job 4711: PENDING Resources]\n[job 4711: RUNNING n[1-2]]\n[job 4711: COMPLETED n[1-2]]\n"
    assert said.out == ""


def test_a_forgotten_job_of_a_finished_run(
    scripted: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOST_SIGHT_S", 1e9)
    (tmp_path / "summary.json").write_text('{"finished": true}')
    assert scripted(Job(FORGOTTEN)) == 0


def test_a_forgotten_job_s_status_is_that_of_its_last_end(scripted: Callable[..., int], tmp_path: Path) -> None:
    for n, code in ((1, 140), (2, 3)):
        record.write(record.end_path(tmp_path, n), {"reason": "failed", "status": code, "job": "4711"})
    record.write(record.end_path(tmp_path, 3), {"reason": "failed", "status": 9, "job": "5000"})
    assert scripted(Job(FORGOTTEN)) == 3


def test_a_job_that_never_began(scripted: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"error: the job ended FAILED without a word: can every node see run_dir={tmp_path}?"
    assert scripted(Job("PENDING"), Job("FAILED", 1)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert scripted(Job("CANCELLED", 0)) == 143
    assert "without a word" not in capsys.readouterr().err
    (tmp_path / "err").write_text("error: said something\n")
    assert scripted(Job("FAILED", 1), tails=[watch.Tail(tmp_path / "err")]) == 1
    said = capsys.readouterr()
    assert said.out == "error: said something\n" and "without a word" not in said.err


def test_new_text_is_shown_once(scripted: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    tail = watch.Tail(log)
    assert tail() == ""
    log.write_text("one\n")
    assert (tail(), tail()) == ("one\n", "")
    log.write_text("one\ntwo\n")
    assert watch.Tail(log, from_end=True)() == ""
    assert scripted(*[Job("RUNNING")] * 5, Job("COMPLETED", 0), tails=[tail, watch.Tail(tmp_path / "err")]) == 0
    assert capsys.readouterr().out == "two\n"


def test_wait_true_ends_with_the_job_s_status(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch.wait, "__defaults__", (scheduler.ask, 0.01))
    log = slurm.place / "x/cluster/4711_0_log.err"
    slurm.put("sbatch", f"echo 'error: no such data' > {log}; echo Submitted batch job 4711")
    slurm.scontrol(shown("FAILED", code="2:0", reason="NonZeroExitCode"))
    done = slurm("run_dir=x", "wait=true")
    assert done.code == 2 and done.out.startswith("submitted job 4711\n") and done.out.count("error: no such data\n") == 1
    assert done.err == "[job 4711: FAILED n[1-2]]\n"


# --- status -------------------------------------------------------------------------------------------------------------------


def test_a_running_job_s_row(slurm: Programs) -> None:
    run = make_run(Path("runs/x"))
    for n, reason in enumerate(("preempted", "signalled", "time limit", "worker lost"), 1):
        make_end(run, n, reason, start=n - 1)
    make_end(run, 5, "preempted", job="4000")  # another job's
    record.write(run / "progress/0005.json", {"step": 9, "left_s": 1.0, "valid_accuracy": 0.1, "time": time.time()})
    told = {"step": 40, "left_s": 7230.0, "valid_accuracy": 0.625, "time": time.time() - 20}
    record.write(run / "progress/0006.json", told)
    slurm.scontrol(shown("RUNNING", restarts="4"))
    (row,) = json.loads(watch_status(slurm, "run=runs/x", "json=true").out)
    assert 7200 < row.pop("left_s") <= 7210
    assert row == {
        "run": "runs/x", "job": "4711", "state": "running", "step": 40, "steps": 400, "accuracy": 0.625, "preemptions": 2,
        "timeouts": 1, "restarts": 1, "nodes": "n[1-2]",
    }  # fmt: skip
    lines = watch_status(slurm, "run=all").out.splitlines()
    assert " ".join(lines[0].split()) == "run job state step left accuracy % preempted time limits restarts nodes"
    assert lines[2].split() == ["runs/x", "4711", "running", "40/400", "2h00m", "62.50", "2", "1", "1", "n[1-2]"]


@pytest.mark.parametrize(
    ("line", "state"),
    [
        (shown("PENDING", nodes="(null)"), "queued"),
        (shown("PENDING", nodes="(null)", restarts="1"), "requeued"),
        (shown("CONFIGURING"), "starting"),
        (shown("COMPLETING"), "ending"),
        (shown("CANCELLED"), "cancelled"),
        (shown("FAILED"), "failed before it began: can every node see the run folder?"),
        (None, "unknown: the scheduler does not answer"),
        ("", "not started"),
    ],
)
def test_states_of_a_run(line: str | None, state: str, slurm: Programs) -> None:
    make_run(Path("runs/x"))
    if line is None:
        (slurm.bin / "scontrol").unlink()
    elif line:
        slurm.scontrol(line)
    (row,) = json.loads(watch_status(slurm, "run=all", "json=true").out)
    assert (row["state"], row["nodes"], row["left_s"]) == (state, "", None)


def test_the_last_end_is_the_state_of_a_job_that_is_over(slurm: Programs) -> None:
    run = make_run(Path("runs/x"))
    make_end(run, 1, "preempted")
    make_end(run, 2, "time limit")
    assert json.loads(watch_status(slurm, "run=runs/x", "json=true").out)[0]["state"] == "time limit"
    record.write(run / "summary.json", {"steps": 400, "finished": True, "test": {"mean": 0.5, "sd": 0.1}})
    (row,) = json.loads(watch_status(slurm, "run=runs/x", "json=true").out)
    assert (row["state"], row["step"], row["accuracy"]) == ("finished", 400, 0.5)


def test_status_of_a_sweep(slurm: Programs) -> None:
    assert slurm("-m", "seed=1,2").code == 0
    place = next((slurm.place / "runs").glob("sweep-*"))
    slurm.scontrol(shown("PENDING", nodes="(null)"))
    done = watch_status(slurm, f"run={place}")
    rows = [line.split() for line in done.out.split("\n\n")[0].splitlines()[2:]]
    assert [row[1:3] for row in rows] == [["4711_0", "queued"], ["4711_1", "queued"]]
    table = done.out.split("\n\n")[1].splitlines()
    assert table[0].split()[:2] == ["run", "seed"] and [line.split()[1] for line in table[2:]] == ["1", "2"]
    assert all(line.endswith("not yet") for line in table[2:])


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"jobs": [{"words": 1}]}', '{"jobs": 3}'])
def test_status_of_a_broken_sweep(broken: str, slurm: Programs) -> None:
    Path("s").mkdir()
    Path("s/sweep.json").write_text(broken)
    done = watch_status(slurm, "run=s")
    assert (done.code, done.out) == (2, "") and done.err.startswith("error: s/sweep.json is broken; name the run folders")


@pytest.mark.parametrize("words", [["ran=all"], [], ["run=all", "json=yes"], ["run=nowhere"], ["all"]])
def test_status_of_a_wrong_word(words: list[str], slurm: Programs) -> None:
    done = watch_status(slurm, *words)
    assert (done.code, done.out) == (2, "") and done.err.startswith("error:") and done.err.count("\n") == 1


def test_status_of_no_runs(slurm: Programs) -> None:
    done = watch_status(slurm, "run=all")
    assert (done.code, done.out) == (0, f"no runs yet under {slurm.place / 'runs'}\n")
    done = watch_status(slurm, "run=all", "json=true")
    assert (done.code, done.out) == (0, "[]\n")


def test_an_earlier_job_s_end_is_not_the_queued_one_s(slurm: Programs) -> None:
    run = make_run(Path("runs/x"))
    make_end(run, 1, "failed", 1, job="4000")
    slurm.put("scontrol", UNKNOWN_JOB)
    (row,) = json.loads(watch_status(slurm, f"run={run}", "json=true").out)
    assert (row["state"], row["restarts"]) == ("not started", 0)
    make_end(run, 2, "worker lost", 1)
    (row,) = json.loads(watch_status(slurm, f"run={run}", "json=true").out)
    assert (row["state"], row["restarts"]) == ("worker lost", 1)
