"""exchange=server on a real cluster: the server is one job, its workers an array that loses and gains elements."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from cluster import Cluster
from launcher import SMALL, Launcher, ends

from metadist.store import load_tensors

# One worker a node: the server shares one of them.
SERVER = ["exchange=server", "exchange.heartbeat_s=1", "server_cpus=1", "server_partition=high", "cpus_per_task=3", "threads=1"]


def submit(launch: Launcher, name: str, *words: str) -> tuple[str, str, Path]:
    """Numbers of the server's job and of its workers' array, and the run folder."""
    done = launch(*SERVER, *SMALL, f"run_dir={name}", *words)
    found = re.search(r"submitted job (\d+), the server, and its workers, array (\d+)", done.stdout)
    assert found and f"scancel {found[1]} {found[2]}" in done.stdout and "join=true" in done.stdout
    return found[1], found[2], launch.place / name


def element(launch: Launcher, array: str, number: int) -> dict[str, str]:
    return launch.cluster.job(f"{array}_{number}")


def roster(folder: Path) -> dict[str, Any]:
    path = folder / "exchange" / "workers.json"
    return json.loads(path.read_text()) if path.exists() else {"workers": [], "counts": {}, "version": 0}


def labels(folder: Path) -> set[str]:
    return {w["worker"].partition("@")[0] for w in roster(folder)["workers"]}


def applied(folder: Path) -> dict[str, Any]:
    """What the last checkpoint says of the tasks: all items below "low" are applied, and those "done"."""
    ledger: dict[str, Any] = load_tensors(max((folder / "checkpoints").glob("step-*")))[1]["user"]["state"]["exchange"][
        "ledger"
    ]
    return ledger


def test_an_element_is_preempted_one_joins_and_every_task_counts_once(launch: Launcher, cluster: Cluster) -> None:
    job, array, folder = submit(launch, "served", "nodes=3", "steps=1500")
    launch.until(lambda: labels(folder) == {"1", "2", "3"}, 90, f"three workers: {launch.logs(folder)}")
    home = cluster.job(job)["NodeList"]
    where = {n: element(launch, array, n)["NodeList"] for n in range(3)}
    victim = next(n for n, node in where.items() if node != home)
    high = ["sbatch", "--parsable", "-p", "high", "-N1", "-w", where[victim], "-n", str(cluster.cpus), "--wrap", "sleep 4"]
    subprocess.run(high, env=cluster.environ(), cwd=launch.place, check=True, capture_output=True)
    launch.until(lambda: element(launch, array, victim).get("Restarts") == "1", 60, "the requeue of an element")

    shown = launch("join=true", "run_dir=served", "workers=1", "cluster=print").stdout
    assert "#SBATCH --array=0-0" in shown and "metadist.run.cluster.member" in shown
    joined = launch("join=true", "run_dir=served", "workers=1").stdout
    other = re.findall(r"submitted array (\d+): 1 more workers", joined)[0]
    launch.until(lambda: "4" in labels(folder), 60, f"the one who joins: {launch.logs(folder)}")
    table = launch("run=served", program="status").stdout
    assert re.search(r"^served +\d+ +running ", table, re.M) and re.search(r"^4@n\d:\d+ ", table, re.M), table
    launch.until(lambda: str(victim + 1) in labels(folder), 60, f"the preempted one's return: {launch.logs(folder)}")

    assert launch.ended(job, 240) == "COMPLETED", launch.logs(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 1500 and summary["workers"] == 4 and ends(folder) == ["finished"]
    ledger = applied(folder)
    assert ledger["low"] * ledger["item"] == 1500 * 4 and ledger["done"] == []
    assert roster(folder)["counts"]["accepted"] == ledger["low"]
    for number in (f"{array}_0", f"{array}_1", f"{array}_2", f"{other}_0"):
        launch.until(lambda n=number: launch.cluster.job(n)["JobState"] in ("COMPLETED", "CANCELLED"), 30, number)


def test_a_preempted_server_comes_back_and_its_workers_wait(launch: Launcher, cluster: Cluster) -> None:
    job, _, folder = submit(launch, "moved", "nodes=2", "steps=300", "server_partition=main", "exchange.max_staleness=0")
    launch.at_step(folder, 20)
    home = cluster.job(job)["NodeList"]
    high = ["sbatch", "--parsable", "-p", "high", "-N1", "-w", home, "-n", str(cluster.cpus), "--wrap", "sleep 3"]
    subprocess.run(high, env=cluster.environ(), cwd=launch.place, check=True, capture_output=True)
    launch.requeued(job, folder)
    assert launch.ended(job, 240) == "COMPLETED", launch.logs(folder)
    assert ends(folder) == ["preempted", "finished"]
    ledger = applied(folder)
    assert ledger["low"] * ledger["item"] == 300 * 4
    assert json.loads((folder / "exchange/server.json").read_text())["incarnation"] == 2


def test_scancel_of_the_server_and_resuming(launch: Launcher, cluster: Cluster) -> None:
    job, array, folder = submit(launch, "cancelled", "nodes=2", "steps=300")
    launch.at_step(folder, 5)
    subprocess.run(["scancel", job, array], env=cluster.environ(), check=True)
    assert launch.ended(job) == "CANCELLED"
    assert ends(folder) == ["cancelled"] and "cancelled at step" in launch.logs(folder)
    launch.until(lambda: not any(element(launch, array, n)["JobState"] in ("RUNNING", "COMPLETING") for n in range(2)))
    again, arrays, _ = submit(launch, "cancelled", "nodes=2", "steps=300")
    assert again != job and arrays != array
    assert launch.ended(again, 240) == "COMPLETED", launch.logs(folder)
    assert applied(folder)["low"] * applied(folder)["item"] == 300 * 4


def test_a_mistake_of_the_workers_ends_the_run_s_array_and_says_so(launch: Launcher, cluster: Cluster) -> None:
    done = launch("join=true", "run_dir=nowhere", "workers=1", check=False)
    assert done.returncode == 2 and "is no run folder" in done.stderr
    launch(*SMALL, "nodes=1", "steps=2", "run_dir=plain", "wait=true")
    done = launch("join=true", "run_dir=plain", "workers=1", check=False)
    assert done.returncode == 2 and "only a server takes workers" in done.stderr
    done = launch("join=true", "run_dir=plain", "seed=1", check=False)
    assert done.returncode == 2 and "seed can't be given with join=true" in done.stderr
    done = launch(*SERVER, "-m", "seed=1,2", check=False)
    assert done.returncode == 2 and "submit a command for each" in done.stderr
