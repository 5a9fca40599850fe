"""The Python API: a user's own Dataset, module and loss; resume, refusal, evaluation, and the names in the package."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import metadist
from metadist import draw
from metadist.errors import UserError
from metadist.synthetic.distilled import DistilledSet

SMALL = {
    "steps": 6, "tasks": 2, "ipc": 2, "real_batch": 16, "threads": 1, "device": "cpu",
    "inner": {"steps": 2, "epochs": 1, "lr": 0.2},
    "engine": {"compile": "off", "group": 2, "dtype": "float64"},
    "eval": {"every": 3, "nets": 2, "final_nets": 4},
    "run": {"checkpoint_every": 2, "log_every": 3},
    "meta": {"lr": 0.1, "lr_rate": 0.1, "schedule": "constant", "clip": 0.0, "ema": 0.0},
}  # fmt: skip


class Stripes(Dataset[Any]):
    """6 x 6 images in three classes: which two rows are lit. uint8, noisy."""

    classes = ("top", "middle", "bottom")

    def __init__(self, seed: int, count: int = 90) -> None:
        self.x = draw.integers(draw.key(seed, "stripes"), (count, 1, 6, 6), 120).to(torch.uint8)
        for i in range(count):
            self.x[i, :, 2 * (i % 3) : 2 * (i % 3) + 2] += 90

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], i % 3


class Net(nn.Module):
    """A module metadist knows nothing of."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def distil(folder: Path, **changes: Any) -> DistilledSet:
    given: dict[str, Any] = {"train": Stripes(0), "test": Stripes(1, 30), "net": Net, "run_dir": folder, **SMALL, **changes}
    return metadist.distil(given.pop("train"), given.pop("test"), **given)


