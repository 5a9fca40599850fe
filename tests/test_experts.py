"""Expert trajectories: what the store holds and refuses, what training makes, killed and resumed = uninterrupted, words."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_helpers import Nursery, until
from slurm_programs import Programs, shown
from torch import Tensor, nn
from torch.func import grad

from metadist import data as data_room
from metadist import draw, nets, store
from metadist.config import Config
from metadist.data import dsa
from metadist.errors import RunError, UserError
from metadist.metagrad.inner import Inner
from metadist.metagrad.optimizers import Optimizer
from metadist.metagrad.sharpness import sharpness_aware
from metadist.run import trajectories
from metadist.run.cluster import after_member, record
from metadist.run.cluster import experts as on_cluster
from metadist.run.compose import compose
from metadist.run.experts import command, experts_dir, open_experts, recipe
from metadist.run.experts_command import main
from metadist.run.helptext import header
from metadist.run.overrides import groups
from metadist.store.coding import Trajectory
from metadist.store.experts import ExpertStore, file_name, key_of, prepare, write_expert

pytestmark = pytest.mark.usefixtures("one_thread")
REAL = os.environ.get("METADIST_DATA")
PROGRAM = "metadist.run.experts_command"
TINY = ["data=digits", "net=mlp", "net.width=8", "net.depth=1", "threads=1", "device=cpu", "experts.images=256"]


# --- the code of differences --------------------------------------------------------------------------------------------------


def walk(epochs: int, size: int = 4000, seed: int = 0) -> Tensor:
    """Snapshots [epochs + 1, P] of a walk whose steps shrink, with entries of many magnitudes."""
    keys = draw.key(seed, "walk", 0, torch.arange(epochs + 1))
    magnitude = 10.0 ** (-6 * draw.uniform(draw.key(seed, "magnitude"), (size,)))
    steps = draw.normal(keys, (size,)) * magnitude * (0.9 ** torch.arange(epochs + 1))[:, None]
    steps[0] = draw.normal(keys[0], (size,))
    return steps.cumsum(0)


def coded(theta: Tensor) -> Trajectory:
    out = Trajectory(theta[0])
    for row in theta[1:]:
        out.add(row)
    return out


def one_store(folder: Path, theta: Tensor, made: dict[str, object] | None = None, experts: int = 1) -> ExpertStore:
    about = made or {"experts": {"epochs": len(theta) - 1}}
    key = prepare(folder, about, {"weight": [theta.shape[1]]})
    for i in range(experts):
        write_expert(folder, i, key, coded(theta), {"valid_accuracy": 0.5})
    return ExpertStore(folder)


def test_errors_of_float16_differences_do_not_add_up(tmp_path: Path) -> None:
    theta = walk(40)
    read = one_store(tmp_path, theta).weights(0, range(41))
    assert torch.equal(read[0], theta[0]) and read.dtype == torch.float32
    steps = theta.diff(dim=0)
    for t in range(1, 41):
        # One rounding of the newest difference: 2^-11 / 2 of its largest entry at most, and that of float32 itself.
        bound = steps[t - 1].abs().max() * 2.0**-11 + theta[t].abs().max() * 2.0**-22
        assert (read[t] - theta[t]).abs().max() <= bound
    # The same differences without feedback: each rounding stays for ever.
    open_loop = theta[0] + sum((s * 2.0**14).half().float() / 2.0**14 for s in steps)
    assert (read[-1] - theta[-1]).norm() < 0.05 * (open_loop - theta[-1]).norm()
    for m in (1, 2, 10):
        true, got = theta[m:] - theta[:-m], read[m:] - read[:-m]
        assert float(((got - true).norm(dim=1) / true.norm(dim=1)).max()) < 6e-4
    assert coded(theta).error < 6e-4
    assert (tmp_path / file_name(0)).stat().st_size < 0.53 * 4 * theta.numel()


@pytest.mark.parametrize("size", [1e-12, 1e-7, 1.0, 1e4])
def test_no_magnitude_is_lost(tmp_path: Path, size: float) -> None:
    theta = torch.stack((torch.zeros(500), size * torch.linspace(-1, 1, 500), torch.zeros(500), torch.zeros(500)))
    trajectory = coded(theta)
    codes = trajectory.tensors()["codes"].float()
    assert bool(codes.isfinite().all()) and 2.0**14 <= float(codes[0].abs().max()) < 2.0**15
    read = one_store(tmp_path, theta).weights(0, [1, 3])
    assert float(((read[0] - theta[1]).abs() / theta[1].abs()).max()) < 2.0**-11
    assert bool((read[1] == 0).all())


def test_rows_come_in_the_order_asked_for_from_many_readers(tmp_path: Path) -> None:
    theta = walk(6, 50)
    one, other = one_store(tmp_path, theta), ExpertStore(tmp_path)
    assert (one.count, one.epochs, one.size) == (1, 6, 50)
    every = one.weights(0, range(7))
    assert torch.equal(other.weights(0, [5, 0, 5, 2]), every[[5, 0, 5, 2]])
    assert other.weights(0, []).shape == (0, 50)
    assert torch.equal(every[6], coded(theta).decoded)
    every.zero_()  # a copy: what was read can't be spoilt by a reader
    assert torch.equal(one.weights(0, [0])[0], theta[0])


def test_a_trajectory_goes_on_from_what_a_checkpoint_keeps() -> None:
    theta = walk(6, 300)
    half = coded(theta[:4])
    saved = {k: v.clone() for k, v in {**half.tensors(), **half.rest()}.items()}
    again = Trajectory.of(saved)
    for row in theta[4:]:
        again.add(row)
    whole = coded(theta)
    assert all(torch.equal(v, whole.tensors()[k]) for k, v in again.tensors().items())
    assert again.error == whole.error and torch.equal(again.decoded, whole.decoded)


# --- what the store refuses ---------------------------------------------------------------------------------------------------


def refused(folder: Path, what: str, kind: type[Exception] = RunError, made: dict[str, object] | None = None) -> str:
    with pytest.raises(kind, match=what) as caught:
        ExpertStore(folder, made).weights(1, [1])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    one_store(tmp_path / "s", walk(3, 200), experts=3)
    return tmp_path / "s"


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / file_name(1)).unlink()
    assert ExpertStore(folder).count == 1  # still being made
    (folder / "summary.json").write_text(json.dumps({"count": 3}))
    assert "expert-00001.safetensors is missing (3 experts were finished there)" in refused(folder, "missing")
    with pytest.raises(UserError, match=r"no experts in .*nowhere"):
        ExpertStore(folder / "nowhere")


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder: Path, left: int) -> None:
    path = folder / file_name(1)
    path.write_bytes(path.read_bytes()[:left])
    assert str(path) in refused(folder, "cut short")


def test_an_altered_file_is_named_at_its_first_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proven: list[str] = []
    monkeypatch.setattr("metadist.store.experts.prove", lambda data, path: (proven.append(Path(path).name), prove(data, path)))
    from metadist.store.files import prove

    opened, path = ExpertStore(folder), folder / file_name(1)
    for _ in range(3):
        opened.weights(1, [0, 3])
    opened.weights(0, [1])
    assert proven == [file_name(1), file_name(0)]  # once a process, not once a read
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert str(path) in refused(folder, "its SHA-256 does not fit")
    with pytest.raises(RunError, match="its SHA-256 does not fit"):
        opened.weights(1, [0])  # one who had it open sees that it has changed


def test_foreign_files_are_named(folder: Path, tmp_path: Path) -> None:
    theta, path = walk(3, 200), folder / file_name(1)
    one_store(tmp_path / "other", theta, {"experts": {"epochs": 3, "lr": 0.5}}, experts=2)
    shutil.copy(tmp_path / "other" / file_name(1), path)
    assert str(path) in refused(folder, "it belongs to another recipe")
    key = str(json.loads((folder / "manifest.json").read_text())["key"])
    write_expert(folder, 1, key, coded(walk(3, 100)), {})
    refused(folder, "another store: its size is 100, not 200")
    write_expert(folder, 1, key, coded(theta[:3]), {})
    refused(folder, "another store: its epochs is 2, not 3")
    shutil.copy(folder / file_name(2), path)
    refused(folder, "another store: its expert is 2, not 1")
    store.save_tensors(path, {"theta": theta}, {"mine": True})
    refused(folder, "another store: its expert is None")
    path.write_bytes(b"PK\x03\x04" + bytes(5000))
    refused(folder, "not written by metadist")


@pytest.mark.parametrize("about", [[], "text", {"expert": 1}, 7])
def test_a_header_that_lies_is_named(folder: Path, about: object) -> None:
    """Whatever stands in it: one line, no traceback."""
    path = folder / file_name(1)
    for offsets in ([], [0, "many"], [0, float("inf")], None, [0, 10**30]):
        entry = {"dtype": "F32", "shape": [1], "data_offsets": offsets}
        told = json.dumps({"__metadata__": {"metadist": json.dumps({"content": about})}, "first": entry}).encode()
        path.write_bytes(len(told).to_bytes(8, "little") + told)
        assert str(path) in refused(folder, "cannot be trusted")
    for length in (2**63, 2**64 - 1, 60000):  # longer than the file; a tower of brackets
        path.write_bytes(length.to_bytes(8, "little") + b"[" * 60000)
        assert str(path) in refused(folder, "cannot be trusted")


def test_a_proven_file_of_other_tensors_is_named(folder: Path) -> None:
    key = str(json.loads((folder / "manifest.json").read_text())["key"])
    about, plain = {"expert": 1, "epochs": 3, "size": 200, "key": key}, coded(walk(3, 200)).tensors()
    path = folder / file_name(1)
    for changed, what in (
        ({"codes": plain["codes"].float()}, r"its codes are F32 \[3, 200\], not F16 \[3, 200\]"),
        ({"first": plain["first"][:9]}, r"its first are F32 \[9\], not F32 \[200\]"),
    ):
        store.save_tensors(path, plain | changed, about)
        assert str(path) in refused(folder, what)
    store.save_tensors(path, {"first": plain["first"]}, about)
    assert str(path) in refused(folder, "its header is not one of metadist's")


@pytest.mark.parametrize("made", [{"experts": {}}, {"experts": 3}, {"experts": {"epochs": "x"}}, {"experts": {"epochs": 0}}])
def test_a_manifest_that_lies_is_named(folder: Path, made: dict[str, object]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({"key": key_of(made), "recipe": made, "parameters": {"weight": [200]}}))
    assert str(path) in refused(folder, "epochs or parameters are none")
    good = {"experts": {"epochs": 3}}
    for parameters in ([], {"weight": 3}, {"weight": ["a", "b"]}, {}):
        path.write_text(json.dumps({"key": key_of(good), "recipe": good, "parameters": parameters}))
        assert str(path) in refused(folder, "epochs or parameters are none")


def test_another_recipe_is_refused_with_the_difference(folder: Path) -> None:
    text = refused(folder, "made otherwise", UserError, {"experts": {"epochs": 4}, "net": {"name": "mlp"}})
    assert "(experts.epochs: 3 -> 4, net.name: None -> mlp; recorded -> given)" in text
    with pytest.raises(UserError, match=r"another net of that name \(200 parameters, now 30\)"):
        prepare(folder, {"experts": {"epochs": 3}}, {"weight": [30]})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["recipe"]["experts"]["epochs"] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(folder, "its key does not fit its recipe")
    (folder / "manifest.json").write_text("{")
    refused(folder, "manifest.json cannot be trusted")


def test_more_than_there_is_is_refused_where_it_is_asked_for(folder: Path) -> None:
    found = ExpertStore(folder)
    found.require(3, 3)
    for what, ask in (
        ("holds 3 finished experts, experts.count=4 asks for more", lambda: found.require(4)),
        ("have 3 epochs, and snapshots up to epoch 4", lambda: found.require(3, 4)),
        ("has no expert 3; allowed: 0 to 2", lambda: found.weights(3, [0])),
        ("has no snapshot after epoch 4; allowed: 0 to 3", lambda: found.weights(0, [1, 4])),
        ("has no snapshot after epoch -1", lambda: found.weights(0, [-1])),
    ):
        with pytest.raises(UserError, match=what):
            ask()


# --- sharpness ----------------------------------------------------------------------------------------------------------------


def test_sam_and_gsam_step_as_their_papers_say() -> None:
    """On a quadratic, in closed form, for two networks at once; the optimizer sees nothing of it."""
    a = torch.diag(torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64))
    theta = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, 2.0]], dtype=torch.float64)
    shift = torch.tensor([[[0.1, 0.2, 0.3]], [[0.0, 1.0, 0.0]]], dtype=torch.float64)

    def loss(t: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return 0.5 * (t - batch[0][0]) @ a @ (t - batch[0][0])

    for kind in ("none", "sam", "gsam"):
        inner = Inner(sharpness_aware(loss, kind, rho=0.3, alpha=0.4), Optimizer("sgd"), shared=False)
        after = inner.train(theta, (shift.unsqueeze(1),), (0,), torch.full((1, 1), 0.1, dtype=torch.float64))
        for i in range(2):
            g = a @ (theta[i] - shift[i, 0])
            worst = a @ (theta[i] + 0.3 * g / g.norm() - shift[i, 0])
            across = g - worst * (g @ worst) / (worst @ worst)
            step = {"none": g, "sam": worst, "gsam": worst - 0.4 * across}[kind]
            assert (after[i] - (theta[i] - 0.1 * step)).abs().max() < 1e-12
            assert kind != "gsam" or abs(float(across @ worst)) < 1e-12 < float(across.norm())


def test_a_gradient_of_zero_has_no_direction() -> None:
    for kind in ("sam", "gsam"):
        loss = sharpness_aware(lambda t, batch: (t**2).sum(), kind, 0.1, 0.3)
        assert torch.equal(grad(loss)(torch.zeros(3), ()), torch.zeros(3))


# --- training -----------------------------------------------------------------------------------------------------------------


def run(at: Path, *words: str) -> ExpertStore:
    """``launch/experts.py``, here. words: a later one of a key replaces an earlier one."""
    every = {w.partition("=")[0]: w for w in (*TINY, f"cache_dir={at}", *words)}
    assert main(list(every.values())) == 0
    return ExpertStore(experts_dir(configured(*every.values())))


def configured(*words: str) -> Config:
    return compose(words, judge=lambda config, keys: None)


def content(found: ExpertStore) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(found.folder.glob("expert-*"))}


def test_an_expert_is_ordinary_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against torch's own SGD on the module, in float64: momentum, decay, a last batch that is not full, an order a pass."""
    words = ["experts.count=2", "experts.epochs=3", "experts.batch=100", "experts.lr=0.05", "experts.momentum=0.9",
             "engine.dtype=float64",
             "experts.weight_decay=0.01", "experts.seed=3"]  # fmt: skip
    found, config = run(tmp_path, *words), configured(*TINY, *words)
    data = data_room.load(config.data, "cpu", torch.float64)
    learner = nets.build(config.net, 1, 8, 10, torch.float64)
    for i in range(2):
        theta0 = learner.init(draw.key(3, "expert theta0", 0, torch.tensor([i])))[0]
        module = learner.module(theta0)
        sgd = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        for epoch in range(3):
            key = draw.split(draw.key(3, "expert order", 0, torch.tensor([i])), epoch)
            order = draw.permutation(draw.split(key, 0), len(data.train))[0, :256]
            for rows in order.split(100):
                sgd.zero_grad()
                nn.functional.cross_entropy(module(data.train.x[rows]), data.train.y[rows]).backward()
                sgd.step()
            theta = learner.flatten(module)
            assert (found.weights(i, [epoch + 1])[0] - theta).abs().max() < 4e-4 * (theta - theta0).abs().max()
        right = (learner.module(theta)(data.valid.x).argmax(1) == data.valid.y).double().mean()
        assert found.figures(i)["valid_accuracy"] == pytest.approx(float(right))
    out = capsys.readouterr().out
    assert (
        f"2 experts x 3 epochs: {100 * (found.figures(0)['valid_accuracy'] + found.figures(1)['valid_accuracy']) / 2:.2f}"
        in out
    )
    assert str(found.folder) in out


