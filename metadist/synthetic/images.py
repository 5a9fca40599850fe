"""What is learned: distilled images as meta-parameters, and what every synthetic set has: rates, momenta, soft labels.

Design choices
- Image i has class i mod classes, so every inner batch is as balanced as its size allows.
- Pixels start from N(0, 1) in the normalised space (Wang et al. 2018, arXiv 1811.10959), or from drawn real images.
- Rates stay positive: "softplus" learns softplus^-1(rate), "raw" the rate itself, clamped at 1e-6. A momentum lives in (0, 1)
  by a sigmoid. Soft labels are the softmax of learned logits.
- Trajectory matching differentiates N steps, a fraction of a training; what is recorded goes on with the same steps, over and
  over, for trajectory.replay of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from metadist import draw
from metadist.config import Config
from metadist.data import Split, baseline
from metadist.metagrad.mixed import Batch
from metadist.metagrad.optimizers import Optimizer

Phi = dict[str, Tensor]
MIN_RATE = 1e-6
CARRIED = "carried/"  # names of meta-parameters that a task sets anew and nobody optimizes


class Synthetic(ABC):
    """A synthetic set's order of steps, rates and momenta. ``Images`` and ``Generator`` say where its batches come from.

    count: N, images of the recorded training; order: [T], which batch each of its steps uses; classes_of: [N], their classes.
    inner_steps: those that a meta-step runs, all T but for trajectory matching.
    """

    count: int
    classes_of: Tensor

    @property
    def shared(self) -> bool:
        """Whether all tasks of a meta-step see the same batches."""
        return True

    def __init__(
        self, config: Config, classes: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Fix the order."""
        inner = config.inner
        self.config, self.classes, self.shape = config, classes, tuple(shape)
        self.dtype, self.device = dtype, torch.device(device)
        self.inner_steps = inner.steps * inner.epochs
        recorded = config.trajectory.replay if config.method.gradient == "trajectory" else self.inner_steps
        self.order = tuple(t % inner.steps for t in range(recorded))
        self.optimizer = Optimizer(inner.optimizer, inner.beta2, inner.eps)

    @abstractmethod
    def parameters(self) -> Phi:
        """The meta-parameters before the first meta-step."""

    @abstractmethod
    def batches(self, phi: Phi, drawn: Tensor | None = None) -> Batch:
        """All inner batches [S, B, ...]; of what ``draw`` gave, with [G, ...] in front."""

    def draw(self, keys: Tensor) -> Tensor | None:
        """What the batches of each task depend on beside the parameters; None: on nothing. keys: [G, 2]."""
        return None

    def soft_labels(self, classes: Tensor) -> Tensor:
        """Logits [n, K] that give each its own class with probability labels.confidence."""
        p = self.config.labels.confidence
        own = math.log(p * (self.classes - 1) / (1 - p))
        return F.one_hot(classes, self.classes).to(self.dtype) * own

    def step_parameters(self) -> Phi:
        """What is learned of the steps: rate [steps], or [1] if they share it; momentum [steps]."""
        inner, steps, phi = self.config.inner, self.inner_steps, dict[str, Tensor]()
        if inner.learn_lr:
            raw = inner.lr if inner.rate == "raw" else math.log(math.expm1(inner.lr))
            phi["rate"] = torch.full((1 if inner.shared_lr else steps,), raw, dtype=self.dtype, device=self.device)
        if inner.learn_momentum and inner.optimizer != "sgd":
            logit = math.log(inner.momentum / (1 - inner.momentum))
            phi["momentum"] = torch.full((steps,), logit, dtype=self.dtype, device=self.device)
        return phi

    def rates(self, phi: Phi) -> Tensor:
        """Learning rates [T], positive."""
        if "rate" not in phi:
            return torch.full((len(self.order),), self.config.inner.lr, dtype=self.dtype, device=self.device)
        raw = self._each(phi["rate"])
        return raw.clamp(min=MIN_RATE) if self.config.inner.rate == "raw" else F.softplus(raw)

    @property
    def least(self) -> dict[str, float]:
        """Bounds that a meta-step must not lead below: a raw rate on its clamp would have no gradient ever after."""
        inner = self.config.inner
        return {"rate": 1.01 * MIN_RATE} if inner.learn_lr and inner.rate == "raw" else {}

    def _each(self, learned: Tensor) -> Tensor:
        """Of every recorded step [T], what was learned of the steps that are run."""
        times = -(-len(self.order) // len(learned))
        return learned.repeat(times)[: len(self.order)] if times > 1 else learned

    def momenta(self, phi: Phi) -> Tensor | None:
        """Momentum coefficients [T] in [0, 1); None for SGD."""
        if self.config.inner.optimizer == "sgd":
            return None
        if "momentum" in phi:
            return torch.sigmoid(self._each(phi["momentum"]))
        return torch.full((len(self.order),), self.config.inner.momentum, dtype=self.dtype, device=self.device)

    def schedule(self, phi: Phi) -> Tensor:
        """The optimizer's table h [T, K], differentiable in the learned rates and momenta."""
        return self.optimizer.schedule(self.rates(phi), self.momenta(phi))


class Images(Synthetic):
    """What is learned when method.synthetic=images.

    config: ipc, images.start, inner.*, labels.*, seed.
    classes: number of classes K.
    shape: (C, H, W) of an image.
    dtype, device: of the parameters.
    real: training images, for images.start=real.
    """

    def __init__(
        self,
        config: Config,
        classes: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        real: Split | None = None,
    ) -> None:
        """Fix sizes and order; ``parameters`` makes the tensors."""
        super().__init__(config, classes, shape, dtype, device)
        self.real = real
        self.count = config.ipc * classes
        self.classes_of = torch.arange(self.count, device=self.device) % classes

    def parameters(self) -> Phi:
        """The meta-parameters before the first meta-step: images [N, C, H, W], rate [T], momentum [T], labels [N, K].

        Raises UserError for images.start=real where a class has too few real images.
        """
        phi = {"images": self._pixels()} | self.step_parameters()
        return phi | ({"labels": self.soft_labels(self.classes_of)} if self.config.labels.kind == "soft" else {})

    def _pixels(self) -> Tensor:
        if self.config.images.start == "real":
            assert self.real is not None
            return baseline("random", self.real, self.classes, self.config.ipc, self.config.seed)[0].clone()
        key = draw.key(self.config.seed, "images", 0, torch.zeros((), dtype=torch.int64, device=self.device))
        return draw.normal(key, (self.count, *self.shape), self.dtype)

    def labels(self, phi: Phi) -> Tensor:
        """Classes [N] int64, or probabilities [N, K] if soft."""
        return torch.softmax(phi["labels"], dim=1) if "labels" in phi else self.classes_of

    def batches(self, phi: Phi, drawn: Tensor | None = None) -> Batch:
        """All inner batches: images [S, B, C, H, W] and labels [S, B] or [S, B, K]."""
        s = self.config.inner.steps
        return tuple(v.reshape(s, self.count // s, *v.shape[1:]) for v in (phi["images"], self.labels(phi)))