def same(a: DistilledSet, b: DistilledSet) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.lr, b.lr)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of six steps."""
    folder = tmp_path_factory.mktemp("api") / "run"
    distil(folder)
    return folder


def test_distil_own_dataset_and_module(made: Path) -> None:
    found = metadist.load(made)
    assert found.images.shape == (6, 1, 6, 6) and found.classes == Stripes.classes
    assert found.manifest["data"].startswith("Stripes-") and found.manifest["net"]["target"].startswith("Net-")
    summary = json.loads((made / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["test"]["n"] == 4
    assert (made / "images.png").is_file()


def test_same_call_on_a_finished_run_only_reads(made: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in made.rglob("*"))
    assert same(distil(made), metadist.load(made))
    assert sorted((p, p.stat().st_mtime_ns) for p in made.rglob("*")) == before


def test_raised_steps_resume_as_if_never_ended(made: Path, tmp_path: Path) -> None:
    distil(tmp_path / "part", steps=4)
    resumed = distil(tmp_path / "part")
    assert json.loads((tmp_path / "part" / "summary.json").read_text())["steps"] == 6
    last = "distilled-last.safetensors"
    assert same(metadist.load(tmp_path / "part" / last), metadist.load(made / last))
    assert resumed.images.shape == (6, 1, 6, 6)


def test_ctrl_c_saves_and_raises_keyboard_interrupt(made: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def interrupting(phi: Any, task: Any, setup: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        value: Tensor = setup.method.loss(phi, task)
        return value

    with pytest.raises(KeyboardInterrupt):
        distil(tmp_path, loss=interrupting, steps=200)
    kept = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert kept and not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"train": Stripes(2)}, "data.name"),
        ({"test": Stripes(2, 30)}, "data.name"),
        ({"net": lambda: Net(13)}, "net.target"),
        ({"net": nn.Sequential(nn.Flatten(), nn.Linear(36, 3))}, "net.target"),
        ({"loss": lambda phi, task, setup: setup.method.loss(phi, task)}, "method.name"),
        ({"seed": 5}, "seed"),
    ],
)
def test_a_folder_refuses_another_identity(made: Path, change: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"holds another run .*{key}"):
        distil(made, **change)


def test_own_loss_takes_the_methods_place(made: Path, tmp_path: Path) -> None:
    def unchanged(phi: dict[str, Tensor], task: Any, setup: Any) -> Tensor:
        value: Tensor = setup.method.loss(phi, task)
        return value

    def shrink(phi: dict[str, Tensor], task: Any, setup: Any) -> Tensor:
        return phi["images"].square().sum().expand(len(task.theta0))

    assert torch.equal(distil(tmp_path / "same", loss=unchanged).images, metadist.load(made).images)
    distil(tmp_path / "other", loss=shrink)
    shrunk = metadist.load(tmp_path / "other" / "distilled-last.safetensors")
    untrained = draw.normal(draw.key(0, "images", 0, torch.zeros((), dtype=torch.int64)), (6, 1, 6, 6))
    assert shrunk.images.norm() < 0.8 * untrained.norm()
    assert shrunk.manifest["method"].startswith("dd_random_init+shrink-")


def test_own_loss_of_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one loss a task, a tensor \[\d\] here; it returned shape \[\]"):
        distil(tmp_path, loss=lambda phi, task, setup: phi["images"].sum())


def test_evaluate_by_own_images_and_module(made: Path, tmp_path: Path) -> None:
    longer = distil(tmp_path, steps=60, **{"run.log_every": 60, "eval.every": 60})
    test = Stripes(1, 30)
    good = metadist.evaluate(longer, test, Net, nets=30)
    assert good.n == 30 and good.mean > 0.8 and good.ci95 is not None and 0 <= good.ci95 < good.mean
    # The figure is that of replaying the set on as many networks; another Dataset of swapped labels is read as wrong.
    x = longer.normalize(test.x / 255)
    replayed = []
    for seed in range(30):
        torch.manual_seed(seed)
        net = longer.replay(Net())
        replayed.append(float((net(x).argmax(1) == torch.arange(30) % 3).double().mean()))
    assert abs(sum(replayed) / 30 - good.mean) < 0.1
    wrong = TensorDataset(test.x, (torch.arange(30) + 1) % 3)
    assert metadist.evaluate(longer, wrong, Net, nets=5).mean < 0.2
    assert metadist.evaluate(str(tmp_path), test, "mlp", nets=2).n == 2


def test_load_and_replay_in_three_lines(made: Path) -> None:
    distilled = metadist.load(made)
    net = distilled.replay(Net())
    logits = net(distilled.normalize(torch.rand(5, 1, 6, 6)))
    assert logits.shape == (5, 3) and not net.training


def test_distil_leaves_the_callers_hydra_alone(made: Path, tmp_path: Path) -> None:
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        assert same(distil(made), metadist.load(made))
        assert GlobalHydra.instance().hydra is theirs is not None


def test_named_data_and_net_fixed_start(tmp_path: Path) -> None:
    settings = {**SMALL, "steps": 2, "data.size": 8}
    found = metadist.distil("digits", net="mlp", method="dd_fixed_init", run_dir=tmp_path, **{**settings, "net.width": 16})
    assert found.manifest["net"]["width"] == 16 and found.start() is not None
    result = metadist.evaluate(found, nets=7)
    assert result.n == 1  # the one initialization it is for
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert result.mean == pytest.approx(summary["test"]["mean"], abs=0.01)  # that was float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metadist.distil("digits", stepz=3), "stepz.*steps"),
        (lambda: metadist.distil("mnits"), "did you mean mnist"),
        (lambda: metadist.distil("digits", workers=2), "launch/local.py"),
        (lambda: metadist.distil("digits", Stripes(0)), "leave test out"),
        (lambda: metadist.distil(test=Stripes(0)), "without train"),
        (lambda: metadist.distil("digits", method="lower_bound"), "demonstration"),
        (lambda: metadist.distil("digits", inner={"steps": "few"}), "inner.steps=.*whole number"),
        (lambda: metadist.distil("digits", steps=object()), "steps is given a object"),
        (lambda: metadist.distil(Stripes(0), net=lambda: 3), "makes a int"),
        (lambda: metadist.load("nothing-here"), "unknown"),
    ],
)
def test_mistakes_are_one_line(call: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"net": Net}, "author's own.*give data="),
        ({"data": Stripes(1, 30)}, "author's own.*give net="),
        ({"data": "digits", "net": Net}, "classes"),
        ({"data": TensorDataset(torch.zeros(4, 1, 6, 6), torch.tensor([0, 1, 2, 3])), "net": Net}, "label 3"),
        ({"data": Stripes(1, 30), "net": Net, "nets": 0}, "nets=0"),
    ],
)
def test_evaluate_says_what_does_not_fit(made: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        metadist.evaluate(made, **arguments)


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        # what ends a job's start, lists runs, submits: on a login node, or once for every start
        ("metadist.run.cluster.after, metadist.run.cluster.status, metadist.run.cluster.command, metadist.store", "torch"),
        # what every worker imports
        ("metadist.run.trainer, metadist.exchange, metadist.data", "sklearn matplotlib torchvision torch._dynamo"),
    ],
)
def test_what_starts_often_imports_nothing_heavy(modules: str, without: str) -> None:
    code = f"import sys, {modules}\nprint(*({set(without.split())} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n", f"{modules} bring along {done.stdout}"


def test_import_is_light_and_evaluate_is_room_and_function() -> None:
    code = """
import sys, metadist
assert "torch" not in sys.modules and "hydra" not in sys.modules
assert {"distil", "load", "load_network", "evaluate", "DistilledSet"} <= set(dir(metadist))
assert metadist.UserError.__name__ == "UserError" and "torch" not in sys.modules
assert callable(metadist.evaluate)
from metadist.evaluate.statistics import Summary
assert metadist.evaluate.statistics.Summary is Summary and callable(metadist.evaluate)
try:
    metadist.distill
except AttributeError as e:
    assert "distill" in str(e)
else:
    raise AssertionError
try:
    metadist.evaluate("nothing-here")
except metadist.UserError as e:
    print("refused:", e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: distilled set=nothing-here")
