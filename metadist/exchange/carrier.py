"""Numbers between a worker and its server's shards: a version gathered from all of them, a gradient laid down with all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metadist.exchange import wire
from metadist.exchange.line import Line
from metadist.exchange.wire import Header, Layout


@dataclass
class _Pending:
    """One lease's numbers on their way. header: the server's order, or what to tell it when all shards have theirs."""

    header: Header
    parts: dict[int, Tensor] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)


class Carrier:
    """What one worker has under way with its shards, by lease."""

    def __init__(self, layout: Layout) -> None:
        """Nothing is under way."""
        self._layout = layout
        self._pending: dict[int, _Pending] = {}

    @property
    def laying(self) -> bool:
        """Whether a gradient is not with all shards yet."""
        return any(p.header["k"] == "push" for p in self._pending.values())

    def fetch(self, shards: Sequence[Line], header: Header) -> None:
        """Ask for the version that an order names."""
        lease, version = wire.number(header, "lease"), wire.number(header, "version")
        self._pending[lease] = _Pending(header)
        for line in shards:
            line.send({"k": "fetch", "key": version, "lease": lease})

    def lay(self, shards: Sequence[Line], header: Header, grad: Tensor) -> None:
        """Give every shard its range of a gradient [P]."""
        self._pending[header["lease"]] = _Pending(header)
        for line, part in zip(shards, self._layout.ranges(len(shards)), strict=True):
            line.send({"k": "piece", "lease": header["lease"]}, wire.block(grad[part]))

    def heard(self, number: int, shards: int, header: Header, content: Any) -> tuple[str, Header, Tensor | None] | None:
        """A shard's answer. When it completes something: ("gathered", order, flat [P]), ("laid", what to tell the server, None)
        or ("failed", order, None): the version is old by now, or a shard has no room.
        """
        lease = wire.number(header, "lease")
        pending = self._pending.get(lease)
        if pending is None:
            return None
        if header["k"] in ("gone", "full"):
            del self._pending[lease]
            return "failed", pending.header, None
        if header["k"] == "kept":
            pending.kept.add(number)
        else:
            part = self._layout.ranges(shards)[number]
            pending.parts[number] = wire.values(content or b"", self._layout.wire, part.stop - part.start)
        if len(pending.kept) == shards:
            del self._pending[lease]
            return "laid", pending.header, None
        if len(pending.parts) == shards:
            del self._pending[lease]
            return "gathered", pending.header, torch.cat([pending.parts[k] for k in range(shards)])
        return None

    def forget(self, lease: int | None = None) -> None:
        """Drop what is under way for a lease; without one, for all."""
        if lease is None:
            self._pending.clear()
        else:
            self._pending.pop(lease, None)
