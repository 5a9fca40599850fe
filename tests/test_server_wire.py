"""What goes over the wire and what is known beforehand: layout, headers, seals, secrets, the server's address, its keys."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from metadist.config import Config
from metadist.errors import RunError, UserError
from metadist.exchange import wire
from metadist.exchange.keys import Secret, Serving, find_server
from metadist.exchange.wire import Layout, Malformed
from metadist.identity import SERVER, identity_hash
from metadist.run.compose import compose
from metadist.run.unread import unread


def phi(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    numbers = torch.linspace(-3, 1e-3, 24, dtype=torch.float64).to(dtype)
    return {
        "images": numbers[:18].view(3, 2, 3),
        "none": torch.zeros(0, 4, dtype=dtype),
        "rate": numbers[18:23],
        "one": numbers[23],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_lie_flat_and_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    layout, given = Layout.of(phi(dtype), "full"), phi(dtype)
    assert layout.sizes == [18, 0, 5, 1] and layout.size == 24 and layout.wire == layout.dtype == dtype
    flat = layout.flat(given)
    received = wire.values(bytearray(wire.block(flat)), layout.wire, layout.size)
    back = layout.split(received)
    assert list(back) == list(given)
    assert all(torch.equal(back[name], given[name]) and back[name].shape == given[name].shape for name in given)
    assert back["images"].data_ptr() == received.data_ptr()


def test_a_narrow_wire_halves_the_bytes_and_rounds_to_nearest() -> None:
    layout = Layout.of(phi(), "bfloat16")
    assert (layout.dtype, layout.wire) == (torch.float32, torch.bfloat16)
    flat = layout.flat(phi())
    sent = wire.block(flat.to(layout.wire))
    assert len(sent) == 48
    back = wire.values(bytearray(sent), layout.wire, 24).float()
    assert 0 < (back - flat).abs().max() <= 2.0**-8 * 3


@pytest.mark.parametrize("shards", [1, 2, 5, 24, 30])
def test_the_ranges_of_shards_cover_the_vector_once_in_even_parts(shards: int) -> None:
    ranges = Layout.of(phi(), "full").ranges(shards)
    assert len(ranges) == shards
    assert [n for part in ranges for n in range(part.start, part.stop)] == list(range(24))
    sizes = [part.stop - part.start for part in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_any_other_layout_has_another_name() -> None:
    layout = Layout.of(phi(), "full")
    others = [
        dataclasses.replace(layout, names=("images", "none", "rates", "one")),
        dataclasses.replace(layout, names=("images", "none", "one", "rate")),
        dataclasses.replace(layout, shapes=((3, 6), (0, 4), (5,), ())),
        Layout.of(phi(torch.float64), "full"),
        Layout.of(phi(), "bfloat16"),
    ]
    assert len({layout.digest, *(other.digest for other in others)}) == 6
    assert Layout.of(phi(), "full").digest == layout.digest


def test_a_block_is_taken_only_at_its_own_length() -> None:
    assert wire.values(bytearray(8), torch.float32, 2).tolist() == [0.0, 0.0]
    assert wire.values(b"", torch.float32, 0).numel() == 0
    for length, count in ((7, 2), (9, 2), (0, 2), (4, 0), (8, 1)):
        with pytest.raises(Malformed, match=f"a block of {length} bytes, {4 * count} expected"):
            wire.values(bytearray(length), torch.float32, count)


HOSTILE = {
    "empty": b"",
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe{}",
    "deep list": b"[" * 16000,
    "deep object": b'{"a":' * 3000,
    "endless number": b'{"a":' + b"9" * 16000 + b"}",
    "huge": b'{"a":"' + b"x" * wire.MAX_HEADER + b'"}',
    "list": b"[1]",
    "text": b'"k"',
    "number": b"7",
    "null": b"null",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_header_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        wire.parse(data)


def test_a_header_as_long_as_is_allowed_is_read() -> None:
    data = wire.dump({"a": "x" * (wire.MAX_HEADER - 8)})
    assert len(data) == wire.MAX_HEADER and len(wire.parse(data)["a"]) == wire.MAX_HEADER - 8


@pytest.mark.parametrize("value", [True, False, -1, 2**63, 1.0, math.nan, "1", None, [1], {}])
def test_no_count(value: Any) -> None:
    with pytest.raises(Malformed, match="n is no count"):
        wire.number(wire.parse(wire.dump({"n": value})), "n")


def test_counts_and_numbers_and_texts_are_read_as_they_are() -> None:
    header = wire.parse(wire.dump({"n": 2**63 - 1, "zero": 0, "x": 0.5, "i": 3, "inf": math.inf, "t": "ü" * 200}))
    assert (wire.number(header, "n"), wire.number(header, "zero")) == (2**63 - 1, 0)
    assert (wire.real(header, "x"), wire.real(header, "i"), wire.real(header, "inf")) == (0.5, 3.0, math.inf)
    assert wire.text(header, "t") == "ü" * 200
    for read in (wire.number, wire.real, wire.text):
        with pytest.raises(Malformed, match="absent is no"):
            read(header, "absent")


@pytest.mark.parametrize("value", [True, "0.5", None, [0.5], {}])
def test_no_number(value: Any) -> None:
    with pytest.raises(Malformed, match="x is no number"):
        wire.real(wire.parse(wire.dump({"x": value})), "x")


@pytest.mark.parametrize("value", ["x" * 201, 1, None, ["x"], True])
def test_no_text(value: Any) -> None:
    with pytest.raises(Malformed, match="t is no text of at most 200 characters"):
        wire.text({"t": value}, "t")


def test_a_number_beyond_every_float_is_malformed() -> None:
    with pytest.raises(Malformed):
        wire.real(wire.parse(b'{"loss":1' + b"0" * 400 + b"}"), "loss")


def test_a_text_that_has_no_bytes_is_malformed() -> None:
    with pytest.raises(Malformed):
        wire.text(wire.parse(b'{"nonce":"\\ud800"}'), "nonce")


def test_a_seal_fits_one_key_and_one_header() -> None:
    key, header = bytes(range(32)), b'{"k":"push"}'
    given = wire.seal(key, header)
    assert len(given) == wire.SEAL and wire.sealed(key, header, given)
    flipped = bytes([given[0] ^ 1]) + given[1:]
    for wrong in (flipped, given[:-1], b"", given + b"\0", wire.seal(key, header + b" "), wire.seal(key[:-1] + b"?", header)):
        assert not wire.sealed(key, header, wrong)


def test_a_session_key_depends_on_both_sides_words_and_the_token() -> None:
    keys = {wire.session_key(t, c, s) for t in (b"t", b"u") for c in ("a", "b") for s in ("a", "b", "c")}
    assert len(keys) == 12 and {len(k) for k in keys} == {32}
    assert wire.session_key(b"t", "a", "b") == wire.session_key(b"t", "a", "b")


def test_the_secret_is_its_owners_from_its_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes, opened = [], os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, mode=0o777, **k: modes.append((flags, mode)) or opened(path, flags, mode, **k)
    )
    before = os.umask(0)
    try:
        made = Secret.make(tmp_path)
    finally:
        os.umask(before)
    assert [mode for flags, mode in modes if flags & os.O_CREAT] == [0o600]
    path = tmp_path / "exchange" / "secret.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]
    assert Secret.make(tmp_path) == Secret.read(tmp_path) == made
    assert len(bytes.fromhex(made.token)) == 32 and made.server_secret != made.worker_secret


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622])
def test_a_secret_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    Secret.make(tmp_path)
    path = tmp_path / "exchange" / "secret.json"
    path.chmod(mode)
    with pytest.raises(RunError, match=r"can be read by others; chmod 600 it, or remove it and start the server anew$"):
        Secret.read(tmp_path)


def test_a_missing_or_broken_secret_is_told_with_its_mend(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"secret.json can't be read \(No such file or directory\); the server makes it"):
        Secret.read(tmp_path)
    whole = dataclasses.asdict(Secret.make(tmp_path))
    path = tmp_path / "exchange" / "secret.json"
    broken: list[Any] = [[], {}, None, whole | {"more": 1}, {k: v for k, v in whole.items() if k != "token"}]
    broken += [whole | {"token": "no hex"}, whole | {"server_public": "short"}, whole | {"worker_secret": "\u00e9" * 40}]
    for text in [json.dumps(b) for b in broken] + ["", "{", json.dumps(whole)[:-9]]:
        path.write_text(text)
        with pytest.raises(RunError, match="is broken; remove it and start the server anew"):
            Secret.read(tmp_path)


def make_one(folder: Path, ready: Any, found: Any) -> None:
    ready.wait()
    found.put(Secret.make(folder).token)


def test_two_processes_and_two_threads_that_make_a_secret_at_once_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, found = context.Event(), context.Queue()
    makers = [context.Process(target=make_one, args=(tmp_path, ready, found), daemon=True) for _ in range(2)]
    makers += [threading.Thread(target=make_one, args=(tmp_path, ready, found), daemon=True) for _ in range(2)]
    for maker in makers:
        maker.start()
    ready.set()
    tokens = {found.get(timeout=60) for _ in makers}
    assert tokens == {Secret.read(tmp_path).token}
    assert [p.name for p in (tmp_path / "exchange").iterdir()] == ["secret.json"]
    for maker in makers:
        maker.join(60)
    found.close()


def test_the_server_is_found_where_its_newest_start_listens(tmp_path: Path) -> None:
    assert find_server(tmp_path) == Serving()
    folder = tmp_path / "exchange"
    folder.mkdir()
    assert find_server(tmp_path) == Serving()
    there = Serving(3, ("tcp://127.0.0.1:7", "tcp://127.0.0.1:8"), False, 0.5)
    whole = there.record()
    for torn in (b"", whole[:20], b"[]", b"7", b'{"incarnation": "x", "addresses": []}', b'{"incarnation": 1}', b"\xff"):
        (folder / "server.json").write_bytes(torn)
        assert find_server(tmp_path) == Serving()
    (folder / "server.json").write_bytes(whole)
    assert find_server(tmp_path) == there


REFUSED = {
    "exchange.max_staleness=-1": r"exchange.max_staleness=-1 is out of range; allowed: at least 0",
    "exchange.damping=-0.1": r"exchange.damping=-0.1 is out of range; allowed: at least 0",
    "exchange.damping=nan": r"exchange.damping=nan is not a finite number",
    "exchange.batch=-1": r"exchange.batch=-1 is out of range; allowed: at least 0",
    "exchange.deadline_s=inf": r"exchange.deadline_s=inf is not a finite number",
    "exchange.shards=0": r"exchange.shards=0 is out of range; allowed: at least 1",
    "exchange.patience=0": r"exchange.patience=0.0 is out of range; allowed: above 0",
    "exchange.heartbeat_s=0": r"exchange.heartbeat_s=0.0 is out of range; allowed: above 0",
    "exchange.wire=bfloat": r"exchange.wire=bfloat is unknown; did you mean bfloat16\?",
    "exchange.encrypt=perhaps": r"exchange.encrypt=perhaps is not true or false",
    "exchange.item=3": r"exchange.item=3 does not divide tasks=8, a meta-step's tasks; allowed: divisors of it, or 0",
    "exchange.batch=6 exchange.item=4": r"exchange.item=4 does not divide exchange.batch=6, the tasks a meta-step takes",
    "exchange.queue=7": r"exchange.queue=7 holds less than a meta-step's gradients; give at least 8, or 0",
    "exchange.queue=1 exchange.item=4": r"exchange.queue=1 holds less than a meta-step's gradients; give at least 2, or 0",
    "engine.dtype=float64 exchange.wire=bfloat16": r"exchange.wire=bfloat16 is for engine.dtype=float32; float64 is exact",
    "method=lower_bound": r"method=lower_bound takes a second on one core; leave exchange=server out",
    "exchange.backend=gloo": r"exchange.backend is not read by this run: it belongs to exchange=allreduce",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_wrong_key_of_the_server_is_refused_with_what_is_allowed(words: str) -> None:
    with pytest.raises(UserError, match=REFUSED[words]):
        compose(["exchange=server", "tasks=8", *words.split()])


@pytest.mark.parametrize(
    "words", ["exchange.queue=8", "exchange.queue=2 exchange.item=4", "exchange.batch=6 exchange.item=2", "workers=30"]
)
def test_what_just_fits_is_taken(words: str) -> None:
    assert compose(["exchange=server", "tasks=8", *words.split()]).exchange.name == "server"


GIVEN = {
    "max_staleness": "1", "damping": "0.5", "batch": "4", "deadline_s": "9", "item": "2", "wire": "bfloat16", "shards": "2",
    "queue": "16", "encrypt": "false", "patience": "9", "heartbeat_s": "1",
}  # fmt: skip
CIRCUMSTANCE = {"shards", "queue", "encrypt", "patience", "heartbeat_s"}


@functools.cache
def composed(*words: str) -> Config:
    return compose(words)


@pytest.mark.parametrize("key", GIVEN)
def test_allreduce_refuses_the_servers_keys_and_only_what_decides_the_result_is_identity(key: str) -> None:
    word = f"exchange.{key}={GIVEN[key]}"
    with pytest.raises(
        UserError, match=f"^exchange.{key} is not read by this run: it belongs to exchange=server; leave it out"
    ):
        compose([word])
    plain, served, altered = composed(), composed("exchange=server"), composed("exchange=server", word)
    other = copy.deepcopy(plain)
    setattr(other.exchange, key, getattr(altered.exchange, key))
    assert getattr(altered.exchange, key) != getattr(served.exchange, key)
    assert identity_hash(other) == identity_hash(plain)
    assert (identity_hash(altered) == identity_hash(served)) == (key in CIRCUMSTANCE)


def test_every_key_of_the_server_is_tried_above() -> None:
    plain, served = composed(), composed("exchange=server")
    assert {f"exchange.{key}" for key in GIVEN} == set(SERVER)
    assert identity_hash(plain) != identity_hash(served)
    assert set(SERVER) <= set(unread(plain)) and not set(SERVER) & set(unread(served))
