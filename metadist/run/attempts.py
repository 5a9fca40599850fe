"""Marks of what was begun and not ended: a task that kills its process shall not do so for ever.

Design choices
- The kernel kills who asks for too much memory, and nobody is left to write that down. So a mark is left beside the locks of
  the queue before a task is begun. It goes when the task is done, fails, or is left in good order by a signal; what stays is of
  a process that was killed. The next one counts it, and does a task that was marked often in parts, each under its own mark.
- A mark is written by who holds the task's claim, so there is one writer.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metadist.store import atomic_write


class Attempts:
    """The marks in one folder, as one process sees them."""

    def __init__(self, place: Path) -> None:
        """Nothing is read or written yet. place: of the queue."""
        self.place = place
        self._lock, self._over = threading.Lock(), False
        self._open: tuple[Path, bytes | None] | None = None  # the mark left now, and what was there before it

    def _path(self, task: str) -> Path:
        return self.place / f"{task}.begun"

    def _read(self, task: str) -> dict[str, Any]:
        try:
            return dict(json.loads(self._path(task).read_text()))
        except FileNotFoundError:
            return {}

    def killed(self, task: str) -> int:
        """How many processes were killed at the whole of a task."""
        return int(self._read(task).get("killed", 0))

    def suspect(self, task: str) -> int | None:
        """The part of a task at which a process was killed that did this part alone."""
        return self._read(task).get("part")

    @contextlib.contextmanager
    def begun(self, task: str, part: int | None = None) -> Iterator[None]:
        """Do a task, or one part of it alone, under a mark. Raises RunError if the disk refuses."""
        path = self._path(task)
        mark = {"killed": self.killed(task) + (part is None), "part": part}
        with self._lock:
            if not self._over:
                self._open = (path, path.read_bytes() if path.exists() else None)
                atomic_write(path, (json.dumps(mark) + "\n").encode())
        try:
            yield
        finally:
            with self._lock:
                self._withdraw()

    def _withdraw(self) -> None:
        if self._open is not None:
            path, before = self._open
            if before is None:
                path.unlink(missing_ok=True)
            else:
                atomic_write(path, before)
        self._open = None

    def leave(self) -> None:
        """Take back the mark left now, as this process ends in good order. Called by another thread than that which works."""
        with self._lock:
            self._over = True  # it may be about to leave the next one
            self._withdraw()

    def forget(self, task: str) -> None:
        """A task is done."""
        self._path(task).unlink(missing_ok=True)
