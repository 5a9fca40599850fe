"""A space of architectures, and groups of candidates that are trained as one tensor of weights.

Design choices
- A space is numbered and named: candidate i is built by its number, and known in files and tables by its key.
- Candidates whose weights have the same shapes may be one module (``Shared``) that a few frozen numbers in front of the weights
  tell apart. Such a group is trained by one vmap; each of its networks computes what the candidate's own module would.
- A candidate's initial weights are those of its own module: no group, and no place in it, changes them. A user's own module
  keeps its own distribution with init=default, as it does where it is a net by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from metadist.errors import UserError
from metadist.nets.learner import Learner
from metadist.search.cells import Cells
from metadist.search.convnets import Convnets
from metadist.search.own import own

NAMES = ("convnets", "cells")


class Space(Protocol):
    """Architectures 0 ... len - 1. name: for tables."""

    name: str

    def __len__(self) -> int:
        """How many there are."""
        ...

    def key(self, index: int) -> str:
        """The architecture's name: unique in the space, the same for ever."""
        ...

    def module(self, index: int, channels: int, size: int, classes: int) -> nn.Module:
        """From images [B, channels, size, size] to logits [B, classes]. Raises UserError for images it can't take."""
        ...


@runtime_checkable
class Shared(Protocol):
    """What a space offers beside whose candidates can be one module."""

    def shape(self, index: int) -> str:
        """Equal for candidates that can."""
        ...

    def shared(self, index: int, channels: int, size: int, classes: int) -> nn.Module:
        """That module; its first parameter [k] is the candidate's choice, the others are those of its own module."""
        ...

    def choice(self, index: int) -> tuple[float, ...]:
        """The k numbers of a candidate."""
        ...


def open_space(name: str, width: int = 0, cells: int = 0) -> Space:
    """The space of that name: convnets, cells, or the import path of a user's own class.

    width, cells: sizes of the first two, see there; 0: as published. Raises UserError for what the space does not know.
    """
    sizes = {"convnets": ("width",), "cells": ("width", "cells")}.get(name, ())
    for key, value in (("width", width), ("cells", cells)):
        if value and key not in sizes:
            raise UserError(f"search.{key}={value} means nothing to search.space={name}; leave it out")
    if name == "convnets":
        return Convnets(width)
    return Cells(width, cells) if name == "cells" else own(name, NAMES)


@dataclass(frozen=True)
class Group:
    """Networks of one structure and one set of parameter shapes.

    indices: the candidate that each network is. learner: of all of them; its weights are a choice [k] and a candidate's own.
    own: each candidate's own module.
    """

    indices: tuple[int, ...]
    learner: Learner
    own: dict[int, Learner]
    choices: Tensor  # [n, k]

    def start(self, keys: Tensor) -> Tensor:
        """Initial weights [n, P], drawn by keys int64 [n, 2], one a network."""
        rows = [self.own[i].init(keys[j : j + 1]) for j, i in enumerate(self.indices)]
        return torch.cat([self.choices, torch.cat(rows)], 1)

    def module(self, j: int, theta: Tensor, buffers: Tensor | None = None) -> nn.Module:
        """Network j as its candidate's own module. theta: [P]; buffers: [Q], then in evaluation mode."""
        return self.own[self.indices[j]].module(theta[self.choices.shape[1] :], buffers)


def shape(space: Space, index: int) -> str:
    """Equal for candidates that may be in one group."""
    return space.shape(index) if isinstance(space, Shared) else space.key(index)


def grouped(space: Space, indices: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """The candidates in groups of one shape and of at most ``most``, in the order given. Nothing is built."""
    found: dict[str, list[int]] = {}
    for i in indices:
        found.setdefault(shape(space, i), []).append(i)
    return [tuple(same[k : k + most]) for same in found.values() for k in range(0, len(same), most)]


def build(
    space: Space,
    indices: Sequence[int],
    channels: int,
    size: int,
    classes: int,
    init: str = "default",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Group:
    """The group of these candidates, for images [B, channels, size, size]; init: p(theta0), see metadist.nets.

    Raises UserError for images that they can't take, for candidates of several shapes, and where a space makes no module.
    """
    if len({shape(space, i) for i in indices}) != 1:
        raise UserError(f"candidates {', '.join(space.key(i) for i in indices)} are of several shapes; group them by shape")

    def learner(make: Callable[[], nn.Module]) -> Learner:
        # Layers draw when they are built. What of it stays (a user's frozen parameters) must depend on the candidate alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module = make()
        if not isinstance(module, nn.Module):
            raise UserError(f"search.space={space.name} makes a {type(module).__name__}; its module() must make an nn.Module")
        factory = None if isinstance(space, Convnets | Cells) else make
        return Learner(module, init, factory, dtype, device, classes)

    own = {i: learner(partial(space.module, i, channels, size, classes)) for i in dict.fromkeys(indices)}
    if len(own) > 1 and isinstance(space, Shared):
        together = learner(partial(space.shared, indices[0], channels, size, classes))
        rows = [space.choice(i) for i in indices]
    else:
        together, rows = own[indices[0]], [() for _ in indices]
    return Group(tuple(indices), together, own, torch.tensor(rows, dtype=dtype, device=device).view(len(rows), -1))
