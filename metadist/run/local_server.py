"""exchange=server on this machine: one server process, and workers that it can do without.

Design choices
- A worker that is killed is started again, a few times; one that ended by a fault of its own would only meet it again. The
  others go on in either case: the run ends only when nobody is left.
- A server that is killed is started again, too, as the next start of the run; the workers wait for it.
- Signals go to all at once: the server writes its checkpoint, the workers just leave.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time

from metadist.errors import RunError
from metadist.run.environment import cores
from metadist.run.folder import RunFolder
from metadist.run.local import WORKER, Rank, verdict
from metadist.run.signals import Stop
from metadist.run.worker import result_text, threads

MEMBER = [sys.executable, "-m", "metadist.run.member"]
_POLL_S = 0.05
_TRIES = 3  # starts of one process after it was killed
_LEAVE_S = 15.0  # workers' time to leave after the server has ended


class Crew:
    """The processes of one run. Rank 0 is the server."""

    def __init__(self, folder: RunFolder, count: int) -> None:
        """count: threads of each. Nothing is started yet."""
        self.folder, self.count = folder, count
        self.lock = threading.Lock()
        self.ranks: dict[int, Rank] = {}
        self._tries: dict[int, int] = {}
        self._told: str | None = None
        self.failed: list[Rank] = []

    def start(self, number: int) -> None:
        """Start the server (0) or a worker."""
        command = MEMBER if number else WORKER
        with self.lock:
            self.ranks[number] = Rank(number, self.folder, command, "127.0.0.1:0", self.count)
            if self._told is not None:
                self.ranks[number].signal(signal.Signals[self._told])

    def forward(self, signum: int) -> None:
        """A signal for all."""
        with self.lock:
            self._told = signal.Signals(signum).name
            for rank in self.ranks.values():
                rank.signal(signum)

    def kill(self) -> None:
        """End all at once."""
        for rank in list(self.ranks.values()):
            rank.end()

    @property
    def members(self) -> list[Rank]:
        """Workers at work."""
        return [rank for n, rank in self.ranks.items() if n and rank.process.poll() is None]

    def look(self) -> None:
        """Deal with workers that ended while the server runs. Raises RunError when none is left."""
        for number, rank in list(self.ranks.items()):
            if number and rank.process.poll() is not None and rank not in self.failed:
                self._ended(number, rank)
        if self._told is None and self.failed and all(rank in self.failed for n, rank in self.ranks.items() if n):
            raise RunError(f"no worker is left; look into {self.folder.path}/log-rank1.txt")

    def _ended(self, number: int, rank: Rank) -> None:
        if not rank.failed:
            return  # it was told to leave
        code, tried = rank.process.returncode, self._tries.get(number, 0)
        if code < 0 and tried < _TRIES:
            self._tries[number] = tried + 1
            _say(f"worker {number} was killed (signal {-code}); it is started again, the others go on")
            self.start(number)
            return
        self.failed.append(rank)
        text = rank.fault["text"] if rank.fault else rank.tail or f"it was killed (signal {-code}) once more"
        if not text.startswith("error: ") and "\n" in text:
            text = f"{text.splitlines()[-1]}; all of it is in {rank.log}"
        _say(f"worker {number} has ended, the others go on: {text.removeprefix('error: ')}")

    def revive(self) -> bool:
        """Start a killed server again, as the next start of the run; False if it was killed too often."""
        if self.folder.finished is not None:
            return False  # it was killed while it said good-bye
        tried = self._tries.get(0, 0)
        code = self.ranks[0].process.returncode
        if tried >= _TRIES or self._told is not None or code >= 0:
            return False
        self._tries[0] = tried + 1
        _say(f"the server was killed (signal {-code}); it starts again from step {self.folder.newest_step}, the workers wait")
        self.folder = RunFolder.open(self.folder.config)
        self.start(0)
        return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def join(folder: RunFolder, count: int) -> int:
    """Give a run's server, wherever it is, ``count`` workers of this machine; until they leave. Returns the exit status."""
    crew = Crew(folder, folder.config.threads or max(1, cores() // count))
    with Stop(on_request=crew.forward, on_abort=crew.kill):
        try:
            taken = [int(p.stem.removeprefix("log-rank")) for p in folder.path.glob("log-rank[0-9]*.txt")]
            first = max([folder.config.workers, *taken]) + 1
            for number in range(first, first + count):
                crew.start(number)
            while crew.members:
                crew.look()
                time.sleep(_POLL_S)
        finally:
            crew.kill()
            for rank in crew.ranks.values():
                rank.process.wait()
    return verdict(crew.failed[:1], folder) if crew.failed else 0


def launch(folder: RunFolder) -> int:
    """Run the server and ``workers`` workers; returns the run's exit status."""
    crew = Crew(folder, threads(folder, folder.config.workers))
    with Stop(on_request=crew.forward, on_abort=crew.kill):
        try:
            for number in range(folder.config.workers + 1):
                crew.start(number)
            while True:
                if crew.ranks[0].process.poll() is None:
                    crew.look()
                    time.sleep(_POLL_S)
                elif not (crew.ranks[0].failed and crew.revive()):
                    break
            until = time.monotonic() + _LEAVE_S
            while crew.members and time.monotonic() < until and not crew.ranks[0].failed:
                time.sleep(_POLL_S)
        except RunError:
            if len(reasons := {r.fault["text"] for r in crew.failed if r.fault}) == 1 and reasons:
                return verdict(crew.failed[:1], crew.folder)  # all had the same: that is the run's fault
            raise
        finally:
            crew.kill()
            for rank in crew.ranks.values():
                with contextlib.suppress(OSError):
                    rank.process.wait()
    server = crew.ranks[0]
    if server.failed and (summary := crew.folder.finished) is not None:
        print(result_text(summary), flush=True)
        return 0
    return verdict([server], crew.folder) if server.failed else server.process.returncode
