"""The meta-gradient of some tasks: groups of a fixed size under vmap, summed into one flat buffer.

A short last group is filled up with a repeated task of weight zero, so that shapes stay static (one compilation, one CUDA
graph). On a GPU the whole of it, forward and backward, is captured once, unless the method draws its number of steps.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor

from metadist.metagrad.execution import Captured
from metadist.synthetic.images import Phi

_TENSOR = object()  # stands for a task's tensors among its static members, of which None may be one


class Method(Protocol):
    """A method: what is learned, what a task draws, what it loses."""

    def parameters(self) -> Phi:
        """Meta-parameters before the first meta-step."""
        ...

    def draw(self, step: int, tasks: Tensor) -> Any:
        """Everything random of these tasks [G]: a named tuple of tensors and static values."""
        ...

    def loss(self, phi: Phi, task: Any) -> Tensor:
        """Loss of each task: [G]."""
        ...

    def figures(self) -> dict[str, float]:
        """What to log of the last tasks besides their loss."""
        ...


class Compute:
    """Callable (phi, step, tasks) -> flat buffer [gradient sum..., loss sum, task count].

    method: what to differentiate.
    group: tasks at once.
    device: where.
    static: every step has the same shapes and the same number of inner steps, so a GPU may capture the whole.
    """

    def __init__(self, method: Method, group: int, device: torch.device, static: bool = True) -> None:
        """Nothing is captured before the first call."""
        self.method, self.group, self.device = method, group, device
        self._captured: dict[Any, Captured] = {}
        self._static = static and device.type == "cuda"
        self._spent = {"data_s": 0.0, "compute_s": 0.0}

    def __call__(self, phi: Phi, step: int, tasks: Tensor) -> Tensor:
        """Sum over ``tasks`` (int64 [n], n >= 0)."""
        size = sum(p.numel() for p in phi.values())
        dtype = next(iter(phi.values())).dtype
        total = torch.zeros(size + 2, dtype=dtype, device=self.device)
        for ids in torch.split(tasks.to(self.device), self.group) if len(tasks) else ():
            weight = (torch.arange(self.group, device=self.device) < len(ids)).to(dtype)
            padded = torch.cat((ids, ids[-1:].expand(self.group - len(ids))))
            began = time.perf_counter()
            task = self.method.draw(step, padded)
            drawn = time.perf_counter()
            total += self._one(phi, task, weight)
            self._spent["data_s"] += drawn - began
            self._spent["compute_s"] += time.perf_counter() - drawn
        return total

    def spent(self) -> dict[str, float]:
        """Seconds spent drawing ("data_s") and differentiating ("compute_s") since the last call."""
        out, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        return out

    def _one(self, phi: Phi, task: Any, weight: Tensor) -> Tensor:
        if not self._static:
            return self._plain(phi, task, weight)
        # Static members (integers, tuples of them) select the graph; tensors are its inputs.
        fixed = tuple(_TENSOR if isinstance(v, Tensor) else v for v in task)
        if fixed not in self._captured:
            kind = type(task)

            def whole(phi: Phi, tensors: tuple[Tensor, ...], weight: Tensor) -> Tensor:
                it = iter(tensors)
                return self._plain(phi, kind(*(next(it) if v is _TENSOR else v for v in fixed)), weight)

            self._captured[fixed] = Captured(whole)
        result: Tensor = self._captured[fixed](
            {k: v.detach() for k, v in phi.items()}, tuple(v for v in task if isinstance(v, Tensor)), weight
        )
        return result

    def _plain(self, phi: Phi, task: Any, weight: Tensor) -> Tensor:
        leaves = {k: v.detach().requires_grad_() for k, v in phi.items()}
        with torch.enable_grad():
            # A padding task repeats a real one: its loss is finite whenever the real one's is, so 0 * loss is 0.
            loss = (self.method.loss(leaves, task) * weight).sum()
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        flat = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(leaves.values(), grads, strict=True)]
        return torch.cat((*flat, loss.detach()[None], weight.sum()[None]))
