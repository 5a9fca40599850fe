"""A user's own torch Datasets as tensors."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from metadist.data import pixels
from metadist.data.splits import Raw
from metadist.errors import UserError


def read(train: Dataset[Any], test: Dataset[Any] | None, size: int | None) -> Raw:
    """The items of map-style Datasets, as found; see `metadist.data.from_datasets` for what an item may be.

    size: side to resize to; None: all images must be square and of one size.
    Raises UserError naming the item that is something else.
    """
    images, labels = _items(train, "train")
    more, more_labels = _items(test, "test") if test is not None else ([], [])
    x = pixels.stack(images + more, size, "the given Dataset")
    classes = _classes(train, max(labels + more_labels) + 1)
    cut = len(images)
    held = (x[cut:], torch.tensor(more_labels)) if test is not None else None
    return Raw(type(train).__name__, classes, (x[:cut], torch.tensor(labels)), held)


def _items(found: Dataset[Any], what: str) -> tuple[list[Tensor], list[int]]:
    length = len(found) if hasattr(found, "__len__") else 0
    if length == 0:
        raise UserError(f"the given {what} Dataset is empty or has no length; a map-style torch Dataset with items is needed")
    images: list[Tensor] = []
    labels: list[int] = []
    # A fixed seed in a forked generator: transforms that draw give every worker the same images.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for i in range(length):
            image, label = _item(found[i], f"item {i} of the {what} Dataset")
            images.append(image)
            labels.append(label)
    return images, labels


def _item(item: Any, what: str) -> tuple[Tensor, int]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise UserError(f"{what} is not a pair (image, label)")
    image, label = item
    try:
        number = int(label)
    except (TypeError, ValueError) as e:
        raise UserError(f"{what} has the label {label!r}; labels are integers 0 .. classes-1") from e
    if number < 0 or number != label:
        raise UserError(f"{what} has the label {label!r}; labels are integers 0 .. classes-1")
    if isinstance(image, Image.Image):
        return pixels.from_pil(image, what), number
    return _tensor(image, what), number


def _tensor(image: Any, what: str) -> Tensor:
    if not isinstance(image, Tensor) or image.dim() not in (2, 3):
        shape = f" of shape {list(image.shape)}" if isinstance(image, Tensor) else ""
        raise UserError(f"{what} holds a {type(image).__name__}{shape}; give a PIL image or a tensor [C, H, W] or [H, W]")
    pixel: Tensor = image.detach().cpu()
    pixel = pixel if pixel.dim() == 3 else pixel.unsqueeze(0)
    if pixel.dtype == torch.uint8:
        return pixel
    if not pixel.is_floating_point() or not (pixel.min() >= 0 and pixel.max() <= 1):
        low, high = pixel.min().item(), pixel.max().item()
        raise UserError(
            f"{what} holds {str(pixel.dtype).removeprefix('torch.')} values from {low:.3g} to {high:.3g}; give uint8 or floats"
            " in [0, 1] and leave the normalization to data.normalize"
        )
    return pixel


def _classes(found: Dataset[Any], count: int) -> tuple[str, ...]:
    """The Dataset's own names if it has as many as there are labels."""
    names = getattr(found, "classes", None)
    if isinstance(names, list | tuple) and len(names) >= count:
        return tuple(str(n) for n in names)
    return tuple(str(i) for i in range(count))
