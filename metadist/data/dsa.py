"""Differentiable siamese augmentation (DSA, Zhao and Bilen 2021, arXiv 2102.08259): every operation is affine in the pixels.

Design choices
- Parameters are drawn up front, by counter, as one tensor; ``apply`` is a pure function of them. What was applied to one
  batch can be applied to another (siamese), and a recomputation sees the same.
- As published, one operation of the strategy is chosen for a batch; the others are the identity. All are applied in one pass
  of fixed shape, so that the choice costs no synchronisation: color, then one resampling (crop, flip, scale, rotate), then
  cutout.
- Drawn in 24 bits and worked out in float64: the same numbers, rounded, in every dtype.
- Zeros lie outside the image: in the normalised space, the data's mean.
- Published strengths: brightness 1, saturation 2, contrast .5, crop by up to an eighth, cutout of half a side, scale up to 1.2,
  rotation up to 15 degrees, flip with probability 1/2.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from metadist import draw
from metadist.errors import UserError, unknown

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
WIDTH = 13  # numbers an image: 3 of color, 6 of the resampling, 4 of the cutout
ALL = "_".join(OPERATIONS)
MIRROR_FREE = "color_crop_cutout_scale_rotate"  # for digits, which have no mirror image

_BRIGHTNESS, _SATURATION, _CONTRAST, _SHIFT, _CUTOUT, _SCALE, _DEGREES = 1.0, 2.0, 0.5, 0.125, 0.5, 1.2, 15.0


def operations(strategy: str) -> tuple[str, ...]:
    """The operations of a strategy: names joined by underscores. Raises UserError for an unknown or a repeated one."""
    names = tuple(strategy.split("_"))
    for name in names:
        if name not in OPERATIONS:
            raise unknown("augmentation", name, OPERATIONS)
    if len(set(names)) < len(names):
        raise UserError(f"the augmentation {strategy} names an operation twice; name each once")
    return names


def parameters(strategy: str, keys: Tensor, images: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What to do to each image: [..., images, WIDTH]; every key chooses one operation of the strategy for its batch.

    strategy: such as ``ALL``; "none": the identity.
    keys: int64 [..., 2], one a batch.
    images: drawn for on their own; 1: the whole batch gets the same (siamese).
    size: pixels of a side.
    Raises UserError for an unknown operation.
    """
    lead = (*keys.shape[:-1], images)
    identity = torch.tensor([0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0], dtype=torch.float64, device=keys.device)
    out = identity.expand(*lead, WIDTH)
    if strategy == "none":
        return out.to(dtype)
    names = operations(strategy)
    chosen = draw.integers(draw.split(keys, 0), (1,), len(names))
    u = draw.uniform(draw.split(keys, 1), (images, 3)).to(torch.float64)
    for number, name in enumerate(names):
        own = _OWN[name](u, size, identity)
        out = torch.where((chosen == number).unsqueeze(-1), own, out)
    return out.to(dtype)


def apply(parameters: Tensor, x: Tensor) -> Tensor:
    """Augmented images of the same shape, once differentiable in them.

    parameters: [..., B or 1, WIDTH] from ``parameters``; x: [..., B, C, H, W], square.
    """
    brightness, saturation, contrast = (v[..., None, None, None] for v in parameters[..., :3].unbind(-1))
    if x.shape[-3] > 1:  # a gray image has no saturation
        x = x * saturation + x.mean(-3, keepdim=True) * (1 - saturation)
    x = x * contrast + x.mean((-3, -2, -1), keepdim=True) * (1 - contrast) + brightness
    return _resample(x, parameters[..., 3:9]) * _kept(parameters[..., 9:], x.shape[-1]).unsqueeze(-3)


def _color(u: Tensor, size: int, identity: Tensor) -> Tensor:
    values = torch.stack(((u[..., 0] - 0.5) * _BRIGHTNESS, u[..., 1] * _SATURATION, u[..., 2] + _CONTRAST), -1)
    return torch.cat((values, identity[3:].expand(*u.shape[:-1], -1)), -1)


def _placed(u: Tensor, identity: Tensor, **values: Tensor) -> Tensor:
    """The identity with some of the resampling's numbers: a, b, s (row) and c, d, t (column)."""
    names = ("a", "b", "s", "c", "d", "t")
    columns = [values.get(n, identity[3 + i].expand(u.shape[:-1])) for i, n in enumerate(names)]
    rest = identity.expand(*u.shape[:-1], -1)
    return torch.cat((rest[..., :3], torch.stack(columns, -1), rest[..., 9:]), -1)


def _crop(u: Tensor, size: int, identity: Tensor) -> Tensor:
    reach = int(size * _SHIFT + 0.5)
    rows, columns = ((u[..., i] * (2 * reach + 1)).floor() - reach for i in (0, 1))
    return _placed(u, identity, s=rows, t=columns)


