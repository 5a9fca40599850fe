"""The launcher on a real cluster: preempted, out of time, cancelled, cut off, and the result is the same to the last bit."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cluster import Cluster
from launcher import FOUR, ROOT, SMALL, Launcher, ends

from metadist.store import load_tensors


def last(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint: meta-parameters, optimizer, average, the best set so far."""
    newest = max((folder / "checkpoints").glob("step-*.safetensors"))
    return load_tensors(newest)[0]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, uninterrupted, by launch/local.py with four workers."""
    place = tmp_path_factory.mktemp("reference")
    words = [w for w in SMALL if not w.startswith(("check_mount", "signal_delay"))]
    command = [sys.executable, str(ROOT / "launch/local.py"), FOUR[0], *words, "workers=4", "threads=1", "run_dir=local"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=place, env=environ, check=True, capture_output=True, timeout=300)
    return place / "local"


def assert_same(folder: Path, reference: Path) -> None:
    """Bit for bit: what was learned, what was chosen, what it reached."""
    one, other = last(folder), last(reference)
    assert set(one) == set(other)
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor), name
    figures = [json.loads((f / "summary.json").read_text()) for f in (folder, reference)]
    for key in ("steps", "best_step", "valid_accuracy", "test"):
        assert figures[0][key] == figures[1][key]


def test_the_fixed_command_on_four_nodes(launch: Launcher, reference: Path) -> None:
    done = launch(*FOUR, *SMALL, "run_dir=fixed", "wait=true")
    folder = launch.place / "fixed"
    assert "test accuracy" in done.stdout and "step 60/60" in done.stdout
    one, other = last(folder), last(reference)
    for name, tensor in other.items():
        assert (one[name] - tensor).abs().max() <= 1e-10
    assert_same(folder, reference)
    start = json.loads((folder / "starts" / "0001.json").read_text())
    assert start["environment"]["slurm"]["job_nodelist"] == "n[1-4]" and start["config"]["workers"] == 4
    assert start["environment"]["commit"] and any(p.startswith("torch==") for p in start["packages"])
    assert {"config.yaml", "summary.json", "distilled.safetensors", "images.png", "report.png"} <= {
        p.name for p in folder.iterdir()
    }
    assert not list(folder.rglob("*.pkl"))
    again = launch(*FOUR, *SMALL, "run_dir=fixed")
    assert "submitted" not in again.stdout and "test accuracy" in again.stdout
    row = json.loads(launch("run=fixed", "json=true", program="status").stdout)[0]
    assert row["state"] == "finished" and row["step"] == 60 and row["accuracy"] is not None


def test_preempted_it_makes_room_and_goes_on(launch: Launcher, cluster: Cluster, reference: Path) -> None:
    job, folder = launch.submit("preempted")
    launch.at_step(folder, 12)
    high = ["sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "--wrap", "sleep 3"]
    subprocess.run(high, env=cluster.environ(), cwd=launch.place, check=True, capture_output=True)
    launch.requeued(job, folder)
    assert launch.ended(job) == "COMPLETED", launch.logs(folder)
    assert_same(folder, reference)
    assert ends(folder) == ["preempted", "finished"]
    row = json.loads(launch("run=preempted", "json=true", program="status").stdout)[0]
    assert (row["preemptions"], row["timeouts"], row["restarts"]) == (1, 0, 0)


def test_at_the_time_limit_it_is_requeued(launch: Launcher, cluster: Cluster, reference: Path) -> None:
    """The warning comes by hand, too: the scheduler's own clock has a grid of 30 s. What it means is judged by the end time."""
    job, folder = launch.submit("limit", "timeout_min=2", "signal_delay_s=30", "max_num_timeout=9")
    for start in (1, 2):
        launch.at_step(folder, 1, start)
        subprocess.run(["scancel", "--signal=USR2", job], env=cluster.environ(), check=True)
        launch.until(lambda n=start: launch.cluster.job(job).get("Restarts") == str(n), 60, "the requeue")
        launch.forget(folder)
    assert launch.ended(job) == "COMPLETED", launch.logs(folder)
    assert_same(folder, reference)
    assert len(ends(folder)) >= 3 and set(ends(folder)[:-1]) == {"time limit"} and ends(folder)[-1] == "finished"


