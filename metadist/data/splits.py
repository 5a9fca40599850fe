"""Training, validation and test images of one data set, resident on one device.

Design choices
- Held-out images are drawn class by class with a counter-based permutation: a fixed function of labels and seed, and no class
  is missed by chance.
- The test split of a data set that has none of its own never depends on `data.split_seed`: whatever is tried with other
  validation splits is judged on the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist import draw
from metadist.data.normalization import Normalization
from metadist.errors import UserError

TEST_FRACTION = 0.2  # of a data set without its own test split
Images = tuple[Tensor, Tensor]  # raw images [N, C, H, W] (uint8 or in [0, 1]) and labels int64 [N]


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels."""

    x: Tensor  # [N, C, H, W] normalised
    y: Tensor  # int64 [N]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.y)

    def thinned(self, count: int) -> Split:
        """At most ``count`` of the images, evenly spread over their order."""
        every = -(-len(self) // count)
        return self if every == 1 else Split(self.x[::every], self.y[::every])


@dataclass(frozen=True, eq=False)
class Data:
    """A data set on a device."""

    name: str
    train: Split
    valid: Split
    test: Split
    classes: tuple[str, ...]
    normalization: Normalization

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train.x.shape[1]

    @property
    def size(self) -> int:
        """Side of the (square) images in pixels."""
        return self.train.x.shape[-1]


@dataclass(frozen=True, eq=False)
class Raw:
    """A data set as it was found: uint8 or [0, 1] images on the CPU. A split that is None is drawn from the training images."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images | None = None
    valid: Images | None = None


def hold_out(y: Tensor, fraction: float, key: Tensor, what: str, mend: str) -> tuple[Tensor, Tensor]:
    """Indices (kept, held out), each ascending: round(fraction * N) images are held out, every class in proportion.

    y: labels int64 [N] on the CPU.
    fraction: in (0, 1).
    key: int64 [2] from `draw.key`.
    what, mend: what set the fraction and what to do about it, for errors.
    Raises UserError if some class would have no image on one of the sides.
    """
    for c, size, count in _counts(y, fraction):
        if not 0 < count < size:
            side = "none would be held out" if count == 0 else "none would be left"
            raise UserError(f"{what}={fraction:g} does not suit class {c} with {size} images: {side}; {mend}")
    held = _drawn(y, fraction, key)
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def _counts(y: Tensor, fraction: float) -> list[tuple[int, int, int]]:
    """Of every class: its number, its images, how many of them a fraction draws."""
    classes, sizes = torch.unique(y, return_counts=True)
    return list(zip(classes.tolist(), sizes.tolist(), _apportion(sizes, fraction)))


def _drawn(y: Tensor, fraction: float, key: Tensor) -> Tensor:
    """Which images a fraction draws: bool [N]."""
    out = torch.zeros(len(y), dtype=torch.bool)
    for c, size, count in _counts(y, fraction):
        members = (y == c).nonzero()[:, 0]
        out[members[draw.permutation(draw.split(key, c), size)[:count]]] = True
    return out


def _apportion(sizes: Tensor, fraction: float) -> list[int]:
    """Images held out per class: they sum to the rounded total, each within one of its share (largest remainders)."""
    share = sizes.to(torch.float64) * fraction
    counts = share.floor().to(torch.int64)
    left = round(fraction * int(sizes.sum())) - int(counts.sum())
    counts[torch.sort(share - counts, descending=True, stable=True).indices[:left]] += 1
    return [int(c) for c in counts]


def divide(images: Images, fraction: float, key: Tensor, what: str, mend: str) -> tuple[Images, Images]:
    """(kept, held-out) images; see `hold_out`."""
    x, y = images
    kept, held = hold_out(y, fraction, key, what, mend)
    return (x[kept], y[kept]), (x[held], y[held])


def transfer(images: Images, exclude: Sequence[int], fraction: float, seed: int) -> Images:
    """The part of the training images that is trained on.

    exclude: classes that are left out. fraction: of what is left, every class in proportion; 1: all. seed: `data.split_seed`.
    Raises UserError if nothing would be left of some class, or of all.
    """
    x, y = images
    if exclude:
        kept = torch.tensor([int(c) not in exclude for c in y], dtype=torch.bool)
        if not kept.any():
            raise UserError(f"data.exclude={list(exclude)} leaves no class to train on; name fewer")
        x, y = x[kept], y[kept]
    if fraction < 1:
        if none := [(c, size) for c, size, count in _counts(y, fraction) if not count]:
            raise UserError(
                f"data.fraction={fraction:g} takes none of the {none[0][1]} images of class {none[0][0]}; give more"
            )
        chosen = _drawn(y, fraction, draw.key(seed, "training fraction"))
        x, y = x[chosen], y[chosen]
    return x, y


def complete(raw: Raw, validation: float, seed: int) -> tuple[Images, Images, Images]:
    """(train, valid, test) of a data set, those it lacks held out of its training images.

    validation: fraction of the training images (test images already taken out) for validation; not used where the
        data set brings its own validation images.
    seed: `data.split_seed`.
    Raises UserError if the fraction is not inside (0, 1) or a class is missing in the training or validation images.
    """
    if not 0 < validation < 1:
        raise UserError(f"data.validation={validation:g} must lie between 0 and 1 (exclusive), such as 0.1")
    train, test, valid = raw.train, raw.test, raw.valid
    if test is None:
        what, mend = "no test images were given, and a test fraction", "give test images of their own or add images"
        train, test = divide(train, TEST_FRACTION, draw.key(0, "test split"), what, mend)
    if valid is None:
        train, valid = divide(
            train, validation, draw.key(seed, "validation split"), "data.validation", "change it or add images"
        )
    for what, (_, y) in (("training", train), ("validation", valid)):
        missing = sorted(set(range(len(raw.classes))) - set(y.tolist()))
        if missing:
            raise UserError(f"data set {raw.name}: no {what} image of class {raw.classes[missing[0]]}; every class needs one")
    return train, valid, test