def _flip(u: Tensor, size: int, identity: Tensor) -> Tensor:
    return _placed(u, identity, d=torch.where(u[..., 0] < 0.5, -1.0, 1.0).to(u.dtype))


def _scale(u: Tensor, size: int, identity: Tensor) -> Tensor:
    rows, columns = (u[..., i] * (_SCALE - 1 / _SCALE) + 1 / _SCALE for i in (0, 1))
    return _placed(u, identity, a=rows, d=columns)


def _rotate(u: Tensor, size: int, identity: Tensor) -> Tensor:
    angle = (u[..., 0] - 0.5) * 2 * _DEGREES * math.pi / 180
    return _placed(u, identity, a=angle.cos(), b=angle.sin(), c=-angle.sin(), d=angle.cos())


def _cutout(u: Tensor, size: int, identity: Tensor) -> Tensor:
    side = int(size * _CUTOUT + 0.5)
    first = ((u[..., :2] * (size + 1 - side % 2)).floor() - side // 2).clamp(min=0)
    last = ((u[..., :2] * (size + 1 - side % 2)).floor() - side // 2 + side).clamp(max=size)
    return torch.cat((identity[:9].expand(*u.shape[:-1], -1), first, last), -1)


_OWN = {"color": _color, "crop": _crop, "cutout": _cutout, "flip": _flip, "scale": _scale, "rotate": _rotate}


def _resample(x: Tensor, warp: Tensor) -> Tensor:
    """Bilinear: the result's pixel (i, j) is the source's at (a i + b j + s, c i + d j + t), counted from the centre."""
    images = x.flatten(0, -4)
    maps = warp.expand(*x.shape[:-3], 6).reshape(-1, 6)
    out: Tensor = _Resample.apply(images, maps) if x.is_cuda else _sampled(images, maps)
    return out.view(x.shape)


def _sampled(x: Tensor, warp: Tensor) -> Tensor:
    a, b, s, c, d, t = warp.unbind(-1)
    half = x.shape[-1] / 2  # torch counts columns first, and in halves of the image's side
    theta = torch.stack((torch.stack((d, c, t / half), -1), torch.stack((b, a, s / half), -1)), -2)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    return grid_sample(x, grid, align_corners=False)


class _Resample(torch.autograd.Function):
    """``_sampled`` with a backward pass whose sums have one order: torch's own adds by atomics on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, warp: Tensor) -> Tensor:
        ctx.save_for_backward(warp)
        return _sampled(x, warp)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, lam: Tensor) -> tuple[Tensor, None]:
        return _spread(lam, ctx.saved_tensors[0]), None


def _spread(lam: Tensor, warp: Tensor) -> Tensor:
    """The adjoint of ``_sampled``: each source pixel collects from the 3 x 3 results around where it went.

    No more can reach it: a map of this file moves neighbours at least 1 / 1.2 pixels apart, by rotations of 15 degrees at most.
    """
    size, (a, b, s, c, d, t) = lam.shape[-1], (w[:, None, None] for w in warp.unbind(-1))
    at = torch.arange(size, dtype=lam.dtype, device=lam.device) - (size - 1) / 2
    p, q = at[:, None] - s, at - t
    det = a * d - b * c
    i, j = ((d * p - b * q) / det + (size - 1) / 2).round(), ((a * q - c * p) / det + (size - 1) / 2).round()
    flat, out = lam.flatten(-2), torch.zeros_like(lam)
    for di, dj in itertools.product((-1, 0, 1), repeat=2):
        m, n = i + di, j + dj
        u, v = m - (size - 1) / 2, n - (size - 1) / 2
        weight = (1 - (a * u + b * v - p).abs()).clamp(min=0) * (1 - (c * u + d * v - q).abs()).clamp(min=0)
        inside = (m >= 0) & (m < size) & (n >= 0) & (n < size)
        index = (m.clamp(0, size - 1) * size + n.clamp(0, size - 1)).long().flatten(-2).unsqueeze(-2)
        out = out + flat.gather(-1, index.expand(flat.shape)).view(lam.shape) * (weight * inside).unsqueeze(-3)
    return out


def _kept(box: Tensor, size: int) -> Tensor:
    """1 outside of the box (first row, first column, row and column behind it), 0 inside: [..., size, size]."""
    at = torch.arange(size, dtype=box.dtype, device=box.device)
    top, left, bottom, right = (v[..., None] for v in box.unbind(-1))
    rows, columns = (at >= top) & (at < bottom), (at >= left) & (at < right)
    return (~(rows[..., :, None] & columns[..., None, :])).to(box.dtype)
