"""Checkpoints of one run, fenced by the numbers of ``metadist.store.claim``.

Design choices
- A file is named by step AND incarnation: `step-0000000300.inc-0002.safetensors`. A process forgotten on some node can only
  write names with its own, older number, and removes no newer incarnation's files: it can spoil nothing.
- The newest step wins, among equals the newest incarnation. A torn file is skipped with a warning that names it.
- Pruning keeps the `keep` newest of all files, the `keep` newest of the own incarnation (so that a forgotten process that is
  ahead cannot crowd them out), and anchors.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metadist.store.atomic import clean

if TYPE_CHECKING:
    from torch import Tensor  # to see which checkpoints there are takes no torch

log = logging.getLogger("metadist")
_NAME = re.compile(r"step-(\d+)\.inc-(\d+)\.safetensors")


class Saved(NamedTuple):
    """One checkpoint on disk; sorts by step, then incarnation."""

    step: int
    incarnation: int
    path: Path


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint in ``folder`` by its name, whole or torn; 0 if there is none. Nothing is touched."""
    return max((saved.step for saved in _listed(folder)), default=0)


def _listed(folder: Path) -> list[Saved]:
    if not folder.is_dir():
        return []
    found = [(m, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return sorted((Saved(int(m[1]), int(m[2]), p) for m, p in found), reverse=True)


class Checkpoints:
    """The checkpoints in one folder.

    folder: where they lie; made at the first save.
    incarnation: this process's number from ``claim``.
    keep: how many of the newest are kept, at least 1.
    anchor_every: checkpoints at multiples of this step are kept for ever; 0: none.
    """

    def __init__(self, folder: Path | str, incarnation: int, keep: int = 3, anchor_every: int = 0) -> None:
        """Clean what dead processes left half written."""
        if keep < 1:
            raise ValueError(f"keep={keep}: at least 1")
        self.folder, self.incarnation, self.keep, self.anchor_every = Path(folder), incarnation, keep, anchor_every
        clean(self.folder)

    def path(self, step: int) -> Path:
        """The file this process writes for ``step``."""
        return self.folder / f"step-{step:010d}.inc-{self.incarnation:04d}.safetensors"

    def saved(self) -> list[Saved]:
        """All checkpoints on disk, whole or torn, newest first."""
        return _listed(self.folder)

    def save(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
        """Write the checkpoint of ``step``, then prune; returns its path.

        A second save of the same step replaces the first. Raises RunError when the disk refuses: the older checkpoints
        are then all intact.
        """
        from metadist.store.files import save_tensors

        path = self.path(step)
        save_tensors(path, tensors, {"step": step, "user": dict(metadata)})
        self._prune()
        return path

    def load_newest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """(step, tensors on the CPU, metadata) of the newest whole checkpoint; None if there is none.

        Each torn one on the way is named in a warning of the logger "metadist".
        """
        from metadist.store.files import Torn, load_tensors

        saved = self.saved()
        for step, _, path in saved:
            try:
                tensors, metadata = load_tensors(path)
                if metadata.get("step") != step:
                    raise Torn(path, f"it holds step {metadata.get('step')}")
                return step, tensors, metadata["user"]
            except FileNotFoundError:
                continue  # pruned by another process since it was listed
            except Torn as e:
                log.warning("checkpoint %s is skipped: %s; the one before it is used", path, e.why)
        if saved:
            log.warning("no checkpoint in %s can be used: the run starts from its beginning", self.folder)
        return None

    def _prune(self) -> None:
        saved = self.saved()
        own = [s for s in saved if s.incarnation == self.incarnation]
        kept = {s.path for s in saved[: self.keep]} | {s.path for s in own[: self.keep]}
        if self.anchor_every:
            # The last one written wins: of one step only the newest incarnation's file is an anchor.
            anchors = {s.step: s.path for s in reversed(saved) if s.step % self.anchor_every == 0}
            kept |= set(anchors.values())
        for s in saved:
            if s.path not in kept and s.incarnation <= self.incarnation:
                with contextlib.suppress(OSError):  # gone already, or kept for want of rights: no reason to end a run
                    s.path.unlink()
