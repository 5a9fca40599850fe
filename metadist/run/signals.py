"""A stop request by signal, seen even while the process is blocked in a collective.

Design choices
- Python runs signal handlers between byte codes of the main thread: never, while that thread waits inside gloo or NCCL. The
  C-level handler still writes the signal's number to the wake-up descriptor; a thread reads it there.
- A stop is a wish, not an exception: the training loop looks at ``requested`` at a point where all ranks agree.
- A second Ctrl-C leaves at once, whatever the process is doing.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def stop_status(name: str) -> int:
    """Exit status of a run that a signal stopped with its work saved: 128 + number (SIGINT 130, SIGTERM 143, SIGUSR2 140)."""
    return 128 + signal.Signals[name]


def _nothing(signum: int, frame: FrameType | None) -> None:
    """Keep the default action away; the wake-up descriptor does the work."""


class Stop:
    """Context manager that turns SIGINT, SIGTERM and SIGUSR2 into a request to stop; earlier handlers come back at its end.

    on_request: called once, in the reading thread, with the number of the first signal.
    on_abort: called before a second SIGINT ends this process with status 130.
    at_once: called with the name of the first signal, outside of ``agreeing``: there is nothing to save that is not saved, and
    nothing is lost by ending there and then. Without it such a request waits, too.
    Outside the main thread (where Python allows no handlers) it only carries requests made by ``request``.
    """

    def __init__(
        self,
        on_request: Callable[[int], None] | None = None,
        on_abort: Callable[[], None] | None = None,
        at_once: Callable[[str], None] | None = None,
    ) -> None:
        """Nothing is installed before the block is entered."""
        self._at_once, self._agreeing = at_once, False
        self.requested: str | None = None  # name of the first signal
        self._on_request, self._on_abort = on_request, on_abort
        self._interrupts = 0
        self._old: dict[signal.Signals, Any] = {}

    def request(self, name: str) -> None:
        """Ask for a stop as the signal ``name`` does; the first request counts."""
        if self.requested is None:
            self.requested = name
            if self._on_request is not None:
                self._on_request(signal.Signals[name])
            if self._at_once is not None and not self._agreeing:
                self._at_once(name)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A stretch of work whose end all workers agree on: a request only sets ``requested``."""
        self._agreeing = True
        try:
            yield
        finally:
            self._agreeing = False

    def __enter__(self) -> Stop:
        """Install the handlers."""
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="metadist-signals", daemon=True)
        self._thread.start()
        self._old = {s: signal.signal(s, _nothing) for s in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Restore what was there."""
        if not self._old:
            return
        for s, handler in self._old.items():
            signal.signal(s, handler if handler is not None else signal.SIG_DFL)
        self._old = {}
        signal.set_wakeup_fd(self._old_fd)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        while received := self._reader.recv(64):
            for number in received:
                self._see(number)

    def _see(self, number: int) -> None:
        if number not in SIGNALS:
            return  # a signal somebody else handles
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            try:
                if self._on_abort is not None:
                    self._on_abort()
            finally:
                os._exit(stop_status("SIGINT"))
        self.request(signal.Signals(number).name)
