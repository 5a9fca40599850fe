"""exchange.shards=K: processes that carry a range of the flat vector each, so that one process need not feed all workers.

    python -m metadist.exchange.shard        (started by the server, which writes its order to standard input)

Design choices
- The server keeps the meta-parameters, the optimizer and the order of things: one logical version, one checkpoint. A shard
  hands out its range of the newest versions, keeps its range of the pushed gradients, and sums what the server names. So the
  server moves one sum and one new version a meta-step, however many workers there are.
- A shard holds nothing that can't be made again: if it dies, its gradients' tasks go out again and another takes its place.
- It ends when the pipe from its server closes.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import zmq
from torch import Tensor

from metadist.exchange import wire
from metadist.exchange.door import Door, Peer
from metadist.exchange.keys import Secret
from metadist.exchange.wire import Header, Malformed

AT_ONCE = 400  # leases named in one message
_VERSIONS = 2  # kept: a worker may still be fetching the one before the newest


class Shard:
    """The process. ``size``: numbers in its range; ``most``: gradients it keeps."""

    def __init__(self, door: Door, size: int, narrow: torch.dtype, full: torch.dtype, most: int) -> None:
        """Nothing is kept yet."""
        self.door, self.size, self.narrow, self.full, self.most = door, size, narrow, full, most
        self._versions: dict[int, Any] = {}
        self._fetches: list[tuple[Peer, int, int]] = []
        self._pieces: dict[int, Tensor] = {}
        self._sum, self._missing = torch.zeros(size, dtype=full), list[int]()

    def handle(self, peer: Peer, header: Header, content: Any) -> None:
        """One message. Raises Malformed."""
        kind = header.get("k")
        if kind == "ping":
            self.door.send(peer, {"k": "pong"})
        elif kind == "fetch":
            self._fetches.append((peer, wire.number(header, "key"), wire.number(header, "lease")))
            self._answer()
        elif kind == "piece":
            self._piece(peer, wire.number(header, "lease"), content)
        elif peer.role != "server":
            raise Malformed("a message of no known kind")
        elif kind == "publish":
            wire.values(content or b"", self.narrow, self.size)
            self._versions[wire.number(header, "key")] = content
            for old in sorted(self._versions)[:-_VERSIONS]:
                del self._versions[old]
            self._answer()
        elif kind == "add":
            self._add(header["leases"], header["weights"])
        elif kind == "collect":
            self.door.send(peer, {"k": "sum", "missing": self._missing[:AT_ONCE]}, wire.block(self._sum))
            self._sum, self._missing = torch.zeros(self.size, dtype=self.full), []
        elif kind == "drop":
            for lease in header["leases"]:
                self._pieces.pop(lease, None)

    def _answer(self) -> None:
        """Fetches of a version that is there, or no longer; those of one that is yet to come wait."""
        newest = max(self._versions, default=-1)
        for fetch in [f for f in self._fetches if f[1] <= newest]:
            self._fetches.remove(fetch)
            peer, key, lease = fetch
            found = self._versions.get(key)
            self.door.send(peer, {"k": "gone" if found is None else "version", "lease": lease}, found)

    def _piece(self, peer: Peer, lease: int, content: Any) -> None:
        if len(self._pieces) >= self.most:
            self.door.send(peer, {"k": "full", "lease": lease})
            return
        self._pieces[lease] = wire.values(content or b"", self.narrow, self.size)
        self.door.send(peer, {"k": "kept", "lease": lease})

    def _add(self, leases: list[int], weights: list[float]) -> None:
        for lease, weight in zip(leases, weights, strict=True):
            piece = self._pieces.pop(lease, None)
            if piece is None:
                self._missing.append(lease)
            else:
                self._sum.add_(piece.to(self.full), alpha=weight)

    def serve(self) -> None:
        """Until standard input closes."""
        poller = zmq.Poller()
        for source in (self.door.socket, self.door.monitor, sys.stdin.fileno()):
            poller.register(source, zmq.POLLIN)
        while sys.stdin.fileno() not in dict(poller.poll(1000)):
            self.door.watch()
            for peer, header, content in self.door.messages():
                try:
                    self.handle(peer, header, content)
                except Malformed as e:
                    self.door.refuse("a malformed message", name=peer.name, detail=str(e))
            gone = time.monotonic() - 600.0
            for peer in [p for p in self.door.peers.values() if p.heard < gone and p.role != "server"]:
                self.door.forget(peer)
                self._fetches = [f for f in self._fetches if f[0] is not peer]


def main() -> int:
    """Read the order, say the address, serve."""
    order = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    narrow, full = (getattr(torch, order[k]) for k in ("narrow", "full"))
    longest = order["size"] * full.itemsize

    def say(text: str) -> None:
        print(f"shard {order['number']}: {text}", file=sys.stderr, flush=True)

    door = Door(order["ip"], Secret(**order["secret"]), order["encrypt"], order["facts"], longest, say)
    print(door.address, flush=True)
    try:
        Shard(door, order["size"], narrow, full, order["most"]).serve()
    finally:
        door.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
