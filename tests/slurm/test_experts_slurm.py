"""Experts on a real cluster: an array of workers of which one is preempted makes the very files that one worker makes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from launcher import ROOT, Launcher

WORDS = ["data=digits", "net=mlp", "net.width=8", "net.depth=1", "experts=6", "epochs=24", "experts.images=1024"]
WORDS += ["experts.batch=16", "experts.group=1", "device=cpu", "threads=1", "engine.compile=off"]


def weights(cache: Path) -> dict[str, str]:
    """The bytes of every expert's file, by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in cache.glob("experts/*/expert-*.safetensors")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("alone")
    command = [sys.executable, str(ROOT / "launch/experts.py"), *WORDS, f"cache_dir={place}"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=place, env=environ, check=True, capture_output=True, timeout=300)
    return weights(place)


def test_an_array_loses_an_element_and_makes_what_one_worker_makes(
    launch: Launcher, cluster: Cluster, alone: dict[str, str]
) -> None:
    words = [*WORDS, "cluster=slurm", "nodes=3", f"cache_dir={launch.place}", "check_mount=false", "run.checkpoint_s=0.2"]
    done = launch(*words, program="experts")
    array = re.findall(r"submitted array (\d+): 3 workers for 6 tasks", done.stdout)[0]
    launch.until(lambda: list(launch.place.glob("experts/*/partial/*/step-*.safetensors")), 90, "an expert at work")
    node = cluster.job(f"{array}_1")["NodeList"]
    high = ["sbatch", "--parsable", "-p", "high", "-N1", "-w", node, "-n", str(cluster.cpus), "--wrap", "sleep 3"]
    subprocess.run(high, env=cluster.environ(), cwd=launch.place, check=True, capture_output=True)
    launch.until(lambda: cluster.job(f"{array}_1").get("Restarts") == "1", 60, "the requeue of an element")
    for number in range(3):
        assert launch.ended(f"{array}_{number}", 180) == "COMPLETED", logs(launch)
    folder = next(launch.place.glob("experts/*"))
    assert weights(launch.place) == alone and len(alone) == 6
    assert json.loads((folder / "summary.json").read_text())["finished"] and not list(folder.glob("partial/*"))
    done = launch(*words, program="experts")
    assert done.stdout.startswith("6 experts x 24 epochs: ") and "submitted" not in done.stdout


def test_scancel_keeps_what_was_done_and_the_same_command_goes_on(
    launch: Launcher, cluster: Cluster, alone: dict[str, str]
) -> None:
    words = [*WORDS, "cluster=slurm", "nodes=2", f"cache_dir={launch.place}", "check_mount=false", "run.checkpoint_s=0.2"]
    array = re.findall(r"submitted array (\d+)", launch(*words, program="experts").stdout)[0]
    launch.until(lambda: weights(launch.place), 120, "a finished expert")
    subprocess.run(["scancel", array], env=cluster.environ(), check=True)
    launch.until(lambda: launch.state(f"{array}_0") == "CANCELLED" and launch.state(f"{array}_1") == "CANCELLED", 60)
    kept = weights(launch.place)
    assert 0 < len(kept) < 6
    again = re.findall(r"submitted array (\d+)", launch(*words, program="experts").stdout)[0]
    for number in range(2):
        assert launch.ended(f"{again}_{number}", 180) == "COMPLETED", logs(launch)
    assert weights(launch.place) == alone


def logs(launch: Launcher) -> str:
    return launch.logs(next(launch.place.glob("experts/*")))
