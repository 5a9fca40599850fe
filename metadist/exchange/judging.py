"""An evaluation in parts: which networks of a set's judgement are where, and their figures as they come."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from metadist.exchange import wire
from metadist.exchange.wire import Malformed

_numbers = itertools.count(1)


class Judging:
    """Networks 0 .. count - 1, ``chunk`` at a time.

    purpose: which held-out networks. rows: figures of each network. content: the parameters' bytes, in full precision.
    ``table``: float64 [rows, count], NaN where nothing has come yet.
    """

    def __init__(self, purpose: str, rows: int, count: int, chunk: int, content: Any) -> None:
        """Nothing is out."""
        self.purpose, self.rows, self.content = purpose, rows, content
        self.table = torch.full((rows, count), float("nan"), dtype=torch.float64)
        parts = torch.split(torch.arange(count), max(1, chunk))
        self._parts: dict[int, Tensor] = {next(_numbers): part for part in parts}
        self._todo = sorted(self._parts, reverse=True)
        self._missing = set(self._parts)

    @property
    def complete(self) -> bool:
        """Whether all figures are there."""
        return not self._missing

    def issue(self) -> int | None:
        """A part to be judged; None if all are out."""
        return self._todo.pop() if self._todo else None

    def header(self, part: int) -> dict[str, Any]:
        """What a worker must know of it."""
        networks = self._parts[part]
        return {"purpose": self.purpose, "first": int(networks[0]), "count": len(networks), "all": self.table.shape[1]}

    def networks(self, part: int) -> Tensor:
        """The networks' numbers [n]."""
        return self._parts[part]

    def put(self, part: int, content: Any) -> None:
        """A part's figures as they came. Raises Malformed for another size, and for figures that are none."""
        networks = self._parts.get(part)
        if networks is None or part not in self._missing:
            return
        found = wire.values(content, torch.float64, self.rows * len(networks)).view(self.rows, -1)
        if not torch.isfinite(found).all():
            raise Malformed("figures that are not finite")
        self.table[:, networks] = found
        self._missing.discard(part)

    def give_back(self, part: int) -> None:
        """Nobody is at work on it any more."""
        if part in self._missing and part not in self._todo:
            self._todo.append(part)
