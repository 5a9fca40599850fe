"""Real data: splits, normalization, whitening, augmentation, baselines, folders, a user's own Datasets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from metadist import draw
from metadist.config import DataConfig
from metadist.data import Normalization, Split, augment, baseline, from_datasets, load, normalization, sources, splits
from metadist.errors import RunError, UserError

REAL = os.environ.get("METADIST_DATA")
needs_real = pytest.mark.skipif(REAL is None, reason="METADIST_DATA (folder with torchvision data sets) is not set")
F64 = torch.float64


def digits(**changes: Any) -> Any:
    return load(DataConfig(name="digits", **changes), "cpu", F64)


def one_line(call: Callable[[], object], *words: str, error: type[Exception] = UserError) -> str:
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    return text


# --- splits -----------------------------------------------------------------------------------------------------------


def test_digits_shapes_and_types() -> None:
    data = digits()
    assert [tuple(s.x.shape) for s in (data.train, data.valid, data.test)] == [(1294, 1, 8, 8), (144, 1, 8, 8), (359, 1, 8, 8)]
    assert data.train.x.dtype == F64 and data.train.y.dtype == torch.int64
    assert (data.channels, data.size, len(data.classes), data.name) == (1, 8, 10, "digits")
    raw = data.normalization.invert(data.train.x)
    assert raw.min() >= -1e-12 and raw.max() == pytest.approx(1)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_digits_are_scikit_learn_s(elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, read from its file or, where another version keeps it elsewhere, by its own function."""
    if elsewhere:
        monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    x, y = sources.digits().train
    images, labels = load_digits(return_X_y=True)
    assert torch.equal(x, torch.from_numpy(images / 16.0).to(torch.float32).reshape(-1, 1, 8, 8))
    assert torch.equal(y, torch.from_numpy(labels).to(torch.int64))


def test_digits_splits_partition_the_whole() -> None:
    """Every one of the 1,797 images lies in exactly one split, with its own label."""
    data = digits(normalize="none")
    x, y = sources.digits().train

    def rows(images: Tensor, labels: Tensor) -> list[bytes]:
        flat = torch.cat([images.to(F64).flatten(1), labels.to(F64).unsqueeze(1)], 1)
        return sorted(r.numpy().tobytes() for r in flat)

    together = [torch.cat([getattr(s, k) for s in (data.train, data.valid, data.test)]) for k in ("x", "y")]
    assert rows(*together) == rows(x, y)


@pytest.mark.parametrize("fraction", [0.1, 1 / 6, 0.5])
def test_hold_out_is_stratified_disjoint_and_exact(fraction: float) -> None:
    y = torch.arange(1003) % 7
    y[:100] = 3
    kept, held = splits.hold_out(y, fraction, draw.key(5, "x"), "v", "m")
    assert sorted(kept.tolist() + held.tolist()) == list(range(1003))
    assert len(held) == round(fraction * 1003)
    for c in range(7):
        assert abs(int((y[held] == c).sum()) - fraction * int((y == c).sum())) < 1


def test_split_seed_moves_validation_but_never_the_test_split() -> None:
    a, b, c = digits(), digits(split_seed=1), digits()
    raw = [d.normalization.invert(d.test.x) for d in (a, b)]
    torch.testing.assert_close(raw[0], raw[1], rtol=0, atol=1e-12)
    assert torch.equal(a.valid.x, c.valid.x) and torch.equal(a.valid.y, c.valid.y)
    valid = [d.normalization.invert(d.valid.x) for d in (a, b)]
    assert (valid[0] - valid[1]).abs().max() > 0.5


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_validation_fraction_outside_0_1_is_refused(fraction: float) -> None:
    one_line(lambda: digits(validation=fraction), "data.validation", "between 0 and 1")


def test_validation_too_small_for_a_class_is_refused() -> None:
    one_line(lambda: digits(validation=0.001), "data.validation=0.001", "none would be held out")
    one_line(lambda: digits(validation=0.999), "data.validation=0.999", "none would be left")


