"""A configuration's architecture search: what there is to do, in which order.

Design choices
- Candidates are the first of one drawn order, so more of them are added to those that are there. Those that a later start adds
  are grouped among themselves: groups that are done stay as they are, and nobody is trained again to be beside a newcomer.
- A task is (way, seed, candidates of one shape), done when every one of these has its file; metadist.run.queue has the tasks
  done by any number of workers. What comes next (a round of halving, the best in full) is read off the files of what came
  before.
- A candidate that failed has a file too: it says why.
"""

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metadist import draw
from metadist.config import Config
from metadist.config_search import FREE
from metadist.errors import UserError
from metadist.run.search_folder import record
from metadist.run.search_results import Results
from metadist.search.space import grouped, open_space

if TYPE_CHECKING:
    from metadist.search.space import Space

SUBSETS, HALVING = ("random_real", "coreset"), "halving-"


@dataclass(frozen=True)
class Task:
    """What a worker does at once."""

    way: str
    repeat: int  # the seed's number
    indices: tuple[int, ...]  # candidates of one shape, by their numbers in the space

    @property
    def name(self) -> str:
        """Becomes the name of a file."""
        return f"{self.way}-{self.repeat}-{self.indices[0]:05d}"


class Search:
    """A configuration's candidates and tasks. Raises UserError for a space or a truth that can't be."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Open the space and draw the candidates; of the folder nothing is read yet."""
        c = self.config = config.search
        self.space: Space = open_space(c.space, c.width, c.cells)
        self.folder, self.results = folder, Results(folder / "results", self.space)
        self.known = known_truth(c.truth)
        self.candidates = self._drawn()
        if c.halving and (kept := len(self.candidates) // c.halving) <= c.best:
            raise UserError(f"search.halving={c.halving} keeps {kept} of {len(self.candidates)} candidates, no more than "
                            f"best={c.best}: there would be no round; lower either, or give more candidates")  # fmt: skip

    def key(self, index: int) -> str:
        """The canonical name of a candidate."""
        return self.space.key(index)

    def _drawn(self) -> tuple[int, ...]:
        c, size = self.config, len(self.space)
        among, what = draw.permutation(draw.key(c.seed, "search candidates"), size).tolist(), f"space={c.space}"
        if self.known is not None:
            numbers = {self.space.key(i): i for i in range(size)}
            if wrong := next((k for k in self.known if k not in numbers), None):
                raise UserError(f"{c.truth}: {wrong!r} is no architecture of space={c.space}; one is {self.space.key(0)!r}")
            among, what = [i for i in among if self.space.key(i) in self.known], c.truth
        if len(among) < max(2, c.candidates):
            raise UserError(f"candidates={c.candidates} is more than the {len(among)} architectures of {what}; give 2 to "
                            f"{len(among)}, or 0 for all of them")  # fmt: skip
        return tuple(among[: c.candidates or None])

    def repeats(self, way: str) -> int:
        """How many seeds a way has."""
        c = self.config
        if way in FREE:
            return 1
        if way in ("truth", "retrained"):
            return c.seeds
        return c.proxy_seeds * (c.draws if way in SUBSETS else 1)

    def tasks(self, way: str, indices: Sequence[int]) -> list[Task]:
        """Of a way, for these candidates."""
        waves: dict[int, list[int]] = {}
        for i in indices:
            waves.setdefault(self._wave[i], []).append(i)
        groups = [group for _, wave in sorted(waves.items()) for group in grouped(self.space, wave, self.config.group)]
        return [Task(way, repeat, tuple(group)) for repeat in range(self.repeats(way)) for group in groups]

    @functools.cached_property
    def _wave(self) -> dict[int, int]:
        """Which start has added a candidate."""
        ends = record(self.folder).get("waves", [])
        return {i: bisect.bisect_right(ends, place) for place, i in enumerate(self.candidates)}

    def count(self) -> int:
        """How many tasks can be done from the beginning."""
        return sum(len(self.tasks(way, indices)) for way, indices in next(self.phases()).items())

    def phases(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """{way: candidates} of what can be done at one time; the next is to be asked for when that is done."""
        c, all_ = self.config, self.candidates
        yield dict.fromkeys((*c.proxy, *(("truth",) if c.truth == "train" else ())), all_)
        best = all_
        if c.halving:
            rounds = 0
            way = "distilled"
            while (keep := max(c.best, len(best) // c.halving)) < len(best):
                best, rounds = self.ranked(way, best)[:keep], rounds + 1
                if keep > c.best:
                    way = f"{HALVING}{rounds}"
                    yield {way: best}
        else:
            best = self.ranked(c.proxy[0], all_)[: c.best]
        if c.truth == "none":
            yield {"retrained": best}

    def ranked(self, way: str, indices: Sequence[int]) -> tuple[int, ...]:
        """These candidates by their mean score, best first; ties in drawn order, who failed last."""
        scores = {i: self.results.outcome(way, i, self.repeats(way)).mean for i in indices}
        return tuple(sorted(indices, key=lambda i: -scores[i] if scores[i] == scores[i] else float("inf")))

    def missing(self, task: Task) -> list[int]:
        """The candidates of a task that have no file."""
        return [i for i in task.indices if not self.results.has(task.way, task.repeat, i)]

    def finished(self) -> bool:
        """Whether everything is done. All files of a phase are read: a space that has changed is seen before any work."""
        for phase in self.phases():
            if sum(len(self.missing(t)) for way, indices in phase.items() for t in self.tasks(way, indices)):
                return False
        return True

    @functools.cached_property
    def ways(self) -> dict[str, tuple[int, ...]]:
        """All ways of a finished search and the candidates that each was given to."""
        return {way: indices for phase in self.phases() for way, indices in phase.items()}


def known_truth(given: str) -> dict[str, tuple[float, ...]] | None:
    """Accuracies by architecture out of a file; None if they are to be trained. Raises UserError for another content."""
    if given in ("train", "none"):
        return None
    try:
        found = json.loads(Path(given).expanduser().read_text())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{given} is not a JSON file of {{architecture: accuracy or list of accuracies}}")
    if len(found) < 2:
        raise UserError(f"{given} holds too few accuracies to compare ({len(found)}); give those of 2 architectures or more")
    table = {key: v if isinstance(v, list) else [v] for key, v in found.items()}
    for key, values in table.items():
        # True is a number to Python, and a whole number may be too long for a float.
        if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1 for v in values):
            raise UserError(f"{given}: {key} has {str(values)[:60]}; accuracies are fractions, from 0 to 1, one or more each")
    return {key: tuple(map(float, values)) for key, values in table.items()}
