"""A user's own images: one folder per class.

    pets/cat/1.png  pets/dog/7.jpg                        a fifth is held out for the test, a part of the rest for validation
    pets/train/cat/1.png  pets/test/cat/2.png             the test images are given; pets/valid/cat/3.png: validation too

Design choices
- Classes are the folder names in sorted order; files are read in sorted order: the same tensors on every machine.
- Files of other kinds and hidden ones are passed over; an image that can't be decoded is an error that names it.
- Grey images stay one channel; if any image has colour, all get three.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from metadist import errors
from metadist.data import pixels
from metadist.data.splits import Images, Raw
from metadist.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
PARTS = ("train", "valid", "test")


def read(root: Path, size: int | None) -> Raw:
    """The images under `root`, as found.

    size: side to resize to; None: all images must be square and of one size.
    Raises UserError if the folder is missing or empty, holds no class folders, a class has no images, an image can't be
    decoded, or `valid/` and `test/` have other classes than `train/`.
    """
    if not root.is_dir():
        raise UserError(f"data.path={root} is not a folder; give one that holds one folder of images per class")
    parts = _parts(root)
    classes = _classes(parts["train"])
    for part in parts.values():
        if _classes(part) != classes:
            odd = sorted(set(classes) ^ set(_classes(part)))[0]
            raise UserError(f"{part} and {parts['train']} differ in class {odd}; both need the same class folders")
    found = _stack_together({name: _read_part(part, classes, size) for name, part in parts.items()}, size, root)
    return Raw(_name(root), classes, found["train"], found.get("test"), found.get("valid"))


def _name(root: Path) -> str:
    return f"folder:{root.resolve().name}"


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    found = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(p for p in found if p.is_file())


def _parts(root: Path) -> dict[str, Path]:
    """The folders of the splits: `root` itself unless it holds a train/ that holds folders."""
    if not (root / "train").is_dir() or not _folders(root / "train"):
        return {"train": root}
    found = {p.name: p for p in _folders(root)}
    for name in found:
        if name not in PARTS:
            raise errors.unknown(f"{root} holds train/, so each folder beside it is a split; folder", name, PARTS)
    return {name: found[name] for name in PARTS if name in found}


def _classes(part: Path) -> tuple[str, ...]:
    names = tuple(p.name for p in _folders(part))
    if len(names) < 2:
        found = "no class folders" if not names else f"only the class folder {names[0]}"
        raise UserError(
            f"{part} holds {found}; it must hold one folder of images ({' '.join(SUFFIXES)}) per class, two at least"
        )
    return names


def _read_part(part: Path, classes: tuple[str, ...], size: int | None) -> tuple[list[Tensor], list[int]]:
    images: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = _files(part / name)
        if not files:
            raise UserError(f"class folder {part / name} holds no images ({' '.join(SUFFIXES)})")
        images += [_decode(f, size) for f in files]
        labels += [label] * len(files)
    return images, labels


def _decode(file: Path, size: int | None) -> Tensor:
    """One image [C, H, W], resized at once where asked: a folder of photographs need not fit in memory at full size."""
    try:
        with Image.open(file) as image:
            image.load()
            out = pixels.from_pil(image, str(file))
    except UserError:
        raise
    except Exception as e:  # decoders raise OSError, SyntaxError, ValueError, struct.error... for broken files
        why = " ".join(str(e).split()).replace(f" {str(file)!r}", "")
        raise UserError(f"image {file} can't be read ({why}); replace or remove it") from e
    return out if size is None else pixels.resize(out[None], size)[0]


def _stack_together(parts: dict[str, tuple[list[Tensor], list[int]]], size: int | None, root: Path) -> dict[str, Images]:
    """Tensors of all splits with one size and one number of channels."""
    x = pixels.stack([image for images, _ in parts.values() for image in images], size, f"data.path={root}")
    out: dict[str, Images] = {}
    start = 0
    for name, (_, labels) in parts.items():
        out[name] = (x[start : start + len(labels)], torch.tensor(labels))
        start += len(labels)
    return out