def test_size_resizes_all_splits() -> None:
    data = digits(size=28, normalize="none")
    assert data.size == 28 and data.test.x.shape == (359, 1, 28, 28)
    raw = digits(normalize="none").test.x
    wanted = functional.interpolate(raw.float(), size=(28, 28), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(data.test.x, wanted.to(F64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "mnst"}, ("data=mnst", "did you mean mnist")),
        ({"normalize": "std"}, ("data.normalize=std", "standard")),
        ({"augment": "crops"}, ("data.augment=crops", "did you mean crop")),
        ({"augment": "crop_flip"}, ("data.augment=crop_flip", "mirror", "digits")),
        ({"name": "svhn", "augment": "flip"}, ("data.augment=flip", "svhn")),
        ({"size": 0}, ("data.size=0",)),
        ({"name": "folder"}, ("data.path",)),
        ({"name": "mnist", "root": "nowhere/at/all"}, ("nowhere/at/all", "data.download=true", "data.root")),
        ({"name": "cifar10", "root": "nowhere/at/all"}, ("nowhere/at/all", "data.download=true", "data.root")),
        ({"name": "usps", "root": "nowhere/at/all"}, ("nowhere/at/all", "data.download=true", "data.root")),
        ({"name": "svhn", "root": "nowhere/at/all"}, ("nowhere/at/all", "data.download=true", "data.root")),
    ],
)
def test_bad_configuration_is_one_line(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    one_line(lambda: load(DataConfig(**changes), "cpu", F64), *words)
    assert not Path("nowhere").exists()


# --- torchvision ------------------------------------------------------------------------------------------------------


def test_torchvision_layouts_become_nchw() -> None:
    pixel = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).reshape(2, 4, 5, 3).numpy()
    cifar, y = sources._tensors(SimpleNamespace(data=pixel, targets=[4, 1]))
    svhn, z = sources._tensors(SimpleNamespace(data=pixel.transpose(0, 3, 1, 2), labels=np.array([4, 1])))
    usps, _ = sources._tensors(SimpleNamespace(data=pixel[..., 0], targets=[4, 1]))
    assert cifar.shape == (2, 3, 4, 5) and int(cifar[1, 2, 3, 0]) == pixel[1, 3, 0, 2]
    assert torch.equal(svhn, cifar) and y.tolist() == z.tolist() == [4, 1] and y.dtype == torch.int64
    assert usps.shape == (2, 1, 4, 5) and torch.equal(usps[:, 0], cifar[:, 0])


def test_download_only_when_missing_and_a_failed_one_is_a_run_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def make(root: str, train: bool, download: bool) -> Any:
        asked.append(download)
        if not present and not download:
            raise RuntimeError("Dataset not found")
        if not present:
            raise OSError("name resolution\nfailed")
        y = np.arange(50) % 10
        return SimpleNamespace(data=np.zeros((50, 4, 4), np.uint8) + y[:, None, None].astype(np.uint8), targets=y)

    monkeypatch.setitem(sources._TORCHVISION, "mnist", make)
    cfg = DataConfig(name="mnist", root=str(tmp_path / "data"), download=True, validation=0.2)
    present = True
    assert len(load(cfg, "cpu", F64).valid) == 10
    assert asked == [False, False] and not (tmp_path / "data").exists()
    present = False
    one_line(lambda: load(cfg, "cpu", F64), "mnist", "downloaded", "name resolution failed", error=RunError)
    assert asked[-1] is True


def test_damaged_files_are_named_as_such(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 9, 0, 0, 0, 28, 0, 0, 0, 28, 1, 2, 3]))
    one_line(lambda: load(DataConfig(name="mnist", root=str(tmp_path)), "cpu", F64), "mnist can't be read", str(tmp_path))


