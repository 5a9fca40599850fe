"""The store: whole files or none, torn ones named, incarnations fenced."""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from metadist.errors import RunError
from metadist.store import Checkpoints, Torn, atomic_write, cached, claim, clean, load_tensors, save_tensors


def _bits(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _content(step: int) -> dict[str, torch.Tensor]:
    return {"theta": torch.arange(5000, dtype=torch.float64) * step, "n": torch.tensor(step)}


def _assert_is(step: int, found: tuple | None) -> None:
    assert found is not None and found[0] == step and found[2] == {"note": f"s{step}"}
    for k, v in _content(step).items():
        assert torch.equal(found[1][k], v)


def _fill(folder: Path, steps: tuple[int, ...], incarnation: int = 1, **kwargs: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, incarnation, **kwargs)
    for s in steps:
        checkpoints.save(s, _content(s), {"note": f"s{s}"})
    return checkpoints


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    nans = torch.tensor([0x7FC00001, 0x7F800001, 0xFFC12345 - 2**32, 0x80000000 - 2**32], dtype=torch.int32)
    tensors = {
        "nan payloads": nans.view(torch.float32),
        "double": torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        "half": torch.tensor([1.0, -0.0, 3.14, float("inf")], dtype=torch.bfloat16),
        "long": torch.tensor([-(2**63), 2**63 - 1]),
        "scalar": torch.tensor(0.1),
        "scalar long": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6).reshape(2, 3).t(),
    }
    tensors["same storage"] = tensors["double"][1]
    metadata = {"a": [1, None, {"é": 'quote " and {"sha256":"'}], "f": 0.1, "nan": float("inf")}
    save_tensors(tmp_path / "deep" / "x.safetensors", tensors, metadata)
    loaded, read = load_tensors(tmp_path / "deep" / "x.safetensors")
    assert read == metadata and loaded.keys() == tensors.keys()
    for k, v in tensors.items():
        assert loaded[k].dtype == v.dtype and loaded[k].shape == v.shape and _bits(loaded[k]) == _bits(v), k


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        save_tensors(tmp_path / name, _content(3), {"x": 1, "y": [2]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_flipped_bit_of_the_header_and_any_cut_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"t": torch.arange(12.0)}, {"name": "value"})
    whole = path.read_bytes()
    for i in range(len(whole)):
        bent = bytearray(whole)
        bent[i] ^= 1 << (i % 8)
        path.write_bytes(bent)
        with pytest.raises(Torn, match=r"x\.safetensors"):
            load_tensors(path)
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(Torn):
            load_tensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(Torn):
        load_tensors(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"t": torch.zeros(3)}, str(tmp_path / "foreign"))
    with pytest.raises(Torn, match="not written by metadist"):
        load_tensors(tmp_path / "foreign")


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "other step"])
def test_a_torn_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = _fill(tmp_path, (10, 20, 30))
    newest = checkpoints.path(30)
    data, rng = bytearray(newest.read_bytes()), random.Random(5)
    if harm == "cut":
        data = data[: rng.randrange(len(data))]
    elif harm == "flip":
        data[rng.randrange(len(data))] ^= 0x10
    elif harm == "empty":
        data = bytearray()
    else:
        data = bytearray(checkpoints.path(10).read_bytes())
    newest.write_bytes(data)
    with caplog.at_level(logging.WARNING, "metadist"):
        _assert_is(20, Checkpoints(tmp_path, 2).load_newest())
    assert str(newest) in caplog.text and "checkpoint" in caplog.text
    caplog.clear()
    for s in (10, 20):
        checkpoints.path(s).write_bytes(b"x")
    assert checkpoints.load_newest() is None and "starts from its beginning" in caplog.text


