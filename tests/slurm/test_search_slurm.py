"""A search on a real cluster: an array of workers of which one is preempted finds what one worker finds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from launcher import ROOT, Launcher

WORDS = ["set=digits-10", "data=digits", "width=4", "candidates=8", "seeds=2", "epochs=6", "proxy=distilled,random_real,params"]
WORDS += ["halving=2", "best=2", "device=cpu", "threads=1"]


def results(folder: Path) -> dict[str, Any]:
    """All that was found, but for the time it took."""
    out = {}
    for path in folder.glob("results/*/*/*.json"):
        found = json.loads(path.read_text())
        found.pop("seconds")
        out[str(path.relative_to(folder))] = found
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("alone")
    command = [sys.executable, str(ROOT / "launch/search.py"), *WORDS, "out=x"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=place, env=environ, check=True, capture_output=True, timeout=300)
    return results(place / "x")


def test_an_array_loses_an_element_and_finds_what_one_worker_finds(
    launch: Launcher, cluster: Cluster, alone: dict[str, Any]
) -> None:
    folder = launch.place / "x"
    words = [*WORDS, "cluster=slurm", "nodes=3", f"out={folder}", "check_mount=false"]
    done = launch(*words, program="search")
    array = re.findall(r"submitted array (\d+): 3 workers for \d+ tasks", done.stdout)[0]
    launch.until(lambda: results(folder), 90, "a first result")
    node = cluster.job(f"{array}_1")["NodeList"]
    high = ["sbatch", "--parsable", "-p", "high", "-N1", "-w", node, "-n", str(cluster.cpus), "--wrap", "sleep 3"]
    subprocess.run(high, env=cluster.environ(), cwd=launch.place, check=True, capture_output=True)
    launch.until(lambda: cluster.job(f"{array}_1").get("Restarts") == "1", 60, "the requeue of an element")
    for number in range(3):
        assert launch.ended(f"{array}_{number}", 240) == "COMPLETED", launch.logs(folder)
    assert results(folder) == alone and json.loads((folder / "summary.json").read_text())["finished"]
    again = launch(*words, program="search")
    assert "halving-1" in again.stdout and "submitted" not in again.stdout


def test_scancel_keeps_what_was_found_and_the_same_command_goes_on(
    launch: Launcher, cluster: Cluster, alone: dict[str, Any]
) -> None:
    folder = launch.place / "x"
    words = [*WORDS, "cluster=slurm", "nodes=2", f"out={folder}", "check_mount=false"]
    array = re.findall(r"submitted array (\d+)", launch(*words, program="search").stdout)[0]
    launch.until(lambda: len(results(folder)) >= 3, 120, "a few results")
    subprocess.run(["scancel", array], env=cluster.environ(), check=True)
    launch.until(lambda: launch.state(f"{array}_0") == "CANCELLED" and launch.state(f"{array}_1") == "CANCELLED", 60)
    kept = results(folder)
    assert 3 <= len(kept) < len(alone)
    again = re.findall(r"submitted array (\d+)", launch(*words, program="search").stdout)[0]
    for number in range(2):
        assert launch.ended(f"{again}_{number}", 240) == "COMPLETED", launch.logs(folder)
    assert results(folder) == alone
