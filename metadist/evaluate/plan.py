"""What is asked of an ordinary training, and what a measurement answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from metadist.data import dsa
from metadist.evaluate.recipe import RATES
from metadist.evaluate.statistics import Summary
from metadist.metagrad.optimizers import Optimizer

Rate = float | None


@dataclass(frozen=True)
class Plan:
    """Ordinary training."""

    epochs: int = 100
    optimizer: Optimizer = field(default_factory=lambda: Optimizer("momentum"))
    momentum: float = 0.9  # of "momentum", Adam's beta1
    weight_decay: float = 0.0
    batch: int = 256
    augment: str = "none"  # none | crop | flip | crop_flip | dsa:<strategy>
    schedule: str = "half"  # constant | half: a tenth of the rate from half of the steps on | half_anew: and a new optimizer
    rates: tuple[float, ...] | None = None  # tried on validation; None: RATES of the optimizer

    @property
    def candidates(self) -> tuple[float, ...]:
        """The rates to choose from."""
        return RATES[self.optimizer.kind] if self.rates is None else self.rates

    @property
    def text(self) -> str:
        """In words: `100 epochs, momentum, crop`."""
        short = {f"dsa:{dsa.ALL}": "dsa", f"dsa:{dsa.MIRROR_FREE}": "dsa without flip"}
        augment = short.get(self.augment, self.augment)
        return f"{self.epochs} epochs, {self.optimizer.kind}{'' if augment == 'none' else f', {augment}'}"


@dataclass(frozen=True, eq=False)
class Result:
    """One measurement."""

    accuracies: Tensor  # float64 [n], fractions
    rate: Rate  # the constant rate used; None: the recorded ones, or no training
    tried: dict[Rate, float]  # rate -> mean accuracy on validation; empty if there was nothing to choose

    @property
    def summary(self) -> Summary:
        """Mean, deviation and interval."""
        return Summary.of(self.accuracies)
