"""Images as tensors in [0, 1]: conversion, resizing, and passes over many images in chunks.

Design choices
- Raw images stay uint8 until they are normalised: a data set is held once in bytes and once on the device, and what lies
  between is made in chunks.
- Float images are taken to be in [0, 1] already; whoever hands over something else is told so.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from metadist.errors import UserError

CHUNK = 4096  # images converted at once
_GREY = {"1", "L", "LA"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


def unit(x: Tensor) -> Tensor:
    """Images as floats in [0, 1]: uint8 [...] is divided by 255 (float32), floats [...] are returned as they are."""
    return x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x


def chunks(x: Tensor, size: int = CHUNK) -> Iterator[tuple[slice, Tensor]]:
    """(where, images in [0, 1]) for consecutive chunks of x [N, C, H, W]."""
    for start in range(0, len(x), size):
        where = slice(start, min(start + size, len(x)))
        yield where, unit(x[where])


def resize(x: Tensor, size: int) -> Tensor:
    """x [N, C, H, W] (uint8 or in [0, 1]) as [N, C, size, size] floats: bilinear, antialiased; x itself if it has that size."""
    # A second of imports that most runs do without.
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    if x.shape[-2:] == (size, size):
        return x
    kind = torch.float32 if x.dtype == torch.uint8 else x.dtype
    out = torch.empty(*x.shape[:2], size, size, dtype=kind)
    for where, part in chunks(x):
        out[where] = tv.resize(part, [size, size], interpolation=InterpolationMode.BILINEAR, antialias=True)
    return out


def from_pil(image: Image.Image, what: str) -> Tensor:
    """A PIL image as uint8 [C, H, W]: one channel if it is grey, else three (palettes resolved, transparency dropped).

    what: the name of the image in errors. Camera orientation (EXIF) is applied.
    Raises UserError for images of more than 8 bits a channel.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode not in _GREY | _COLOUR:
        raise UserError(f"{what} has pixel mode {image.mode}; convert it to 8 bits a channel (grey or RGB)")
    pixels = np.array(image.convert("L" if image.mode in _GREY else "RGB"), dtype=np.uint8)
    return torch.from_numpy(pixels).reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def stack(images: list[Tensor], size: int | None, what: str) -> Tensor:
    """One tensor [N, C, S, S] of images [c, h, w], grey ones repeated to three channels if any has colour.

    size: side to resize every image to; None: all must have one size and be square.
    what: the name of the collection in errors.
    Raises UserError if sizes differ, or are not square, and `size` is not given.
    """
    shapes = sorted({(i.shape[-2], i.shape[-1]) for i in images})
    if size is None and (len(shapes) > 1 or shapes[0][0] != shapes[0][1]):
        seen = ", ".join(f"{w}x{h}" for h, w in shapes[:3]) + (", ..." if len(shapes) > 3 else "")
        raise UserError(f"{what}: images must be square and of one size, found {seen}; data.size=N resizes all to NxN")
    if size is not None:
        images = [resize(i[None], size)[0] for i in images]
    channels = max(i.shape[0] for i in images)
    if len({i.dtype for i in images}) > 1:
        images = [unit(i) for i in images]
    return torch.stack([i.expand(channels, -1, -1) for i in images])
