"""The cluster itself: four nodes that run jobs, break and come back, and nothing is left of it, even after a hard death."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster

pytestmark = pytest.mark.usefixtures("cluster")  # all are skipped where none can be brought up


def remains(place: Path) -> list[str]:
    """Processes, this one left out, that have the folder in their arguments or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if bytes(place) in text and process.name != str(os.getpid()):
            found.append(text.decode(errors="replace"))
    return found


def links(name: str) -> list[str]:
    return [link.name for link in Path("/sys/class/net").glob(f"mdsl-{name}*")]


def run(cluster: Cluster, *command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, env=cluster.environ()).stdout


def batch(cluster: Cluster, *options: str, script: str = "srun sleep 300") -> int:
    return int(run(cluster, "sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}"))


def knock(cluster: Cluster) -> None:
    """Connect from node n1 to the slurmd of n2, for 2 s at most."""
    cluster.execute("n1", "timeout", "2", "bash", "-c", f"echo > /dev/tcp/n2/{cluster.port}18")


def runs(cluster: Cluster, job: int) -> None:
    cluster.wait_until(lambda: cluster.job(job)["JobState"] == "RUNNING", 20, f"job {job}")


def test_four_nodes_with_two_gpus_each(cluster: Cluster) -> None:
    command = ("srun", "--nodes=4", "--gpus-per-node=2", "bash", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES")
    assert sorted(run(cluster, *command).splitlines()) == [f"n{i} 0,1" for i in (1, 2, 3, 4)]


def test_sacct_tells_what_a_job_came_to(cluster: Cluster) -> None:
    job = batch(cluster, script="exit 3")
    told = ("sacct", "--jobs", str(job), "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
    cluster.wait_until(lambda: run(cluster, *told).strip() == "FAILED|3:0", 20, "sacct")


def test_a_job_in_high_pushes_one_in_main_out(cluster: Cluster, tmp_path: Path) -> None:
    traps = f"trap 'echo USR2 >> {tmp_path}/signals; scontrol requeue $SLURM_JOB_ID' USR2; sleep 300 & wait; wait"
    low = batch(cluster, "--nodes=4", "--exclusive", "--signal=B:USR2@60", "--time=10", script=traps)
    runs(cluster, low)
    high = batch(cluster, "--nodes=4", "--exclusive", "--partition=high", script="sleep 1")
    runs(cluster, high)
    assert (tmp_path / "signals").read_text() == "USR2\n"
    cluster.wait_until(lambda: cluster.job(low)["JobState"] == "RUNNING" and cluster.job(low)["Restarts"] == "1", 30)


def test_a_crashed_node_goes_down_and_boots_again(cluster: Cluster) -> None:
    cluster.crash("n3")
    cluster.wait_until(lambda: cluster.states()["n3"].startswith("down"), 40, "n3 down")
    with pytest.raises(RuntimeError, match="n3 is down"):
        cluster.execute("n3", "true")
    cluster.boot("n3")
    cluster.wait_until(lambda: cluster.states()["n3"] == "idle", 20, "n3 idle")
    assert cluster.execute("n3", "hostname") == "n3\n"


def test_a_node_that_lost_its_processes_stays_reachable(cluster: Cluster) -> None:
    job = batch(cluster, "--nodelist=n2")
    runs(cluster, job)
    cluster.kill_procs("n2")
    assert "sleep 300" not in cluster.execute("n2", "ps", "ax", "-o", "args")
    with pytest.raises(RuntimeError, match="refused"):
        knock(cluster)


def test_a_cut_node_is_silent_until_healed(cluster: Cluster) -> None:
    knock(cluster)
    cluster.cut("n2")
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        knock(cluster)
    assert time.monotonic() - start > 1.5
    cluster.heal("n2")
    knock(cluster)


def test_a_job_cannot_see_what_is_hidden(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "seen").touch()
    look = ("srun", "--nodes=2", "--nodelist=n1,n2", "bash", "-c", f"echo $(hostname) $(ls {tmp_path})")
    cluster.hide("n2", tmp_path)
    assert sorted(run(cluster, *look).splitlines()) == ["n1 seen", "n2"]
    cluster.unhide("n2", tmp_path)
    assert sorted(run(cluster, *look).splitlines()) == ["n1 seen", "n2 seen"]


def test_jobs_outlive_a_stop_of_the_controller(cluster: Cluster) -> None:
    job = batch(cluster)
    runs(cluster, job)
    cluster.stop_controller()
    assert "is DOWN" in run(cluster, "bash", "-c", "scontrol ping || true")
    cluster.start_controller()
    assert cluster.job(job)["JobState"] == "RUNNING" and cluster.job(job)["Restarts"] == "0"


def test_idle_repairs_and_clears(cluster: Cluster) -> None:
    deaf = "trap '' TERM USR2; srun sleep 300"
    jobs = [batch(cluster, "--exclusive", script=deaf) for _ in range(6)]
    runs(cluster, jobs[0])
    start = time.monotonic()
    cluster.idle()
    assert time.monotonic() - start < 6, "a job that ignores TERM is not waited for"
    runs(cluster, batch(cluster, "--nodes=4"))
    cluster.kill_slurmd("n1")
    cluster.cut("n2")
    cluster.crash("n4")
    cluster.stop_controller()
    cluster.idle()
    assert run(cluster, "squeue", "-h") == ""


def test_two_side_by_side_and_nothing_remains(cluster: Cluster, tmp_path: Path) -> None:
    other = Cluster(tmp_path / "other", "y", nodes=2, accounting=False, user_signal=False)
    other.down()
    subprocess.run(["ip", "link", "add", "mdsl-y", "type", "bridge"], check=True)  # left behind by a broken start
    with other:
        assert sorted(run(other, "srun", "--nodes=2", "hostname").split()) == ["n1", "n2"]
        assert run(cluster, "srun", "hostname").startswith("n")
        assert "user_signal" not in (other.place / "slurm.conf").read_text()
        sacct = subprocess.run(["sacct"], capture_output=True, text=True, env=other.environ())
        assert "accounting storage is disabled" in sacct.stderr
        with pytest.raises(TimeoutError, match="another cluster y"):
            Cluster(tmp_path / "third", "y").up()
        batch(other)
        assert run(other, "srun", "hostname")
        assert remains(other.place) and links("y")
    other.down()
    assert not remains(other.place) and not links("y")
    assert not (other.place / "state").exists()


def test_nothing_remains_of_half_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, boot = Cluster(tmp_path, "x", accounting=False), Cluster.boot

    def break_at_three(self: Cluster, node: str) -> None:
        boot(self, node)
        if node == "n3":
            assert remains(tmp_path) and links("x")
            raise KeyboardInterrupt

    monkeypatch.setattr(Cluster, "boot", break_at_three)
    with pytest.raises(KeyboardInterrupt):
        cluster.up()
    assert not remains(tmp_path) and not links("x")
    monkeypatch.undo()
    with cluster:
        assert run(cluster, "srun", "--nodes=4", "hostname")
    assert not remains(tmp_path) and not links("x")


def test_nothing_remains_after_the_test_process_was_killed(tmp_path: Path) -> None:
    code = (
        f"from pathlib import Path; from cluster import Cluster; Cluster(Path({str(tmp_path)!r}), 'z').up(); "
        "print('up', flush=True); input()"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        assert remains(tmp_path) and links("z")
        process.kill()
        process.communicate()
    end = time.monotonic() + 20
    while remains(tmp_path) or links("z"):
        assert time.monotonic() < end, (remains(tmp_path), links("z"))
        time.sleep(0.1)
