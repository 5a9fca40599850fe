"""Strangers at the parameter server's door: each is refused with the reason, while an honest worker's work goes on."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from server_cases import LAYOUT, LONGEST, Honest, Stage, gradient, heard, resident_mb, until, work_for

from metadist.errors import RunError
from metadist.exchange import client as client_module
from metadist.exchange import wire
from metadist.exchange.door import REASONS
from metadist.exchange.line import Line
from metadist.exchange.work import facts

KEYLESS = "a connection without the run's key"
NOTHING = "a connection that brought nothing of this run's"
NO_TOKEN = "a hello without the run's token"
NO_SEAL = "a message whose seal is not its sender's"
OLD = "a message that was sent before"
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
SEED = 4711
encrypted = pytest.mark.parametrize("stage", [True], indirect=True, ids=["encrypted"])
open_line = pytest.mark.parametrize("stage", [False], indirect=True, ids=["open"])


class Overheard(Line):
    """A line whose last push is kept as it went out."""

    frames: list[bytes] = []  # noqa: RUF012
    line: Line

    def _send(self, frames: list[Any]) -> bool:
        if b'"k":"push"' in frames[0]:
            Overheard.frames, Overheard.line = [bytes(frame) for frame in frames], self
        return super()._send(frames)


@pytest.fixture(scope="module", params=[True, False], ids=["encrypted", "open"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "Line", Overheard)
        made = Stage(tmp_path_factory.mktemp("run"), request.param)
        made.honest = Honest(made.client("1"))
        made.update()
        yield made
        made.hub.dismiss("finished", 10.0)
        assert made.honest.leave() == "finished"
        made.close()


@pytest.fixture(autouse=True)
def _work_goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a stranger did: the honest worker's gradients are applied, each once, and each reason is logged once."""
    yield
    if "stage" in request.fixturenames:
        stage: Stage = request.getfixturevalue("stage")
        stage.update(3)
        logged = [
            line.partition(": ")[2].removesuffix("; further ones are only counted").partition(" (")[0]
            for line in stage.said
            if "refused" in line
        ]
        with stage.hub.changed:
            assert sorted(logged) == sorted(stage.door.refusals)


