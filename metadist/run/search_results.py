"""What is known of each candidate: one file a way, seed and candidate, whole or not there.

results/<way>/<seed>/<number of the candidate in the space>.json    {"architecture", "score", "failed", "seconds", "images"}

A number means an architecture only as long as the space is the same: every file is held against the name it was written for.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from metadist.errors import RunError, UserError
from metadist.search.table import Outcome
from metadist.store import atomic_write

if TYPE_CHECKING:
    from metadist.search.space import Space
    from metadist.search.training import Measured


class Results:
    """The files below a folder, each read once."""

    def __init__(self, folder: Path, space: Space) -> None:
        """Reads nothing yet."""
        self.folder, self.space = folder, space
        self._read: dict[Path, Outcome] = {}

    def _path(self, way: str, repeat: int, index: int) -> Path:
        return self.folder / way / str(repeat) / f"{index:05d}.json"

    def has(self, way: str, repeat: int, index: int) -> bool:
        """Whether it is known. Raises as ``of``."""
        path = self._path(way, repeat, index)
        if path not in self._read and path.exists():
            self.of(way, repeat, index)
        return path in self._read

    def put(self, way: str, repeat: int, index: int, found: Measured) -> None:
        """Keep one. Raises RunError if the disk refuses."""
        record = {"architecture": self.space.key(index), **dataclasses.asdict(found)}
        atomic_write(self._path(way, repeat, index), (json.dumps(record) + "\n").encode())

    def of(self, way: str, repeat: int, index: int) -> Outcome:
        """What came of one seed. Raises RunError for a file that can't be read, UserError for one of another architecture."""
        path = self._path(way, repeat, index)
        if path not in self._read:
            try:
                found = json.loads(path.read_text())
                self._same(path, index, found["architecture"])
                scores = () if found["score"] is None else (float(found["score"]),)
                self._read[path] = Outcome(scores, found["failed"], float(found["seconds"]), int(found["images"]))
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise RunError(f"{path} can't be read ({type(e).__name__}); remove it and run the same command again") from None
        return self._read[path]

    def _same(self, path: Path, index: int, written: str) -> None:
        if written != (key := self.space.key(index)):
            raise UserError(f"{path} is of {written}, which is now {key} in search.space={self.space.name}: the space has "
                            "changed; give another out, or the space as it was to go on")  # fmt: skip

    def known(self, way: str, index: int) -> list[Outcome]:
        """All that is there of a candidate by one way, whatever the seed."""
        repeats = sorted(int(path.parent.name) for path in (self.folder / way).glob(f"*/{index:05d}.json"))
        return [self.of(way, repeat, index) for repeat in repeats]

    def outcome(self, way: str, index: int, repeats: int) -> Outcome:
        """All seeds of a way together: a candidate without a score by one of them has failed."""
        found = [self.of(way, repeat, index) for repeat in range(repeats)]
        lost = next((o.failed for o in found if not o.scores), None)
        scores = () if lost else tuple(s for o in found for s in o.scores)
        guessed = next((o.failed for o in found if o.failed is not None), None)
        return Outcome(scores, lost or guessed, sum(o.seconds for o in found), sum(o.images for o in found))
