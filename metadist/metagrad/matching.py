"""The gradient of a training loss as a differentiable operation: ``inner_gradient``.

Design choices
- Gradient matching differentiates a distance D between gradients. Autograd hands us lambda = dD/dg; one ``mixed`` product
  turns it into the gradients of weights and batch. The forward pass keeps weights and batch, no second-order graph.
- Weights that ask for no gradient get none: their part of the product, H lambda, is then left out.
- Once differentiable: the derivative of ``mixed`` would be of third order, and asking for it is refused rather than wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metadist.metagrad.mixed import Batch, Loss, floats, gradients, mixed, prepare, pullback, refill


def inner_gradient(loss: Loss, theta: Tensor, batch: Batch, form: str = "reverse", shared: bool = True) -> Tensor:
    """Gradient of every task's loss in its own weights, differentiable in the weights and the batch.

    loss: (theta [P], batch) -> scalar; tensors it closes over get no gradient: what is to be learned belongs in the batch.
    theta: [G, P].
    batch: members [B, ...] if shared (their gradient is summed over tasks), else [G, B, ...]; integers get none.
    form: form of ``mixed``, "reverse" | "forward".
    Returns g [G, P]. Raises UserError for another form; a second differentiation raises RuntimeError.
    Source: Zhao et al. 2020, "Dataset condensation with gradient matching".
    """
    prepare(form)
    out: Tensor = _Gradient.apply(loss, form, shared, tuple(b.detach() for b in batch), theta, *floats(batch))
    return out


class _Gradient(torch.autograd.Function):
    """Autograd's view of ``gradients``, with ``mixed`` for its backward pass."""

    @staticmethod
    def forward(ctx: Any, loss: Loss, form: str, shared: bool, batch: Batch, theta: Tensor, *values: Tensor) -> Tensor:
        ctx.loss, ctx.form, ctx.shared, ctx.batch = loss, form, shared, batch
        ctx.save_for_backward(theta, *values)
        return gradients(loss, theta.detach(), batch, shared)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, lam: Tensor) -> tuple[Tensor | None, ...]:
        # The saved tensors are used, not the kept batch: they tell when a member was overwritten since the forward pass.
        theta, *values = ctx.saved_tensors
        if not ctx.needs_input_grad[4] and ctx.form == "reverse":
            _, pull = pullback(lambda *v: gradients(ctx.loss, theta, refill(ctx.batch, v), ctx.shared), *values)
            return (None, None, None, None, None, *pull(lam))
        product = mixed(ctx.loss, theta, refill(ctx.batch, tuple(values)), lam, ctx.form, ctx.shared)
        parts = (p for p in product.batch if p is not None)
        return (None, None, None, None, product.hessian_lambda, *parts)
