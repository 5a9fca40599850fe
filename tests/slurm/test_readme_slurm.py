"""The README's section on SLURM, on a real cluster."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cluster import Cluster
from launcher import Launcher

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
SECTION = README.split("## On SLURM")[1].split("\n## ")[0]
COMMANDS = [line for line in re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)[0].splitlines() if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str, cluster: Cluster, place: Path) -> None:
    _, program, *words = shlex.split(line)
    launch = Launcher(cluster, place)
    if program.endswith("status.py"):
        assert launch(*words, program="status").stdout.count("finished") >= 7
        return
    tests = ["smoke=true", "tasks=4", "check_mount=false", *([] if "cluster=print" in words else ["wait=true"])]
    done = launch(*dict.fromkeys([*words, *tests]))
    assert ("#SBATCH --nodes=4" if "cluster=print" in words else "submitted job") in done.stdout


def test_the_packages_named_are_those_that_ci_installs() -> None:
    named = " ".join(re.findall(r"Debian's `([^`]+)`", SECTION)[0].split())  # however its lines are broken
    assert named in (Path(__file__).resolve().parents[2] / ".ci" / "run").read_text()