def test_more_experts_are_added_to_those_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experts.epochs=2", "experts.group=3"]
    few = content(run(tmp_path, *words, "experts.count=2"))
    stamps = {name: next(tmp_path.rglob(name)).stat().st_mtime_ns for name in few}
    more = run(tmp_path, *words, "experts.count=7")
    assert more.count == 7 and {k: v for k, v in content(more).items() if k in few} == few
    assert {name: next(tmp_path.rglob(name)).stat().st_mtime_ns for name in few} == stamps
    assert list(content(run(tmp_path / "new", *words, "experts.count=7")).values()) == list(content(more).values())
    assert not list(more.folder.glob("partial/*"))
    capsys.readouterr()
    began = time.monotonic()
    assert main([*TINY, f"cache_dir={tmp_path}", "epochs=2", "experts.group=3", "experts=7"]) == 0  # all there: only said again
    assert time.monotonic() - began < 5 and capsys.readouterr().out.startswith("7 experts x 2 epochs: ")


def test_what_a_kill_left_of_finished_experts_is_cleared(tmp_path: Path) -> None:
    words = [*TINY, "epochs=1", "experts.group=1", f"experts.path={tmp_path}"]
    for name in ("00000-00000", "00001-00001", "00000-00003", "mine"):
        (tmp_path / "partial" / name).mkdir(parents=True)
    assert main([*words, "experts=1"]) == 0
    # Those of experts that are not there yet stay: somebody may be at work on them.
    assert {p.name for p in (tmp_path / "partial").iterdir()} == {"00001-00001", "00000-00003", "mine"}


