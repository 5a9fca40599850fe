"""Inner optimizers as pure, elementwise functions of (state, gradient, hyper-parameters of the step).

Design choices
- A state is a tuple of tensors of one shape: the weights first, then the optimizer's buffers. Elementwise, so the same
  function updates one flat vector [P], a group [G, P] or a module's tensors one by one.
- What a step needs besides the gradient is one row h[t] of a table made by ``schedule``; autograd runs through the table, so
  learned rates and momenta need no special case, bias correction included.
- Adam divides by sqrt(v + eps^2), not sqrt(v) + eps: the latter has an infinite slope at a zero gradient, and one dead unit
  would turn every meta-gradient into NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.errors import unknown

State = tuple[Tensor, ...]
KINDS = ("sgd", "momentum", "adam")
_BUFFERS = {"sgd": 0, "momentum": 1, "adam": 2}


@dataclass(frozen=True)
class Optimizer:
    """One of SGD, SGD with (heavy-ball) momentum, Adam (Kingma & Ba 2015, with eps inside the root).

    kind: "sgd" | "momentum" | "adam".
    beta2: Adam's second decay.
    eps: Adam's epsilon, added as eps**2 under the root.
    Raises UserError for another kind.
    """

    kind: str = "sgd"
    beta2: float = 0.999
    eps: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse a kind that does not exist."""
        if self.kind not in KINDS:
            raise unknown("inner.optimizer", self.kind, KINDS)

    @property
    def buffers(self) -> int:
        """Tensors kept beside the weights: 0, 1 or 2."""
        return _BUFFERS[self.kind]

    @property
    def linear(self) -> bool:
        """Whether the update is linear in the gradient, so that its adjoint needs no gradient."""
        return self.kind != "adam"

    def init(self, theta: Tensor) -> State:
        """The state before the first step: weights and zero buffers, each of theta's shape."""
        return (theta, *(torch.zeros_like(theta) for _ in range(self.buffers)))

    def schedule(self, lr: Tensor, momentum: Tensor | None = None) -> Tensor:
        """The hyper-parameter table h [T, K] of T steps, differentiable in both arguments.

        lr: [T] learning rates.
        momentum: [T] momentum coefficients, for Adam its first beta; needed unless kind is "sgd".
        Columns: sgd: rate; momentum: rate, mu; adam: rate, beta1, 1 - prod(beta1), 1 - beta2**t.
        """
        if self.kind == "sgd":
            return lr[:, None]
        if momentum is None:
            raise ValueError(f"inner.optimizer={self.kind} needs a momentum per step")
        if self.kind == "momentum":
            return torch.stack((lr, momentum), dim=1)
        t = torch.arange(1, len(lr) + 1, dtype=lr.dtype, device=lr.device)
        # expm1: 1 - beta2**t loses five digits in float32. A number, not a tensor: a CUDA graph can't copy one from the host.
        second = -torch.expm1(t * math.log(max(self.beta2, 1e-300)))
        return torch.stack((lr, momentum, 1 - _running_product(momentum), second), dim=1)

    def update(self, state: State, grad: Tensor, h: Tensor) -> State:
        """One step: the state after it.

        state: as made by ``init``.
        grad: gradient, of the weights' shape.
        h: [K] row of ``schedule``.
        """
        if self.kind == "sgd":
            return (state[0] - h[0] * grad,)
        if self.kind == "momentum":
            velocity = h[1] * state[1] + grad
            return state[0] - h[0] * velocity, velocity
        first = h[1] * state[1] + (1 - h[1]) * grad
        second = self.beta2 * state[2] + (1 - self.beta2) * grad.square()
        step = h[0] * (first / h[2]) / torch.sqrt(second / h[3] + self.eps**2)
        return state[0] - step, first, second


def _running_product(x: Tensor) -> Tensor:
    """prod(x[:t + 1]) for every t of x [T]."""
    if not x.requires_grad:
        return torch.cumprod(x, 0)
    # cumprod's backward asks the host whether a factor is 0, which a CUDA graph can't capture.
    out = [x[0]]
    for factor in x[1:].unbind():
        out.append(out[-1] * factor)
    return torch.stack(out)
