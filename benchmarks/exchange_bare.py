"""What the exchange is compared with: bare TCP sockets, and bare ZeroMQ, that move the same bytes and do nothing else.

Design choices
- Bare sockets are the best that one thread a side can do: one connection, no Nagle, into a buffer that is kept warm.
- Bare ZeroMQ is the same two sockets as the exchange's, one thread a side, without headers, seals, ledger or a second thread:
  what is lost between the two is the library's own (its thread moves the bytes), the rest is ours.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol

import zmq
from exchange_parts import SPAWN

SMALL = 64  # bytes of a request, and of an acknowledgement
_ROOM = 41_000_000  # bytes of the largest block


class Peer(Protocol):
    """The worker's end."""

    def pull(self, size: int) -> None:
        """A small request, ``size`` bytes back."""
        ...

    def push(self, size: int) -> None:
        """``size`` bytes, a small answer."""
        ...


def _store() -> memoryview:
    return memoryview(bytearray(b"\1") * _ROOM)  # written: pages that nobody wrote share one page of zeros


def _request(kind: bytes, size: int) -> bytes:
    return struct.pack("<cq", kind, size).ljust(SMALL)


def _receive(link: socket.socket, into: memoryview) -> None:
    while into:
        if not (got := link.recv_into(into)):
            raise EOFError
        into = into[got:]


def _answer_sockets(pipe: Connection) -> None:
    """A request names a size; b"g": so many bytes go out, b"p": so many come in."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        link = listener.accept()[0]
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request, store = memoryview(bytearray(SMALL)), _store()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            _receive(link, request)
            kind, size = struct.unpack_from("<cq", request)
            if kind == b"g":
                link.sendall(store[:size])
            else:
                _receive(link, store[:size])
                link.sendall(request)


class Sockets:
    """A bare connection."""

    def __init__(self, port: int) -> None:
        """Connect."""
        self._link = socket.create_connection(("127.0.0.1", port))
        self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._store, self._small = _store(), memoryview(bytearray(SMALL))

    def pull(self, size: int) -> None:
        """A small request, ``size`` bytes back."""
        self._link.sendall(_request(b"g", size))
        _receive(self._link, self._store[:size])

    def push(self, size: int) -> None:
        """``size`` bytes, a small answer."""
        self._link.sendall(_request(b"p", size))
        self._link.sendall(self._store[:size])
        _receive(self._link, self._small)


def _answer_zmq(pipe: Connection) -> None:
    context: zmq.Context[Any] = zmq.Context()
    link, store = context.socket(zmq.ROUTER), _store()
    pipe.send(link.bind_to_random_port("tcp://127.0.0.1"))
    while True:
        link.poll()
        frames = link.recv_multipart(copy=False)
        kind, size = struct.unpack_from("<cq", bytes(frames[1].buffer))
        small = [bytes(frames[0].buffer), bytes(SMALL)]
        link.send_multipart([*small, store[:size]] if kind == b"g" else small, copy=False)


class Zmq:
    """A bare connection through ZeroMQ."""

    def __init__(self, port: int) -> None:
        """Connect."""
        self._context: zmq.Context[Any] = zmq.Context()
        self._link, self._store = self._context.socket(zmq.DEALER), _store()
        self._link.connect(f"tcp://127.0.0.1:{port}")

    def _answered(self) -> None:
        self._link.poll()
        self._link.recv_multipart(copy=False)

    def pull(self, size: int) -> None:
        """A small request, ``size`` bytes back."""
        self._link.send(_request(b"g", size))
        self._answered()

    def push(self, size: int) -> None:
        """``size`` bytes, a small answer."""
        self._link.send_multipart([_request(b"p", size), self._store[:size]], copy=False)
        self._answered()


@contextlib.contextmanager
def bare() -> Iterator[dict[str, Peer]]:
    """Both, each with a server in a process of its own."""
    programs, peers = [], dict[str, Peer]()
    try:
        for name, answer, end in (("sockets", _answer_sockets, Sockets), ("zmq", _answer_zmq, Zmq)):
            ours, theirs = SPAWN.Pipe()
            programs.append(SPAWN.Process(target=answer, args=(theirs,), daemon=True))
            programs[-1].start()
            peers[name] = end(ours.recv())
        yield peers
    finally:
        for program in programs:
            program.kill()
            program.join()