def test_newest_is_by_step_then_incarnation(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", 1).load_newest() is None
    _fill(tmp_path, (20,), incarnation=1)
    Checkpoints(tmp_path, 3).save(20, {"who": torch.tensor(3)}, {})
    Checkpoints(tmp_path, 2).save(20, {"who": torch.tensor(2)}, {})
    found = Checkpoints(tmp_path, 4).load_newest()
    assert found is not None and found[1]["who"] == 3
    _fill(tmp_path, (100,), incarnation=1)
    _assert_is(100, Checkpoints(tmp_path, 4).load_newest())


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = _fill(tmp_path, (10,))
    checkpoints.save(10, {"n": torch.tensor(-1)}, {})
    found = checkpoints.load_newest()
    assert found is not None and found[1]["n"] == -1 and len(_names(tmp_path)) == 1


def test_pruning_keeps_the_newest_and_the_anchors(tmp_path: Path) -> None:
    _fill(tmp_path, (10, 20, 30, 40, 50, 60, 70), keep=2, anchor_every=30)
    assert [int(n[5:15]) for n in _names(tmp_path)] == [30, 60, 70]


def test_a_forgotten_process_spoils_nothing(tmp_path: Path) -> None:
    young = _fill(tmp_path, (40, 50), incarnation=2, keep=2)
    old = _fill(tmp_path, (60, 70, 80), incarnation=1, keep=2)
    assert young.path(40).exists() and young.path(50).exists()  # older numbers remove no newer files
    young.save(60, _content(60), {})
    assert young.path(60).exists() and young.path(50).exists()  # nor do they crowd the newer ones out
    assert old.path(80).exists() and not old.path(60).exists()
    young.save(70, _content(70), {})
    young.save(80, _content(80), {})
    assert [(s.step, s.incarnation) for s in young.saved()] == [(80, 2), (80, 1), (70, 2)]


def test_stale_temporaries_of_the_dead_are_cleaned(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    host, dead = os.uname().nodename, int(child.stdout)
    gone = [tmp_path / f".a.safetensors.{host}.{dead}.0.tmp", tmp_path / f".a.safetensors.{host}.{os.getpid()}.99999.tmp"]
    old = tmp_path / ".a.safetensors.elsewhere.5.0.tmp"
    kept = [tmp_path / f".a.safetensors.{host}.{os.getppid()}.0.tmp", tmp_path / ".a.safetensors.elsewhere.6.0.tmp"]
    for p in (*gone, *kept, old):
        p.write_bytes(b"half")
    os.utime(old, (time.time() - 1e6,) * 2)
    assert sorted(clean(tmp_path)) == sorted([*gone, old])
    assert _names(tmp_path) == sorted(p.name for p in kept)


@pytest.mark.parametrize(
    ("call", "number", "mend"),
    [("fsync", errno.ENOSPC, "free that much"), ("write", errno.ENOSPC, "free that much"), ("write", errno.EDQUOT, "quota"),
     ("open", errno.EROFS, "writable disk"),
     ("open", errno.EACCES, "make the folder writable"), ("fsync", errno.EIO, "mend that")],
)  # fmt: skip
def test_a_refusing_disk_is_one_line_and_the_old_checkpoint_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, mend: str
) -> None:
    checkpoints = _fill(tmp_path, (10, 20), keep=1)

    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as m:
        m.setattr(os, call, refuse)
        with pytest.raises(RunError, match=mend) as caught:
            checkpoints.save(30, _content(30), {})
    text = str(caught.value)
    assert "\n" not in text and str(checkpoints.path(30)) in text and "0.0403 MB needed" in text, text
    assert _names(tmp_path) == [checkpoints.path(20).name]
    _assert_is(20, checkpoints.load_newest())


def test_a_real_file_size_limit(tmp_path: Path) -> None:
    program = (
        "import resource, sys, torch\n"
        "from metadist.errors import RunError\n"
        "from metadist.store import Checkpoints\n"
        "c = Checkpoints(sys.argv[1], 1)\n"
        "c.save(1, {'t': torch.arange(10)}, {})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n    c.save(2, {'t': torch.zeros(100000)}, {})\n"
        "except RunError as e:\n    print(e)\n    sys.exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "ulimit -f" in done.stdout and "Traceback" not in done.stderr, done
    found = Checkpoints(tmp_path, 2).load_newest()
    assert found is not None and found[0] == 1 and len(_names(tmp_path)) == 1


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot write"):
        atomic_write(tmp_path / "file" / "x", b"1")
    with pytest.raises(RunError, match="cannot write"):
        claim(tmp_path / "file")


def _processes() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")  # torch is imported once, and in a process without threads
    context.set_forkserver_preload(["torch", "safetensors.torch"])
    return context


def _save_for_ever(run_dir: str, said: Connection) -> None:
    write = os.write

    def slowly(fd: int, data: memoryview) -> int:  # so that most kills meet a half-written file
        time.sleep(0.001)
        return write(fd, data[:4096])

    os.write = slowly
    checkpoints = Checkpoints(run_dir + "/checkpoints", claim(run_dir), keep=2)
    found = checkpoints.load_newest()
    step = found[0] if found else 0
    while True:
        step += 1
        checkpoints.save(step, _content(step), {"note": f"s{step}"})
        said.send(step)


def test_sigkill_at_random_instants(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng, reached, context = random.Random(11), 0, _processes()
    for kill in range(10):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_save_for_ever, args=(str(tmp_path), theirs))
        child.start()
        theirs.close()
        assert ours.poll(60)
        first = last = ours.recv()
        assert first == reached + 1  # it went on exactly where the newest whole checkpoint stands
        time.sleep(rng.random() * 0.05)
        child.kill()
        child.join()
        with contextlib.suppress(EOFError):
            while True:
                last = ours.recv()
        ours.close()
        reader = Checkpoints(tmp_path / "checkpoints", kill + 100)
        assert not [n for n in _names(reader.folder) if n.endswith(".tmp")]
        found = reader.load_newest()
        assert found is not None
        reached = found[0]
        _assert_is(reached, found)
        assert last <= reached <= last + 1  # what was reported saved is saved
        assert caplog.text == ""  # renamed when whole: a kill leaves no torn file under a checkpoint's name
    assert _names(tmp_path / "incarnations") == [f"{i:04d}" for i in range(1, 11)]


def _claim_many(run_dir: str, queue: multiprocessing.Queue[int]) -> None:
    for _ in range(10):
        queue.put(claim(run_dir))


def test_claims_are_unique_among_processes(tmp_path: Path) -> None:
    context = _processes()
    queue: multiprocessing.Queue[int] = context.Queue()
    children = [context.Process(target=_claim_many, args=(str(tmp_path), queue)) for _ in range(4)]
    for c in children:
        c.start()
    got = sorted(queue.get(timeout=30) for _ in range(40))
    for c in children:
        c.join()
    assert got == list(range(1, 41)) and claim(tmp_path) == 41


def test_cached_makes_once_and_knows_its_recipe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"w": torch.full((3,), float(len(calls)))}

    ask = [cached(tmp_path, "zca", r, make)["w"][0].item() for r in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3})]
    assert ask == [1.0, 1.0, 2.0]
    assert cached(tmp_path, "other", {"a": 1, "b": 2}, make)["w"][0] == 3.0
    for file in (tmp_path / "zca").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert cached(tmp_path, "zca", {"a": 1, "b": 2}, make)["w"][0] == 4.0
    assert "made again" in caplog.text
    assert cached(tmp_path, "zca", {"a": 1, "b": 2}, make)["w"][0] == 4.0


def test_cached_without_a_writable_folder_warns_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    got = cached(tmp_path / "file", "zca", {"a": 1}, lambda: {"w": torch.ones(2)})
    assert torch.equal(got["w"], torch.ones(2)) and "cache is not used" in caplog.text


def _ask(folder: str, queue: multiprocessing.Queue[float]) -> None:
    def make() -> dict[str, torch.Tensor]:
        time.sleep(0.1)
        return {"w": torch.full((1000,), float(os.getpid()))}

    queue.put(cached(folder, "k", {"a": 1}, make)["w"].unique().item())


def test_many_processes_get_the_same_bits(tmp_path: Path) -> None:
    context = _processes()
    queue: multiprocessing.Queue[float] = context.Queue()
    children = [context.Process(target=_ask, args=(str(tmp_path), queue)) for _ in range(6)]
    for c in children:
        c.start()
    got = {queue.get(timeout=30) for _ in children}
    for c in children:
        c.join()
    assert len(got) == 1
