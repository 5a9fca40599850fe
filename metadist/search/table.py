"""What a search found: every candidate by every way of training, as numbers that a JSON file holds.

Design choices
- A way of training gives a candidate one `Outcome`: a score a seed, or one line that says why there is none. A failure is a
  result like another: it is kept, counted and ranks last.
- Accuracies are fractions of 1. Truth is on the test split and nothing is chosen by it; all other accuracies are on the
  validation split. A score that is not finite cannot be ranked: such an outcome counts as failed.
- A full training that diverges is no failure to train: whoever picks such an architecture gets a network that guesses. That is
  its score, and its outcome says beside why. Else a proxy that likes what diverges would not be punished for it.
- Costs are kept twice: seconds, which hold for the machine at hand, and training images seen, which hold everywhere.
- `as_dict` and `Table.of` are each other's inverse, through JSON too (a score that is not finite comes back as nan).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RETRAINED, HALVING = "retrained", "halving-"  # ways that are no proxies: the best k in full, and the rungs of halving


@dataclass(frozen=True)
class Outcome:
    """One candidate by one way of training."""

    scores: tuple[float, ...]  # one a seed: accuracies, or the free score; () if it failed
    failed: str | None  # why it failed, in one line; with scores: why a seed among them is a guess
    seconds: float  # of this machine, summed over seeds
    images: int  # training images seen, summed over seeds

    @property
    def mean(self) -> float:
        """Mean score over seeds; nan if it failed."""
        if not self.scores:
            return math.nan
        mean = sum(self.scores) / len(self.scores)
        return mean if math.isfinite(mean) else math.nan

    @property
    def reason(self) -> str | None:
        """Why there is no score to rank by; None if there is one."""
        return (self.failed or "its score is not finite") if math.isnan(self.mean) else None

    @property
    def diverged(self) -> bool:
        """Whether a seed among the scores is a guess."""
        return self.failed is not None and self.reason is None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        scores = [s if math.isfinite(s) else None for s in self.scores]
        return {"scores": scores, "failed": self.failed, "seconds": self.seconds, "images": self.images}

    @staticmethod
    def of(d: Mapping[str, Any]) -> Outcome:
        """What ``as_dict`` wrote."""
        scores = tuple(math.nan if s is None else float(s) for s in d["scores"])
        return Outcome(scores, d["failed"], float(d["seconds"]), int(d["images"]))


@dataclass(frozen=True)
class Table:
    """One search."""

    space: str
    data: str
    keys: tuple[str, ...]  # the candidates, in drawn order
    truth: Mapping[str, Outcome]  # key -> test accuracy after full training; empty if no truth was asked for
    ways: Mapping[str, Mapping[str, Outcome]]  # proxy, RETRAINED or a rung of HALVING -> key -> outcome
    set_seconds: float | None  # what making the distilled set cost; None: not known
    set_where: str | None  # where these seconds were measured, in words
    best: int  # so many of a proxy's best are trained in full
    settings: Mapping[str, Any] = field(default_factory=dict)  # shown in the report
    remarks: tuple[str, ...] = ()  # sentences at its head

    @property
    def proxies(self) -> tuple[str, ...]:
        """The ways that score every candidate before full training."""
        return tuple(w for w in self.ways if w != RETRAINED and not w.startswith(HALVING))

    @property
    def rungs(self) -> tuple[str, ...]:
        """The rungs of successive halving after the proxy, first to last."""
        return tuple(sorted((w for w in self.ways if w.startswith(HALVING)), key=lambda w: int(w.removeprefix(HALVING))))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "space": self.space, "data": self.data, "keys": list(self.keys), "truth": _outcomes(self.truth),
            "ways": {way: _outcomes(found) for way, found in self.ways.items()}, "set_seconds": self.set_seconds,
            "set_where": self.set_where, "best": self.best, "settings": dict(self.settings),
            "remarks": list(self.remarks),
        }  # fmt: skip

    @staticmethod
    def of(d: Mapping[str, Any]) -> Table:
        """What ``as_dict`` wrote."""
        ways = {way: {k: Outcome.of(o) for k, o in found.items()} for way, found in d["ways"].items()}
        truth = {k: Outcome.of(o) for k, o in d["truth"].items()}
        remarks = tuple(d.get("remarks", ()))
        return Table(**{**d, "keys": tuple(d["keys"]), "truth": truth, "ways": ways, "remarks": remarks})


def _outcomes(found: Mapping[str, Outcome]) -> dict[str, Any]:
    return {key: outcome.as_dict() for key, outcome in found.items()}