@needs_real
@pytest.mark.parametrize(
    ("name", "train", "valid", "channels", "size"), [("mnist", 54000, 6000, 1, 28), ("cifar10", 45000, 5000, 3, 32)]
)
def test_real_data_has_the_published_statistics(name: str, train: int, valid: int, channels: int, size: int) -> None:
    data = load(DataConfig(name=name, root=str(REAL)), "cpu", torch.float32)
    assert (len(data.train), len(data.valid), len(data.test), data.channels, data.size) == (train, valid, 10000, channels, size)
    raw = data.normalization.invert(data.train.x)
    assert raw.min() > -1e-6 and raw.max() < 1 + 1e-6
    torch.testing.assert_close(raw.double().mean((0, 2, 3)), data.normalization.mean, atol=2e-3, rtol=0)
    assert data.normalization.mean.tolist() == list(normalization.PUBLISHED[name][0])
    counts = torch.bincount(data.valid.y).tolist()
    assert all(abs(v - t / 9) < 2 for v, t in zip(counts, torch.bincount(data.train.y).tolist(), strict=True))
    assert data.classes[1] == ("1" if name == "mnist" else "automobile")


# --- normalization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["standard", "zca", "none"])
def test_normalization_round_trip_and_storage(kind: str) -> None:
    data = digits(normalize=kind)
    wanted = digits(normalize="none").test.x
    copy = Normalization.from_tensors({k: v.clone() for k, v in data.normalization.tensors().items()})
    torch.testing.assert_close(copy.invert(data.test.x), wanted, atol=1e-6, rtol=0)
    assert torch.equal(copy.apply(wanted), data.test.x)
    assert all(t.is_contiguous() for t in copy.tensors().values())


def test_standard_uses_training_statistics_only() -> None:
    data, raw = digits(), digits(normalize="none")
    assert data.normalization.mean.item() == pytest.approx(raw.train.x.mean().item(), abs=1e-6)
    assert data.normalization.sd.item() == pytest.approx(raw.train.x.std(correction=0).item(), abs=1e-6)
    assert abs(raw.test.x.mean() - raw.train.x.mean()) > 1e-4
    torch.testing.assert_close(data.train.x.mean().item(), 0.0, atol=1e-5, rtol=0)


def test_measure_per_channel_in_chunks_and_constant_channel() -> None:
    x = draw.uniform(draw.key(0, "t"), (5000, 3, 2, 2), F64)
    x[:, 2] = 0.25
    mean, sd = normalization.measure(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(sd[:2], x[:, :2].permute(1, 0, 2, 3).flatten(1).std(1, correction=0), atol=1e-6, rtol=0)
    assert sd[2] == 1


def test_uint8_and_float_images_measure_alike() -> None:
    x = draw.integers(draw.key(0, "t"), (100, 2, 3, 3), 256)
    for a, b in zip(normalization.measure(x.to(torch.uint8)), normalization.measure(x.to(F64) / 255)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_zca_covariance_is_s_over_s_plus_eps() -> None:
    """Whitened training images have covariance U S/(S + eps) U^T and mean zero: the definition, by numpy on raw pixels."""
    raw, white = digits(normalize="none").train.x.flatten(1), digits(normalize="zca").train.x.flatten(1)
    covariance = np.cov(raw.numpy(), rowvar=False)
    wanted = covariance @ np.linalg.inv(covariance + 0.1 * np.eye(64))
    assert np.abs(np.cov(white.numpy(), rowvar=False) - wanted).max() < 1e-5
    assert white.mean(0).abs().max() < 1e-6


def test_zca_tends_to_identity_covariance_without_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalization, "EPS", 0.0)
    x = draw.normal(draw.key(0, "t"), (400, 1, 3, 3), F64) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0.5], [0, 0, 1]], dtype=F64)
    white = normalization.whitening(x).apply(x).flatten(1)
    assert np.abs(np.cov(white.numpy(), rowvar=False) - np.eye(9)).max() < 1e-5


def test_zca_is_symmetric_so_pictures_stay_pictures() -> None:
    matrix = digits(normalize="zca").normalization.zca.matrix
    torch.testing.assert_close(matrix, matrix.T, atol=1e-9, rtol=0)
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_test_split_is_whitened_with_training_statistics() -> None:
    data, raw = digits(normalize="zca"), digits(normalize="none")
    again = normalization.fit("zca", "digits", raw.train.x)
    torch.testing.assert_close(data.test.x, again.apply(raw.test.x), atol=1e-5, rtol=0)