def test_time_limits_are_counted(launch: Launcher, cluster: Cluster) -> None:
    job, folder = launch.submit("counted", "timeout_min=2", "signal_delay_s=30", "max_num_timeout=0", "steps=100000")
    launch.at_step(folder, 3)
    subprocess.run(["scancel", "--signal=USR2", job], env=cluster.environ(), check=True)
    assert launch.ended(job) == "FAILED"
    assert launch.cluster.job(job)["ExitCode"] == "140:0"
    assert "time limit, and not requeued: it was 0 times already (max_num_timeout=0); resume with" in launch.logs(folder)


def test_scancel_ends_it_with_a_checkpoint_and_for_good(launch: Launcher, cluster: Cluster, reference: Path) -> None:
    job, folder = launch.submit("cancelled", "exchange.interface=eth0")
    launch.at_step(folder, 12)
    row = json.loads(launch("run=cancelled", "json=true", program="status").stdout)[0]
    assert (row["state"], row["nodes"], row["job"]) == ("running", "n[1-4]", job) and row["step"] >= 1 and row["left_s"] >= 0
    met = json.loads((folder / "cluster" / f"meet-{job}-0.json").read_text())
    assert met["store"].startswith(f"{cluster.net}.")  # of the interface, not of every one
    subprocess.run(["scancel", job], env=cluster.environ(), check=True)
    assert launch.ended(job) == "CANCELLED"
    launch.until(lambda: ends(folder), 20, "the record")
    assert ends(folder) == ["cancelled"] and "cancelled at step" in launch.logs(folder)
    end = json.loads((folder / "ends" / "0001.json").read_text())
    assert end["step"] >= 12 and (folder / "checkpoints" / f"step-{end['step']:010d}.inc-0001.safetensors").exists()
    row = json.loads(launch("run=cancelled", "json=true", program="status").stdout)[0]
    assert row["state"] == "cancelled" and row["step"] >= 12
    done = launch(*FOUR, *SMALL, "run_dir=cancelled", "wait=true")  # the command that resumes
    assert "step 60/60" in done.stdout
    assert_same(folder, reference)


def test_a_killed_worker_is_worth_another_try(launch: Launcher, cluster: Cluster, reference: Path) -> None:
    job, folder = launch.submit("killed")
    launch.at_step(folder, 12)
    cluster.execute("n3", "pkill", "-KILL", "-f", "metadist.run.cluster.rank")
    launch.requeued(job, folder)
    assert launch.ended(job) == "COMPLETED", launch.logs(folder)
    assert_same(folder, reference)
    assert ends(folder) == ["worker lost", "finished"]


def test_killed_workers_are_tried_max_restarts_times(launch: Launcher, cluster: Cluster) -> None:
    job, folder = launch.submit("given_up", "max_restarts=0", "steps=100000")
    launch.at_step(folder, 3)
    cluster.execute("n2", "pkill", "-KILL", "-f", "metadist.run.cluster.rank")
    assert launch.ended(job) == "FAILED"
    assert "worker lost, and not requeued" in launch.logs(folder)


@pytest.mark.parametrize("node", ["n2", "n1"], ids=["another node", "the batch host"])
def test_a_node_loses_power(launch: Launcher, cluster: Cluster, reference: Path, node: str) -> None:
    job, folder = launch.submit("power")
    launch.at_step(folder, 12)
    cluster.kill_procs(node)  # slurmd, its step and the ranks, by SIGKILL
    launch.until(lambda: launch.cluster.job(job).get("Restarts") == "1", 90, "the requeue")
    cluster.boot(node)
    assert launch.ended(job, 180) == "COMPLETED", launch.logs(folder)
    assert_same(folder, reference)
    if node != "n1":

        def states() -> list[str]:
            told = subprocess.run(["sacct", "-X", "-D", "-n", "-P", "-j", job, "-o", "State"], env=cluster.environ(),
                                  capture_output=True, text=True, check=True)  # fmt: skip
            return told.stdout.split()

        launch.until(lambda: states()[-1] == "COMPLETED", 60, "sacct, which comes after scontrol")
        assert {"NODE_FAIL", "REQUEUED"} & set(states()[:-1])


