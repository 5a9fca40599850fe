"""Networks and images made elsewhere that a run stands on: resumed, it must find the very same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from metadist.data import Normalization, Split
from metadist.errors import RunError
from metadist.run.folder import RunFolder


class Origin(NamedTuple):
    """What they are.

    name: under which the run folder records their SHA-256. what, mend: for a person, when they are others.
    """

    name: str
    sha256: str
    what: str
    mend: str


def pool(weights: Tensor) -> Origin:
    """Pre-trained networks [n, P]."""
    digest = hashlib.sha256(weights.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    return Origin("pool", digest, "the pre-trained networks", "restore cache_dir or pretrained.path")


def experts(key: str) -> Origin:
    """Expert trajectories; key: of their recipe."""
    return Origin("experts", key, "the experts", "restore experts.path")


def teachers(digests: Iterable[str]) -> Origin:
    """Teachers of knowledge distillation; digests: of each."""
    return Origin("teachers", hashlib.sha256("".join(digests).encode()).hexdigest(), "the teachers",
                  "restore the runs of kd.teachers")  # fmt: skip


def images(train: Split, normalization: Normalization) -> Origin:
    """A distilled set that networks are trained on."""
    parts = (train.x, train.y, *normalization.tensors().values())
    total = hashlib.sha256()
    for part in parts:
        total.update(part.detach().cpu().contiguous().numpy().tobytes())
    return Origin("images", total.hexdigest(), "the images of data.path", "restore that file")


def check(found: Iterable[Origin], folder: RunFolder) -> None:
    """Record them at the first start. Raises RunError if they are not those that the run began with."""
    for origin in found:
        if (known := folder.resolve(origin.name, partial(str, origin.sha256))) != origin.sha256:
            raise RunError(
                f"{origin.what} are not those this run began with (sha256 {origin.sha256[:12]}, recorded {known[:12]}): "
                f"{origin.mend}, or start a new run_dir"
            )