def test_large_whitening_is_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = DataConfig(normalize="zca", size=32)
    made = 0
    real = normalization._decompose

    def counted(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal made
        made += 1
        return real(x)

    monkeypatch.setattr(normalization, "_decompose", counted)
    first = load(cfg, "cpu", torch.float32, tmp_path)
    second = load(cfg, "cpu", torch.float32, tmp_path)
    assert made == 1 and torch.equal(first.train.x, second.train.x)
    load(dataclasses.replace(cfg, split_seed=1), "cpu", torch.float32, tmp_path)
    assert made == 2


def test_normalization_refuses_other_shapes() -> None:
    data = digits(normalize="zca")
    one_line(lambda: data.normalization.apply(torch.zeros(2, 1, 9, 9)), "1x9x9", "64")
    one_line(lambda: digits().normalization.apply(torch.zeros(2, 3, 8, 8)), "3 channels")


# --- augmentation -----------------------------------------------------------------------------------------------------


def known(tasks: int, images: int, size: int = 12) -> Tensor:
    """Images whose every pixel is unique in the whole batch."""
    return torch.arange(tasks * images * 2 * size * size, dtype=F64).reshape(tasks, images, 2, size, size)


def source(out: Tensor, image: Tensor) -> tuple[int, int, bool]:
    """The only (row shift, column shift, flipped) for which a plain flip, reflect pad and slice gives `out`."""
    size = image.shape[-1]
    found = []
    for flip in (False, True):
        padded = functional.pad(image.flip(-1) if flip else image, (4, 4, 4, 4), mode="reflect")
        found += [
            (dy, dx, flip) for dy in range(9) for dx in range(9) if torch.equal(padded[:, dy : dy + size, dx : dx + size], out)
        ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("kind", ["crop", "flip", "crop_flip"])
def test_augment_is_a_crop_and_flip_of_the_same_image(kind: str) -> None:
    x = known(3, 60)
    out = augment(kind, draw.key(7, "augment", 1, torch.arange(3)), x)
    seen = [source(out[g, r], x[g, r]) for g in range(3) for r in range(60)]
    shifts, flips = {s[:2] for s in seen}, sum(s[2] for s in seen)
    assert flips == 0 if kind == "crop" else 60 < flips < 120
    assert shifts == {(4, 4)} if kind == "flip" else len(shifts) > 60
    if kind != "flip":
        assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(9))


def test_augment_none_and_determinism() -> None:
    x, keys = known(2, 5), draw.key(0, "augment", 0, torch.arange(2))
    assert torch.equal(augment("none", keys, x), x)
    assert torch.equal(augment("crop_flip", keys, x), augment("crop_flip", keys, x))
    assert not torch.equal(augment("crop_flip", draw.key(1, "augment", 0, torch.arange(2)), x), augment("crop_flip", keys, x))


def test_augment_of_a_task_does_not_depend_on_its_group() -> None:
    x, keys = known(4, 6), draw.key(0, "augment", 0, torch.arange(4))
    together = augment("crop_flip", keys, x)
    for part in (slice(0, 1), slice(1, 4)):
        assert torch.equal(augment("crop_flip", keys[part], x[part]), together[part])


def test_augment_passes_gradients_to_the_pixels_it_kept() -> None:
    x = known(1, 2).requires_grad_()
    (augment("crop", draw.key(3, "a", 0, torch.arange(1)), x) * 2).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.sum() == 2 * x.numel() and len(set(x.grad.flatten().tolist())) > 1


def test_augment_refuses_tiny_images_and_unknown_kinds() -> None:
    keys = draw.key(0, "a", 0, torch.arange(1))
    one_line(lambda: augment("crop", keys, known(1, 1, 4)), "4x4", "data.size")
    one_line(lambda: augment("cutout", keys, known(1, 1)), "data.augment=cutout", "crop_flip")


# --- baselines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "class_mean", "kmeans", "kcenter"])
def test_baselines_are_interleaved_seeded_and_of_the_right_class(kind: str) -> None:
    split = digits().train
    x, y = baseline(kind, split, 10, 5, 0)
    assert x.shape == (50, 1, 8, 8) and x.dtype == F64 and y.tolist() == [i % 10 for i in range(50)]
    assert torch.equal(baseline(kind, split, 10, 5, 0)[0], x)
    if kind != "class_mean":
        assert not torch.equal(baseline(kind, split, 10, 5, 1)[0], x)
    if kind in ("random", "kcenter"):
        for image, label in zip(x, y):
            assert (split.x[split.y == label] == image).flatten(1).all(1).any()
        assert len({i.numpy().tobytes() for i in x}) == 50


def test_class_mean_is_kmeans_with_one_centre() -> None:
    split = digits().train
    mean, centre = (baseline(kind, split, 10, 1, 0)[0] for kind in ("class_mean", "kmeans"))
    torch.testing.assert_close(mean, centre, atol=1e-10, rtol=0)
    torch.testing.assert_close(mean[3], split.x[split.y == 3].mean(0))


def cost(split: Split, chosen: Tensor, power: int) -> Tensor:
    """(largest, mean) distance^power of a class's images to the nearest chosen one, averaged over the classes: [2]."""
    near = [torch.cdist(split.x[split.y == c].flatten(1), chosen[c::10].flatten(1)).min(1).values ** power for c in range(10)]
    return torch.stack([torch.stack([d.max(), d.mean()]) for d in near]).mean(0)


def test_kcenter_covers_better_and_kmeans_quantises_better_than_random() -> None:
    split = digits().train
    chosen = {k: baseline(k, split, 10, 8, 0)[0] for k in ("kmeans", "kcenter")}
    randoms = [baseline("random", split, 10, 8, seed)[0] for seed in range(5)]
    assert cost(split, chosen["kcenter"], 1)[0] < min(cost(split, r, 1)[0] for r in randoms)
    assert cost(split, chosen["kmeans"], 2)[1] < 0.75 * min(cost(split, r, 2)[1] for r in randoms)


def test_kcenter_is_farthest_first() -> None:
    x = torch.tensor([0.0, 1, 2, 10, 30]).reshape(-1, 1, 1, 1)
    chosen = baseline("kcenter", Split(x, torch.zeros(5, dtype=torch.int64)), 1, 3, 0)[0].flatten().tolist()
    remaining = [0.0, 1, 2, 10, 30]
    for i in (1, 2):
        assert chosen[i] == max(remaining, key=lambda v: min(abs(v - c) for c in chosen[:i]))


def test_baselines_refuse_unknown_kinds_and_too_many_images() -> None:
    split = digits().train
    one_line(lambda: baseline("kmean", split, 10, 1, 0), "baseline=kmean", "did you mean kmeans")
    one_line(lambda: baseline("random", split, 10, 1000, 0), "ipc=1000", "class 0")
    one_line(lambda: baseline("random", split, 10, 0, 0), "ipc=0")


# --- a folder of images -----------------------------------------------------------------------------------------------


def write(file: Path, colour: int | tuple[int, int, int], size: tuple[int, int] = (6, 6)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(file)


def make_folder(root: Path, parts: tuple[str, ...] = ("",), count: int = 10, colour: bool = True) -> Path:
    """Two classes; the red (or grey) value tells class (100 apart), split (30 apart) and number."""
    for p, part in enumerate(parts):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                value = 100 * c + 30 * p + i
                write(root / part / name / f"{i}{('.png', '.bmp')[i % 2]}", (value, 7, 9) if colour else value)
    return root


def read_folder(root: Path, **changes: Any) -> Any:
    return load(DataConfig(name="folder", path=str(root), **({"normalize": "none"} | changes)), "cpu", F64)


def test_folder_without_parts_is_split_and_read_exactly(tmp_path: Path) -> None:
    data = read_folder(make_folder(tmp_path / "pets"), validation=0.25)
    assert data.classes == ("cat", "dog") and data.name == "folder:pets"
    assert (len(data.train), len(data.valid), len(data.test), data.channels, data.size) == (12, 4, 4, 3, 6)
    red = {round(255 * v.item()) for s in (data.train, data.valid, data.test) for v in s.x[:, 0, 0, 0]}
    assert red == {*range(10), *range(100, 110)}
    for s in (data.train, data.valid, data.test):
        assert torch.equal((s.x[:, 0, 0, 0] * 255 >= 99).long(), s.y)


def test_folder_with_parts(tmp_path: Path) -> None:
    data = read_folder(make_folder(tmp_path, ("train", "valid", "test"), 3))
    for k, s in enumerate((data.train, data.valid, data.test)):
        assert sorted((s.x[:, 0, 0, 0] * 255).round().int().tolist()) == [
            100 * c + 30 * k + i for c in (0, 1) for i in range(3)
        ]
    data = read_folder(make_folder(tmp_path / "two", ("train", "test"), 4), validation=0.25)
    assert (len(data.train), len(data.valid), len(data.test)) == (6, 2, 8)


def test_folder_grey_stays_one_channel_and_mixes_become_three(tmp_path: Path) -> None:
    grey = make_folder(tmp_path / "grey", colour=False)
    assert read_folder(grey).channels == 1
    write(grey / "cat" / "odd.png", (200, 100, 50))
    data = read_folder(grey)
    assert data.channels == 3
    together = torch.cat([data.train.x, data.valid.x, data.test.x])
    assert int((together[:, 0, 0, 0] != together[:, 2, 0, 0]).sum()) == 1


def test_folder_sizes_differ(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    write(root / "cat" / "wide.jpg", (1, 2, 3), (9, 6))
    one_line(lambda: read_folder(root), "6x6", "9x6", "data.size")
    data = read_folder(root, size=5)
    assert data.size == 5 and len(data.train) + len(data.valid) + len(data.test) == 21


def test_folder_other_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "._0.png").write_text("no image")
    (root / ".git").mkdir()
    (root / "README.md").write_text("pets")
    assert read_folder(root).classes == ("cat", "dog")


def _missing(root: Path) -> Path:
    return root / "gone"


def _empty(root: Path) -> Path:
    root.mkdir()
    return root


def _flat(root: Path) -> Path:
    write(root / "1.png", 3)
    return root


def _one_class(root: Path) -> Path:
    write(root / "cat" / "1.png", 3)
    return root


def _empty_class(root: Path) -> Path:
    (make_folder(root) / "eel").mkdir()
    return root


def _garbage(root: Path) -> Path:
    (make_folder(root) / "dog" / "bad.png").write_bytes(b"not an image\nat all")
    return root


def _cut(root: Path) -> Path:
    file = make_folder(root) / "dog" / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:500])
    return root


