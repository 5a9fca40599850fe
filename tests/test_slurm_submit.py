"""What launch/slurm.py prints, submits and refuses, to the letter. No SLURM: small programs on PATH stand for it."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_programs import ROOT, SLURM, Programs, shown

from metadist.errors import UserError
from metadist.run.cluster import record
from metadist.run.cluster.mounts import mount_of, refuse_local
from metadist.run.command import main as local_main

# --- the batch file -----------------------------------------------------------------------------------------------------------

EVERY_KEY = [
    "nodes=2", "tasks_per_node=2", "gpus_per_node=2", "cpus_per_task=3", "mem_gb=1.5", "timeout_min=77", "partition=high",
    "qos=low", "account=me", "constraint=fast", "exclude=n3", "signal_delay_s=44", "setup=['module load cuda','export A=1']",
    "additional_parameters={mail-type: END}", "additional_parameters.nice=100", "run_dir=x",
]  # fmt: skip
GOLDEN = """\
#!/bin/bash

# Parameters
#SBATCH --account=me
#SBATCH --chdir=@cwd@
#SBATCH --constraint=fast
#SBATCH --cpus-per-task=3
#SBATCH --error=@cwd@/x/cluster/%j_0_log.err
#SBATCH --exclude=n3
#SBATCH --gpus-per-node=2
#SBATCH --job-name=metadist-x
#SBATCH --mail-type=END
#SBATCH --mem=1536MB
#SBATCH --nice=100
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=@cwd@/x/cluster/%j_0_log.out
#SBATCH --partition=high
#SBATCH --qos=low
#SBATCH --requeue
#SBATCH --signal=USR2@44
#SBATCH --time=77
#SBATCH --wckey=submitit

# setup
export PYTHONPATH=@root@
module load cuda
export A=1
blind=$(srun --nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 bash -c \
'test -d "$0" || echo "$SLURMD_NODENAME"' @cwd@/x/cluster)
if [ -n "$blind" ]; then echo "error: "$blind" can not see run_dir="@cwd@/x"; give one on a file system that all nodes share" \
>&2; exit 1; fi

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output @cwd@/x/cluster/%j_%t_log.out --error @cwd@/x/cluster/%j_%t_log.err --kill-on-bad-exit=1 \
--cpus-per-task=3 @python@ -u -m metadist.run.cluster.rank @cwd@/x


