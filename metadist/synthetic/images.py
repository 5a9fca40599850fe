"""Distilled images as meta-parameters: pixels, per-step rates and momenta, soft labels.

Design choices
- Image i has class i mod classes, so every inner batch is as balanced as its size allows.
- Pixels start from N(0, 1) in the normalised space (Wang et al. 2018, arXiv 1811.10959).
- Rates stay positive: "softplus" learns softplus^-1(rate), "raw" the rate itself, clamped at 1e-6. A momentum lives in (0, 1)
  by a sigmoid. Soft labels are the softmax of learned logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from metadist import draw
from metadist.config import Config
from metadist.metagrad.mixed import Batch
from metadist.metagrad.optimizers import Optimizer

Phi = dict[str, Tensor]
MIN_RATE = 1e-6


class Images:
    """What is learned when method.synthetic=images.

    config: ipc, inner.*, labels.*, seed.
    classes: number of classes K.
    shape: (C, H, W) of an image.
    dtype, device: of the parameters.
    """

    def __init__(
        self, config: Config, classes: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Fix sizes and order; ``parameters`` makes the tensors."""
        inner = config.inner
        self.config, self.classes, self.shape = config, classes, tuple(shape)
        self.dtype, self.device = dtype, torch.device(device)
        self.count = config.ipc * classes
        self.order = tuple(t % inner.steps for t in range(inner.steps * inner.epochs))
        self.optimizer = Optimizer(inner.optimizer, inner.beta2, inner.eps)
        self.classes_of = torch.arange(self.count, device=self.device) % classes

    def parameters(self) -> Phi:
        """The meta-parameters before the first meta-step: images [N, C, H, W], rate [T], momentum [T], labels [N, K]."""
        inner, steps = self.config.inner, len(self.order)
        key = draw.key(self.config.seed, "images", 0, torch.zeros((), dtype=torch.int64, device=self.device))
        phi = {"images": draw.normal(key, (self.count, *self.shape), self.dtype)}
        if inner.learn_lr:
            raw = inner.lr if inner.rate == "raw" else math.log(math.expm1(inner.lr))
            phi["rate"] = torch.full((steps,), raw, dtype=self.dtype, device=self.device)
        if inner.learn_momentum and inner.optimizer != "sgd":
            logit = math.log(inner.momentum / (1 - inner.momentum))
            phi["momentum"] = torch.full((steps,), logit, dtype=self.dtype, device=self.device)
        if self.config.labels.kind == "soft":
            p = self.config.labels.confidence
            own = math.log(p * (self.classes - 1) / (1 - p))
            phi["labels"] = F.one_hot(self.classes_of, self.classes).to(self.dtype) * own
        return phi

    def labels(self, phi: Phi) -> Tensor:
        """Classes [N] int64, or probabilities [N, K] if soft."""
        return torch.softmax(phi["labels"], dim=1) if "labels" in phi else self.classes_of

    def batches(self, phi: Phi) -> Batch:
        """All inner batches: images [S, B, C, H, W] and labels [S, B] or [S, B, K]."""
        s = self.config.inner.steps
        return tuple(v.reshape(s, self.count // s, *v.shape[1:]) for v in (phi["images"], self.labels(phi)))

    def rates(self, phi: Phi) -> Tensor:
        """Learning rates [T], positive."""
        if "rate" not in phi:
            return torch.full((len(self.order),), self.config.inner.lr, dtype=self.dtype, device=self.device)
        raw = phi["rate"]
        return raw.clamp(min=MIN_RATE) if self.config.inner.rate == "raw" else F.softplus(raw)

    def momenta(self, phi: Phi) -> Tensor | None:
        """Momentum coefficients [T] in [0, 1); None for SGD."""
        if self.config.inner.optimizer == "sgd":
            return None
        if "momentum" in phi:
            return torch.sigmoid(phi["momentum"])
        return torch.full((len(self.order),), self.config.inner.momentum, dtype=self.dtype, device=self.device)

    def schedule(self, phi: Phi) -> Tensor:
        """The optimizer's table h [T, K], differentiable in the learned rates and momenta."""
        return self.optimizer.schedule(self.rates(phi), self.momenta(phi))
