"""Real data, resident on the device: named data sets, a folder of images, or any torch Dataset.

Design choices
- Every split is one tensor on the device, normalised once; a batch is an index.
- What the normalization and whitening learn, they learn from the training split (validation and test taken out).

    data = load(DataConfig(name="mnist", root="data", download=True), "cpu", torch.float32, "~/.cache/metadist")
    data.train.x, data.train.y, data.normalization.invert(data.test.x[:10])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from metadist import errors
from metadist.config import DataConfig
from metadist.data import folder, normalization, own, pixels, sources, splits
from metadist.data.augment import KINDS as AUGMENTATIONS
from metadist.data.augment import augment
from metadist.data.baselines import KINDS as BASELINES
from metadist.data.baselines import baseline
from metadist.data.normalization import Normalization
from metadist.data.splits import Data, Images, Raw, Split
from metadist.errors import UserError

__all__ = [
    "AUGMENTATIONS", "BASELINES", "NAMES", "Data", "Normalization", "Split",
    "augment", "baseline", "check", "from_datasets", "load", "split_of",
]  # fmt: skip

NAMES = (*sources.NAMED, "folder", "distilled")
SMOKE = (512, 64, 64)  # at most so many training, validation and test images in a smoke run


def check(cfg: DataConfig) -> None:
    """Raises UserError for a configuration that no data could satisfy; reads nothing."""
    if cfg.name not in NAMES:
        raise errors.unknown("data", cfg.name, NAMES)
    if cfg.name == "folder" and not cfg.path:
        raise UserError("data=folder needs data.path=<folder that holds one folder of images per class>")
    if cfg.name == "distilled":
        raise UserError("data=distilled is a set to train networks on (method=train or kd); give the name of real data here")
    _check_common(cfg)
    if cfg.name in sources.DIGIT_SETS and "flip" in cfg.augment:
        raise UserError(
            f"data.augment={cfg.augment} mirrors images, and a mirrored digit of {cfg.name} is no digit; use crop or none"
        )


def split_of(cfg: DataConfig) -> dict[str, Any]:
    """What says which images of a data set are trained on and which are held out."""
    return {key: getattr(cfg, key) for key in ("validation", "split_seed", "fraction", "exclude")}


def load(
    cfg: DataConfig, device: torch.device | str, dtype: torch.dtype, cache_dir: str | Path | None = None, smoke: bool = False
) -> Data:
    """The data set that the configuration names.

    device, dtype: of the images (labels are int64).
    cache_dir: where whitening is kept; None: nowhere.
    smoke: keep SMOKE images of the splits, every class in turn: a run of seconds can't judge 10,000 of them.
    Raises UserError for anything a user can mend, RunError for a failed download.
    """
    check(cfg)
    raw = folder.read(Path(cfg.path or "").expanduser(), cfg.size) if cfg.name == "folder" else sources.read(cfg)
    return _place(raw, cfg, device, dtype, cache_dir, smoke)


def from_datasets(
    train: Dataset[Any],
    test: Dataset[Any] | None,
    cfg: DataConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    cache_dir: str | Path | None = None,
) -> Data:
    """A user's own torch Datasets, read once, in order.

    train, test: map-style; items (image, label): a PIL image, or a tensor [C, H, W] or [H, W], uint8 or float in [0, 1] (not
        normalised: `data.normalize` does that, and pictures need the way back); label an integer 0 .. classes-1.
        Without a test set a fifth of the training images is held out, class by class.
    cfg: `size`, `validation`, `split_seed`, `normalize`, `augment` are used; `name`, `root`, `download`, `path` are not.
    Raises UserError for items that are something else, naming the item.
    """
    _check_common(cfg)
    return _place(own.read(train, test, cfg.size), cfg, device, dtype, cache_dir)


def _check_common(cfg: DataConfig) -> None:
    if cfg.augment not in AUGMENTATIONS:
        raise errors.unknown("data.augment", cfg.augment, AUGMENTATIONS)
    if cfg.normalize not in normalization.KINDS:
        raise errors.unknown("data.normalize", cfg.normalize, normalization.KINDS)
    if cfg.size is not None and not 1 <= cfg.size <= 1024:
        raise UserError(f"data.size={cfg.size} must be a side in pixels from 1 to 1024, or null for the images' own")
    if not 0 < cfg.validation < 1:
        raise UserError(f"data.validation={cfg.validation:g} must lie between 0 and 1 (exclusive), such as 0.1")
    if not 0 < cfg.fraction <= 1:
        raise UserError(f"data.fraction={cfg.fraction:g} is no part of the training images; allowed: above 0 and at most 1")


def _place(
    raw: Raw, cfg: DataConfig, device: torch.device | str, dtype: torch.dtype, cache_dir: str | Path | None, smoke: bool = False
) -> Data:
    """Split, resize, fit the normalization on the training images, and put all splits on the device."""
    train, valid, test = splits.complete(raw, cfg.validation, cfg.split_seed)
    if smoke:
        train, valid, test = (_few(part, most) for part, most in zip((train, valid, test), SMOKE))
    if cfg.size is not None:
        train, valid, test = ((pixels.resize(x, cfg.size), y) for x, y in (train, valid, test))
    fitted = normalization.fit(cfg.normalize, raw.name, train[0], cache_dir)
    train = splits.transfer(train, cfg.exclude, cfg.fraction, cfg.split_seed)
    parts = [_resident(part, fitted, device, dtype) for part in (train, valid, test)]
    return Data(raw.name, parts[0], parts[1], parts[2], raw.classes, fitted)


def _few(images: Images, most: int) -> Images:
    """The first images of every class in turn."""
    x, y = images
    order, sizes = torch.sort(y, stable=True).indices, torch.bincount(y)
    rank = torch.arange(len(y)) - (sizes.cumsum(0) - sizes)[y[order]]  # within the class
    rows = order[torch.sort(rank, stable=True).indices[:most]]
    return x[rows], y[rows]


def _resident(images: Images, fitted: Normalization, device: torch.device | str, dtype: torch.dtype) -> Split:
    x, y = images
    out = torch.empty(x.shape, dtype=dtype, device=device)
    for where, part in pixels.chunks(x):
        out[where] = fitted.apply(_to(part, device, dtype))
    return Split(out, y.to(device))


def _to(x: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    # Types narrower than float32 are rounded after the normalization, not before.
    return x.to(device, torch.promote_types(dtype, torch.float32))