# teardown
@python@ -m metadist.run.cluster.after $? @cwd@/x
exit $?"""


def test_the_batch_file_of_every_key_to_the_letter(slurm: Programs) -> None:
    printed = slurm(*EVERY_KEY, "cluster=print")
    golden = GOLDEN
    for name, value in {"cwd": slurm.place, "root": ROOT, "python": sys.executable}.items():
        golden = golden.replace(f"@{name}@", str(value))
    assert (printed.code, printed.err) == (0, "")
    assert printed.out == golden
    assert not (slurm.place / "x").exists() and not (slurm.place / "runs").exists() and slurm.asked == []
    assert slurm(*EVERY_KEY).code == 0
    assert slurm.received == golden.encode() == (slurm.place / "x/cluster/batch.sh").read_bytes()
    assert stat.S_IMODE((slurm.place / "x/cluster").stat().st_mode) == 0o700
    # no pickle, no draft; one more copy is submitit's own
    assert sorted(p.name for p in (slurm.place / "x/cluster").iterdir()) == ["4711_submission.sh", "batch.sh", "job.json"]
    assert (slurm.place / "x/cluster/4711_submission.sh").read_bytes() == slurm.received
    assert not list(slurm.place.rglob("*.pkl"))
    assert [line for line in slurm.asked if line.startswith("sbatch")] != []


def test_keys_left_out_leave_no_line(slurm: Programs) -> None:
    text = slurm("cluster=print", "run_dir=x").out
    flags = {line.split()[1].partition("=")[0] for line in text.splitlines() if line.startswith("#SBATCH")}
    assert flags == {
        "--chdir", "--cpus-per-task", "--error", "--job-name", "--nodes", "--ntasks-per-node", "--open-mode", "--output",
        "--requeue", "--signal", "--time", "--wckey",
    }  # fmt: skip
    assert "#SBATCH --signal=USR2@90\n" in text and "#SBATCH --time=60\n" in text
    # a worker a GPU unless it is said
    assert "--ntasks-per-node=2\n" in slurm("cluster=print", "run_dir=x", "gpus_per_node=2").out
    assert "--ntasks-per-node=1\n" in slurm("cluster=print", "run_dir=x", "gpus_per_node=2", "tasks_per_node=1").out


def test_an_array_is_printed_as_it_is_submitted(slurm: Programs) -> None:
    words = ["-m", "seed=1,2,3", "nodes=2", "array_parallelism=2"]
    printed = slurm(*words, "cluster=print")
    assert printed.code == 0 and slurm.asked == [] and not (slurm.place / "runs").exists()
    assert "#SBATCH --array=0-2%2\n" in printed.out and "/cluster/%A_%a_%t_log.out" in printed.out
    sent = slurm(*words)
    assert sent.code == 0 and slurm.received == printed.out.encode()
    place = next((slurm.place / "runs").glob("sweep-*"))
    assert (place / "cluster/batch.sh").read_bytes() == slurm.received
    runs = [Path(r) for r in json.loads((place / "sweep.json").read_text())["runs"]]
    for i, run in enumerate(runs):
        assert json.loads((run / "cluster/job.json").read_text())["job"] == f"4711_{i}"
        config = json.loads((run / "config.json").read_text())
        assert (config["seed"], config["workers"]) == (i + 1, 2)
        assert record.folder_of(place, {"SLURM_ARRAY_TASK_ID": str(i)}) == run
    assert {stat.S_IMODE((p / "cluster").stat().st_mode) for p in (place, *runs)} == {0o700}
    assert not list(slurm.place.rglob("*.pkl"))
    assert f"run={place}; at the end also {place}/table.txt" in sent.out
    assert "resume         python launch/slurm.py -m seed=1,2,3 nodes=2 array_parallelism=2 check_mount=false\n" in sent.out


def test_the_program_itself_prints_the_same_bytes(slurm: Programs) -> None:
    assert slurm("nodes=2", "run_dir=x").code == 0
    done = subprocess.run(
        [sys.executable, str(SLURM), "nodes=2", "run_dir=x", "check_mount=false", "cluster=print"],
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == slurm.received
    broken = subprocess.run([sys.executable, str(SLURM), "nods=2"], capture_output=True, text=True, timeout=60)
    assert (broken.returncode, broken.stdout) == (2, "")
    assert broken.stderr == "error: nods=2: there is no key 'nods'; nearest: cluster.nodes\n"


def test_a_batch_file_is_one_that_bash_reads(slurm: Programs) -> None:
    words = ["run_dir='my runs/x'", "setup=['echo \"a b\"']"]
    text = slurm(*words, "cluster=print").out
    assert subprocess.run(["/bin/bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    assert shlex.split(text.split("# teardown\n")[1].splitlines()[0])[-1] == str(slurm.place / "my runs/x")
    # a node that is blind: the script ends before a worker starts, and names it
    slurm.put("srun", "echo n7")
    assert slurm(*words).code == 0
    done = subprocess.run(["/bin/bash", str(slurm.place / "received")], text=True, capture_output=True, timeout=60)
    assert done.returncode == 1
    where = slurm.place / "my runs/x"
    assert done.stderr == f"error: n7 can not see run_dir={where}; give one on a file system that all nodes share\n"
    assert not any("metadist.run.cluster.rank" in line for line in slurm.asked)


def test_the_sheet_and_the_record(slurm: Programs) -> None:
    place = slurm.place / "x"
    sent = slurm("nodes=2", "run_dir=x", "setup=[echo]")
    assert sent.out == (
        "submitted job 4711\n"
        f"  run folder     {place}\n"
        f"  logs           {place}/cluster/4711_<rank>_log.out and .err\n"
        f"  status         python launch/status.py run={place}\n"
        f"  monitor        tensorboard --logdir {place}\n"
        f"  resume         python launch/slurm.py nodes=2 'setup=[echo]' check_mount=false run_dir={place}\n"
        "  cancel         scancel 4711\n"
    )
    known = json.loads((place / "cluster/job.json").read_text())
    assert (known["job"], known["cluster"]) == ("4711", "slurm")
    assert known["words"] == ["nodes=2", "run_dir=x", "setup=[echo]", "check_mount=false"]
    assert abs(known["time"] - time.time()) < 60
    config = json.loads((place / "config.json").read_text())
    assert (config["workers"], config["cluster"]["nodes"], config["run_dir"]) == (2, 2, str(place))


# --- what is refused ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "partition=mian": "partition=mian is unknown; did you mean main? (allowed: high, main)",
    "partition='main,hihg'": "partition=hihg is unknown; did you mean high? (allowed: high, main)",
    "nodes=9": "workers=9 is more than tasks=4: a worker without a task has no work; give workers 1 to 4, or more tasks",
    "workers=3 nodes=2": "workers=3 contradicts nodes=2 x tasks_per_node=1 = 2; leave workers out",
    "nods=2": "nods=2: there is no key 'nods'; nearest: cluster.nodes",
    "nodes=two": "cluster.nodes=two is not a whole number",
    "nodes=0": "cluster.nodes=0 is out of range; allowed: at least 1",
    "tasks_per_node=-1": "cluster.tasks_per_node=-1 is out of range; allowed: at least 0",
    "timeout_min=0": "cluster.timeout_min=0 is out of range; allowed: at least 1",
    "timeout_min=2 signal_delay_s=120": "signal_delay_s=120 is not below timeout_min=2 (120 s); "
    "give less of the one or more of the other",
    "device=cuda": "device=cuda, engine.precision=tf32|bf16 and exchange.backend=nccl need GPUs: give gpus_per_node=N",
    "method=lower_bound": "method=lower_bound takes a second on one core; use python launch/local.py method=lower_bound",
    "engine.dtype=float64 engine.precision=tf32 gpus_per_node=1": "engine.precision=tf32 is for engine.dtype=float32; "
    "float64 is exact, use fp32",
    "-m nodes=1,2 cluster=local": "nodes can't be swept: all runs of an array get the same machines",
    "run_dir=50%": "run_dir=@cwd@/50% has a %, which sbatch would replace in the names of the logs; give one without",
    "-m nodes=1,2 seed=1,2": "nodes can't be swept: all runs of an array get the same machines; "
    "submit a command for each value",
    "seed=1,2": "seed=1,2 lists several values: put -m in front to run each of them",
    "cluster=slrum": "cluster=slrum is unknown",
    "--dry": "flag=--dry is unknown",
    "net=convnet net.depth=5": "net.name=convnet can't take 8x8 images",
    "-m net=convnet net.depth=3,5": "net.name=convnet can't take 8x8 images",
    "inner.steps=7": "inner.steps=7 does not divide",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_one_line_and_submits_nothing(words: str, slurm: Programs) -> None:
    done = slurm(*words.split())
    assert (done.code, done.out) == (2, "")
    assert (
        done.err.startswith(f"error: {REFUSED[words].replace('@cwd@', str(slurm.place))}")
        and done.err.endswith("\n")
        and done.err.count("\n") == 1
    )
    assert not any(line.startswith("sbatch") for line in slurm.asked) and slurm.received is None
    assert not (slurm.place / "runs").exists()


def test_a_time_limit_just_above_the_warning_is_taken(slurm: Programs) -> None:
    assert slurm("timeout_min=2", "signal_delay_s=119", "cluster=print").code == 0


def test_without_sbatch(slurm: Programs) -> None:
    (slurm.bin / "sbatch").unlink()
    done = slurm("run_dir=x")
    assert (done.code, done.err.count("\n")) == (2, 1) and not (slurm.place / "x").exists()
    assert done.err.startswith("error: cluster=slurm, but there is no sbatch on PATH: run this on a login node of the cluster")
    assert slurm("run_dir=x", "cluster=print").code == 0  # to print needs none of it


def test_a_silent_sinfo_refuses_no_partition(slurm: Programs) -> None:
    slurm.put("sinfo", "exit 1")
    assert slurm("run_dir=x", "partition=mian").code == 0


def test_sbatch_s_reason_is_passed_on(slurm: Programs) -> None:
    slurm.put("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1")
    done = slurm("run_dir=x")
    assert done.code == 2 and done.out == ""
    assert done.err == "error: SLURM refused the job and nothing was submitted: Batch job submission failed: Invalid account\n"
    assert sorted(p.name for p in (slurm.place / "x/cluster").iterdir()) == ["batch.sh"]


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "COMPLETING", "REQUEUED"])
def test_a_folder_that_a_job_works_on(state: str, slurm: Programs) -> None:
    assert slurm("run_dir=x").code == 0
    (slurm.place / "received").unlink()
    slurm.scontrol(shown(state))
    done, place = slurm("run_dir=x"), slurm.place / "x"
    assert done.code == 2 and slurm.received is None
    assert done.err == (
        f"error: run_dir={place} belongs to job 4711 ({state}); watch it with python launch/status.py run={place}, "
        "or scancel 4711 first\n"
    )


@pytest.mark.parametrize("state", ["FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"])
def test_a_folder_whose_job_has_ended_is_submitted_again(state: str, slurm: Programs) -> None:
    assert slurm("run_dir=x").code == 0
    slurm.put("sbatch", f'/bin/cp "$1" {slurm.place}/received; echo Submitted batch job 4712')
    slurm.scontrol(shown(state))
    assert slurm("run_dir=x").code == 0
    assert json.loads((slurm.place / "x/cluster/job.json").read_text())["job"] == "4712"


def test_a_sweep_with_a_run_at_work_is_refused(slurm: Programs) -> None:
    assert slurm("-m", "seed=1,2").code == 0
    (slurm.place / "received").unlink()
    slurm.scontrol(shown("RUNNING"))
    done = slurm("-m", "seed=1,2")
    assert done.code == 2 and "belongs to job 4711_0 (RUNNING)" in done.err and slurm.received is None
    assert "scontrol show job -o 4711_0" in slurm.asked


def test_a_finished_run_is_shown_and_not_submitted(slurm: Programs) -> None:
    assert slurm("run_dir=x", "steps=3").code == 0
    (slurm.place / "received").unlink()
    (slurm.place / "x/summary.json").write_text(json.dumps({"steps": 3, "finished": True, "text": "test accuracy 42"}))
    done = slurm("run_dir=x", "steps=3")
    assert (done.code, done.out) == (0, "test accuracy 42\n") and slurm.received is None


def test_a_finished_sweep_is_shown_and_not_submitted(slurm: Programs) -> None:
    assert slurm("-m", "seed=1,2", "steps=3").code == 0
    (slurm.place / "received").unlink()
    place = next((slurm.place / "runs").glob("sweep-*"))
    first, second = json.loads((place / "sweep.json").read_text())["runs"]
    done = json.dumps({"steps": 3, "finished": True, "text": "", "test": {"mean": 0.5, "sd": 0.1}})
    Path(first, "summary.json").write_text(done)
    assert slurm("-m", "seed=1,2", "steps=3").out.startswith("submitted job") and slurm.received is not None
    (slurm.place / "received").unlink()
    Path(second, "summary.json").write_text(done)
    shown = slurm("-m", "seed=1,2", "steps=3")
    assert shown.code == 0 and slurm.received is None
    assert [line.split()[-1] for line in shown.out.splitlines()[2:]] == ["finished", "finished"]
    assert shown.out.count("50.00 +- 10.00") == 2


def test_the_words_that_resume_are_read_as_they_were_given(slurm: Programs) -> None:
    sent = slurm("run_dir='my runs/it''s, {x}'".replace("''", "\\'"), "setup=[echo a]")
    assert sent.code == 0, sent.err
    place = slurm.place / "my runs/it's, {x}"
    resume = next(line for line in sent.out.splitlines() if line.startswith("  resume")).split(maxsplit=1)[1]
    words = shlex.split(resume)[2:]
    (slurm.place / "received").unlink()
    assert slurm(*words, mount=True).code == 0
    assert [p.parent for p in slurm.place.glob("**/config.json")] == [place]


@pytest.mark.parametrize(
    ("given", "requeue", "others"),
    [
        ("{requeue: false}", "#SBATCH --no-requeue\n", ""),
        ("{requeue: null}", "#SBATCH --no-requeue\n", ""),
        ("{exclusive: true, nice: null, hold: false}", "#SBATCH --requeue\n", "#SBATCH --exclusive\n"),
    ],
)
def test_words_without_a_value(given: str, requeue: str, others: str, slurm: Programs) -> None:
    printed = slurm(f"additional_parameters={given}", "cluster=print")
    assert printed.code == 0, printed.err
    assert requeue in printed.out and others in printed.out
    assert printed.out.count("requeue") == 1 and not any(w in printed.out for w in ("hold", "nice", "False", "None"))


def test_a_run_dir_of_this_machine(slurm: Programs) -> None:
    done = slurm("run_dir=/tmp/metadist-never-made", mount=True)
    assert (done.code, slurm.received) == (2, None) and not Path("/tmp/metadist-never-made").exists()
    assert done.err == (
        "error: run_dir=/tmp/metadist-never-made can't be seen by the nodes (/tmp is each machine's own); give a run_dir on a "
        "file system that they share, or check_mount=false if they do see it\n"
    )
    swept = slurm("-m", "seed=1,2", "run_dir=/tmp/metadist-never-made", mount=True)
    assert swept.code == 2 and swept.err.count("\n") == 1 and slurm.received is None


def test_data_that_only_the_nodes_have(slurm: Programs) -> None:
    done = slurm("run_dir=x", "data=mnist", f"data.root={slurm.place}", "data.download=false")
    assert done.code == 0 and done.err.startswith("note: data=mnist can't be read here, the nodes must have it (")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("cluster.nodes=2", "cluster.nodes is not read by this run: it belongs to launch/slurm.py"),
        ("nodes=2", "nodes=2: there is no key 'nodes'; nearest: cluster.nodes"),
    ],
)
def test_the_local_launcher_does_not_read_them(word: str, text: str, slurm: Programs) -> None:
    done = slurm(word, program=local_main, mount=True)
    assert done.code == 2 and done.err.startswith(f"error: {text}") and done.err.count("\n") == 1
    assert not (slurm.place / "runs").exists()


# --- mounts -------------------------------------------------------------------------------------------------------------------

MOUNTS = r"""/dev/sda1 / ext4 rw,relatime 0 0
tmpfs /run tmpfs rw 0 0
tmpfs /scratch/ram tmpfs rw,size=1k 0 0
server:/export /tmp/shared nfs4 rw,vers=4.2 0 0
server:/two /mnt/my\040data nfs rw 0 0
/dev/sdb1 /home ext4 rw 0 0
lustre@tcp:/fs /home/project lustre rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "place", "kind"),
    [
        ("/data/x", "/", "ext4"),
        ("/home/me/x", "/home", "ext4"),
        ("/home/project", "/home/project", "lustre"),
        ("/home/project/x", "/home/project", "lustre"),
        ("/home/projects/x", "/home", "ext4"),
        ("/mnt/my data/x", "/mnt/my data", "nfs"),
        ("/mnt/my/x", "/", "ext4"),
        ("/scratch/ram/a/b", "/scratch/ram", "tmpfs"),
    ],
)
def test_the_mount_of_a_path(path: str, place: str, kind: str) -> None:
    assert mount_of(Path(path), MOUNTS) == (place, kind)


