"""The queue of tasks: every task once, a dead worker's task free at once, with locks and without. Real processes and kills."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from metadist.errors import RunError
from metadist.run import queue
from metadist.run.queue import claimed, run_queue, run_workers

ROOT = Path(__file__).resolve().parents[1]
# A task writes who did it; `slow` is not finished by whoever comes first.
WORKER = """
import os, signal, sys, time
from pathlib import Path
from metadist.run.queue import run_queue
from metadist.run.signals import SIGNALS, Stop
place, how = Path(sys.argv[1]), sys.argv[2]

def work(name):
    with (place / "log").open("a") as f:
        f.write(f"{name} {os.getpid()}\\n")
    if how == "hang" and name == "b":
        (place / "hanging").touch()
        while not stop.requested:
            time.sleep(.01)
        return
    if how == "fail" and name == "b":
        sys.exit("error: b is broken")
    time.sleep(.02)
    (place / name).write_text(str(os.getpid()))

with Stop() as stop:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    done = lambda name: (place / name).exists()
    finished = run_queue("abcde", work, done, place / "q", lambda: stop.requested is not None, poll_s=.05)
sys.exit(0 if finished else 143)
"""


def command(place: Path, how: str = "plain") -> list[str]:
    return [sys.executable, "-c", WORKER, str(place), how]


def spawn(place: Path, how: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(place, how), env={**os.environ, "PYTHONPATH": str(ROOT)})


def log(place: Path) -> list[str]:
    return [line.split()[0] for line in (place / "log").read_text().splitlines()]


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.005)


def test_tasks_are_done_in_order_and_only_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    seen: list[str] = []

    def work(name: str) -> None:
        seen.append(name)
        (tmp_path / name).touch()

    def done(name: str) -> bool:
        return (tmp_path / name).exists()

    assert run_queue("abc", work, done, tmp_path / "q")
    assert seen == ["a", "c"]
    assert run_queue("abcd", work, done, tmp_path / "q") and seen == ["a", "c", "d"]


def test_a_stop_is_looked_at_between_tasks_and_a_task_without_a_result_is_a_fault(tmp_path: Path) -> None:
    seen: list[str] = []
    assert not run_queue("abc", seen.append, lambda name: False, tmp_path, stop=lambda: len(seen) == 2 or seen == ["a"])
    assert seen == ["a"]
    with pytest.raises(RunError, match="task a ended without its result"):
        run_queue("abc", seen.append, lambda name: False, tmp_path)


def test_three_workers_do_each_task_once(tmp_path: Path) -> None:
    assert run_workers(command(tmp_path), 3, {"PYTHONPATH": str(ROOT)}) == (0, "")
    assert sorted(log(tmp_path)) == list("abcde")


def test_the_task_of_a_killed_worker_is_free_at_once(tmp_path: Path) -> None:
    hanging = spawn(tmp_path, "hang")
    until((tmp_path / "hanging").exists, "the first worker to hang")
    other = spawn(tmp_path, "plain")
    until(lambda: all((tmp_path / n).exists() for n in "acde"), "the rest")
    time.sleep(0.3)  # it waits for b, which it may not take
    assert not (tmp_path / "b").exists() and other.poll() is None and log(tmp_path).count("b") == 1
    began = time.monotonic()
    hanging.kill()
    hanging.wait()
    assert other.wait(30) == 0 and (tmp_path / "b").read_text() == str(other.pid)
    assert time.monotonic() - began < 2 and sorted(log(tmp_path)) == list("abbcde")


def test_an_impatient_worker_leaves_what_others_hold(tmp_path: Path) -> None:
    made: set[str] = set()
    with claimed(tmp_path / "a.lock") as mine:
        assert mine
        assert not run_queue("ab", made.add, made.__contains__, tmp_path, patient=False)
    assert made == {"b"}
    assert run_queue("ab", made.add, made.__contains__, tmp_path, patient=False)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)


def test_without_locks_a_claim_is_a_file(no_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "BEAT_S", 0.05)
    lock, claim = tmp_path / "a.lock", tmp_path / "a.claim"
    with claimed(lock) as mine:
        assert mine and claim.read_text() == f"{socket.gethostname()} {os.getpid()}\n"
        with claimed(lock) as again:
            assert not again
        os.utime(claim, (0, 0))
        until(lambda: claim.stat().st_mtime > 1e9, "a sign of life")
    assert not claim.exists()
    with claimed(lock) as mine:
        assert mine


@pytest.mark.parametrize(
    "owner, age, free",
    [("dead here", 0, True), ("alive here", 1e6, False), ("elsewhere 1", 10, False), ("elsewhere 1", 100, True)],
)
def test_without_locks_the_dead_lose_their_claims(no_locks: None, tmp_path: Path, owner: str, age: float, free: bool) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = {"dead here": f"{socket.gethostname()} {gone.pid}", "alive here": f"{socket.gethostname()} {os.getpid()}"}
    claim = tmp_path / "a.claim"
    claim.write_text(here.get(owner, owner))
    os.utime(claim, (time.time() - age,) * 2)
    with claimed(tmp_path / "a.lock") as mine:
        assert mine == free


def test_a_disk_that_takes_no_lock_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*file/q"):
        run_queue("a", lambda name: None, lambda name: False, tmp_path / "file" / "q")


def test_a_failing_worker_ends_all_with_its_own_words(tmp_path: Path) -> None:
    assert run_workers(command(tmp_path, "fail"), 2, {"PYTHONPATH": str(ROOT)}) == (1, "error: b is broken")


def children(pid: int) -> list[int]:
    return [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]


def test_killed_workers_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    def kill_one() -> None:
        until((tmp_path / "hanging").exists, "somebody to hang")
        pid = int(next(line.split()[1] for line in (tmp_path / "log").read_text().splitlines() if line.startswith("b")))
        (tmp_path / "b").touch()  # whoever is left is not to hang, too
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    status, text = run_workers(command(tmp_path, "hang"), 2, {"PYTHONPATH": str(ROOT)})
    thread.join()
    assert status == 0 and text in ("worker 0 killed (signal 9)", "worker 1 killed (signal 9)")
    killing = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert run_workers(killing, 2) == (1, "workers 0, 1 killed (signal 9)")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_stop_with_their_launcher(tmp_path: Path, number: int) -> None:
    code = f"import sys; from metadist.run.queue import run_workers; sys.exit(run_workers({command(tmp_path, 'hang')!r}, 2)[0])"
    launcher = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    until((tmp_path / "hanging").exists, "a worker to hang")
    until(lambda: len(children(launcher.pid)) == 2, "two workers")
    workers = children(launcher.pid)
    launcher.send_signal(number)
    assert launcher.wait(30) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}").exists() and _running(pid) for pid in workers), "the end of the workers")
    assert not (tmp_path / "b").exists()


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
