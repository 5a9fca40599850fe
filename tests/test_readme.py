"""Every command of the README runs: the short ones as they stand, presets in their smoke mode."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line.strip()]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
REAL = os.environ.get("METADIST_DATA")


def programs() -> list[str]:
    """Command lines of this project's programs, in order."""
    return [line for line in SHELL if line.startswith("python launch/")]


def in_small(words: list[str]) -> list[str]:
    """The same command, as a smoke run where it trains; real data from where this machine has them."""
    words = [w for w in words if not w.startswith(("data.root=", "data.download="))]
    if words[1].endswith("local.py") and not {"--help", "--cfg"} & set(words):
        words += ["smoke=true", "threads=1", f"data.root={REAL}"]
    if words[1].endswith("slurm.py") and not any(w.startswith("cluster=") for w in words):
        words += ["smoke=true", "tasks=4", "cluster=print"]  # on a real cluster: tests/slurm/test_readme_slurm.py
    if words[1].endswith("experts.py") and "--help" not in words:
        words = [w for w in words if not w.startswith(("experts=", "epochs=", "workers="))]
        words += ["smoke=true", "threads=1", "net.width=4", f"data.root={REAL}"]
    if words[1].endswith("evaluate.py"):
        words += ["nets=2", "epochs=1", "trials=1", "threads=1"] if "check=gradient" not in words else []
    if words[1].endswith("experts.py"):
        words += ["smoke=true", "threads=1", f"data.root={REAL}"]
    if words[1].endswith("search.py"):
        words += ["smoke=true", "threads=1", "set=digits-10"]
    if words[1].endswith("compare.py"):
        words += ["smoke=true", "threads=1", "eval.nets=2", f"data.root={REAL}"]
    return words


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which runs/x is a small finished run, as the README assumes."""
    place = tmp_path_factory.mktemp("readme")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(place)}
    command = [sys.executable, str(ROOT / "launch" / "local.py"), "smoke=true", "threads=1", "run_dir=runs/x"]
    subprocess.run(command, cwd=place, env=environ, check=True, capture_output=True, timeout=300)
    return place


def assert_joined(words: list[str], place: Path) -> None:
    """The command for more workers, beside a server that has one: it stays until the run is finished."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(place)}
    serving = ["exchange=server", "workers=1", "steps=400", "smoke=true", "threads=1", "run_dir=runs/served"]
    run = [sys.executable, str(ROOT / "launch" / "local.py"), *serving]
    log = place / "served.log"
    with log.open("w") as out, subprocess.Popen(run, cwd=place, env=environ, stdout=out) as server:
        while "step 1/" not in log.read_text():
            assert server.poll() is None
            time.sleep(0.1)
        command = [sys.executable, str(ROOT / words[1]), *(w.replace("runs/x", "runs/served") for w in words[2:])]
        done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, timeout=300)
        server.wait(timeout=120)
    assert done.returncode == 0 and server.returncode == 0, done.stderr
    taken = json.loads((place / "runs/served/summary.json").read_text())["workers"]
    assert taken == 3


def marked(line: str) -> object:
    """A command that trains is slow."""
    quick = any(word in line for word in ("--help", "slurm.py", "runs.py", "status.py")) and "join=true" not in line
    return pytest.param(line, marks=[] if quick else [pytest.mark.slow], id=line)


@pytest.mark.parametrize("line", map(marked, programs()))
def test_program(line: str, place: Path) -> None:
    words = in_small(shlex.split(line))
    if "join=true" in words:
        assert_joined(words, place)
        return
    if REAL is None and any("mnist" in w or "cifar" in w or "gtn" in w for w in words):
        pytest.skip("needs $METADIST_DATA, a folder with torchvision's data sets")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(place)}
    command = [sys.executable, str(ROOT / words[1]), *words[2:]]
    done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("block", PYTHON)
def test_python(block: str, place: Path) -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(place), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", block], cwd=place, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_there_are_two_set_up_commands_of_one_line_and_nothing_else_to_install() -> None:
    set_up = [line for line in SHELL if "pip install" in line]
    assert len(set_up) == 2
    assert all(line.startswith("python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && ") for line in set_up)
    assert set_up[0].endswith(".venv/bin/python launch/local.py workers=2")
    assert set_up[1].endswith(".venv/bin/python -m pytest")


def test_every_shell_line_is_known() -> None:
    known = ("python launch/", "python3 -m venv", "tensorboard --logdir")
    assert all(line.startswith(known) for line in SHELL)
    assert len(README.splitlines()) < 200