@pytest.mark.parametrize("path", ["/home/me/x", "/home/project/x", "/mnt/my data/x", "/tmp/shared/x", "/data/x", "/tmpdata/x"])
def test_what_nodes_may_see_is_accepted(path: str) -> None:
    refuse_local(Path(path), MOUNTS)
    refuse_local(Path(path), MOUNTS + "server:/all / nfs4 rw 0 0\n")  # a diskless machine: the later mount covers


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/scratch/ram/x", "/scratch/ram is a tmpfs of this machine"),
        ("/tmp/x", "/tmp is each machine's own"),
        ("/tmp", "/tmp is each machine's own"),
        ("/var/tmp/x", "/var/tmp is each machine's own"),
        ("/dev/shm/x", "/dev/shm is each machine's own"),
        ("/run/x", "/run is each machine's own"),
    ],
)
def test_what_only_this_machine_sees_is_refused(path: str, why: str) -> None:
    if os.path.realpath(path) != path:
        pytest.skip(f"{path} is a link here")
    with pytest.raises(UserError) as caught:
        refuse_local(Path(path), MOUNTS)
    assert f"run_dir={path} can't be seen by the nodes ({why})" in str(caught.value)


# --- a server and its workers -------------------------------------------------------------------------------------------------

SERVED = ["exchange=server", "nodes=3", "tasks_per_node=2", "gpus_per_node=2", "cpus_per_task=4", "partition=main", "run_dir=x"]


