"""Images at rest: float32, float16, or uint8.

Design choices
- uint8 is affine per image, offset + scale * k with its own float32 scale and offset, because distilled images leave [0, 1]
  and differ much in contrast. What comes back is off by at most scale / 2, scale = (max - min) / 255 of that image.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metadist.errors import unknown

PRECISIONS = ("float32", "float16", "uint8")


def pack(images: Tensor, precision: str) -> dict[str, Tensor]:
    """The tensors that keep ``images`` [N, C, H, W] at that precision; UserError for one not in PRECISIONS."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision != "uint8":
        return {"images": images.to(getattr(torch, precision))}
    flat = images.to(torch.float32).flatten(1)
    offset, high = flat.aminmax(dim=1, keepdim=True)
    scale = (high - offset) / 255
    codes = ((flat - offset) / scale.where(scale > 0, 1.0)).round().clamp(0, 255).to(torch.uint8)
    return {"images": codes.reshape(images.shape), "images/scale": scale[:, 0], "images/offset": offset[:, 0]}


def unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    """Images [N, C, H, W] in float32 from the tensors of ``pack``."""
    images = tensors["images"].to(torch.float32)
    if tensors["images"].dtype != torch.uint8:
        return images
    scale, offset = (tensors[f"images/{k}"].reshape(-1, 1, 1, 1) for k in ("scale", "offset"))
    return images * scale + offset
