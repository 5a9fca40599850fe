"""`launch/compare.py` with cluster=slurm: a comparison of networks as arrays. Small programs on PATH stand for SLURM's."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare_cases import CHAIN
from slurm_programs import UNKNOWN_JOB, Programs, shown

from metadist import data as data_room
from metadist import draw, nets
from metadist.config import DataConfig, NetConfig
from metadist.evaluate.statistics import Summary
from metadist.run import compare, compare_set
from metadist.run.cluster import record
from metadist.run.guard import guarded
from metadist.synthetic.network import FILE, Network


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words of the chain above."""
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "chain.yaml").write_text(CHAIN)
    monkeypatch.setattr(compare_set, "config_dir", lambda: tmp_path)
    monkeypatch.setattr(compare, "config_dir", lambda: tmp_path)
    return ["preset=chain", "out=out"]


@pytest.mark.slow
def test_on_a_cluster_a_comparison_is_an_array_a_wave(slurm: Programs, digits: list[str]) -> None:
    count = slurm.place / "count"
    slurm.put("sbatch", f"n=4711; while [ -e {count}$n ]; do n=$((n+1)); done; : > {count}$n; "
                        f'/bin/cp "$1" {slurm.place}/received$n; echo Submitted batch job $n')  # fmt: skip
    words = [*digits, "cluster=slurm", "cpus_per_task=2"]

    def go(*more: str) -> SimpleNamespace:
        return slurm(*words, *more, program=lambda argv: guarded(compare.main, argv))

    printed = go("cluster=print")
    assert printed.code == 0 and printed.out.count("#!/bin/bash") == 3 and slurm.asked == []
    sent = go()
    assert sent.code == 0, sent.err
    for line in ("wave 1: submitted array 4711 of 2: alone, 32\n", "wave 2: submitted array 4712 of 3: 32-4, 32-8, longer\n",
                 "wave 3: submitted array 4713 of 1: 32-8-4\n", "scancel 4711 4712 4713\n"):  # fmt: skip
        assert line in sent.out
    received = [(slurm.place / f"received{n}").read_text() for n in (4711, 4712, 4713)]
    waits = [re.findall("#SBATCH --dependency=(.*)", text) for text in received]
    assert waits == [[], ["afterok:4711"], ["afterok:4712"]]
    assert ["#SBATCH --kill-on-invalid-dep=yes\n" in text for text in received] == [False, True, True]
    assert ["#SBATCH --array=0-1%2" in received[0], "--cpus-per-task=2" in received[1]] == [True, True]
    out = slurm.place / "out"
    assert record.folder_of(out / "wave-2", {"SLURM_ARRAY_TASK_ID": "1"}) == out / "32-8"
    config = json.loads((out / "32-8" / "config.json").read_text())
    assert config["kd"]["teachers"] == [str(out / "32")] and config["run_dir"] == str(out / "32-8")
    assert json.loads((out / "32-8-4" / "cluster" / "job.json").read_text())["job"] == "4713_0"

    slurm.scontrol(shown("RUNNING"))
    again = go()
    assert again.code == 2 and "belongs to job 4711_0 (RUNNING)" in again.err and not (slurm.place / "received4714").exists()
    slurm.put("scontrol", UNKNOWN_JOB)
    summary = {
        "finished": True,
        "steps": 100,
        "minutes": 1.0,
        "test": Summary.of([0.9, 0.8, 0.7]).as_dict(),
        "errors": [1, 2, 3],
    }
    for name in ("alone", "32", "32-4", "32-8"):
        (out / name / "summary.json").write_text(json.dumps(summary))
    (slurm.place / "count4711").unlink()
    network_like(out / "32"), network_like(out / "32-8")
    last = go()
    assert last.code == 0, last.err
    assert "wave 1: submitted array 4711 of 2: 32-8-4, longer\n" in last.out and "wave 2" not in last.out
    for name in ("longer", "32-8-4"):
        (out / name / "summary.json").write_text(json.dumps(summary | {"steps": 200}))
    done = go()
    assert done.code == 0 and "a chain of digits" in done.out and (out / "table.txt").read_text() in done.out + "\n"
    assert go("seed=7").code == 2


def network_like(place: Path) -> None:
    """A teacher of the chain's digits, never trained."""
    learner = nets.build(NetConfig(name="mlp", depth=1, width=32), 1, 8, 10)
    found = data_room.load(DataConfig(name="digits", size=8), torch.device("cpu"), torch.float32)
    theta = learner.init(draw.key(0, "x", 0, torch.arange(3)))
    manifest = {"net": dataclasses.asdict(NetConfig(name="mlp", depth=1, width=32)), "classes": list(found.classes),
                "channels": 1, "size": 8, "metrics": {}}  # fmt: skip
    Network(theta, theta[:, :0], found.normalization, manifest).save(place / FILE)


def test_a_comparison_of_budgets_is_no_array(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(compare.main, ["preset=gtn_weight_norm", "cluster=slurm"]) == 2
    assert "comparisons for arrays: early_stop" in capsys.readouterr().err