def _cut_png(root: Path) -> Path:
    file = make_folder(root) / "dog" / "cut.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:500])
    return root


def _sixteen_bits(root: Path) -> Path:
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(make_folder(root) / "dog" / "deep.png")
    return root


def _other_classes(root: Path) -> Path:
    write(make_folder(root, ("train", "test")) / "test" / "eel" / "1.png", (1, 2, 3))
    return root


def _other_part(root: Path) -> Path:
    write(make_folder(root, ("train", "test")) / "val" / "cat" / "1.png", (1, 2, 3))
    return root


def _few(root: Path) -> Path:
    return make_folder(root, count=2)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_missing, ("gone", "not a folder", "data.path")),
        (_empty, ("no class folders",)),
        (_flat, ("no class folders",)),
        (_one_class, ("only the class folder cat",)),
        (_empty_class, ("eel", "no images")),
        (_garbage, ("bad.png", "can't be read", "replace or remove")),
        (_cut, ("cut.jpg", "can't be read")),
        (_cut_png, ("cut.png", "can't be read")),
        (_sixteen_bits, ("deep.png", "8 bits")),
        (_other_classes, ("class eel", "same class folders")),
        (_other_part, ("val", "did you mean valid")),
        (_few, ("with 2 images", "none would be held out", "give test images")),
    ],
)
def test_folder_errors_are_one_line(tmp_path: Path, build: Callable[[Path], Path], words: tuple[str, ...]) -> None:
    root = build(tmp_path / "pets")
    one_line(lambda: read_folder(root), *words)


