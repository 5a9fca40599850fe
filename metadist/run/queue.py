"""A queue of named tasks over a folder: any number of workers, on any number of machines, until every result is there.

    run_queue(names, work, done, place)                       # in each worker
    run_workers([sys.executable, "-m", "my.worker"], count=4)   # workers as processes on this machine

Design choices
- Nothing is handed out and nobody is in charge. A worker claims a task by a lock of the operating system on a file of its name;
  the lock goes with the process that holds it, so the task of a dead worker is free at once. A task is finished when its
  result is there: what a task's result is, only the caller knows.
- So a queue is resumed by starting workers again, enlarged by naming more tasks, and shrunk by ending a worker at any moment.
  ``work`` should make the same result whoever does it, and keep what it needs to go on where it was ended.
- Where the file system has no locks, a file made with O_EXCL stands for one. Its owner touches it every few seconds; one that
  went untouched for a minute, or whose owner on this machine is dead, is taken over (after ten minutes if another process
  there has the owner's number by now).
- Workers are ended by a signal in good order (``stop``). A worker that was killed is no fault of the queue: the others go on. A
  worker that failed would fail again: the others are told to stop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from metadist.errors import RunError
from metadist.run.signals import SIGNALS, Stop, stop_status
from metadist.run.sweep import end_with_parent
from metadist.store import disk_error

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
BEAT_S, STALE_S, LOST_S = 5.0, 60.0, 600.0  # of claims where there are no locks; the last: though a process has its number
_POLL_S = 0.05


def run_queue(
    names: Sequence[str],
    work: Callable[[str], None],
    done: Callable[[str], bool],
    place: Path,
    stop: Callable[[], bool] = lambda: False,
    patient: bool = True,
    poll_s: float = 1.0,
) -> bool:
    """Work on tasks beside all others who do, until every one is done; True if they are, False if this worker left before.

    names: of tasks, in the order they are begun; they become names of files.
    work: does a task; it returns without a result only if ``stop()`` asks for that.
    done: whether a task's result is there.
    place: folder of the locks, common to all workers; made if missing.
    stop: asked between tasks.
    patient: stay while others work, to take over from whoever dies; False: leave when there is nothing to take.
    Raises what ``work`` raises, and RunError for a task that ended without its result.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise disk_error(place, 0, e) from e
    while True:
        left = [name for name in names if not done(name)]
        if not left:
            return True
        worked = False
        for name in left:
            if stop():
                return False
            with claimed(place / f"{name}.lock") as mine:
                if mine and not done(name):
                    work(name)
                    worked = True
                    if not done(name) and not stop():
                        raise RunError(f"task {name} ended without its result")
        if not worked:
            if not patient:
                return all(done(name) for name in names)
            _sleep(poll_s, stop)


def _sleep(seconds: float, stop: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop():
        time.sleep(min(_POLL_S, seconds))


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold the lock ``path`` for the block: True; or find it held by another: False. Raises RunError if the disk refuses."""
    try:
        file = path.open("a")
    except OSError as e:
        raise disk_error(path, 0, e) from e
    with contextlib.ExitStack() as stack:
        stack.enter_context(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except OSError as e:
            if e.errno in _NO_LOCKS:
                mine = stack.enter_context(_claimed_by_name(path.with_suffix(".claim")))
            elif e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                mine = False
            else:
                raise disk_error(path, 0, e) from e
        yield mine


@contextlib.contextmanager
def _claimed_by_name(path: Path) -> Iterator[bool]:
    if _abandoned(path):
        with contextlib.suppress(OSError):
            path.unlink()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        yield False
        return
    except OSError as e:
        raise disk_error(path, 0, e) from e
    with os.fdopen(fd, "w") as file:
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        ended.set()
        beat.join()
        with contextlib.suppress(OSError):
            path.unlink()


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)


def _abandoned(path: Path) -> bool:
    """Whether a claim's owner is known to be dead, or was silent for too long. Two who see it at once may both go on: a task
    then is done twice, to the same result."""
    try:
        owner, age = path.read_text().split(), time.time() - path.stat().st_mtime
        here = len(owner) == 2 and owner[0] == socket.gethostname()
        if here:
            os.kill(int(owner[1]), 0)
        # A process of that number may be another one by now: after a restart of the machine, or of a container.
        return age > (LOST_S if here else STALE_S)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # gone already, or being written
        return False


class _Worker:
    """A worker process, and what it says on stderr."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], out: IO[str] | None) -> None:
        # Signals wait until the worker is ready for them.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.said = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=self.said,
                start_new_session=True,  # a Ctrl-C of the terminal reaches it once, through us
                preexec_fn=end_with_parent,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)

    def end(self) -> str:
        """Wait for it; what it said."""
        self.process.wait()
        with self.said:
            self.said.seek(0)
            return self.said.read()[-8192:].decode(errors="replace").strip()


def run_workers(
    command: Sequence[str], count: int, environment: Mapping[str, str] | None = None, out: IO[str] | None = None
) -> tuple[int, str]:
    """Run ``count`` processes of ``command`` until all have ended; (exit status, what to say about it).

    command: each unblocks metadist.run.signals.SIGNALS when it is ready for them, and ends with 0 or ``stop_status``.
    environment: beside this process's own; METADIST_WORKER (0, 1, ...) is added. out: where they print; None: as this one.
    Signals are passed on to all; when this process dies they get SIGTERM.
    Status: 128 + number: stopped by that signal. That of a worker that failed, with its words. 1: all were killed.
    Else 0, with a line if some were killed.
    """
    workers: list[_Worker] = []

    def forward(signum: int) -> None:
        for worker in list(workers):
            if worker.process.poll() is None:
                worker.process.send_signal(signum)

    def kill() -> None:
        for worker in workers:
            worker.process.kill()

    with Stop(on_request=forward, on_abort=kill) as stop:
        try:
            for number in range(count):
                workers.append(_Worker(command, {**(environment or {}), "METADIST_WORKER": str(number)}, out))
            if stop.requested:  # it came while they were being started
                forward(signal.Signals[stop.requested])
            failed = _wait(workers, forward)
        finally:
            kill()
            words = [worker.end() for worker in workers]
    codes = [worker.process.returncode for worker in workers]
    if failed is not None:
        return codes[failed], words[failed]
    if stop.requested:
        return stop_status(stop.requested), ""
    killed = [n for n, code in enumerate(codes) if code < 0]
    if not killed:
        return 0, "\n".join(filter(None, words))
    who = f"worker{'s' if len(killed) > 1 else ''} {', '.join(map(str, killed))} killed (signal {-codes[killed[0]]})"
    return (1 if len(killed) == count else 0), who


def _wait(workers: Sequence[_Worker], forward: Callable[[int], None]) -> int | None:
    """Until all have ended; the number of the first that failed by itself, after which the others are told to stop."""
    first: int | None = None
    while any(worker.process.poll() is None for worker in workers):
        time.sleep(_POLL_S)
        if first is None and (first := _failed(workers)) is not None:
            forward(signal.SIGTERM)
    return first if first is not None else _failed(workers)


def _failed(workers: Sequence[_Worker]) -> int | None:
    stopped = {stop_status(s.name) for s in SIGNALS}
    codes = [worker.process.poll() for worker in workers]
    return next((n for n, code in enumerate(codes) if code is not None and code > 0 and code not in stopped), None)
