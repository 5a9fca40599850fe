"""The SLURM launcher without SLURM: programs of a few lines on PATH stand for the scheduler. tests/slurm has the real one."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metadist.errors import UserError
from metadist.run.cluster import after, record, scheduler, watch
from metadist.run.cluster.command import main
from metadist.run.cluster.mounts import mount_of, refuse_local
from metadist.run.cluster.network import interfaces, own_address
from metadist.run.cluster.scheduler import Job, parse

ROOT = Path(__file__).resolve().parents[1]
NO_MOUNT = "check_mount=false"
SHOWN = (
    "JobId=4711 JobName=metadist-x UserId=me(1) Priority=1 JobState={state} Reason=None Dependency=(null) Requeue=1 Restarts=1 "
    "BatchFlag=1 ExitCode=2:0 RunTime=00:00:03 StartTime=2026-11-21T03:00:00 EndTime=2026-11-21T04:00:00 PreemptTime={preempt} "
    "Partition=main NodeList=n[1-4] BatchHost=n1 NumNodes=4 Command=/a b/c.sh WorkDir=/w"
)


class Fakes:
    """Programs on PATH: what sbatch received, what scontrol was asked."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin, self.place = place / "bin", place
        self.bin.mkdir()
        # Nothing else of SLURM may be found, whatever is installed here.
        tools = [Path(f"/bin/{name}") for name in ("sh", "cp", "echo", "cat", "git")]
        for tool in tools:
            (self.bin / tool.name).symlink_to(os.path.realpath(tool if tool.exists() else f"/usr{tool}"))
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.chdir(place)

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    @property
    def received(self) -> str | None:
        path = self.place / "received.sh"
        return path.read_text() if path.exists() else None


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes(tmp_path, monkeypatch)
    made.program("sbatch", f'cp "$1" {tmp_path}/received.sh; echo Submitted batch job 4711')
    made.program("sinfo", "echo main; echo high; echo main")
    made.program(
        "scontrol", f"echo \"$@\" >> {tmp_path}/asked; echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    )
    return made


RESOURCES = {
    "nodes=2": "--nodes=2", "tasks_per_node=2": "--ntasks-per-node=2", "gpus_per_node=2": "--gpus-per-node=2",
    "cpus_per_task=3": "--cpus-per-task=3", "mem_gb=1.5": "--mem=1536MB", "timeout_min=77": "--time=77",
    "partition=high": "--partition=high",
    "qos=low": "--qos=low", "account=me": "--account=me", "constraint=fast": "--constraint=fast", "exclude=n3": "--exclude=n3",
    "signal_delay_s=44": "--signal=USR2@44", "additional_parameters={mail-type: END}": "--mail-type=END",
    "additional_parameters.nice=100": "--nice=100",
}  # fmt: skip


def test_printed_is_what_sbatch_receives(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["method=dd_random_init", "run_dir=x", NO_MOUNT, *RESOURCES, "setup=['module load cuda']", "device=cpu"]
    assert main([*words, "cluster=print"]) == 0
    printed = capsys.readouterr().out
    assert fakes.received is None and not Path("x").exists()
    assert main(words) == 0
    assert fakes.received == printed == Path("x/cluster/batch.sh").read_text()
    lines = printed.splitlines()
    assert {f"#SBATCH {flag}" for flag in RESOURCES.values()} <= set(lines)
    assert {"#SBATCH --requeue", f"#SBATCH --chdir={Path.cwd()}", "module load cuda"} <= set(lines)
    assert lines.index("module load cuda") < lines.index("# command")
    srun = next(line for line in lines if "metadist.run.cluster.rank" in line)
    assert "--kill-on-bad-exit=1 --cpus-per-task=3" in srun and srun.endswith(f"metadist.run.cluster.rank {Path.cwd() / 'x'}")
    assert lines[-2:] == [f"{sys.executable} -m metadist.run.cluster.after $? {Path.cwd() / 'x'}", "exit $?"]
    assert stat.S_IMODE(Path("x/cluster").stat().st_mode) == 0o700
    assert not list(Path("x").rglob("*.pkl")) and not list(Path("x").rglob(".submission*"))


def test_the_sheet_says_how_to_go_on(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nodes=2", "run_dir=x", NO_MOUNT]) == 0
    sheet, place = capsys.readouterr().out, Path.cwd() / "x"
    for line in (
        "submitted job 4711", f"run folder     {place}", f"{place}/cluster/4711_<rank>_log.out",
        f"tensorboard --logdir {place}",
        f"python launch/slurm.py nodes=2 {NO_MOUNT} run_dir={place}", "scancel 4711", f"launch/status.py run={place}",
    ):  # fmt: skip
        assert line in sheet
    assert json.loads(Path("x/config.json").read_text())["workers"] == 2
    assert json.loads(Path("x/cluster/job.json").read_text())["job"] == "4711"


def test_a_sweep_is_one_array(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "seed=1,2,3", "nodes=2", "array_parallelism=2", NO_MOUNT]
    assert main([*words, "cluster=print"]) == 0
    printed = capsys.readouterr().out
    assert not Path("runs").exists()
    assert main(words) == 0
    assert fakes.received == printed and "#SBATCH --array=0-2%2" in printed
    place = next(Path("runs").glob("sweep-*"))
    runs = json.loads((place / "sweep.json").read_text())["runs"]
    assert [json.loads((Path(r) / "config.json").read_text())["seed"] for r in runs] == [1, 2, 3]
    assert record.folder_of(place, {"SLURM_ARRAY_TASK_ID": "2"}) == Path(runs[2])


BAD = {
    "nods=2": "there is no key 'nods'",
    "nodes=9": "workers=9 is more than tasks=4",
    "nodes=2 workers=3": "workers=3 contradicts nodes=2 x tasks_per_node=1 = 2",
    "timeout_min=0": "cluster.timeout_min=0 is out of range",
    "timeout_min=1 signal_delay_s=60": "signal_delay_s=60 is not below timeout_min=1",
    "device=cuda": "give gpus_per_node=N",
    "engine.precision=tf32": "give gpus_per_node=N",
    "exchange.backend=nccl gpus_per_node=1 tasks_per_node=2": "takes a GPU a worker",
    "method=lower_bound": "python launch/local.py method=lower_bound",
    "partition=mian": "partition=mian is unknown; did you mean main? (allowed: high, main)",
    "net=convnet net.depth=5": "net.name=convnet can't take 8x8 images",
    "inner.steps=7": "inner.steps=7 does not divide",
    "-m nodes=1,2": "nodes can't be swept",
    "-x": "flag=-x is unknown",
}


@pytest.mark.parametrize("words", BAD)
def test_a_mistake_submits_nothing(words: str, fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words.split(), NO_MOUNT]) == 2
    error = capsys.readouterr().err
    assert BAD[words] in error and error.startswith("error:") and error.count("\n") == 1
    assert fakes.received is None and not Path("runs").exists()


def test_without_sbatch(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    (fakes.bin / "sbatch").unlink()
    assert main([NO_MOUNT]) == 2
    assert "there is no sbatch on PATH: run this on a login node" in capsys.readouterr().err


def test_a_refusal_is_told_in_the_scheduler_s_words(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.program("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1")
    assert main([NO_MOUNT, "run_dir=x"]) == 2
    error = capsys.readouterr().err
    assert error == "error: SLURM refused the job and nothing was submitted: Batch job submission failed: Invalid account\n"
    assert not Path("x/cluster/job.json").exists() and not list(Path("x/cluster").glob(".submission*"))


def test_a_folder_that_a_job_works_on_is_left_alone(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([NO_MOUNT, "run_dir=x"]) == 0
    fakes.program("scontrol", f"echo '{SHOWN.format(state='RUNNING', preempt='None')}'")
    assert main([NO_MOUNT, "run_dir=x"]) == 2
    assert "belongs to job 4711 (RUNNING)" in capsys.readouterr().err


def test_the_other_launcher_does_not_take_these_keys() -> None:
    from metadist.run.compose import compose

    for word in ("cluster.nodes=2", "cluster=print", "exchange.interface=eth0"):
        with pytest.raises(UserError, match=r"belongs to launch/slurm\.py"):
            compose([word])


def test_mounts() -> None:
    mounts = "/dev/a / ext4 rw 0 0\ntmpfs /tmp/ram tmpfs rw 0 0\nsrv:/x /home nfs4 rw 0 0\nsrv:/y /tmp/my\\040nfs nfs4 rw 0 0\n"
    assert mount_of(Path("/tmp/my nfs/z"), mounts) == ("/tmp/my nfs", "nfs4")
    assert mount_of(Path("/homes/z"), mounts) == ("/", "ext4")
    for fine in ("/home/me/run", "/tmp/my nfs/run", "/data/run"):
        refuse_local(Path(fine), mounts)
    for wrong in ("/tmp/run", "/tmp/ram/run", "/var/tmp/run", "/dev/shm/run"):
        with pytest.raises(UserError, match="can't be seen by the nodes"):
            refuse_local(Path(wrong), mounts)


def test_the_local_mount_is_refused_before_anything_is_made(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run_dir=/dev/shm/metadist-test"]) == 2
    assert "check_mount=false if they do see it" in capsys.readouterr().err
    assert fakes.received is None and not Path("/dev/shm/metadist-test").exists()


def test_a_job_as_scontrol_shows_it() -> None:
    job = parse(SHOWN.format(state="RUNNING", preempt="2026-11-21T03:30:00"))
    assert (job.state, job.exit_status, job.nodes, job.preempted, job.restarts) == ("RUNNING", 2, "n[1-4]", True, 1)
    assert job.end is not None and time.localtime(job.end)[3:5] == (4, 0)
    assert scheduler._status("0:9") == 137 and scheduler._status("?") is None


def test_who_is_asked(fakes: Fakes) -> None:
    assert scheduler.ask("4711").state == scheduler.FORGOTTEN  # no sacct
    fakes.program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert scheduler.ask("4711").state == scheduler.FORGOTTEN
    fakes.program("sacct", "echo '4711|CANCELLED by 0|0:15|n1'; echo '47110|FAILED|1:0|n1'")
    assert scheduler.ask("4711") == Job("CANCELLED", 143, "n1")
    (fakes.bin / "scontrol").unlink()
    assert scheduler.ask("4711").state == scheduler.UNREACHABLE


def test_why_a_job_was_stopped() -> None:
    now = 1000.0
    soon, late = Job("RUNNING", end=now + 60), Job("RUNNING", end=now + 3000)
    cases = [
        ("SIGUSR2", soon, "time limit"), ("SIGUSR2", late, "signalled"), ("SIGTERM", late, "terminated"),
        ("SIGTERM", Job("COMPLETING"), "cancelled"), ("SIGTERM", Job("COMPLETING", restarts=1), "requeued"),
        # a short time limit does not make a time-out of a preemption
        ("SIGUSR2", Job("RUNNING", preempted=True, end=now + 5), "preempted"),
        ("SIGTERM", Job("RUNNING", preempted=True), "preempted"),
    ]  # fmt: skip
    for signal, job, reason in cases:
        assert record.why(signal, job, 0, 30, now=now) == reason
    assert record.why("SIGUSR2", Job(scheduler.UNREACHABLE), 0, 30, end=now + 40, now=now) == "time limit"


def test_what_becomes_of_it() -> None:
    limit, lost = {"reason": "time limit"}, {"reason": "worker lost"}
    assert record.verdict("time limit", [], 1, 0) == (True, "time limit: requeued (1 of at most 1 times)")
    assert record.verdict("time limit", [limit], 1, 0)[0] is False
    assert record.verdict("worker lost", [limit, lost], 0, 2)[0] and not record.verdict("worker lost", [lost, lost], 0, 2)[0]
    assert record.verdict("preempted", [{"reason": "preempted"}] * 100, 0, 0)[0]
    assert not any(record.verdict(reason, [], 9, 9)[0] for reason in ("cancelled", "terminated", "failed", "refused"))


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ([Job("PENDING"), Job("RUNNING"), Job("NODE_FAIL"), Job("PENDING"), Job("RUNNING"), Job("COMPLETED", 0)], 0),
        ([Job("NODE_FAIL", 0)], 1),
        ([Job("CANCELLED", 0)], 143),
        ([Job("FAILED", 2)], 2),
        ([Job(scheduler.UNREACHABLE), Job("COMPLETED", 0)], 0),
        ([Job(scheduler.FORGOTTEN)], 1),
    ],
)
def test_waiting(states: list[Job], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit takes a requeued job's NODE_FAIL for its end, and waits for ever where there are no accounts."""
    monkeypatch.setattr(watch, "SETTLED_S", 0.2)
    monkeypatch.setattr(watch, "LOST_SIGHT_S", 0.2)
    script = iter(states)

    def ask(job: str, last: list[Job] = []) -> Job:  # noqa: B006
        last[:] = [next(script, last[0] if last else states[-1])]
        return last[0]

    assert watch.wait("4711", tmp_path, [], ask, poll_s=0.01) == status


def test_waiting_shows_each_line_once_and_knows_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text("one\n")

    def ask(job: str) -> Job:
        log.write_text(log.read_text() + "two\n")
        return Job(scheduler.FORGOTTEN)

    (tmp_path / "summary.json").write_text('{"finished": true}')
    assert watch.wait("4711", tmp_path, [watch.Tail(log)], ask, poll_s=0.01) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    (tmp_path / "summary.json").unlink()
    assert watch.wait("4711", tmp_path, [], lambda job: Job("FAILED", 1), poll_s=0.01) == 1
    assert f"can every node see run_dir={tmp_path}?" in capsys.readouterr().err


@pytest.fixture
def job(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder of job 4711 at its second start, as the batch script sees it."""
    assert main([NO_MOUNT, "run_dir=x", "max_restarts=1"]) == 0
    for name, value in {"JOB_ID": "4711", "RESTART_COUNT": "1", "NTASKS": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(after, "_KILLED_SOON_S", 0.0)
    fakes.program("scontrol", f'echo "$@" >> {fakes.place}/asked')
    record.write(Path("x/cluster/meet-4711-1.json"), {"incarnation": 2, "store": None})
    return Path("x")


def finish(job: Path, status: int, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, bool]:
    """After srun has ended so: exit status, what was said, whether it was requeued."""
    capsys.readouterr()
    asked = job.parent / "asked"
    asked.unlink(missing_ok=True)
    code = after.main([str(status), str(job)])
    out = capsys.readouterr()
    return code, out.out + out.err, asked.exists() and "requeue 4711" in asked.read_text()


def ended(job: Path, reason: str, status: int = 140, start: int = 1, incarnation: int = 2) -> None:
    told = {"reason": reason, "status": status, "step": 7, "job": "4711", "start": start}
    record.write(record.end_path(job, incarnation), told)


def test_after_a_preemption_it_is_requeued_and_after_scancel_not(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(job, "preempted")
    assert finish(job, 140, capsys) == (140, "preempted: requeued from step 7\n", True)
    ended(job, "cancelled", 143)
    code, text, again = finish(job, 143, capsys)
    assert (code, again) == (143, False) and "resume with: sbatch x/cluster/batch.sh" in text


def test_after_a_kill_it_is_requeued_so_often(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(job, 137, capsys) == (1, "worker lost: requeued (1 of at most 1 times) from step 0\n", True)
    assert record.read(record.end_path(job, 2))["reason"] == "worker lost"
    ended(job, "worker lost", 1, start=0, incarnation=1)
    code, text, again = finish(job, 137, capsys)
    assert (code, again) == (1, False) and "it was 1 times already (max_restarts=1)" in text


def test_after_it_was_superseded_it_requeues_nothing(job: Path, fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    shown = SHOWN.format(state="RUNNING", preempt="None").replace("Restarts=1", "Restarts=2")
    fakes.program("scontrol", f"echo \"$@\" >> {fakes.place}/asked; echo '{shown}'")
    assert finish(job, 137, capsys) == (1, "worker lost; SLURM has started the job again already\n", False)


def test_after_a_mistake_it_ends(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record.write(job / "cluster/fault-4711-1-3.json", {"time": 1.0, "status": 2, "text": "error: no such data", "lost": False})
    record.write(job / "cluster/fault-4711-1-0.json", {"time": 0.5, "status": 1, "text": "error: lost another", "lost": True})
    record.write(
        job / "cluster/fault-4711-0-0.json", {"time": 0.1, "status": 1, "text": "error: of an earlier start", "lost": False}
    )
    assert finish(job, 75, capsys) == (2, "error: no such data\n", False)


def test_after_a_start_that_never_began(job: Path, fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    (job / "cluster/meet-4711-1.json").unlink()
    code, text, again = finish(job, 1, capsys)
    assert (code, again) == (1, False) and "every node must see run_dir=x" in text
    (job / "ends/0000-4711-1.json").unlink()
    shown = SHOWN.format(state="RUNNING", preempt="2026-11-21T03:30:00")
    fakes.program("scontrol", f"echo \"$@\" >> {fakes.place}/asked; echo '{shown}'")
    assert finish(job, 140, capsys)[1:] == ("preempted: requeued from step 0\n", True)  # while torch was being imported


def test_after_a_requeue_that_is_refused(
    job: Path, fakes: Fakes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.program("scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    monkeypatch.setattr(scheduler.time, "monotonic", iter(range(0, 10**9, 1000)).__next__)
    ended(job, "preempted")
    code, text, _ = finish(job, 140, capsys)
    assert code == 1 and "SLURM refused to requeue it (Requested operation is presently disabled); resume with: sbatch" in text


def test_interfaces() -> None:
    assert interfaces()["lo"] == "127.0.0.1" == own_address("lo") == own_address(None)
    with pytest.raises(UserError, match=r"exchange.interface=none0 is no network interface of .* allowed there: .*lo"):
        own_address("none0")


def test_the_same_command_on_this_machine(tmp_path: Path) -> None:
    def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch" / f"{program}.py"), *words]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)

    assert "no runs yet" in run("status", "run=all").stdout
    done = run("slurm", "nodes=2", "partition=gpu", "cluster=local", "smoke=true", "wait=true", "run_dir=runs/x")
    assert done.returncode == 0, done.stderr
    assert "cluster=local does not read partition=gpu" in done.stderr and "test accuracy" in done.stdout
    row = json.loads(run("status", "run=all", "json=true").stdout)[0]
    assert (row["state"], row["step"], row["steps"]) == ("finished", 3, 3)
    wrong = run("status", "ran=all")
    assert wrong.returncode == 2 and "ran=all is unknown; usage:" in wrong.stderr