# --- a user's own Dataset ---------------------------------------------------------------------------------------------


class Own(Dataset[Any]):
    """Red squares whose value is their number; items of the kind asked for."""

    classes = ("even", "odd")

    def __init__(self, kind: str, n: int = 40, label: Any = None) -> None:
        self.kind, self.n, self.label = kind, n, label

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        image: Any = torch.zeros(3, 6, 6, dtype=torch.uint8)
        image[0] = i
        if self.kind == "pil":
            image = Image.fromarray(image.permute(1, 2, 0).numpy())
        elif self.kind == "float":
            image = image.float() / 255
        elif self.kind == "normalised":
            image = image.float() - 3
        elif self.kind == "random":
            image = torch.rand(3, 6, 6)
        return image, i % 2 if self.label is None else self.label


@pytest.mark.parametrize("kind", ["pil", "uint8", "float"])
def test_own_dataset_items_of_every_kind_give_the_same(kind: str) -> None:
    data = from_datasets(Own(kind), Own(kind, 10), DataConfig(normalize="none", validation=0.2), "cpu", F64)
    assert (len(data.train), len(data.valid), len(data.test)) == (32, 8, 10)
    assert data.classes == ("even", "odd") and data.name == "Own" and data.channels == 3
    red = torch.cat([data.train.x, data.valid.x])[:, 0, 0, 0] * 255
    assert red.round().int().sort().values.tolist() == list(range(40))
    assert torch.equal((data.test.x[:, 0, 0, 0] * 255).round().long() % 2, data.test.y)


