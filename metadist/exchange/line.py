"""A worker's end of the line to the server, or to one of its shards."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

import zmq

from metadist.exchange import wire
from metadist.exchange.keys import Secret
from metadist.exchange.wire import Header, Malformed

_HELLO_S = 1.0  # until a hello without an answer is said again


class Line:
    """A DEALER socket. ``open``: the server has answered the hello; ``refused``: or said why it won't.

    facts: what the hello says (see ``Door``); longest: bytes of the longest block. Use it in one thread.
    """

    def __init__(
        self, context: zmq.Context[Any], address: str, secret: Secret, encrypt: bool, facts: dict[str, Any], longest: int
    ) -> None:
        """Connect; nothing is sent before ``hello``."""
        self.address, self._facts = address, facts
        self._token = bytes.fromhex(secret.token)
        self.socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.MAXMSGSIZE, longest + wire.MAX_HEADER),
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),  # nothing is queued for a server that is away
            (zmq.RCVHWM, 64),
            (zmq.SNDHWM, 64),
        ):
            self.socket.setsockopt(option, value)
        if encrypt:
            self.socket.curve_serverkey = secret.server_public.encode()
            self.socket.curve_publickey = secret.worker_public.encode()
            self.socket.curve_secretkey = secret.worker_secret.encode()
        self.socket.connect(address)
        self.heard = time.monotonic()
        self._said = 0.0
        self._reset()

    def _reset(self) -> None:
        self.open, self.refused, self.incarnation = False, "", 0
        self._key, self._word = b"", secrets.token_hex(16)
        self._sent = self._received = 0

    def hello(self) -> None:
        """Say hello, at most once a second, until the line is open."""
        if self.open or time.monotonic() - self._said < _HELLO_S:
            return
        data = wire.dump({**self._facts, "k": "hello", "nonce": self._word})
        if self._send([data, wire.seal(self._token, data)]):
            self._said = time.monotonic()

    def send(self, header: Header, content: Any = None) -> None:
        """A sealed message; ``content``: a buffer, sent without a copy."""
        self._sent += 1
        data = wire.dump({**header, "n": self._sent})
        frames: list[Any] = [data, wire.seal(self._key, data)]
        self._send([*frames, content] if content is not None else frames)

    def _send(self, frames: list[Any]) -> bool:
        try:
            self.socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=len(frames) < 3)
        except zmq.Again:  # the server is away: whoever waits for its answer will notice
            return False
        return True

    def messages(self) -> Iterator[tuple[Header, Any]]:
        """All that has come in order: header, block (a buffer or None). What is not the server's is dropped."""
        while True:
            try:
                frames = self.socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                found = self._one(frames)
            except Malformed:
                continue
            if found is not None:
                yield found

    def _one(self, frames: list[Any]) -> tuple[Header, Any] | None:
        if not 2 <= len(frames) <= 3:
            raise Malformed(f"{len(frames)} parts")
        data, given = bytes(frames[0].buffer), bytes(frames[1].buffer)
        header = wire.parse(data)
        kind = header.get("k")
        if kind == "unknown" and self.open:  # the server has lost us, or is another by now
            self._reset()
            return {"k": "unknown"}, None
        if kind in ("welcome", "refused") and not self.open:
            if header.get("to") == self._word and wire.sealed(self._token, data, given):
                self._answered(header)
                return {"k": header["k"]}, None
            return None
        if not self.open or not wire.sealed(self._key, data, given) or wire.number(header, "n") <= self._received:
            return None
        self._received, self.heard = header["n"], time.monotonic()
        return header, frames[2].buffer if len(frames) == 3 else None

    def _answered(self, header: Header) -> None:
        self.heard = time.monotonic()
        if header["k"] == "refused":
            self.refused = wire.text(header, "why")
            return
        self._key = wire.session_key(self._token, self._word, wire.text(header, "nonce"))
        self.incarnation, self.open = wire.number(header, "incarnation"), True

    def close(self, linger_ms: int = 0) -> None:
        """Disconnect; ``linger_ms``: for a last word to leave."""
        self.socket.close(linger_ms)
