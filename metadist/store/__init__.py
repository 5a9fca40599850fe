"""Atomic, checksummed, hash-keyed files: checkpoints, distilled sets, caches. No pickle."""

from metadist.store.cache import cached
from metadist.store.checkpoints import Checkpoints, Saved, claim
from metadist.store.files import Torn, atomic_write, clean, disk_error, load_tensors, save_tensors, write_first

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
    "save_tensors",
    "write_first",
]
