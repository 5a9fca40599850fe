"""What was measured: rows, curves, and the table a person reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metadist.evaluate.plan import Result
from metadist.evaluate.settings import Settings
from metadist.evaluate.statistics import Summary
from metadist.synthetic.distilled import DistilledSet

HEADER = ("images", "training", "net", "accuracy %", "sd", "n", "95% of mean", "rate")
TRANSFER_HEADER = ("net", "training", "distilled %", "random real %", "gain")
NAMES = {
    "none": "-",
    "all": "all real",
    "random": "random real",
    "class_mean": "class means",
    "kmeans": "k-means",
    "kcenter": "k-center",
}


@dataclass(frozen=True, eq=False)
class Row:
    """One measurement: what images, how trained, which net."""

    images: str  # distilled | random | class_mean | kmeans | kcenter | all | none
    count: int  # how many images
    training: str  # in words
    protocol: str  # recorded | standard | dc | dsa | mtt | none
    net: str
    result: Result
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; accuracies are fractions, rate null: the recorded rates."""
        tried = {("recorded" if k is None else f"{k:g}"): v for k, v in self.result.tried.items()}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "result"}
        return own | {"accuracy": self.result.summary.as_dict(), "rate": self.result.rate, "validation": tried}


@dataclass(frozen=True, eq=False)
class Curve:
    """Accuracy against inner step."""

    images: str
    steps: tuple[int, ...]
    accuracies: Tensor  # float64 [len(steps), n]

    @property
    def sd(self) -> Tensor:
        """Deviation over networks after each of the steps; 0 for a single network."""
        return self.accuracies.std(1, correction=1 if self.accuracies.shape[1] > 1 else 0)


@dataclass(frozen=True, eq=False)
class Report:
    """All that was measured on one set."""

    dset: DistilledSet
    data: str
    net: str
    starts: str  # in words
    settings: Settings
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...]
    poison: dict[str, Summary] | None = None

    def find(self, images: str, protocol: str = "recorded") -> Row | None:
        """The best row of these images by this protocol with the set's own net, if it was measured."""
        rows = [r for r in self.rows if (r.images, r.protocol, r.net) == (images, protocol, self.net)]
        return max(rows, key=lambda r: r.result.summary.mean, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: the set, the settings, every row, the curves (mean and sd by step)."""
        manifest = self.dset.manifest
        about = {k: manifest[k] for k in ("method", "data", "net", "seed", "version") if k in manifest}
        curves = {
            c.images: {"steps": c.steps, "mean": c.accuracies.mean(1).tolist(), "sd": c.sd.tolist(), "n": c.accuracies.shape[1]}
            for c in self.curves
        }
        return {
            "set": about | {"images": len(self.dset.images), "steps": len(self.dset.order)},
            "data": self.data,
            "net": self.net,
            "starts": self.starts,
            "settings": dataclasses.asdict(self.settings),
            "rows": [row.as_dict() for row in self.rows],
            "curves": curves,
            "poison": None if self.poison is None else {k: v.as_dict() for k, v in self.poison.items()},
        }


def cells(row: Row) -> tuple[str, ...]:
    """A row in words and percent, under ``HEADER``."""
    s = row.result.summary
    interval = "-" if s.ci95 is None else f"+-{100 * s.ci95:.2f}"
    rate = "-" if row.protocol == "none" else "recorded" if row.result.rate is None else f"{row.result.rate:g}"
    images = "-" if row.images == "none" else f"{row.count} {NAMES.get(row.images, row.images)}"
    return images, row.training, row.net, f"{100 * s.mean:.2f}", f"{100 * s.sd:.2f}", str(s.n), interval, rate


def transfer(report: Report) -> list[tuple[str, ...]]:
    """Every net and training: the distilled set against random real images, under ``TRANSFER_HEADER``."""
    made = [row for row in report.rows if row.images == "distilled"]
    real = {_training(row): row.result.summary for row in report.rows if row.images == "random"}
    rows = []
    for row in made:
        own, random = row.result.summary, real.get(_training(row))
        pair = [f"{100 * s.mean:.2f} +- {100 * s.sd:.2f}" if s else "-" for s in (own, random)]
        gain = f"{100 * (own.mean - random.mean):+.2f}" if random else "-"
        rows.append((row.net, row.training, *pair, gain))
    return rows


def _training(row: Row) -> tuple[str, ...]:
    """What rows of other images must share with this one to stand beside it."""
    return row.net, row.protocol, "" if row.protocol == "recorded" else row.training
