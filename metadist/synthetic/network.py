"""The other product: trained networks in one self-describing file. method=train and kd hand it back, teachers are read from it.

    found = metadist.load_network("runs/teacher")   # a run folder or a file
    net = found.module(0)                           # an ordinary torch module in evaluation mode
    net(found.normalization.apply(x))               # x: real images in [0, 1]

One checksummed safetensors file (metadist.store): weights, BatchNorm's statistics, normalization, and a manifest in JSON that
names the network. Loading runs no code of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metadist import nets, store
from metadist.config import NetConfig
from metadist.data.normalization import Normalization
from metadist.errors import UserError
from metadist.nets import Learner

FILE = "network.safetensors"
_KIND, _FORMAT = "metadist networks", 1
_PREFIX = "normalization/"


@dataclass(frozen=True, eq=False)
class Network:
    """S trained networks of one architecture."""

    theta: Tensor  # [S, P] weights
    buffers: Tensor  # [S, Q] BatchNorm's statistics (Learner.statistics); Q = 0 without it
    normalization: Normalization  # of the images they were trained on
    manifest: Mapping[str, Any] = field(default_factory=dict)  # JSON-able: net, classes, channels, size, data, config, metrics

    def __len__(self) -> int:
        """S."""
        return len(self.theta)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names."""
        return tuple(self.manifest["classes"])

    def learner(self, device: torch.device | str = "cpu") -> Learner:
        """The architecture. UserError for a net of its author's own (a file may not name code), or one that does not fit."""
        try:
            config = NetConfig(**self.manifest["net"])
        except TypeError as e:
            raise UserError(f"these networks are of a kind that this metadist does not know: {e}") from None
        if config.name == "custom":
            raise UserError("these networks are of their author's own making (net=custom), whose code a file may not name")
        m = self.manifest
        made = nets.build(config, m["channels"], m["size"], len(self.classes), self.theta.dtype, device)
        held, wanted = (self.theta.shape[-1], self.buffers.shape[-1]), (made.size, made.buffers_size)
        if held != wanted:
            raise UserError(f"a network of this file has {held[0]} weights and {held[1]} statistics, net={config.name} of its "
                            f"manifest {wanted[0]} and {wanted[1]}; make the file anew")  # fmt: skip
        return made

    def module(self, number: int = 0) -> nn.Module:
        """Network ``number`` as a module in evaluation mode: normalised images [B, C, H, W] -> logits [B, K]."""
        return self.learner().module(self.theta[number], self.buffers[number])

    def digest(self) -> str:
        """SHA-256 of weights and statistics."""
        total = hashlib.sha256()
        for value in (self.theta, self.buffers):
            total.update(value.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write the file atomically. Raises RunError when the disk refuses."""
        tensors = {"theta": self.theta, "buffers": self.buffers}
        tensors |= {f"{_PREFIX}{k}": v for k, v in self.normalization.tensors().items()}
        store.save_tensors(path, tensors, {"kind": _KIND, "format": _FORMAT, "manifest": dict(self.manifest)})


def load(path: Path | str) -> Network:
    """The networks of a file, or of a run folder (its `network.safetensors`), on the CPU.

    Raises UserError if there is none or the file holds something else, store.Torn for a damaged one.
    """
    place = Path(path).expanduser()
    file = place / FILE if place.is_dir() else place
    try:
        tensors, head = store.load_tensors(file)
    except FileNotFoundError:
        raise UserError(f"there is no {file}; give the run folder of a finished method=train or method=kd") from None
    if head.get("kind") != _KIND:
        raise UserError(f"{file} holds no networks; give the run folder of a finished method=train or method=kd")
    if head["format"] != _FORMAT:
        raise UserError(f"{file} has format {head['format']}, this metadist reads {_FORMAT}; install the version that made it")
    normalization = Normalization.from_tensors(
        {k.removeprefix(_PREFIX): v for k, v in tensors.items() if k.startswith(_PREFIX)}
    )
    return Network(tensors["theta"], tensors["buffers"], normalization, head["manifest"])


def snapshot_name(part: float) -> str:
    """The file of networks as they were after ``part``, in (0, 1), of their training."""
    return f"network-{part:g}.safetensors"
