"""Training on synthetic batches as a differentiable operation: ``Inner.unroll``.

Design choices
- The backward pass is the reverse recursion of DESIGN.md, not an autograd graph through T steps: the forward pass keeps the
  states (weights and optimizer buffers) of each step and nothing else; the adjoint of a step re-derives the rest with one
  ``mixed`` product. Memory grows by one state a step.
- Tasks run as one group [G, P] under vmap. Where they share their batches the batch gradient comes out summed over tasks.
- ``step`` and ``adjoint`` are pure functions of fixed shapes: they are what is compiled, or captured in a CUDA graph.
- Truncation is the same recursion over a window: the steps before ``start`` are run without keeping anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from metadist.metagrad import execution
from metadist.metagrad.mixed import Batch, Loss, floats, gradients, mixed, one_by_one, prepare, pullback, refill
from metadist.metagrad.optimizers import Optimizer, State

Adjoint = tuple[State, tuple[Tensor, ...], Tensor]


class Inner:
    """An inner training run: loss, optimizer, and how the two are executed.

    loss: (theta [P], batch) -> scalar, mean over the batch; a batch is a tuple of tensors [B, ...].
    optimizer: the inner optimizer.
    form: form of ``mixed``, "reverse" | "forward".
    compile: compile the step and its adjoint with ``torch.compile``.
    graph: capture each of them in a CUDA graph (for runs whose number of steps is drawn; else capture the whole meta-step).
    shared: tasks share their batches ([S, B, ...]) or own them ([G, S, B, ...]).
    judge_loss: (theta [P], (z, *batch)) -> scalar, for nets that also depend on images z when judged; None: ``loss``.
    judge_group: tasks whose final losses are taken at once (0: all); a CPU may be faster with 1.
    alone: take the gradients of steps task by task, without vmap: on a CPU up to twice as fast where a task fills the cores by
        itself. Nothing is then compiled or captured.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: Optimizer,
        form: str = "reverse",
        compile: bool = False,
        graph: bool = False,
        shared: bool = True,
        judge_group: int = 0,
        judge_loss: Loss | None = None,
        alone: bool = False,
    ) -> None:
        """Keep the pieces; nothing is compiled before the first call. Raises UserError for another form."""
        prepare(form)
        self.loss, self.optimizer, self.form, self.shared = loss, optimizer, form, shared
        self.compiled, self.graph = compile, graph
        self.judge_group, self.judge_loss, self.alone = judge_group, judge_loss, alone
        self._step: Callable[..., State] = self.step if alone else execution.accelerate(self.step, compile, graph)
        self._adjoint: Callable[..., Adjoint] = execution.accelerate(self.adjoint, compile, graph)
        self._judge: Callable[..., tuple[tuple[Tensor, ...], Tensor]] = execution.accelerate(self._values, compile, graph)

    def but(self, **changes: Any) -> Inner:
        """The same, but for some arguments."""
        own: dict[str, Any] = {
            "loss": self.loss,
            "optimizer": self.optimizer,
            "form": self.form,
            "compile": self.compiled,
            "graph": self.graph,
            "shared": self.shared,
            "judge_group": self.judge_group,
            "judge_loss": self.judge_loss,
            "alone": self.alone,
        }
        return Inner(**(own | changes))

    def step(self, state: State, batch: Batch, h: Tensor) -> State:
        """One inner step. state: tensors [G, P]; batch: one step's; h: [K]."""
        take = one_by_one if self.alone else gradients
        return self.optimizer.update(state, take(self.loss, state[0], batch, self.shared), h)

    def adjoint(self, state: State, batch: Batch, h: Tensor, lam: State) -> Adjoint:
        """Pull the adjoint ``lam`` of the state after a step back through it.

        state, batch, h: as given to ``step``.
        lam: adjoint of the state after the step, tensors [G, P].
        Returns the adjoints of the state before, of the batch's floating-point members, and of h.
        """
        if self.form == "reverse":
            g, pull = pullback(lambda th, *v: gradients(self.loss, th, refill(batch, v), self.shared), state[0], *floats(batch))
            lam, lam_g, lam_h = self._pull_update(state, g, h, lam)
            hessian, *parts = pull(lam_g)
        else:
            # Forward-over-reverse wants the direction before the gradient: Adam, not linear in it, pays one gradient more.
            linear = self.optimizer.linear
            g = torch.zeros_like(state[0]) if linear else gradients(self.loss, state[0], batch, self.shared)
            product = mixed(self.loss, state[0], batch, self._pull_update(state, g, h, lam)[1], self.form, self.shared)
            lam, _, lam_h = self._pull_update(state, product.gradient, h, lam)
            hessian, parts = product.hessian_lambda, [p for p in product.batch if p is not None]
        return (lam[0] + hessian, *lam[1:]), tuple(parts), lam_h

    def _pull_update(self, state: State, grad: Tensor, h: Tensor, lam: State) -> tuple[State, Tensor, Tensor]:
        _, pull = pullback(self.optimizer.update, state, grad, h)
        result: tuple[State, Tensor, Tensor] = pull(lam)
        return result

    def _values(self, theta: Tensor, seen: Tensor | None, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradients in theta, and in ``seen`` if it is given, and the value, of every task."""
        if seen is None:
            gradient, value = vmap(grad_and_value(lambda th, *b: self.loss(th, b)))(theta, *batch)
            return (gradient,), value
        assert self.judge_loss is not None
        loss = self.judge_loss
        dims = (0, None if self.shared else 0, *(0 for _ in batch))
        gradients, value = vmap(grad_and_value(lambda th, z, *b: loss(th, (z, *b)), argnums=(0, 1)), dims)(theta, seen, *batch)
        return gradients, value

    def judge(self, theta: Tensor, batch: Batch, seen: Tensor | None = None) -> Tensor:
        """The loss of each task's weights on a fixed batch of its own: [G], differentiable in theta and ``seen``.

        theta: [G, P]. batch: members [G, R, ...], not differentiated (real data). Values and gradients come in one pass.
        seen: for ``judge_loss``: synthetic images [B, ...] if tasks share them, else [G, B, ...].
        """
        size, seen = self.judge_group or len(theta), seen if self.judge_loss is not None else None
        pieces = zip(torch.split(theta, size), *(torch.split(b, size) for b in batch), strict=True)
        parts = [seen] * -(-len(theta) // size) if seen is None or self.shared else torch.split(seen, size)
        values: list[Tensor] = [_Judge.apply(self, th, part, *b) for (th, *b), part in zip(pieces, parts, strict=True)]
        return torch.cat(values)

    def pick(self, batches: Batch, index: int) -> Batch:
        """Batch ``index`` of stacked batches."""
        return tuple(b[index] if self.shared else b[:, index] for b in batches)

    @torch.no_grad()
    def train(self, theta0: Tensor, batches: Batch, order: Sequence[int], h: Tensor) -> Tensor:
        """Train without gradients: the weights [G, P] after len(order) steps.

        theta0: [G, P].
        batches: members [S, B, ...] (shared) or [G, S, B, ...].
        order: batch index of each step.
        h: [T, K] from ``Optimizer.schedule``.
        """
        return self.advance(self.optimizer.init(theta0), batches, order, h)[0]

    def advance(self, state: State, batches: Batch, order: Sequence[int], h: Tensor) -> State:
        """The state after the given steps, from any state; nothing is kept, no gradient flows."""
        for t, index in enumerate(order):
            state = self._step(state, self.pick(batches, index), h[t])
        return state

    def unroll(
        self,
        theta0: Tensor,
        batches: Batch,
        order: Sequence[int],
        h: Tensor,
        at: Sequence[int] | None = None,
        start: int = 0,
    ) -> Tensor:
        """Train and stay differentiable in theta0, the batches' floating-point members and h.

        theta0, batches, order, h: as in ``train``; T = len(order).
        at: the step counts whose weights are returned, in (start, T]; default: the last only.
        start: steps before it are run but not differentiated (truncation; theta0 then has zero gradient).
        Returns the weights [len(at), G, P].
        """
        at = (len(order),) if at is None else tuple(at)
        if not all(start < a <= len(order) for a in at) or start < 0:
            raise ValueError(f"at={at} must lie in ({start}, {len(order)}]")
        run = _Run(self, tuple(order[: max(at)]), at, start, batches)
        out: Tensor = _Unroll.apply(run, theta0, h, *floats(batches))
        return out


class _Run:
    """What one call of ``unroll`` carries from forward to backward."""

    def __init__(self, inner: Inner, order: tuple[int, ...], at: tuple[int, ...], start: int, batches: Batch) -> None:
        self.inner, self.order, self.at, self.start = inner, order, at, start
        self.batches = tuple(b.detach() for b in batches)
        self.states: list[State] = []

    def forward(self, theta0: Tensor, h: Tensor) -> Tensor:
        inner = self.inner
        state = inner.advance(inner.optimizer.init(theta0), self.batches, self.order[: self.start], h)
        for t in range(self.start, len(self.order)):
            self.states.append(state)
            state = inner._step(state, inner.pick(self.batches, self.order[t]), h[t])
        self.states.append(state)
        return torch.stack([self.states[a - self.start][0] for a in self.at])

    def backward(self, h: Tensor, lam_out: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        if not self.states:
            raise RuntimeError("backward through unroll twice: its states are freed as they are used; call unroll again")
        inner, theta = self.inner, self.states.pop()[0]
        lam: State = tuple(torch.zeros_like(theta) for _ in range(1 + inner.optimizer.buffers))
        lam_h = torch.zeros_like(h)
        lam_batch = [torch.zeros_like(b) for b in floats(self.batches)]
        for t in reversed(range(self.start, len(self.order))):
            for i, a in enumerate(self.at):
                if a == t + 1:
                    lam = (lam[0] + lam_out[i], *lam[1:])
            index = self.order[t]
            lam, parts, lam_h[t] = inner._adjoint(self.states.pop(), inner.pick(self.batches, index), h[t], lam)
            for whole, part in zip(lam_batch, parts, strict=True):
                (whole[index] if inner.shared else whole[:, index]).add_(part)
        return (lam[0] if self.start == 0 else torch.zeros_like(theta)), lam_h, lam_batch


class _Judge(torch.autograd.Function):
    """Loss values whose gradients were computed along with them."""

    @staticmethod
    def forward(ctx: Any, inner: Inner, theta: Tensor, seen: Tensor | None, *batch: Tensor) -> Tensor:
        gradients, value = inner._judge(theta.detach(), None if seen is None else seen.detach(), batch)
        ctx.save_for_backward(*gradients)
        ctx.shared = inner.shared
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, lam: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *rest = ctx.saved_tensors
        through = None
        if rest:
            through = rest[0] * lam.view(-1, *[1] * (rest[0].dim() - 1))
            through = through.sum(0) if ctx.shared else through
        return (None, gradient * lam[:, None], through, *(None,) * (len(ctx.needs_input_grad) - 3))


class _Unroll(torch.autograd.Function):
    """Autograd's view of ``_Run``."""

    @staticmethod
    def forward(ctx: Any, run: _Run, theta0: Tensor, h: Tensor, *values: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(h)
        return run.forward(theta0.detach(), h.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, lam_out: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        lam_theta, lam_h, lam_batch = ctx.run.backward(h, lam_out)
        return (None, lam_theta, lam_h, *lam_batch)
