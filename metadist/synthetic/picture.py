"""Distilled images as a person sees them: one grid, or a folder of PNGs.

Design choices
- Time runs downwards: with several inner steps each step is a band of rows, a column is a class. With one step, a row is a
  class; one image a class makes a compact block.
- Pixels are enlarged by whole factors without smoothing: what is shown is what was learned.
- One channel is grey, three are colours; any other number is shown as its mean.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metadist.store import atomic_write

_SIDE = 112  # pixels an image is enlarged to, about: 4 x 28
_WIDEST = 4096  # pixels: a wider grid is enlarged less


def to_uint8(x: Tensor) -> Tensor:
    """Images x [N, C, H, W] in [0, 1] (clipped) as uint8 [N, H, W, 3] on the CPU."""
    x = x.detach().to("cpu", torch.float32)
    x = x if x.shape[1] == 3 else x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return (x.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _block_columns(n: int) -> int:
    """Columns of the most compact full rectangle of n images, at most three times as wide as high; else a ragged one."""
    return next((c for c in range(math.isqrt(n - 1) + 1, n + 1) if n % c == 0 and c <= 3 * n / c), math.isqrt(n - 1) + 1)


def arrange(n: int, steps: int, classes: int) -> list[list[list[int]]]:
    """Which of n images goes where: bands of rows of image numbers.

    steps: S; images s*B ... (s+1)*B - 1 are step s, and image i has class i mod ``classes``.
    """
    size = n // steps
    if steps > 1:
        width = classes if size % classes == 0 else size
        return [[list(range(r, r + width)) for r in range(s * size, (s + 1) * size, width)] for s in range(steps)]
    if n > classes and n % classes == 0:
        return [[list(range(k, n, classes)) for k in range(classes)]]
    width = _block_columns(n)
    return [[list(range(r, min(r + width, n))) for r in range(0, n, width)]]


def grid(x: Tensor, steps: int, classes: int) -> Tensor:
    """One picture of images x [N, C, H, W] in [0, 1]: uint8 [height, width, 3] (see ``arrange``), on white.

    An image of 28 x 28 is enlarged 4 times, smaller ones more; grids wider than 4,096 pixels less.
    """
    pixels = to_uint8(x)
    n, high, wide, _ = pixels.shape
    bands = arrange(n, steps, classes)
    columns = max(len(row) for band in bands for row in band)
    factor = max(1, min(math.ceil(_SIDE / high), _WIDEST // (columns * wide)))
    pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    high, wide, gap = high * factor, wide * factor, 4
    between = 3 * gap if any(len(band) > 1 for band in bands) else 0  # steps are told apart only where rows would blur them
    rows = sum(len(band) for band in bands)
    height = gap + rows * (high + gap) + (len(bands) - 1) * between
    out = torch.full((height, gap + columns * (wide + gap), 3), 255, dtype=torch.uint8)
    top = gap
    for band in bands:
        for row in band:
            for c, i in enumerate(row):
                left = gap + c * (wide + gap)
                out[top : top + high, left : left + wide] = pixels[i]
            top += high + gap
        top += between
    return out


def png(pixels: Tensor) -> bytes:
    """A PNG file of uint8 [H, W, 3]; grey if its channels are equal."""
    grey = bool((pixels == pixels[..., :1]).all())
    data = io.BytesIO()
    Image.fromarray((pixels[..., 0] if grey else pixels).contiguous().numpy()).save(data, "PNG")
    return data.getvalue()


def export(folder: Path | str, x: Tensor, labels: Tensor, names: Sequence[str], steps: int) -> None:
    """Write images x [N, C, H, W] in [0, 1] (clipped) as `<number>.png` and `labels.json` into ``folder``.

    labels: int64 [N] or probabilities [N, K].
    names: of the K classes; `labels.json` holds them and, for each file, step, class and (soft labels) probabilities.
    """
    folder = Path(folder)
    soft = labels.is_floating_point()
    hard = (labels.argmax(1) if soft else labels).tolist()
    files: dict[str, Any] = {}
    for i, pixels in enumerate(to_uint8(x)):
        name = f"{i:05d}.png"
        atomic_write(folder / name, png(pixels))
        files[name] = {"step": i // (len(x) // steps), "class": hard[i], "name": names[hard[i]]}
        if soft:
            files[name]["probabilities"] = labels[i].tolist()
    atomic_write(folder / "labels.json", json.dumps({"classes": list(names), "images": files}, indent=1).encode())
