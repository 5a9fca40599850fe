"""Presets of launch/search.py in smoke mode: the set is made as their header says, then the search."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from metadist.run import command, search_command
from metadist.run.overrides import groups

REAL = os.environ.get("METADIST_DATA")
SETS = {"digits_search": "digits_search_set", "cifar10_search": "cifar10_gtn"}


def test_every_preset_of_a_search_is_run_here() -> None:
    assert {p for p in groups()["preset"] if p.endswith("_search")} == set(SETS)


@pytest.mark.parametrize("preset", ["digits_search", pytest.param("cifar10_search", marks=pytest.mark.slow)])
def test_smoke(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if REAL is None and "cifar10" in preset:
        pytest.skip("needs $METADIST_DATA, a folder with torchvision's data sets")
    made, out = tmp_path / "set", tmp_path / "search"
    machine = ["smoke=true", "threads=1", "device=cpu", "engine.compile=off", f"data.root={REAL}", f"cache_dir={tmp_path}"]
    assert command.main([f"preset={SETS[preset]}", *machine, f"run_dir={made}"]) == 0, capsys.readouterr().err
    assert search_command.main([f"preset={preset}", *machine, f"set={made}", f"out={out}"]) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert report["count"] == len(report["candidates"]) >= 2 and {f["key"][:2] for f in report["failures"]} <= {"d4"}
    assert {"distilled", "random_real", "synflow"} < set(report["proxies"]) and report["ceiling"]["n"] == report["judged"]
    assert all(0 <= seed <= 1 for c in report["candidates"] for seed in c["truth_seeds"])
    assert report["payoff"]["set_seconds"] > 0 and "Spearman" in capsys.readouterr().out
    with Image.open(out / "report.png") as image:
        image.load()
