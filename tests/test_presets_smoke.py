"""Every preset runs end to end in smoke mode, through the very program: launch/local.py's main, in this process."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import metadist
from metadist.data import SMOKE
from metadist.run.compose import compose
from metadist.run.folder import RunFolder
from metadist.run.overrides import groups
from metadist.synthetic import network

ROOT = Path(__file__).resolve().parents[1]
REAL = os.environ.get("METADIST_DATA")
EMBEDDED = {"digits"}
QUICK = {"digits", "digits_poison", "mnist_fixed", "mnist_dc", "mnist_student"}


def marked(preset: str) -> object:
    config = compose([f"preset={preset}", "smoke=true"])
    needs = {config.data.name} | ({config.pretrained.data} - {None})
    marks = [] if preset in QUICK else [pytest.mark.slow]
    if needs - EMBEDDED:
        marks.append(
            pytest.mark.skipif(REAL is None, reason=f"{preset} needs $METADIST_DATA, a folder with torchvision's data sets")
        )
    return pytest.param(preset, marks=marks)


def program(words: list[str]) -> int:
    spec = importlib.util.spec_from_file_location("launch_local", ROOT / "launch" / "local.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(module.main(words))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


# Those of other launchers make no distilled set: tests/test_experts.py and test_search_presets.py run them.
@pytest.mark.parametrize("preset", [marked(p) for p in groups()["preset"] if "_experts" not in p and not p.endswith("_search")])
def test_smoke(preset: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    machine = ["threads=1", "device=cpu", "engine.compile=off", f"data.root={REAL or 'data'}", f"cache_dir={cache}"]
    words = [f"preset={preset}", "smoke=true", *machine, f"run_dir={folder}"]
    config = compose(words)
    if config.method.name == "kd":
        teacher = [f"preset={preset.replace('kd', 'teacher')}", "smoke=true", *machine, f"run_dir={tmp_path / 'teacher'}"]
        assert program(teacher) == 0, capsys.readouterr().err
        words.append(f"kd.teachers=[{tmp_path / 'teacher'}]")
    before = torch.get_num_threads()
    assert program(words) == 0, capsys.readouterr().err
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == config.steps and summary["skipped"] == 0
    assert summary["text"] in out and str(folder) in out
    assert 0 <= summary["test"]["mean"] <= 1
    found = RunFolder.attach(folder).checkpoints.load_newest()
    assert found is not None and found[0] == config.steps
    if config.method.synthetic == "network":
        networks = network.load(folder)
        assert len(networks) == len(summary["errors"]) == config.train.networks and networks.theta.isfinite().all()
        assert summary["test"]["mean"] == pytest.approx(1 - sum(summary["errors"]) / len(networks) / summary["test_images"])
        return
    names = {"accuracy", "attacked_accuracy", "success"} if config.method.objective == "poison" else set()
    names |= {"without_teacher"} if config.method.loss == "distillation" else set()
    assert set(summary["figures"]) == names
    judged = summary["test"]["mean"] * summary["test"]["n"] * SMOKE[2]
    assert judged == pytest.approx(round(judged), abs=1e-6)  # whole images, of the few that a smoke run judges
    for name in ("distilled.safetensors", "distilled-last.safetensors"):
        made = metadist.load(str(folder / name))
        generated = config.generator.batch * config.inner.steps
        count = generated if config.method.synthetic == "generator" else config.ipc * 10
        assert len(made.images) == count == summary["images"] and (made.maker is not None) == (count == generated)
        assert bool(made.images.isfinite().all()) and bool((made.lr > 0).all())
        matched = config.method.gradient == "trajectory"  # what is recorded is longer than what is differentiated
        steps = config.trajectory.replay if matched else config.inner.steps * config.inner.epochs
        assert len(made.order) == steps == len(made.lr)
        assert made.manifest["method"] == config.method.name and made.manifest["data"] == config.data.name
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) >= 8
    assert (folder / "images.png").is_file() and list(folder.glob("events.out.tfevents.*"))
    found = RunFolder.attach(folder).checkpoints.load_newest()
    assert found is not None and found[0] == config.steps
    # The same command again prints the result and computes nothing.
    stamp = (folder / "summary.json").stat().st_mtime_ns
    assert program(words) == 0 and summary["text"] in capsys.readouterr().out
    assert (folder / "summary.json").stat().st_mtime_ns == stamp