def test_augmentation_is_drawn_for_each_network_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    real = dsa.apply

    def spy(parameters: Tensor, x: Tensor) -> Tensor:
        seen.append(parameters)
        return real(parameters, x)

    monkeypatch.setattr(trajectories.dsa, "apply", spy)
    words = ["experts.count=2", "experts.epochs=1", "experts.batch=64", f"experts.dsa={dsa.MIRROR_FREE}"]
    augmented = run(tmp_path, *words)
    assert [tuple(p.shape) for p in seen] == [(10, 64, dsa.WIDTH)] * 4  # a group is trained in full
    flat = torch.cat(seen).flatten(0, 1)
    identity = dsa.parameters("none", draw.key(0, "x"), 1, 8)[0]
    moved = (flat != identity).any(1)  # crops and boxes are whole pixels: some of them meet
    assert len(torch.unique(flat[moved], dim=0)) > 0.6 * int(moved.sum())
    one_kind = [{tuple(((row != identity).any(0)).nonzero()[:, 0].tolist()) for row in p.split(64)} for p in torch.cat(seen)]
    assert all(len(kinds) == 1 for kinds in one_kind) and len(set.union(*one_kind)) > 3
    plain = run(tmp_path, *words[:-1])
    assert not torch.equal(plain.weights(0, [1]), augmented.weights(0, [1]))
    assert torch.equal(plain.weights(0, [0]), augmented.weights(0, [0])) and plain.folder != augmented.folder