def test_waiting_outlives_a_lost_node(launch: Launcher, cluster: Cluster, reference: Path) -> None:
    """submitit's own watcher takes the NODE_FAIL of a requeued job for its end."""
    environ = {**cluster.environ(), "OMP_NUM_THREADS": "1", "HOME": str(launch.place)}
    command = [sys.executable, str(ROOT / "launch/slurm.py"), *FOUR, *SMALL, "run_dir=waited", "wait=true"]
    waiting = subprocess.Popen(
        command, cwd=launch.place, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    folder = launch.place / "waited"
    launch.at_step(folder, 12)
    cluster.kill_procs("n4")
    launch.until(lambda: (folder / "starts" / "0002.json").exists() or "n4" in cluster.states(), 5)
    job = json.loads((folder / "cluster" / "job.json").read_text())["job"]
    launch.until(lambda: cluster.job(job).get("Restarts") == "1", 90, "the requeue")
    cluster.boot("n4")
    out, err = waiting.communicate(timeout=180)
    assert waiting.returncode == 0, err
    assert "step 60/60" in out and "COMPLETED" in err
    assert_same(folder, reference)


def test_a_forgotten_start_can_spoil_nothing(launch: Launcher, cluster: Cluster) -> None:
    """Only the batch host's slurmd dies: rank 0 and the batch script run on beside the requeued job. The folder is fenced."""
    slow = ["nodes=2", "inner.epochs=60", "steps=80", "run.checkpoint_every=2"]  # two nodes are left to be requeued on
    job, folder = launch.submit("fenced", *slow)
    launch.at_step(folder, 4)
    cluster.kill_slurmd("n1")
    launch.until(lambda: cluster.job(job).get("Restarts") == "1", 60, f"the requeue: {launch.logs(folder)}")
    assert cluster.execute("n1", "pgrep", "-f", "metadist.run.cluster.rank")  # the forgotten one is alive
    launch.until(lambda: (folder / "starts" / "0002.json").exists(), 60, "the second start")
    launch.until(lambda: (folder / "ends" / "0001.json").exists(), 90, f"the end of the first: {launch.logs(folder)}")
    cluster.boot("n1")
    assert launch.ended(job, 240) == "COMPLETED", launch.logs(folder)
    assert cluster.job(job)["Restarts"] == "1", "the forgotten batch script requeued the newer start"
    assert "SLURM has started the job again already" in launch.logs(folder)
    launch(*FOUR, *SMALL, *slow, "run_dir=calm", "wait=true")
    assert_same(folder, launch.place / "calm")


def test_a_sweep_is_one_array_with_one_table(launch: Launcher, cluster: Cluster) -> None:
    done = launch(
        "-m", "seed=1,2", "method=dd_fixed_init,dd_random_init", "nodes=2", "smoke=true", "check_mount=false", "wait=true"
    )
    assert len(re.findall(r"submitted job \d+", done.stdout)) == 1
    table = done.stdout.split("\nrun ")[-1]
    assert table.count("finished") == 4 and "dd_fixed_init" in table
    place = next((launch.place / "runs").glob("sweep-*"))
    assert (place / "table.txt").read_text().count("finished") == 4
    status = launch(f"run={place}", program="status").stdout
    assert status.count("finished") == 8  # states, and the table


def test_bad_input_submits_nothing(launch: Launcher, cluster: Cluster) -> None:
    cases = {
        "partition=gpu": "partition=gpu is unknown (allowed: high, main)",
        "nodes=9": "workers=9 is more than tasks=4",
        "constraint=none": "SLURM refused the job and nothing was submitted",
        "gpus_per_node=3 tasks=8": "SLURM refused the job and nothing was submitted",
    }
    for words, text in cases.items():
        done = launch(*SMALL, *words.split(), "run_dir=bad", check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        assert text in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("error:")
    queue = subprocess.run(["squeue", "-h"], env=cluster.environ(), capture_output=True, text=True, check=True)
    assert queue.stdout == ""
    shm = launch(*FOUR, "run_dir=/dev/shm/metadist-test", check=False)
    assert shm.returncode == 2 and "can't be seen by the nodes" in shm.stderr and not Path("/dev/shm/metadist-test").exists()


@pytest.mark.parametrize("node", ["n1", "n3"])
def test_a_run_folder_that_a_node_cannot_see(launch: Launcher, cluster: Cluster, node: str) -> None:
    (launch.place / "hidden").mkdir()
    cluster.hide(node, launch.place / "hidden")
    done = launch(*FOUR, *SMALL, "run_dir=hidden/run", "wait=true", check=False)
    assert done.returncode not in (0, 2)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "see run_dir=" in line]
    assert len(lines) == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_printed_is_what_the_scheduler_received(launch: Launcher, cluster: Cluster) -> None:
    printed = launch(*FOUR, *SMALL, "run_dir=held", "cluster=print").stdout
    done = launch(*FOUR, *SMALL, "run_dir=held", "additional_parameters={hold: true}")
    job = re.findall(r"submitted job (\d+)", done.stdout)[0]
    received = subprocess.run(
        ["scontrol", "write", "batch_script", job, "-"], env=cluster.environ(), capture_output=True, text=True
    )
    printed = launch(*FOUR, *SMALL, "run_dir=held", "additional_parameters={hold: true}", "cluster=print").stdout
    assert received.stdout.rstrip("\n") == printed
    row = json.loads(launch("run=held", "json=true", program="status").stdout)[0]
    assert row["state"] == "queued"
    refused = launch(*FOUR, *SMALL, "run_dir=held", check=False)
    assert refused.returncode == 2 and f"belongs to job {job} (PENDING)" in refused.stderr
    subprocess.run(["scancel", job], env=cluster.environ(), check=True)


def test_the_batch_file_can_be_submitted_again_by_hand(launch: Launcher, cluster: Cluster, reference: Path) -> None:
    job, folder = launch.submit("by_hand")
    launch.at_step(folder, 12)
    subprocess.run(["scancel", job], env=cluster.environ(), check=True)
    launch.ended(job)
    bare = {k: v for k, v in cluster.environ().items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = shlex.split(f"sbatch --parsable {folder / 'cluster' / 'batch.sh'}")
    second = subprocess.run(command, env=bare, cwd="/", check=True, capture_output=True, text=True).stdout.strip()
    assert launch.ended(second) == "COMPLETED", launch.logs(folder)
    assert_same(folder, reference)


def test_gpus_reach_their_ranks(launch: Launcher, cluster: Cluster) -> None:
    done = launch(
        "nodes=2", "gpus_per_node=2", "smoke=true", "tasks=4", "device=cpu", "check_mount=false", "run_dir=gpus", "wait=true"
    )
    assert "4 workers" in done.stdout
    start = json.loads((launch.place / "gpus" / "starts" / "0001.json").read_text())
    assert start["config"]["workers"] == 4


def test_without_accounting_waiting_ends(tmp_path: Path) -> None:
    """sacct says it is disabled: submitit's wait would hang for ever on a job that leaves no result."""
    with Cluster(tmp_path / "cluster", "n", nodes=1, accounting=False) as cluster:
        launch = Launcher(cluster, tmp_path)
        done = launch("nodes=1", "smoke=true", "check_mount=false", "run_dir=fine", "wait=true")
        assert "test accuracy" in done.stdout
        broken = launch(
            "nodes=1", "smoke=true", "check_mount=false", "run_dir=broken", "wait=true", "setup=['exit 3']", check=False
        )
        assert broken.returncode == 3, broken.stdout + broken.stderr
