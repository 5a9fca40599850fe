"""How real images in [0, 1] become what a learner sees, and back: per-channel mean and deviation, or ZCA whitening.

Design choices
- Fitted on the training split alone (validation held out), applied to every split, recorded in the distilled set.
- Where a data set has published statistics these are used; measured ones are rounded to six decimals, so that the order
  of a sum on another processor can't show.
- ZCA (Krizhevsky 2009; settings of trajectory matching, arXiv 2203.11932: raw [0, 1] images, eps 0.1) is held as its
  eigenbasis U and scales (S + eps)^-1/2: one D x D matrix serves both directions, and the way back is exact.
- The whitening of large images is cached: it takes seconds to minutes and is the same for every run.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metadist import errors, store
from metadist.data import pixels
from metadist.errors import UserError

KINDS = ("standard", "zca", "none")
PUBLISHED = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}
EPS = 0.1  # added to the variances that ZCA divides by
CACHE_FROM = 1024  # values an image; whitening of smaller ones is made anew in a second


@dataclass(frozen=True, eq=False)
class Zca:
    """ZCA whitening x -> (x - mean) U diag(scale) U^T of flattened images."""

    mean: Tensor  # [D] the mean training image, float32
    basis: Tensor  # [D, D] U, eigenvectors of the covariance in columns, float32
    scale: Tensor  # [D] (S + eps)^-1/2, float32

    @functools.cached_property
    def matrix(self) -> Tensor:
        """U diag(scale) U^T: float64 [D, D]."""
        basis = self.basis.to(torch.float64)
        return (basis * self.scale.to(torch.float64)) @ basis.T

    def apply(self, x: Tensor) -> Tensor:
        """Whitened images, of x's shape [..., C, H, W] and type."""
        flat = self._flat(x)
        return ((flat - self.mean.to(flat)) @ self.matrix.to(flat)).to(x.dtype).reshape(x.shape)

    def invert(self, x: Tensor) -> Tensor:
        """Images in [0, 1] of whitened x [..., C, H, W]."""
        flat = self._flat(x)
        basis = self.basis.to(flat)
        return ((flat @ basis / self.scale.to(flat)) @ basis.T + self.mean.to(flat)).to(x.dtype).reshape(x.shape)

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-3:].numel() != len(self.mean):
            shape = "x".join(map(str, x.shape[-3:]))
            raise UserError(f"images of {shape} do not fit this whitening, made for {len(self.mean)} values an image")
        # On a GPU in float64: reduced-precision matrix units, if switched on, would otherwise blur the images.
        return x.flatten(-3).to(torch.float64 if x.is_cuda else torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Normalization:
    """An invertible map of images: (x - mean) / sd per channel, or ZCA (then mean is 0 and sd 1)."""

    mean: Tensor  # [C] float64
    sd: Tensor  # [C] float64
    zca: Zca | None = None

    def apply(self, x: Tensor) -> Tensor:
        """x [..., C, H, W] in [0, 1], normalised; same type and device. UserError if it has other channels or sizes."""
        if self.zca is not None:
            return self.zca.apply(x)
        return (x - self._channel(self.mean, x)) / self._channel(self.sd, x)

    def invert(self, x: Tensor) -> Tensor:
        """Normalised x [..., C, H, W] back in the scale of [0, 1] (learned images may lie outside: clip for pictures)."""
        if self.zca is not None:
            return self.zca.invert(x)
        return x * self._channel(self.sd, x) + self._channel(self.mean, x)

    def tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` needs to rebuild this."""
        out = {"mean": self.mean, "sd": self.sd}
        if self.zca is not None:
            out |= {"zca_mean": self.zca.mean, "zca_basis": self.zca.basis, "zca_scale": self.zca.scale}
        return out

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Normalization:
        """The normalization whose `tensors()` these are (other names are not looked at)."""
        zca = Zca(*(tensors[f"zca_{k}"] for k in ("mean", "basis", "scale"))) if "zca_basis" in tensors else None
        return Normalization(tensors["mean"], tensors["sd"], zca)

    def _channel(self, values: Tensor, x: Tensor) -> Tensor:
        if x.shape[-3] != len(values):
            raise UserError(f"images have {x.shape[-3]} channels, this normalization is for {len(values)}")
        return values.to(x).reshape(-1, 1, 1)


def fit(kind: str, name: str, x: Tensor, cache_dir: str | Path | None = None) -> Normalization:
    """The normalization of a data set.

    kind: standard (published statistics of the data set `name`, else measured) | zca | none.
    x: training images [N, C, H, W], uint8 or in [0, 1].
    cache_dir: where the whitening of large images is kept; None: nowhere.
    """
    channels = x.shape[1]
    zero, one = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    if kind == "none":
        return Normalization(zero, one)
    if kind == "zca":
        return Normalization(zero, one, whitening(x, cache_dir))
    if kind != "standard":
        raise errors.unknown("data.normalize", kind, KINDS)
    if name in PUBLISHED:
        mean, sd = (torch.tensor(v, dtype=torch.float64) for v in PUBLISHED[name])
        return Normalization(mean, sd)
    return Normalization(*measure(x))


def measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of x [N, C, H, W] (uint8 or in [0, 1]): float64 [C] each, six decimals.

    A channel that never changes gets deviation 1.
    """
    total = torch.zeros(2, x.shape[1], dtype=torch.float64)
    for _, part in pixels.chunks(x):
        wide = part.to(torch.float64)
        total += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
    first, second = total / (x.numel() // x.shape[1])
    sd = (second - first.square()).clamp(min=0).sqrt().round(decimals=6)
    return first.round(decimals=6), torch.where(sd > 0, sd, torch.ones_like(sd))


def whitening(x: Tensor, cache_dir: str | Path | None = None) -> Zca:
    """ZCA of training images x [N, C, H, W] (uint8 or in [0, 1]), from the cache if it is there."""

    def make() -> dict[str, Tensor]:
        mean, basis, scale = _decompose(x)
        return {"mean": mean, "basis": basis, "scale": scale}

    if cache_dir is None or x[0].numel() < CACHE_FROM:
        return Zca(**make())
    content = hashlib.sha256(x.contiguous().numpy().data).hexdigest()
    recipe = {"images": content, "shape": list(x.shape), "type": str(x.dtype), "eps": EPS}
    return Zca(**store.cached(Path(cache_dir).expanduser(), "zca", recipe, make))


def _decompose(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [D], basis [D, D], scale [D]) in float32, computed in float64."""
    width = x[0].numel()
    total, square = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for _, part in pixels.chunks(x):
        flat = part.flatten(1).to(torch.float64)
        total += flat.sum(0)
        square += flat.T @ flat
    mean = total / len(x)
    covariance = (square - len(x) * torch.outer(mean, mean)) / max(len(x) - 1, 1)
    values, basis = torch.linalg.eigh(covariance)
    scale = (values.clamp(min=0) + EPS).rsqrt()
    return mean.float(), basis.float().contiguous(), scale.float()
