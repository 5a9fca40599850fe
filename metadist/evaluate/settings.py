"""What an examination of a distilled set measures, and how thoroughly."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metadist.data import AUGMENTATIONS, BASELINES, Data, dsa
from metadist.data.sources import DIGIT_SETS
from metadist.errors import UserError, unknown
from metadist.evaluate.plan import Plan
from metadist.evaluate.protocols import DRAWS, SPLITS
from metadist.evaluate.published import NAMES
from metadist.evaluate.train import DSA, SCHEDULES
from metadist.metagrad.optimizers import Optimizer

PROTOCOLS = ("recorded", "standard", *NAMES)
SMALL = 16  # pixels: `auto` does not crop smaller images, a shift by 4 would take half of them away


@dataclass(frozen=True)
class Settings:
    """What is measured, and how thoroughly."""

    nets: int = 200  # networks by recorded steps; ordinary training and transfer take at most 20, the full data set 5
    protocol: tuple[str, ...] = (
        "recorded",
        "standard",
    )  # or a published one for standard: `published.settings` has its numbers
    epochs: int = 100  # of ordinary training
    optimizer: str = "momentum"  # of ordinary training: sgd | momentum | adam
    momentum: float = 0.9  # of momentum, Adam's beta1
    weight_decay: float = 0.0
    batch: int = 256
    augment: tuple[str, ...] = ("none", "auto")  # auto: crop for digits, crop_flip for others; dsa: all its operations that fit
    schedule: str = "half"  # constant | half | half_anew
    lr: tuple[float, ...] = ()  # of ordinary training; several: the best on validation; none: of a grid
    baseline_lr: tuple[float, ...] = ()  # the same for real images; none: lr
    baselines: tuple[str, ...] = BASELINES
    full: bool = False  # train on the full data set as well
    full_epochs: int = 5
    split: str = "test"  # who judges: test | valid
    trials: int = 5  # networks that choose a rate on validation
    seed: int = 0  # of fresh initializations, shuffling, random images
    chunk: int = 20  # networks at once
    compile: bool = False  # the training steps

    def __post_init__(self) -> None:
        """Refuse values that mean nothing (UserError)."""
        allowed = (
            ("protocol", self.protocol, PROTOCOLS),
            ("augment", [a for a in self.augment if not a.startswith(DSA)], (*AUGMENTATIONS, "auto", "dsa")),
            ("schedule", (self.schedule,), SCHEDULES),
            ("baselines", self.baselines, BASELINES),
            ("split", (self.split,), SPLITS),
        )
        for what, given, names in allowed:
            for name in given:
                if name not in names:
                    raise unknown(what, name, names)
        for what in ("nets", "epochs", "batch", "full_epochs", "trials", "chunk"):
            if getattr(self, what) < 1:
                raise UserError(f"{what}={getattr(self, what)} must be 1 or more")
        for strategy in (a.removeprefix(DSA) for a in self.augment if a.startswith(DSA)):
            dsa.operations(strategy)
        if not all(0 < rate < math.inf for rate in (*self.lr, *self.baseline_lr)):
            raise UserError("lr and baseline_lr must be above 0")
        if len([p for p in self.protocol if p != "recorded"]) > 1:
            raise UserError(f"protocol={','.join(self.protocol)} names two ordinary trainings; give one of "
                            f"{', '.join(PROTOCOLS[1:])}, beside recorded if you like")  # fmt: skip
        if self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise UserError("weight_decay must be 0 or more, and momentum in [0, 1)")
        Optimizer(self.optimizer)

    @property
    def ordinary(self) -> str | None:
        """The protocol of ordinary training that was asked for: standard, or a published name."""
        return next((p for p in self.protocol if p != "recorded"), None)

    @property
    def few(self) -> int:
        """Networks of ordinary training and of transfer."""
        return self.nets if self.ordinary in NAMES else min(self.nets, DRAWS)

    def plan(self, augment: str, real: bool = False) -> Plan:
        """Ordinary training as asked, with this augmentation. real: on real images."""
        rates = (self.baseline_lr or self.lr if real else self.lr) or None
        optimizer = Optimizer(self.optimizer)
        return Plan(self.epochs, optimizer, self.momentum, self.weight_decay, self.batch, augment, self.schedule, rates)

    def augmentations(self, data: Data) -> tuple[str, ...]:
        """The augmentations to try, ``auto`` and ``dsa`` resolved. Raises UserError for mirrored digits."""
        digits = data.name in DIGIT_SETS
        resolved = {
            "auto": "none" if data.size < SMALL else "crop" if digits else "crop_flip",
            "dsa": DSA + (dsa.MIRROR_FREE if digits else dsa.ALL),
        }
        for name in self.augment:
            if "flip" in name and digits:
                raise UserError(f"augment={name} mirrors images, and a mirrored digit is no digit; use crop or none")
        return tuple(dict.fromkeys(resolved.get(name, name) for name in self.augment))
