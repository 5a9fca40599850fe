"""Training for flat minima, as a loss whose gradient is the direction that such a training steps in.

Design choices
- SAM and GSAM change the gradient that an optimizer sees, not the optimizer. A loss <theta, d> with d held fixed has the
  gradient d: so any inner training takes them without knowing.
- Directions are of one network: under vmap each has its own.
"""

from __future__ import annotations

from torch import Tensor
from torch.func import grad

from metadist.metagrad.mixed import Batch, Loss

KINDS = ("none", "sam", "gsam")
TINY = 1e-12  # a gradient of zero has no direction


def sharpness_aware(loss: Loss, kind: str, rho: float, alpha: float = 0.0) -> Loss:
    """A loss with the gradient of the training ``kind``; its value means nothing.

    With g = grad(theta) and g_p = grad(theta + rho g / |g|):
    sam: g_p (Foret et al. 2021, arXiv 2010.01412).
    gsam: g_p - alpha g_t, where g_t is the part of g that is orthogonal to g_p (Zhuang et al. 2022, arXiv 2203.08065).
    none: ``loss`` itself.
    loss: (theta [P], batch) -> scalar. rho: distance in weight space. alpha: weight of the surrogate gap, gsam's.
    """
    if kind == "none":
        return loss

    def direction(theta: Tensor, batch: Batch) -> Tensor:
        gradient = grad(loss)
        here: Tensor = gradient(theta, batch)
        worst: Tensor = gradient(theta + rho * here / (here.norm() + TINY), batch)
        if kind == "sam":
            return worst
        along = worst / (worst.norm() + TINY)
        across: Tensor = here - along * (along * here).sum()
        return worst - alpha * across

    def directed(theta: Tensor, batch: Batch) -> Tensor:
        value: Tensor = (theta * direction(theta.detach(), batch).detach()).sum()
        return value

    return directed
