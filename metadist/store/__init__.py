"""Atomic, checksummed, hash-keyed files: checkpoints, distilled sets, caches. No pickle.

What handles tensors is imported when it is first used: programs that write a record only start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metadist.store.atomic import atomic_write, claim, clean, disk_error, write_first
from metadist.store.checkpoints import Checkpoints, Saved, newest_step

if TYPE_CHECKING:
    from metadist.store.cache import cached
    from metadist.store.files import Torn, load_tensors, save_tensors

__all__ = [
    "Checkpoints",
    "Saved",
    "Torn",
    "atomic_write",
    "cached",
    "claim",
    "clean",
    "disk_error",
    "load_tensors",
    "newest_step",
    "save_tensors",
    "write_first",
]

_HOME = {
    "Torn": "files",
    "cached": "cache",
    "load_tensors": "files",
    "save_tensors": "files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'metadist.store' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"metadist.store.{_HOME[name]}"), name)
    return value