def test_sharpness_is_trained_and_batch_norm_is_judged(tmp_path: Path) -> None:
    paths = {
        kind: run(tmp_path, "experts.count=1", "experts.epochs=2", f"experts.sharpness={kind}")
        for kind in ("none", "sam", "gsam")
    }
    ends = [found.weights(0, [2]) for found in paths.values()]
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])
    convnet = ["net=convnet", "net.width=4", "net.depth=1", "net.norm=batch", "experts.lr=0.1", "experts.batch=16"]
    words = [w for w in TINY if not w.startswith("net")]
    assert main([*words, *convnet, "experts=2", "epochs=4", "experts.group=1", f"cache_dir={tmp_path}"]) == 0
    summary = json.loads(next(tmp_path.glob("experts/digits-convnet-*/summary.json")).read_text())
    assert summary["accuracy"] > 0.4 and abs(summary["accuracy"] - summary["decoded"]) < 0.02


def test_a_network_that_diverges_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "experts=2", "epochs=2", "experts.lr=1e30", f"cache_dir={tmp_path}"]) == 1
    line = r"error: expert \d diverged in epoch [12]: its weights are not finite; lower experts\.lr \(now 1e\+30\)\n"
    assert re.fullmatch(line, capsys.readouterr().err)


# --- killed, resumed, shared --------------------------------------------------------------------------------------------------

