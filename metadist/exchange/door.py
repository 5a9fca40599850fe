"""The server's end of the line: a socket that only the run's own workers get an answer from.

Design choices
- CURVE (exchange.encrypt) proves both sides at the handshake. Without it the token does, by seals: it never travels itself.
- Who has not said hello in order is nobody, and nothing is kept of what he sends. The longest message is known beforehand:
  libzmq drops a connection that announces a longer one before it makes room for it. (It keeps the parts of a message until
  the last one has come: on an open line, without encryption, a stranger who never ends one does take memory.)
- A refusal is told to the sender where that helps him, counted, and logged once for each reason.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from metadist.exchange import wire
from metadist.exchange.keys import Secret
from metadist.exchange.wire import Header, Malformed

_MOST_PEERS = 10_000
_HANDSHAKE_MS = 5_000
REASONS = {
    "protocol": "its metadist speaks another version of the protocol",
    "run": "it belongs to another run",
    "config": "it has another configuration",
    "layout": "its meta-parameters have other shapes",
}


@dataclass
class Peer:
    """Somebody who has said hello. routing: his connection; heard: when he was heard last (monotonic seconds)."""

    routing: bytes
    name: str
    role: str
    key: bytes
    heard: float
    proven: bool = False  # has sealed a message: a hello alone could have been overheard
    word: str = ""  # his hello's, and ours to it: a hello said twice gets the same answer
    own: str = ""
    received: int = 0  # number of his last message
    sent: int = 0
    data: dict[str, Any] = field(default_factory=dict)


class _Only:
    """The one public key that gets in."""

    def __init__(self, public: str) -> None:
        self.public = public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        return zmq.utils.z85.encode(key) == self.public if len(key) == 32 else key == self.public


class Door:
    """A ROUTER socket on one interface and on a port that the kernel picks.

    ip: of the interface. facts: what a hello must say ("protocol", "run", "config", "layout"). longest: bytes of the longest
    block. say: how to log. Use it in one thread.
    """

    def __init__(
        self, ip: str, secret: Secret, encrypt: bool, facts: dict[str, Any], longest: int, say: Callable[[str], None]
    ) -> None:
        """Listen."""
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self._secret, self._facts, self._say = secret, facts, say
        self._token = bytes.fromhex(secret.token)
        self.refusals: Counter[str] = Counter()
        self.peers: OrderedDict[bytes, Peer] = OrderedDict()
        self._strangers: set[int] = set()  # connections that have shown nothing yet
        self._friends: set[int] = set()  # and those that have
        self._gate: ThreadAuthenticator | None = None
        for option, value in (
            (zmq.MAXMSGSIZE, longest + wire.MAX_HEADER),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
            (zmq.LINGER, 0),
            (zmq.RCVHWM, 64),
            (zmq.SNDHWM, 64),
            (zmq.ROUTER_HANDOVER, 1),
        ):
            self.socket.setsockopt(option, value)
        if encrypt:
            self._gate = ThreadAuthenticator(self.context)
            self._gate.start()
            self._gate.configure_curve_callback("*", _Only(secret.worker_public))
            self.socket.curve_server = True
            self.socket.curve_secretkey = secret.server_secret.encode()
        self.monitor = self.socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )  # fmt: skip
        port = self.socket.bind_to_random_port(f"tcp://{ip}")
        self.address = f"tcp://{ip}:{port}"

    def close(self) -> None:
        """Stop listening."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)
        if self._gate is not None:
            self._gate.stop()
        self.context.term()

    def send(self, peer: Peer, header: Header, content: Any = None) -> None:
        """A sealed message; ``content``: a buffer, sent without a copy."""
        peer.sent += 1
        data = wire.dump({**header, "n": peer.sent})
        frames: list[Any] = [peer.routing, data, wire.seal(peer.key, data)]
        self._send([*frames, content] if content is not None else frames)

    def _send(self, frames: list[Any]) -> None:
        with contextlib.suppress(zmq.Again, zmq.ZMQError):  # gone, or so slow that its queue is full: it will ask again
            self.socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=len(frames) < 4)

    def messages(self) -> Iterator[tuple[Peer, Header, Any]]:
        """All that has come: sender, header, block (a buffer or None). Hellos and refusals are dealt with here."""
        while True:
            try:
                frames = self.socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                found = self._one(frames)
            except Malformed as e:
                self.refuse("a malformed message", frames, detail=str(e))
                continue
            if found is not None:
                yield found

    def _one(self, frames: list[Any]) -> tuple[Peer, Header, Any] | None:
        if not 3 <= len(frames) <= 4:
            raise Malformed(f"{len(frames)} parts")
        routing, data, given = (bytes(f.buffer) if len(f) <= wire.MAX_HEADER else b"" for f in frames[:3])
        header = wire.parse(data)
        file = int(frames[1].get(zmq.SRCFD))
        if header.get("k") == "hello":
            if wire.sealed(self._token, data, given):
                self._strangers.discard(file)
                self._friends.add(file)
                self._hello(routing, header, frames)
            else:
                self.refuse("a hello without the run's token", frames)
            return None
        peer = self.peers.get(routing)
        if peer is None:
            self._send([routing, wire.dump({"k": "unknown"}), b""])  # of an earlier start, maybe: he shall say hello again
            return None
        if not wire.sealed(peer.key, data, given):
            self.refuse("a message whose seal is not its sender's", frames)
            return None
        if wire.number(header, "n") <= peer.received:
            self.refuse("a message that was sent before", frames)
            return None
        peer.received, peer.proven, peer.heard = header["n"], True, time.monotonic()
        return peer, header, frames[3].buffer if len(frames) == 4 else None

    def _hello(self, routing: bytes, header: Header, frames: list[Any]) -> None:
        word, name = wire.text(header, "nonce"), wire.text(header, "name")
        wrong = next((key for key in REASONS if header.get(key) != self._facts[key]), None)
        if wrong is not None:
            self.refuse(REASONS[wrong], frames, name)
            answer = wire.dump({"k": "refused", "why": REASONS[wrong], "to": word})
            self._send([routing, answer, wire.seal(self._token, answer)])
            return
        known = self.peers.get(routing)
        own = known.own if known is not None and known.word == word else secrets.token_hex(16)
        if known is None or known.own != own:
            key, role = wire.session_key(self._token, word, own), wire.text(header, "role")
            self.peers[routing] = Peer(routing, name, role, key, time.monotonic(), word=word, own=own)
            self._prune()
        answer = wire.dump({"k": "welcome", "to": word, "nonce": own, "incarnation": self._facts["incarnation"]})
        self._send([routing, answer, wire.seal(self._token, answer)])

    def _prune(self) -> None:
        while len(self.peers) > _MOST_PEERS:
            unproven = next((r for r, p in self.peers.items() if not p.proven), None)
            del self.peers[unproven if unproven is not None else next(iter(self.peers))]

    def forget(self, peer: Peer) -> None:
        """He is gone; what still comes from him is a stranger's."""
        if self.peers.get(peer.routing) is peer:
            del self.peers[peer.routing]

    def refuse(self, why: str, frames: list[Any] | None = None, name: str = "", detail: str = "") -> None:
        """Count a refusal; the first of its kind is logged. why: one of a few, never a stranger's own words."""
        self.refusals[why] += 1
        if self.refusals[why] == 1:
            who = name
            if frames is not None:
                with contextlib.suppress(zmq.ZMQError, KeyError):
                    who = f"{name} at {frames[1].get('Peer-Address')}".strip()
            why = f"{why} ({detail})" if detail else why
            self._say(f"refused {who or 'somebody'}: {why}; further ones are only counted")

    def watch(self) -> None:
        """Look at connections that came and went: who leaves without a word in order was a stranger."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
            file = int(event["value"])
            if event["event"] == zmq.EVENT_ACCEPTED:
                if file not in self._friends:  # else his hello has overtaken this news
                    self._strangers.add(file)
            elif event["event"] in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                if file in self._strangers:
                    self.refuse("a connection that brought nothing of this run's")
                self._strangers.discard(file)
                self._friends.discard(file)
            else:
                self.refuse("a connection without the run's key")