def array_of_two(slurm: Programs) -> None:
    """sbatch gives one number after another and keeps what it received under it."""
    count = "n=$(/bin/cat n 2>/dev/null || echo 4710); n=$((n + 1)); echo $n > n"
    slurm.put("sbatch", f'{count}; /bin/cp "$1" {slurm.place}/received-$n; echo Submitted batch job $n')


def test_a_server_is_a_job_and_its_workers_an_array(slurm: Programs) -> None:
    array_of_two(slurm)
    words = [*SERVED, "server_partition=high", "server_cpus=3", "server_mem_gb=2", "server_timeout_min=600"]
    printed = slurm(*words, "cluster=print").out
    sent = slurm(*words)
    assert sent.code == 0, sent.err
    server, workers = ((slurm.place / f"received-{n}").read_text() for n in (4711, 4712))
    assert printed == f"# the server\n{server}\n# its workers\n{workers}"
    for line in ("nodes=1", "ntasks-per-node=1", "cpus-per-task=3", "partition=high", "mem=2048MB", "time=600"):
        assert f"#SBATCH --{line}\n" in server
    assert "gpus" not in server and "array" not in server and "-m metadist.run.cluster.rank " in server
    for line in (
        "array=0-2%3",
        "nodes=1",
        "ntasks-per-node=2",
        "cpus-per-task=4",
        "gpus-per-node=2",
        "partition=main",
        "time=60",
    ):
        assert f"#SBATCH --{line}\n" in workers
    place = slurm.place / "x"
    assert f"-m metadist.run.cluster.member {place} 1\n" in workers
    assert f"-m metadist.run.cluster.after_member $? {place}\n" in workers
    assert sent.out.startswith("submitted job 4711, the server, and its workers, array 4712\n")
    assert "scancel 4711 4712\n" in sent.out and f"join=true run_dir={place} workers=2\n" in sent.out
    known = json.loads((place / "cluster/job.json").read_text())
    assert (known["job"], known["workers"], known["last"]) == ("4711", ["4712"], 6)
    assert json.loads((place / "config.json").read_text())["workers"] == 6
    assert (place / "cluster/batch.sh").read_text() == server and (place / "cluster/workers-1.sh").read_text() == workers