LONG = [*TINY, "experts.count=4", "experts.epochs=12", "experts.group=2", "experts.momentum=0.5", "run.checkpoint_s=0.02",
        "experts.batch=32", f"experts.dsa={dsa.MIRROR_FREE}"]  # fmt: skip


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as ours:
        yield ours


@pytest.fixture(scope="module")
def uninterrupted(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    at = tmp_path_factory.mktemp("uninterrupted")
    nursery.run([*LONG, f"cache_dir={at}"], at, program=PROGRAM)
    return content(ExpertStore(next(at.glob("experts/*"))))


def made(at: Path) -> dict[str, bytes]:
    folder = next(at.glob("experts/*"))
    assert not list(folder.glob("partial/*")) and not list(folder.glob(".*"))
    return content(ExpertStore(folder))


def checkpoints(at: Path) -> list[Path]:
    return list(at.glob("experts/*/partial/*/step-*.safetensors"))


@pytest.mark.slow
def test_killed_anywhere_the_files_are_the_same(nursery: Nursery, tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    rng, before = random.Random(7), ""
    for _ in range(3):
        started = nursery.start([*LONG, f"cache_dir={tmp_path}"], tmp_path, program=PROGRAM)
        mark = before
        until(lambda: started.poll() is not None or (newest(tmp_path) or mark) != mark, "a new checkpoint")  # noqa: B023
        time.sleep(rng.uniform(0, 0.2))
        if started.poll() is None:
            started.kill()
        assert started.wait() in (-signal.SIGKILL, 0)
        before = newest(tmp_path) or ""
    nursery.run([*LONG, f"cache_dir={tmp_path}"], tmp_path, program=PROGRAM)
    assert made(tmp_path) == uninterrupted and len(uninterrupted) == 4


def newest(at: Path) -> str:
    return max((str(p.relative_to(at)) for p in checkpoints(at)), default="")


def test_a_signal_leaves_a_checkpoint_and_one_line(nursery: Nursery, tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    words = [*(w for w in LONG if not w.startswith("run.")), "run.checkpoint_s=0", f"cache_dir={tmp_path}"]
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        started = nursery.start(words, tmp_path, program=PROGRAM)
        until(lambda: list(tmp_path.glob("experts/*/manifest.json")), "the training")
        started.kill(number)
        assert started.wait() == status and started.err == ""
        name = signal.Signals(number).name
        assert started.out.splitlines()[-1] == f"stopped by {name} with a checkpoint; run the same command again to go on"
        next(tmp_path.glob("experts/*/manifest.json")).unlink()  # the next start makes it again: then it listens
    assert checkpoints(tmp_path)
    nursery.run(words, tmp_path, program=PROGRAM)
    assert made(tmp_path) == uninterrupted


@pytest.mark.slow
def test_two_workers_make_the_same_files_though_one_is_killed(
    nursery: Nursery, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    started = nursery.start([*LONG, f"cache_dir={tmp_path}", "workers=2"], tmp_path, program=PROGRAM)
    until(lambda: checkpoints(tmp_path), "a group at work")
    worker = int(Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()[0])
    os.kill(worker, signal.SIGKILL)
    assert started.wait() == 0, (started.out, started.err)
    assert "killed (signal 9)" in started.err and started.out.splitlines()[-1].startswith("4 experts x 12 epochs: ")
    assert made(tmp_path) == uninterrupted


# --- words --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, line",
    [
        (["experts=0"], "experts.count=0 is out of range; allowed: at least 1"),
        (["epochs=0"], "experts.epochs=0 is out of range; allowed: at least 1"),
        (["epochs=two"], "experts.epochs=two is not a whole number"),
        (["experts.lr=-1"], "experts.lr=-1.0 is out of range; allowed: above 0"),
        (["experts.momentum=1"], "experts.momentum=1.0 is out of range"),
        (["experts.sharpness=same"], "experts.sharpness=same is unknown; did you mean sam?"),
        (["experts.rho=.1"], "experts.rho is not read here: it belongs to experts.sharpness=sam or gsam"),
        (["experts.sharpness=sam", "experts.gsam_alpha=1"], "experts.gsam_alpha is not read here"),
        (["inner.steps=3"], "inner.steps is not read here: it belongs to launch/local.py"),
        (["run_dir=x"], "run_dir is not read here"),
        (["nodes=4"], "cluster.nodes is not read here: it belongs to cluster=slurm"),
        (["workers=4", "experts=20"], "workers=4 is more than the 2 tasks (20 experts in groups of experts.group=10)"),
        (["net=gtn", "net.draw_width=true"], "net.draw_width=true makes nets of many widths"),
        (["experts.dsa=color_blur"], "augmentation=blur is unknown"),
        (["experts.dsa=flip"], "experts.dsa=flip mirrors images, and a mirrored digit of digits is no digit"),
        (["experts.lrr=1"], "experts.lrr=1: there is no key 'experts.lrr'; nearest: experts.lr"),
        (["experts.path="], "experts.path= names no folder; give one, or leave it out"),
        (["experts.path=/dev/null"], "the experts' folder /dev/null can't be made"),
        (["data=folder", "data.path=/nowhere"], "data.path=/nowhere is no folder"),
        (["--faster"], "flag=--faster is unknown"),
        (["net=lenet"], "net.name=lenet can't take 8x8 images"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = ["data=digits", "net=mlp", f"cache_dir={tmp_path}", "threads=1", "device=cpu", *words]
    assert main(list({w.partition("=")[0]: w for w in every}.values())) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {line}") and said.err.count("\n") == 1, said.err
    assert not list(tmp_path.rglob("expert-*"))
    assert not said.out or "net=lenet" in words  # before any work; what a net takes is known with the data


def test_a_folder_of_other_experts_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "experts=1", "epochs=1", f"experts.path={tmp_path / 's'}"]
    assert main(words) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main([*words, "experts.lr=.5"]) == 2
    err = capsys.readouterr().err
    assert "were made otherwise (experts.lr: 0.01 -> 0.5; recorded -> given)" in err and err.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_distilling_programs_refuse_what_is_for_experts() -> None:
    with pytest.raises(UserError, match=r"preset=mnist_experts is for python launch/experts.py"):
        compose(["preset=mnist_experts"])
    with pytest.raises(UserError, match=r"experts.lr is not read by this run: it belongs to method.gradient=trajectory"):
        compose(["experts.lr=1"])


def test_no_two_recipes_share_a_folder(tmp_path: Path) -> None:
    def place(*words: str) -> Path:
        every = ["data=digits", "net=mlp", f"cache_dir={tmp_path}", *words]
        return experts_dir(configured(*{w.partition("=")[0]: w for w in every}.values()))

    plain = place()
    assert plain.parent == tmp_path / "experts" and plain.name.startswith("digits-mlp-")
    others = [
        ["experts.epochs=51"], ["experts.images=9"], ["experts.lr=.02"], ["experts.momentum=.1"], ["experts.weight_decay=1e-4"],
        ["experts.batch=255"], ["experts.dsa=crop"], ["experts.sharpness=sam"], ["experts.sharpness=gsam"], ["experts.group=1"],
        ["experts.sharpness=sam", "experts.rho=.1"], ["experts.sharpness=gsam", "experts.gsam_alpha=.1"], ["experts.seed=1"],
        ["data.normalize=zca"], ["data.validation=.2"], ["data.split_seed=1"], ["data.size=16"], ["data.augment=crop"],
        ["net.width=64"], ["net.init=xavier"], ["net=lenet"], ["data=usps"], ["engine.dtype=float64"], ["smoke=true"],
    ]  # fmt: skip
    places = [plain, *(place(*words) for words in others)]
    assert len(set(places)) == len(places)
    for same in (["experts.count=3"], ["workers=2"], ["threads=1"], ["data.root=x"], ["seed=4"], ["engine.compile=on"]):
        assert place(*same) == plain
    assert place("experts.path=/x/y") == Path("/x/y")
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    (images / "a" / "1.png").write_bytes(b"one")
    before = place("data=folder", f"data.path={images}")
    (images / "a" / "1.png").write_bytes(b"two")
    assert place("data=folder", f"data.path={images}") != before


def test_a_method_opens_its_experts_or_says_how_to_make_them(tmp_path: Path) -> None:
    words = ["data=digits", "net=mlp", "net.width=8", "net.depth=1", "experts.count=3", "experts.epochs=2", "experts.images=99",
             f"cache_dir={tmp_path}"]  # fmt: skip
    config = configured(*words)
    with pytest.raises(UserError, match="there are no experts in") as caught:
        open_experts(config)
    said = command(config)
    assert str(caught.value).endswith(f"make them with: {said}")
    assert said.startswith("python launch/experts.py data=digits net=mlp ") and "experts.images=99" in said
    assert main(["threads=1", *said.split()[2:]]) == 0
    found = open_experts(config)
    assert (found.count, found.epochs) == (3, 2)
    config.experts.count = 2
    assert open_experts(config).count == 2
    config.experts.count = 4
    with pytest.raises(UserError, match=r"holds 3 finished experts of experts.count=4; go on with: python launch/experts.py"):
        open_experts(config)
    config.experts.count, config.experts.path, config.experts.lr = 3, str(found.folder), 0.5
    assert open_experts(config).count == 3  # a given store was trained as it was
    config.net.width = 9
    with pytest.raises(UserError, match="their net is"):
        open_experts(config)


PRESETS = [p for p in groups()["preset"] if "_experts" in p]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_what_it_is(preset: str) -> None:
    full, smoke = configured(f"preset={preset}"), configured(f"preset={preset}", "smoke=true")
    assert (full.data.name, full.net.name, full.net.depth) == (smoke.data.name, smoke.net.name, smoke.net.depth)
    assert smoke.experts.count * smoke.experts.epochs <= 4 < full.experts.count * full.experts.epochs
    assert set(header("preset", preset)) == {"title", "source", "cost", "command", "expect"}
    assert header("preset", preset)["command"].startswith(f"python launch/experts.py preset={preset} ")
    if "small" not in preset and "mnist" not in preset:  # as published
        c = full.experts
        assert (c.count, c.epochs, c.lr, c.momentum, c.weight_decay, c.batch, c.images) == (100, 50, 0.01, 0, 0, 256, 0)
        assert (full.net.width, c.dsa) == (128, dsa.ALL)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_in_small(preset: str, tmp_path: Path) -> None:
    if REAL is None:
        pytest.skip(f"{preset} needs $METADIST_DATA, a folder with torchvision's data sets")
    words = [f"preset={preset}", "smoke=true", "threads=1", "device=cpu", f"data.root={REAL}", f"cache_dir={tmp_path}"]
    assert main(words) == 0
    found = ExpertStore(next(tmp_path.glob("experts/*")))
    assert found.count == 2 and found.epochs == 2 and found.recipe["smoke"]


# --- SLURM --------------------------------------------------------------------------------------------------------------------


def test_on_slurm_it_is_an_array_of_workers(slurm: Programs) -> None:
    words = [*TINY, "experts=4", "epochs=2", "experts.group=1", "experts.path=x", "nodes=3", "cpus_per_task=2"]
    printed = slurm(*words, "cluster=print", program=main)
    assert (printed.code, printed.err) == (0, "") and slurm.asked == [] and not (slurm.place / "x").exists()
    for line in ("--array=0-2%3", "--nodes=1", "--cpus-per-task=2", "--requeue", "--signal=USR2@90"):
        assert f"#SBATCH {line}\n" in printed.out
    place = slurm.place / "x"
    assert f"-m metadist.run.cluster.experts {place}\n" in printed.out
    assert f"-m metadist.run.cluster.after_member $? {place}\n" in printed.out
    sent = slurm(*words, "cluster=slurm", program=main)
    assert sent.code == 0, sent.err
    assert slurm.received == printed.out.encode() and "submitted array 4711: 3 workers for 4 tasks" in sent.out
    assert json.loads((place / "config.json").read_text())["workers"] == 3
    assert slurm(*[w for w in words if w != "nodes=3"], "nodes=5", "cluster=slurm", program=main).err.startswith(
        "error: workers=5 is more than the 4 tasks"
    )
    far = slurm(*words, "cluster=slurm", program=main, mount=True)
    assert far.code == 2 and f"experts.path={place} can't be seen by the nodes" in far.err


def test_a_worker_of_the_array_works_leaves_and_is_requeued(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*TINY, "experts=2", "epochs=2", "experts.group=1", "experts.path=x", "nodes=2"]
    place = slurm.place / "x"
    assert slurm(*words, "cluster=slurm", program=main).code == 0
    for name, value in {"JOB_ID": "4712", "ARRAY_JOB_ID": "4711", "ARRAY_TASK_ID": "1", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    def element(argv: list[str]) -> int:
        return on_cluster.main([str(place)])

    # Preempted before its first group is done: a checkpoint, a word, a requeue.
    slurm.scontrol(shown("RUNNING", preempt="2026-11-21T04:30:00"))
    real = trajectories._Training.advance
    told: list[int] = []

    def warned(training: trajectories._Training, h: Tensor) -> None:
        if not told:
            told.append(1)
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.3)
        real(training, h)

    monkeypatch.setattr(trajectories._Training, "advance", warned)
    left = slurm(program=element, mount=True)
    assert left.code == 0 and "SIGUSR2: left with a checkpoint" in left.out, left.err
    assert len(list(place.glob("partial/*/step-*"))) == 1
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    after = slurm(program=lambda argv: after_member.main(["0", str(place)]), mount=True)
    assert "this worker: preempted: requeued" in after.out and "scontrol requeue 4712" in slurm.asked
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    done = slurm(program=element, mount=True)
    assert done.code == 0 and "2 experts x 2 epochs: " in done.out
    assert ExpertStore(place).count == 2 and after_member.main(["0", str(place)]) == 0
    assert record.read(place / "summary.json")["finished"]


def test_the_key_of_a_recipe_sees_every_leaf() -> None:
    config = configured("data=digits", "net=mlp")
    made = recipe(config)
    assert key_of(made) == key_of(json.loads(json.dumps(made)))
    assert {"maker", "data", "net", "experts", "dtype", "precision"} == set(made)
    assert "rho" not in made["experts"] and "count" not in made["experts"] and "root" not in made["data"]


def test_keys_that_came_later_leave_what_was_made_before_where_it_is() -> None:
    plain = recipe(compose(["data=digits", "net=mlp"]))
    assert not {"fraction", "exclude"} & plain["data"].keys() and not {"dropout", "input_dropout"} & plain["net"].keys()
    other = recipe(compose(["data=digits", "net=mlp", "data.fraction=.5"]))
    assert other["data"].pop("fraction") == 0.5 and other == plain
