"""Tensors that are costly to make and depend only on a recipe: whitening, teachers, baselines.

Design choices
- The file's name is the SHA-256 of kind and recipe; the recipe itself lies inside and is compared, so a name never lies.
- One process makes, the others wait on a lock of the operating system (released when its holder dies) and read. Where the
  file system knows no locks several make the same thing at once; the rename is atomic, so nothing is ever half there.
- A cache is a convenience: a torn file is made again, a disk that takes no file is a warning, not an end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from metadist.errors import RunError
from metadist.store.atomic import atomic_write, clean
from metadist.store.files import load_tensors, pack, unpack

log = logging.getLogger("metadist")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` for the block, or nothing where files cannot be made or locked."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path, recipe: dict[str, Any]) -> dict[str, Tensor] | None:
    try:
        tensors, metadata = load_tensors(path)
    except FileNotFoundError:
        return None
    except RunError as e:  # torn, or not ours to read
        log.warning("cached file is made again: %s", e)
        return None
    if metadata.get("recipe") != recipe:
        log.warning("cached file %s is made again: it belongs to another recipe", path)
        return None
    return tensors


def cached(
    cache_dir: Path | str, kind: str, recipe: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of ``recipe``: read from the cache, or made and put there. Always on the CPU.

    cache_dir: the cache's folder (`~` is the home folder); made if missing.
    kind: what it is ("zca", "kmeans"), a folder in the cache.
    recipe: JSON-able; everything the tensors depend on (data, size, eps, version of the maker...).
    make: called without arguments if they are not there; all processes that ask at once get the same bits.
    """
    text = json.dumps(recipe, sort_keys=True)
    folder = Path(cache_dir).expanduser() / kind
    path = folder / f"{hashlib.sha256(f'{kind} {text}'.encode()).hexdigest()[:32]}.safetensors"
    plain: dict[str, Any] = json.loads(text)
    if (found := _read(path, plain) if path.exists() else None) is not None:
        return found
    with locked(path.with_suffix(".lock")):
        if (found := _read(path, plain)) is not None:  # made by another process meanwhile
            return found
        clean(folder)
        data = pack(make(), {"recipe": plain})
        try:
            atomic_write(path, data)
        except RunError as e:
            log.warning("the cache is not used: %s", e)
        return unpack(data)[0]
