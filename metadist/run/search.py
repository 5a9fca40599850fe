"""A configuration's architecture search: what it depends on, where it lies, what there is to do, in which order.

Design choices
- Its folder is named by the hash of everything that a candidate's number depends on. How many candidates, seeds and proxies
  there are is not part of it: candidates are the first of one drawn order, so more of them are added to those that are there.
- A task is (way, seed, candidates of one shape), done when every one of these has its file; metadist.run.queue has the tasks
  done by any number of workers. What comes next (a round of halving, the best in full) is read off the files of what came
  before.
- A candidate that failed has a file too: it says why.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadist import draw
from metadist.config import Config
from metadist.config_search import FREE
from metadist.errors import UserError
from metadist.run.experts import data_recipe
from metadist.run.search_results import Results
from metadist.search.space import grouped, open_space

if TYPE_CHECKING:
    from metadist.search.space import Space

VERSION = 1  # of the maker: raised by any change that alters a candidate's number
CIRCUMSTANCE = ("set", "truth", "candidates", "seeds", "proxy_seeds", "draws", "proxy", "best", "group")
SUBSETS, HALVING = ("random_real", "coreset"), "halving-"
FILE = "search.json"


def recipe(config: Config) -> dict[str, Any]:
    """Everything that the number of a candidate depends on, JSON-able. Raises UserError if set or data are not there."""
    from metadist.synthetic.distilled import find

    c = config.search
    own = {k: v for k, v in dataclasses.asdict(c).items() if k not in CIRCUMSTANCE}
    files = {"set": find(c.set) if c.set is not None else None, "truth": None}
    if c.truth not in ("train", "none"):
        files["truth"] = Path(c.truth).expanduser()
    made = {
        "search": VERSION,
        **{f"data.{k}": v for k, v in data_recipe(config).items()},
        **own,
        **{name: hashlib.sha256(path.read_bytes()).hexdigest() if path else None for name, path in files.items()},
        "dtype": config.engine.dtype,
        "precision": config.engine.precision,
    }
    return {**made, "smoke": True} if config.smoke else made  # trained on a few images only


def search_dir(config: Config) -> Path:
    """The folder of a search, be it there or not: run_dir, or runs/search-<space>-<data>-<8 hex of its recipe>."""
    if config.run_dir is not None:
        return Path(config.run_dir).expanduser().absolute()
    key = hashlib.sha256(json.dumps(recipe(config), sort_keys=True).encode()).hexdigest()
    return Path(f"runs/search-{config.search.space}-{config.data.name}-{key[:8]}").absolute()


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
        """Open the space and draw the candidates; nothing is read from the folder yet."""
        c = self.config = config.search
        self.space: Space = open_space(c.space, c.width, c.cells)
        self.folder, self.results = folder, Results(folder / "results", self.space)
        self.known = known_truth(c.truth)
        self.candidates = self._drawn()

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
        groups = grouped(self.space, indices, self.config.group)
        return [Task(way, repeat, tuple(group)) for repeat in range(self.repeats(way)) for group in groups]

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
        table = {str(k): tuple(map(float, v if isinstance(v, list) else [v])) for k, v in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"{given} is not a JSON file of {{architecture: accuracy or list of accuracies}}") from None
    for key, values in table.items():
        if not values or not all(0 <= v <= 1 for v in values):
            raise UserError(f"{given}: {key} has {list(values)}; accuracies are fractions, from 0 to 1, one or more each")
    return table
