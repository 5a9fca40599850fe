"""What goes wrong is one line: a user's mistake before any work (exit 2), a refusing disk on the way (exit 1, nothing lost)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from run_helpers import TINY, Nursery, Started, result, same, until

from metadist.run.command import main
from metadist.store import Checkpoints

# 80 images of 8 x 8, six tensors of that size: a checkpoint takes some 120 kB, all other files together much less.
LARGE = [w for w in TINY if not w.startswith("ipc=")] + ["method=dd_random_init", "steps=24", "ipc=8"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as ours:
        yield ours


def pictures(at: Path, *names: str) -> Path:
    """Two images in each class folder."""
    for name in names:
        (at / name).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (8, 8), 20 * i).save(at / name / f"{i}.png")
    return at


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command line that is refused."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    return err


# --- a user's mistakes, through the whole program


@pytest.mark.parametrize(
    "wrong,said",
    [
        ("method=dd_radnom_init", "did you mean dd_random_init?"),
        ("data=digit", "did you mean digits?"),
        ("data.nam=digits", "there is no key 'data.nam'; nearest: data.name"),
        ("ipc=0", "ipc=0 is out of range; allowed: at least 1"),
        ("steps=0", "steps=0 is out of range; allowed: at least 1"),
        ("workers=4", "workers=4 is more than tasks=3"),
        ("inner.steps=3", "inner.steps=3 does not divide the 10 distilled images"),
        ("net.name=vgg", "net.name=vgg is unknown"),
        ("data=mnist data.root=nowhere", "nowhere"),
        ("net=lenet net.width=0 net.depth=0", "data.size"),
    ],
)
def test_wrong_words(wrong: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = wrong.split()
    given = {w.split("=")[0] for w in words}
    argv = [w for w in TINY if w.split("=")[0] not in given] + words
    assert said in refused([*argv, f"run_dir={tmp_path / 'run'}"], capsys)
    assert not (tmp_path / "run" / "checkpoints").exists()


def folder_words(path: Path, run_dir: Path) -> list[str]:
    return [*TINY[1:], "data=folder", f"data.path={path}", f"run_dir={run_dir}"]


def test_a_data_folder_that_is_missing_or_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run_dir = tmp_path / "pictures", tmp_path / "run"
    said = refused(folder_words(path, run_dir), capsys)
    assert f"data.path={path} is not a folder" in said
    path.mkdir()
    assert f"{path} holds no class folders" in refused(folder_words(path, run_dir), capsys)
    pictures(path, "cat")
    assert "only the class folder cat" in refused(folder_words(path, run_dir), capsys)
    (path / "dog").mkdir()
    assert f"class folder {path / 'dog'} holds no images" in refused(folder_words(path, run_dir), capsys)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corrupt_image(workers: int, nursery: Nursery, tmp_path: Path) -> None:
    path = pictures(tmp_path / "pictures", "cat", "dog")
    bad = path / "dog" / "7.png"
    bad.write_bytes(bad.read_bytes()[:40])
    words = [*folder_words(path, tmp_path / "run"), f"workers={workers}"]
    started = nursery.start(words, tmp_path)
    assert started.wait() == 2
    assert started.err.count("\n") == 1 and started.err.startswith("error: ") and str(bad) in started.err
    Image.new("L", (8, 8), 3).save(bad)
    if workers == 1:
        nursery.run([*words, "steps=2"], tmp_path)  # mended, the same command runs


def test_another_identity(nursery: Nursery, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "method=dd_fixed_init", f"run_dir={tmp_path / 'run'}"]
    nursery.run([*words, "steps=2"], tmp_path)
    before = result(tmp_path / "run")
    said = refused([*words, "steps=2", "seed=1", "meta.lr=0.5"], capsys)
    assert "meta.lr: 0.01 -> 0.5" in said and "seed: 0 -> 1" in said and "another run_dir" in said
    same(result(tmp_path / "run"), before)
    longer = nursery.run([*words, "steps=4", "threads=2"], tmp_path)  # circumstance, and more steps: the same run
    assert "step 3/4" in longer.out and "step 2/4" not in longer.out


# --- a disk that refuses


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    at = tmp_path_factory.mktemp("undisturbed")
    nursery.run([*LARGE, f"run_dir={at / 'run'}"], at)
    return result(at / "run")


def begun(nursery: Nursery, line: list[str], at: Path) -> None:
    """Some steps and a checkpoint."""
    started = nursery.start(line, at)
    started.until_lines(4)
    started.kill(signal.SIGTERM)
    assert started.wait() == 143, started.err


def checkpoints(run_dir: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run_dir / "checkpoints").iterdir())}


def faulted(started: Started, run_dir: Path, before: dict[str, bytes], *said: str) -> None:
    """One line, exit 1, every old checkpoint whole, nothing half written."""
    assert started.wait() == 1
    assert started.err.startswith("error: ") and started.err.count("\n") == 1, started.err
    for text in said:
        assert text in started.err
    assert checkpoints(run_dir) == before
    assert Checkpoints(run_dir / "checkpoints", 0).load_newest() is not None


@contextlib.contextmanager
def mounted(at: Path, *arguments: str) -> Iterator[None]:
    """A mount that lasts as long as the block; the test is skipped where this user may not mount."""
    done = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def test_a_limit_on_file_sizes(nursery: Nursery, undisturbed: dict[str, object], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = [*LARGE, f"run_dir={run_dir}"]
    begun(nursery, line, tmp_path)
    before = checkpoints(run_dir)
    faulted(nursery.start(line, tmp_path, fsize=60_000), run_dir, before, "File too large", "ulimit", "checkpoints/step-")
    nursery.run(line, tmp_path)
    same(result(run_dir), undisturbed)


def test_a_full_disk(nursery: Nursery, undisturbed: dict[str, object], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, "-t", "tmpfs", "-o", "size=4m", "tmpfs"):
        run_dir, balloon = disk / "run", disk / "balloon"
        line = [*LARGE, f"run_dir={run_dir}"]
        begun(nursery, line, tmp_path)
        before = checkpoints(run_dir)
        for left, said in ((90_000, "checkpoints/step-"), (0, "run")):  # at the checkpoint; at the very start
            status = os.statvfs(disk)
            balloon.write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - left)))
            faulted(
                nursery.start(line, tmp_path), run_dir, before, "No space left on device", said, "start the same command again"
            )
            balloon.unlink()
        nursery.run(line, tmp_path)
        same(result(run_dir), undisturbed)


def locked_by_mount(folder: Path) -> contextlib.AbstractContextManager[None]:
    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with mounted(folder, "--bind", str(folder)):
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
            yield

    return both()


@contextlib.contextmanager
def locked_by_mode(folder: Path) -> Iterator[None]:
    if os.geteuid() == 0:
        pytest.skip("modes do not bind this user")
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


LOCKS = {"mount": (locked_by_mount, "Read-only file system"), "mode": (locked_by_mode, "Permission denied")}


@pytest.mark.parametrize("how", LOCKS)
def test_a_read_only_folder(how: str, nursery: Nursery, undisturbed: dict[str, object], tmp_path: Path) -> None:
    lock: Callable[[Path], contextlib.AbstractContextManager[None]]
    lock, said = LOCKS[how]
    run_dir = tmp_path / "run"
    line = [*LARGE, f"run_dir={run_dir}"]
    begun(nursery, line, tmp_path)
    with lock(run_dir):  # from the start
        faulted(nursery.start(line, tmp_path), run_dir, checkpoints(run_dir), said)
    started = nursery.start(line, tmp_path)  # and on the way
    started.until_lines(1)
    with lock(run_dir / "checkpoints"):
        until(lambda: started.poll() is not None, "the next checkpoint")
        faulted(started, run_dir, checkpoints(run_dir), said, "checkpoints/step-")
    nursery.run(line, tmp_path)
    same(result(run_dir), undisturbed)
