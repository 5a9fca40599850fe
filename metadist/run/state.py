"""The meta-state of a run and the one function that advances it. Workers of ``allreduce`` hold replicas, a server one.

Design choices
- ``apply`` is deterministic in (state, combined buffer): every replica stays the same to the bit.
- A meta-gradient that is not finite, or larger than meta.explode, is skipped and counted, but the step number moves on to
  other tasks. What happens after several in a row is the trainer's affair.
- Everything that decides the future is in ``tensors`` and ``metadata``: restoring them continues bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metadist.config import MetaConfig
from metadist.synthetic.images import CARRIED, Phi

_COUNTERS = ("step", "bad", "skipped", "rollbacks", "scale", "best_valid", "best_step")


class MetaState:
    """Meta-parameters, their optimizer, their average, the best set so far, and counters.

    phi: initial meta-parameters, taken over.
    config: the outer optimization; ``horizon`` is the cosine's length in meta-steps (meta.horizon, resolved).
    least: lower bounds of parameters, by name; a step that would lead below them ends there (a projection).
    project: puts updated parameters back, in place, into any other set they must lie in; None: they may lie anywhere.
    """

    def __init__(
        self,
        phi: Phi,
        config: MetaConfig,
        horizon: int,
        least: Mapping[str, float] | None = None,
        project: Callable[[Phi], None] | None = None,
    ) -> None:
        """The state before the first meta-step."""
        self.config, self.horizon, self.least, self._project = config, horizon, least or {}, project
        self.phi: Phi = {k: v.detach().clone().requires_grad_() for k, v in phi.items()}
        self.average: Phi = self.copy_phi()
        self.best: Phi = {}
        self.step = self.bad = self.skipped = self.rollbacks = self.best_step = 0
        self.scale, self.best_valid = 1.0, -math.inf
        self.loss = self.grad_norm = math.nan
        self.optimizer = self._optimizer()

    @property
    def learned(self) -> list[tuple[str, Tensor]]:
        """What the optimizer moves; the rest is carried."""
        return [(k, v) for k, v in self.phi.items() if not k.startswith(CARRIED)]

    def _optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        groups = [{"params": [p], "lr": self._base_rate(name)} for name, p in self.learned]
        if c.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=c.lr, momentum=c.beta1)
        return torch.optim.Adam(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)

    def _base_rate(self, name: str) -> float:
        c = self.config
        special = {"rate": c.lr_rate, "momentum": c.lr_rate, "labels": c.lr_labels}.get(name)
        return c.lr if special is None else special

    def copy_phi(self) -> Phi:
        """A detached copy of the meta-parameters."""
        return {k: v.detach().clone() for k, v in self.phi.items()}

    @property
    def kept(self) -> Phi:
        """What is evaluated and kept: the average if there is one, else the parameters."""
        return self.average if self.config.ema else {k: v.detach() for k, v in self.phi.items()}

    def factor(self) -> float:
        """The schedule's factor on every meta rate at this step, halvings by roll-backs included."""
        c, out = self.config, self.scale
        if c.warmup:
            out *= min(1.0, (self.step + 1) / c.warmup)
        if c.schedule == "step" and c.decay_every:
            out *= c.decay ** (self.step // c.decay_every)
        if c.schedule == "cosine":
            progress = min(1.0, self.step / max(self.horizon, 1))
            out *= c.decay + (1 - c.decay) * 0.5 * (1 + math.cos(math.pi * progress))
        return out

    def apply(self, total: Tensor) -> MetaState:
        """One meta-step from the combined buffer [gradient sum..., loss sum, task count]; returns itself."""
        count = total[-1]
        sizes = [p.numel() for p in self.phi.values()]
        sums = dict(zip(self.phi, torch.split(total[:-2], sizes), strict=True))
        grad = torch.cat([sums[name] for name, _ in self.learned]) / count
        norm, self.loss = (float(v) for v in torch.stack((torch.linalg.vector_norm(grad), total[-2] / count)).tolist())
        self.grad_norm = norm
        if math.isfinite(norm) and math.isfinite(self.loss) and norm <= self.config.explode:
            self.bad = 0
            self._update(grad if not self.config.clip else grad * min(1.0, self.config.clip / max(norm, 1e-30)))
            self._carry(sums)
        else:
            self.bad, self.skipped = self.bad + 1, self.skipped + 1
        self.step += 1
        return self

    def _update(self, grad: Tensor) -> None:
        parts = torch.split(grad, [p.numel() for _, p in self.learned])
        factor = self.factor()
        for (name, p), part, group in zip(self.learned, parts, self.optimizer.param_groups, strict=True):
            p.grad = part.view_as(p).to(p.dtype)
            group["lr"] = self._base_rate(name) * factor
        self.optimizer.step()
        if self._project is not None:
            self._project(self.phi)
        with torch.no_grad():
            for name, bound in self.least.items():
                self.phi[name].clamp_(min=bound)
        for name, value in self.average.items():
            value.lerp_(self.phi[name].detach(), 1 - self.config.ema)

    def _carry(self, sums: dict[str, Tensor]) -> None:
        """What tasks hand on to the next meta-step: each has put its own rows into the sum."""
        with torch.no_grad():
            for name, value in self.phi.items():
                if name.startswith(CARRIED):
                    value.copy_(sums[name].view_as(value))
                    self.average[name].copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state by name; what belongs to the optimizer as opt/<parameter>/<buffer>."""
        out = {f"phi/{k}": v.detach() for k, v in self.phi.items()}
        out |= {f"average/{k}": v for k, v in self.average.items()}
        out |= {f"best/{k}": v for k, v in self.best.items()}
        for name, p in self.phi.items():
            out |= {f"opt/{name}/{k}": v for k, v in self.optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
        return out

    def metadata(self) -> dict[str, Any]:
        """The counters; infinities as null, for JSON."""
        values = {k: getattr(self, k) for k in _COUNTERS}
        return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in values.items()}

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Continue from what ``tensors`` and ``metadata`` gave."""
        with torch.no_grad():
            for name, p in self.phi.items():
                p.copy_(tensors[f"phi/{name}"])
                self.average[name].copy_(tensors[f"average/{name}"])
        device = next(iter(self.phi.values())).device
        self.best = {k.removeprefix("best/"): v.to(device) for k, v in tensors.items() if k.startswith("best/")}
        for k in _COUNTERS:
            setattr(self, k, -math.inf if metadata[k] is None else metadata[k])
        self.optimizer = self._optimizer()
        for name, p in self.phi.items():
            prefix = f"opt/{name}/"
            # Adam keeps its step count on the CPU, its moments beside the parameter.
            buffers = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if buffers:
                self.optimizer.state[p] = {k: v.clone() if v.dim() == 0 else v.to(p.device).clone() for k, v in buffers.items()}
