"""Real runs for the tests of the laws: processes that are started in a moment, watched, killed and compared to the bit.

Design choices
- A start of the program costs seconds of imports. A nursery process imports them once and forks a child for each start; the
  child then runs the very command line (``metadist.run.command.main``). Worker ranks are programs of their own, as always.
- What is compared is what a run leaves: tensors and counters of its last checkpoint, and the bytes of the distilled set.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 180.0  # only reached by a defect

# A learner so small that a step takes milliseconds. All that a checkpoint can hold is there: best set, average, rates. What a
# preset may change is given.
TINY = [
    "data=digits",
    "data.size=8",
    "net=mlp",
    "net.init=kaiming",
    "net.width=8",
    "net.depth=1",
    "ipc=1",
    "tasks=3",
    "real_batch=16",
    "inner.steps=2",
    "inner.epochs=1",
    "inner.lr=0.02",
    "meta.lr=0.01",
    "meta.lr_rate=null",
    "meta.schedule=constant",
    "meta.clip=0",
    "meta.ema=0.9",
    "eval.every=7",
    "eval.nets=2",
    "eval.final_nets=3",
    "run.checkpoint_every=3",
    "run.log_every=1",
    "run.image_every=1000",
    "threads=1",
    "engine.compile=off",
    "engine.group=2",
    "device=cpu",
    "exchange.timeout_s=60",
]


def until(condition: Callable[[], Any], what: str, times: int = 1) -> Any:
    """The first true value of ``condition``."""
    end = time.monotonic() + times * DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.002)
    return value


class Started:
    """One start of the program: its process number, what it wrote, how it ended."""

    def __init__(self, nursery: Nursery, words: Sequence[str], out: Path, fsize: int | None, program: str) -> None:
        self._nursery, self._out, self._err = nursery, out, out.with_suffix(".err")
        self._code: int | None = None
        said = {"out": str(self._out), "err": str(self._err)}
        self.pid = nursery.ask(do="start", words=list(words), **said, fsize=fsize, program=program)

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._nursery.ask(do="poll", pid=self.pid)
        return self._code

    def wait(self, times: int = 1) -> int:
        """Exit status; waits for at most so many times DEADLINE_S."""
        until(lambda: self.poll() is not None, f"the end of {self.pid}: {self.out} {self.err}", times)
        assert self._code is not None
        return self._code

    def lines(self) -> int:
        """Step lines written so far."""
        return sum(line.startswith("step ") for line in self.out.splitlines())

    def until_lines(self, count: int) -> None:
        until(lambda: self.lines() >= count or self.poll() is not None, f"{count} step lines")
        assert self.lines() >= count, (self.out, self.err)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def rank(self, number: int) -> int:
        """Process number of one worker rank."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        mark = f"\0RANK={number}\0".encode()
        return next(int(c) for c in children if mark in b"\0" + Path(f"/proc/{c}/environ").read_bytes())


class Nursery:
    """Starts programs quickly. A context manager."""

    def __enter__(self) -> Nursery:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._count = 0
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(self, words: Sequence[str], at: Path, fsize: int | None = None, program: str = "metadist.run.command") -> Started:
        """``launch/local.py words``; its output goes to files in ``at``.

        fsize: largest file in bytes it may write. program: module whose main it is.
        """
        self._count += 1
        return Started(self, words, at / f"start-{self._count:03d}.out", fsize, program)

    def run(self, words: Sequence[str], at: Path, times: int = 1, program: str = "metadist.run.command") -> Started:
        """Start and wait for success, at most so many times DEADLINE_S."""
        started = self.start(words, at, program=program)
        assert started.wait(times) == 0, (started.out, started.err)
        return started


def result(run_dir: Path) -> dict[str, Any]:
    """All that a finished run decided, in bytes: checkpoint tensors and counters, both distilled sets."""
    from metadist.store import Checkpoints

    found = Checkpoints(run_dir / "checkpoints", 0).load_newest()
    assert found is not None
    step, tensors, metadata = found
    out: dict[str, Any] = {k: (v.dtype, tuple(v.shape), v.numpy().tobytes()) for k, v in tensors.items()}
    out |= {"step": step, "state": metadata["state"], "anchor": metadata["anchor"]}
    for name in ("distilled.safetensors", "distilled-last.safetensors"):
        out[name] = (run_dir / name).read_bytes()
    return out


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal to the bit; names what is not."""
    assert one.keys() == other.keys()
    assert [k for k in one if one[k] != other[k]] == []


def _child(request: dict[str, Any]) -> None:
    from metadist.run.worker import die_with

    main = importlib.import_module(request["program"]).main

    die_with(os.getppid())  # whoever kills the tests kills their runs, too
    os.setsid()
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT),
        (2, request["err"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags, 0o666), number)
    if request["fsize"] is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["fsize"], request["fsize"]))
    status = main(request["words"])
    sys.stdout.flush()
    os._exit(status)


def _serve() -> None:

    import metadist.run.experts_job
    import metadist.run.local
    import metadist.run.search_job
    import metadist.run.trainer  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            if (reply := os.fork()) == 0:
                try:
                    _child(request)
                finally:
                    os._exit(99)
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _serve()
