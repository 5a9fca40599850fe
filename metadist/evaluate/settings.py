"""What an examination of a distilled set measures, and how thoroughly."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.data import AUGMENTATIONS, BASELINES, Data
from metadist.data.sources import DIGIT_SETS
from metadist.errors import UserError, unknown
from metadist.evaluate.plan import Plan
from metadist.evaluate.protocols import SPLITS
from metadist.metagrad.optimizers import Optimizer

PROTOCOLS = ("recorded", "standard")
SMALL = 16  # pixels: `auto` does not crop smaller images, a shift by 4 would take half of them away


@dataclass(frozen=True)
class Settings:
    """What is measured, and how thoroughly."""

    nets: int = 200  # networks by recorded steps; ordinary training takes at most 20, the full data set 5
    protocol: tuple[str, ...] = PROTOCOLS
    epochs: int = 100  # of ordinary training
    optimizer: str = "momentum"  # of ordinary training: sgd | momentum | adam
    momentum: float = 0.9  # of momentum, Adam's beta1
    weight_decay: float = 0.0
    batch: int = 256
    augment: tuple[str, ...] = ("none", "auto")  # of ordinary training; auto: crop for digits, crop_flip for other images
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
            ("augment", self.augment, (*AUGMENTATIONS, "auto")),
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
        if self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise UserError("weight_decay must be 0 or more, and momentum in [0, 1)")
        Optimizer(self.optimizer)

    def plan(self, augment: str) -> Plan:
        """Ordinary training as asked, with this augmentation."""
        return Plan(self.epochs, Optimizer(self.optimizer), self.momentum, self.weight_decay, self.batch, augment)

    def augmentations(self, data: Data) -> tuple[str, ...]:
        """The augmentations to try, ``auto`` resolved. Raises UserError for mirrored digits."""
        automatic = "none" if data.size < SMALL else "crop" if data.name in DIGIT_SETS else "crop_flip"
        for name in self.augment:
            if "flip" in name and data.name in DIGIT_SETS:
                raise UserError(f"augment={name} mirrors images, and a mirrored digit is no digit; use crop or none")
        return tuple(dict.fromkeys(automatic if name == "auto" else name for name in self.augment))