@contextlib.contextmanager
def raw(stage: Stage, *sent: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", stage.port), 10) as made:
        for data in sent:
            made.sendall(data)
        yield made


def ended(connection: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return True


def dealer(stage: Stage, public: bytes | None, secret: bytes | None) -> zmq.Socket[bytes]:
    made = stage.context.socket(zmq.DEALER)
    made.linger, made.reconnect_ivl, made.sndtimeo = 0, -1, 20_000
    if public is not None:
        made.curve_serverkey, made.curve_publickey, made.curve_secretkey = stage.secret.server_public.encode(), public, secret
    made.connect(stage.door.address)
    return made


def entitled(stage: Stage) -> zmq.Socket[bytes]:
    """Somebody with the CURVE keys, if they are asked for."""
    keys = (stage.secret.worker_public.encode(), stage.secret.worker_secret.encode()) if stage.encrypt else (None, None)
    return dealer(stage, *keys)


def hello(stage: Stage, token: bytes, **other: Any) -> list[bytes]:
    data = wire.dump(facts("c", LAYOUT, stage.secret.run, "x") | {"k": "hello", "nonce": "n"} | other)
    return [data, wire.seal(token, data)]


def token(stage: Stage) -> bytes:
    return bytes.fromhex(stage.secret.token)


def count(stage: Stage) -> int:
    with stage.hub.changed:
        return sum(stage.door.refusals.values())


def test_random_bytes_are_refused(stage: Stage) -> None:
    rng, before = random.Random(SEED), count(stage)
    for size in (1, 10, 64, 1000, 50_000):
        with raw(stage) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(rng.randbytes(size))
    until(lambda: count(stage) >= before + 5, "a refusal of each")


def test_a_frame_that_claims_a_terabyte_ends_its_connection_and_takes_no_memory(stage: Stage) -> None:
    before, memory = count(stage), resident_mb()
    header = b"\x02" + (10**12).to_bytes(8, "big")
    with raw(stage, GREETING) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"\x04" + bytes([len(READY)]) + READY + header + bytes(4096))
        assert ended(connection)
    until(lambda: count(stage) > before, "a refusal")
    assert resident_mb() - memory < 5


@open_line
def test_a_frame_one_byte_longer_than_any_block_ends_its_connection(stage: Stage) -> None:
    ready = b"\x04" + bytes([len(READY)]) + READY
    before = stage.refused(NOTHING)
    for size, taken in ((LONGEST + wire.MAX_HEADER, True), (LONGEST + wire.MAX_HEADER + 1, False)):
        with raw(stage, GREETING, ready, b"\x03" + size.to_bytes(8, "big") + bytes(100)) as connection:
            connection.settimeout(0.3)
            if taken:
                with pytest.raises(TimeoutError):
                    ended(connection)
            else:
                assert ended(connection)
    until(lambda: stage.refused(NOTHING) == before + 2, "a refusal of both")


@encrypted
def test_a_socket_without_the_key_is_not_even_heard(stage: Stage) -> None:
    for keys in ((None, None), zmq.curve_keypair()):
        before = stage.refused(KEYLESS)
        stranger = dealer(stage, *keys)
        with contextlib.suppress(zmq.Again):  # it has been turned away by then
            stranger.send_multipart(hello(stage, token(stage)), zmq.NOBLOCK)
        until(lambda known=before: stage.refused(KEYLESS) > known, "a refusal")
        assert not stranger.poll(0)
        stranger.close()


def test_a_hello_with_the_key_but_without_the_token_gets_no_answer(stage: Stage) -> None:
    before, peers = stage.refused(NO_TOKEN), len(stage.door.peers)
    stranger = entitled(stage)
    for wrong in (b"", bytes(32), token(stage)[:-1]):
        stranger.send_multipart(hello(stage, wrong))
    until(lambda: stage.refused(NO_TOKEN) == before + 3, "a refusal of each")
    assert not stranger.poll(0) and len(stage.door.peers) == peers
    stranger.close()


@pytest.mark.parametrize("fact", REASONS)
def test_one_of_another_run_or_configuration_or_layout_or_protocol_is_told_so(stage: Stage, fact: str) -> None:
    before, peers = stage.refused(REASONS[fact]), len(stage.door.peers)
    line = stage.line("2", **{fact: 0 if fact == "protocol" else "another"})
    until(lambda: heard(line) and line.refused, "an answer")
    assert line.refused == REASONS[fact] and not line.open
    assert stage.refused(REASONS[fact]) == before + 1 and len(stage.door.peers) == peers


def test_a_worker_that_is_refused_ends_with_the_servers_reason(stage: Stage) -> None:
    client = stage.client("2", identity="another")
    with pytest.raises(RunError, match=f"^the server at {stage.door.address} refused this worker: {REASONS['config']}$"):
        client.next()
    client.close()


def test_a_push_that_was_overheard_is_worth_nothing(stage: Stage) -> None:
    stage.rest()
    frames, line = Overheard.frames, Overheard.line
    before = {reason: stage.refused(reason) for reason in (OLD, NO_SEAL)}
    accepted = stage.ledger.counts["accepted"]
    assert json.loads(frames[0])["k"] == "push" and len(frames[2]) == LONGEST
    for again in (frames, [*frames[:2], bytes(LONGEST)]):
        stage.honest.client._do(lambda sent=again: line.socket.send_multipart(sent))
    until(lambda: stage.refused(OLD) == before[OLD] + 2, "a refusal of both")
    altered = [frames[0].replace(b'"n":', b'"n":9'), *frames[1:]]
    stage.honest.client._do(lambda: line.socket.send_multipart(altered))
    until(lambda: stage.refused(NO_SEAL) == before[NO_SEAL] + 1, "a refusal")
    nobody, other = entitled(stage), stage.opened("2")
    nobody.send_multipart(frames)
    assert nobody.poll(10_000) and json.loads(nobody.recv_multipart()[0]) == {"k": "unknown"}
    nobody.close()
    other.socket.send_multipart(frames)
    until(lambda: stage.refused(NO_SEAL) == before[NO_SEAL] + 2, "a refusal")
    assert stage.ledger.counts["accepted"] == accepted


MALFORMED = [
    ({"k": "push", "lease": 1, "loss": 0.0}, bytes(LONGEST - 8), f"a block of {LONGEST - 8} bytes, {LONGEST} expected"),
    ({"k": "push", "lease": 1, "loss": 0.0}, bytes(LONGEST + 1), f"a block of {LONGEST + 1} bytes, {LONGEST} expected"),
    ({"k": "push", "lease": 1, "loss": 0.0}, b"", f"a block of 0 bytes, {LONGEST} expected"),
    ({"k": "push", "lease": 1, "loss": 0.0}, None, f"a block of 0 bytes, {LONGEST} expected"),
    ({"k": "push", "lease": "1", "loss": 0.0}, bytes(LONGEST), "lease is no count"),
    ({"k": "push", "lease": True, "loss": 0.0}, bytes(LONGEST), "lease is no count"),
    ({"k": "push", "lease": 1, "loss": "0"}, bytes(LONGEST), "loss is no number"),
    ({"k": "push", "lease": 1, "loss": None}, bytes(LONGEST), "loss is no number"),
    ({"k": "pull", "have": -1}, None, "have is no count"),
    ({"k": "pull", "busy_s": [1]}, None, "busy_s is no number"),
    ({"k": "judged"}, bytes(8), "lease is no count"),
    ({"k": ["push"]}, None, "a message of no known kind"),
    ({}, None, "a message of no known kind"),
]


def test_malformed_messages_of_a_worker_are_refused_and_its_item_goes_to_another(stage: Stage) -> None:
    line, refused = stage.opened("2"), stage.ledger.counts["refused"]
    _, item = work_for(stage, line)
    for header, content, _ in MALFORMED:
        reason = "a malformed message"
        expected = stage.refused(reason) + 1
        line.send(header, content)
        until(lambda r=reason, n=expected: stage.refused(r) == n, reason)
    answers: list[dict[str, Any]] = []
    until(lambda: answers.extend(h for h, _ in heard(line) if h["k"] == "pushed") or len(answers) == len(MALFORMED), "answers")
    assert [(a["verdict"], a["why"]) for a in answers] == [("refused", why) for *_, why in MALFORMED]
    assert stage.ledger.counts["refused"] == refused + 1
    line.send({"k": "bye"})
    until(lambda: stage.update() or item in stage.applied, "its item")


def test_a_lease_of_another_worker_cannot_be_used(stage: Stage) -> None:
    line, thief, before = stage.opened("2"), stage.opened("3"), stage.ledger.counts["duplicate"]
    lease, item = work_for(stage, line)
    thief.send({"k": "push", "lease": lease, "loss": 0.0}, bytes(LONGEST))
    assert until(lambda: heard(thief), "a verdict")[0][0]["verdict"] == "duplicate"
    line.send({"k": "push", "lease": lease, "loss": float(item)}, wire.block(gradient(item)))
    assert until(lambda: heard(line), "a verdict")[0][0]["verdict"] == "accepted"
    until(lambda: stage.update() or item in stage.applied, "its item")
    assert stage.ledger.counts["duplicate"] == before + 1
    for gone in (line, thief):
        gone.send({"k": "bye"})


def attempt(stage: Stage, rng: random.Random, number: int) -> None:
    kind, before = number % 5, count(stage)
    if kind == 0:
        dealer(stage, None, None).close()
        return
    if kind < 3:
        with raw(stage) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(rng.randbytes(2000) if kind == 1 else GREETING + b"\x02" + b"\x7f" * 8)
    else:
        stranger = entitled(stage)
        stranger.send_multipart(hello(stage, rng.randbytes(32)) if kind == 3 else [rng.randbytes(8000), b"", bytes(LONGEST)])
        until(lambda: count(stage) > before, "a refusal")
        stranger.close()
    until(lambda: count(stage) > before, "a refusal")


def test_three_hundred_strangers_take_no_memory(stage: Stage) -> None:
    rng = random.Random(SEED)
    for number in range(360):
        if number == 60:
            before, memory = count(stage), resident_mb()
        attempt(stage, rng, number)
        if number % 30 == 0:
            stage.update()
    assert count(stage) >= before + 240
    assert resident_mb() - memory < 20


def test_two_thousand_hellos_take_no_memory(stage: Stage) -> None:
    stranger, friend = entitled(stage), entitled(stage)
    memory, before, peers = resident_mb(), stage.refused(NO_TOKEN), len(stage.door.peers)
    for number in range(1000):
        stranger.send_multipart(hello(stage, bytes(32)))
        friend.send_multipart(hello(stage, token(stage)))
        assert friend.poll(10_000) and json.loads(friend.recv_multipart()[0])["k"] == "welcome"
        if number % 100 == 0:
            stage.update()
    until(lambda: stage.refused(NO_TOKEN) == before + 1000, "a refusal of each")
    assert resident_mb() - memory < 20 and len(stage.door.peers) == peers + 1
    stranger.close()
    friend.close()


def test_a_strangers_words_make_no_lines_of_their_own_in_the_log(stage: Stage) -> None:
    before, lines, reasons = count(stage), len(stage.said), len(stage.door.refusals)
    stranger = entitled(stage)
    for parts in range(4, 54):
        stranger.send_multipart([b"x"] * parts)
    until(lambda: count(stage) >= before + 50, "a refusal of each")
    stranger.close()
    assert len(stage.said) - lines <= 2 and len(stage.door.refusals) - reasons <= 2