def test_a_server_without_workers_is_taken_back(slurm: Programs) -> None:
    slurm.put(
        "sbatch", "/bin/grep -q array $1 && { echo 'sbatch: error: no such array' >&2; exit 1; }; echo Submitted batch job 4711"
    )
    slurm.put("scancel", "exit 0")
    done = slurm(*SERVED)
    assert done.code == 2 and "no such array" in done.err and "scancel 4711" in slurm.asked


def test_workers_that_are_there_still_are_not_submitted_again(slurm: Programs) -> None:
    array_of_two(slurm)
    assert slurm(*SERVED).code == 0
    gone, there = shown("CANCELLED"), shown("RUNNING")
    slurm.put("scontrol", f"case $4 in 4711) echo '{gone}';; 4712) echo '{there}'; echo '{gone}';; esac")
    again = slurm(*SERVED)
    assert again.code == 0 and again.out.startswith("submitted job 4713, the server, and its workers, array 4712\n")
    slurm.put("scontrol", f"echo '{gone}'")
    assert slurm(*SERVED).out.startswith("submitted job 4714, the server, and its workers, array 4715\n")


def test_more_workers_join(slurm: Programs) -> None:
    array_of_two(slurm)
    assert slurm(*SERVED).code == 0
    asked = ["join=true", "run_dir=x", "workers=4", "partition=high", "additional_parameters={nice: 7}"]
    printed = slurm(*asked, "cluster=print").out
    joined = slurm(*asked)
    assert joined.code == 0, joined.err
    assert joined.out.startswith(f"submitted array 4713: 4 more workers for {slurm.place}/x\n")
    text = (slurm.place / "received-4713").read_text()
    assert text == printed == (slurm.place / "x/cluster/workers-2.sh").read_text()
    for line in (
        "array=0-1%2",
        "nodes=1",
        "ntasks-per-node=2",
        "cpus-per-task=4",
        "gpus-per-node=2",
        "partition=high",
        "nice=7",
    ):
        assert f"#SBATCH --{line}\n" in text
    assert f"-m metadist.run.cluster.member {slurm.place}/x 7\n" in text
    known = json.loads((slurm.place / "x/cluster/job.json").read_text())
    assert (known["job"], known["workers"], known["last"]) == ("4711", ["4712", "4713"], 10)
    assert "-m metadist.run.cluster.member" in slurm("join=true", "run_dir=x", "nodes=1", "cluster=print").out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("join=true workers=2", "join=true needs run_dir="),
        ("join=true run_dir=y workers=2", "is no run folder"),
        ("join=true run_dir=x workers=3", "workers=3 is no multiple of tasks_per_node=2; give 2, 4, ..."),
        ("join=true run_dir=x workers=two", "workers=two is no multiple"),
        ("join=true run_dir=x workers=2 nodes=2", "workers=2 contradicts nodes=2 x tasks_per_node=2; leave one of them out"),
        ("join=true run_dir=x workers=2 seed=3", "seed can't be given with join=true"),
        ("join=true run_dir=x workers=2 partition=mian", "partition=mian is unknown; did you mean main?"),
        ("join=true run_dir=x workers=2 cpus_per_task=0", "cluster.cpus_per_task=0 is out of range"),
        ("join=true run_dir=x cluster=slrum", "cluster=slrum is unknown"),
        ("exchange=server -m seed=1,2", "submit a command for each"),
        ("server_cpus=2", "cluster.server_cpus is not read by this run: it belongs to exchange=server"),
    ],
)
def test_mistakes_with_a_server(words: str, text: str, slurm: Programs) -> None:
    assert slurm(*SERVED).code == 0
    before = (slurm.place / "received").read_bytes()
    done = slurm(*words.split(), mount="join" in words)
    assert (done.code, done.out) == (2, "") and text in done.err and done.err.count("\n") == 1, done.err
    assert (slurm.place / "received").read_bytes() == before


def test_only_a_server_that_is_not_finished_takes_workers(slurm: Programs) -> None:
    assert slurm("run_dir=plain").code == 0 and slurm(*SERVED).code == 0
    assert "only a server takes workers" in slurm("join=true", "run_dir=plain", "workers=1", mount=True).err
    (slurm.place / "x/summary.json").write_text(json.dumps({"steps": 400, "finished": True, "text": ""}))
    assert "is finished; there is nothing to join" in slurm("join=true", "run_dir=x", "workers=2", mount=True).err
