"""The typed configuration of ordinary training and knowledge distillation (see ``metadist.config``)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainConfig:
    """method.synthetic=network: ordinary training. A meta-step is an optimizer step, a task a micro-batch of real_batch."""

    networks: int = 1  # trained at once, each from an initialization and in an order of its own
    weight_decay: float = 0.0  # l2 in the loss
    max_square: float = 0.0  # weights into a hidden unit are scaled back to this squared length; 0: never
    snapshots: list[float] = field(default_factory=list)  # parts of meta.horizon after which the networks are kept: [.1,.5]


@dataclass
class KdConfig:
    """method.loss=distillation: (1 - alpha) cross-entropy + alpha scale KL(teacher || student), both softened by T."""

    alpha: float = 0.5  # weight of the soft term
    T: float = 3.0  # temperature
    scale: float | None = None  # null: T^2, which keeps the soft term's gradient at the size of the hard one's
    teachers: list[str] = field(default_factory=list)  # method=kd, as all below: run folders; their networks are averaged
    pair: bool = False  # network i learns from network i of each teacher's run alone
    stopped: float = 1.0  # the part of its training after which a teacher was stopped: of its train.snapshots; 1: its best
    until: float = 0.0  # passes over the data after which the soft term is left out; 0: never
    variants: int = 0  # augmentations of an image, whose teachers' logits are kept; 0: new ones each pass, nothing kept