def test_own_dataset_that_draws_is_the_same_for_every_worker_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    a, b = (from_datasets(Own("random"), None, DataConfig(), "cpu", F64).train.x for _ in range(2))
    assert torch.equal(a, b) and torch.equal(torch.random.get_rng_state(), before)


def test_own_grey_tensors_without_channel_axis_and_plain_labels() -> None:
    x = draw.uniform(draw.key(0, "t"), (30, 5, 5))
    data = from_datasets(TensorDataset(x, torch.arange(30) % 3), None, DataConfig(size=7, validation=0.2), "cpu", torch.float32)
    assert (
        data.train.x.shape[1:] == (1, 7, 7) and data.classes == ("0", "1", "2") and len(data.test) == 6 and len(data.valid) == 5
    )


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Own("normalised"), ("item 0", "from -3 to -3", "[0, 1]", "data.normalize")),
        (Own("uint8", label="cat"), ("item 0", "'cat'", "integers")),
        (Own("uint8", label=-1), ("item 0", "-1", "integers")),
        (Own("uint8", label=0.5), ("item 0", "0.5", "integers")),
        (Own("uint8", label=1), ("class even",)),
        (Own("uint8", 0), ("empty",)),
        (TensorDataset(torch.zeros(4, 1, 5, 5)), ("item 0", "pair")),
        (TensorDataset(torch.zeros(4, 5), torch.zeros(4)), ("item 0", "[5]")),
    ],
)
def test_own_dataset_errors_are_one_line(dataset: Dataset[Any], words: tuple[str, ...]) -> None:
    one_line(lambda: from_datasets(dataset, None, DataConfig(), "cpu", F64), *words)


def test_a_fraction_of_the_training_images_may_be_nearly_all_but_not_none() -> None:
    y = torch.arange(40) % 4
    x = torch.arange(40)[:, None, None, None]
    assert len(splits.transfer((x, y), [], 0.99, 0)[1]) == 40
    some = splits.transfer((x, y), [2], 0.5, 0)
    assert sorted(some[1].tolist()) == [0] * 5 + [1] * 5 + [3] * 5
    one_line(
        lambda: splits.transfer((x, y), [], 0.05, 0), "data.fraction=0.05 takes none of the 10 images of class", "give more"
    )
