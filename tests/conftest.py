"""One thread a test process: several run at once, and OpenMP's threads spin when there are more of them than cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from slurm_programs import Programs

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a module that computes in its own process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Programs:
    """Programs that stand for SLURM's on PATH; the test works in a folder of its own."""
    from slurm_programs import SINFO, UNKNOWN_JOB, Programs

    made = Programs(tmp_path, capsys)
    made.put("sbatch", f'/bin/cp "$1" {tmp_path}/received; echo Submitted batch job 4711')
    made.put("sinfo", SINFO)
    made.put("scontrol", UNKNOWN_JOB)
    monkeypatch.setenv("PATH", str(made.bin))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return made
