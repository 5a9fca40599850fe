"""A learner: any ``nn.Module`` as pure functions of one flat weight vector.

Design choices
- One vector [P] holds every trainable parameter in ``named_parameters`` order; the forward pass sees views of it. vmap over
  learners is then a leading axis, optimizers are elementwise, and states of the inner loop are one tensor each.
- Three private copies of the module share parameters: one that trains, one that also records batch statistics, one that
  evaluates. No flag is flipped at run time, so the functions stay pure and compile as one graph.
- BatchNorm trains by the batch's statistics and keeps none; ``statistics`` makes those of one batch explicit and ``predict``
  takes them as an argument.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metadist.errors import UserError, unknown
from metadist.nets import checks, layers
from metadist.nets.dropout import placed, slots
from metadist.nets.init import INITS, initialize, parameters
from metadist.nets.watch import first_line

Factory = Callable[[], nn.Module]


def _share(module: nn.Module) -> nn.Module:
    """A copy of the structure around the very same parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


class Learner:
    """Pure functions of a flat weight vector for one module.

    module: any net from images [B, C, H, W] to logits [B, K]; it is copied, never changed.
    init: p(theta0), one of ``init.INITS``.
    factory: builds the module anew; with it, a user's module keeps its own p(theta0) (see ``init``).
    classes: K where known; ``check`` then insists on it.
    Attributes: ``size`` P; ``buffers_size`` Q; ``names`` and ``shapes`` of the parameters; ``template``, the module as it was
    given; ``net``, the copy that ``__call__`` runs.
    Raises UserError for an unknown init and for a module without trainable real parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        init: str = "default",
        factory: Factory | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        classes: int | None = None,
    ) -> None:
        """See the class."""
        if init not in INITS:
            raise unknown("net.init", init, INITS)
        self.kind, self.factory, self.classes = init, factory, classes
        self.dtype, self.device = dtype, torch.device(device)
        specs = parameters(module)
        try:
            self.template = copy.deepcopy(module).to(self.device, dtype)
        except (RuntimeError, TypeError) as e:
            raise UserError(f"the net {type(module).__name__} can't be copied: {first_line(e)}") from e
        self.names = tuple(p.name for p in specs)
        self.shapes = tuple(p.shape for p in specs)
        self._sizes = [p.shape.numel() for p in specs]
        self.size = sum(self._sizes)
        self._seen: dict[str, Tensor] = {}
        self.net = layers.pure(_share(self.template).train(), "batch", self._seen)
        self._record = layers.pure(_share(self.template).train(), "record", self._seen)
        self._eval = layers.pure(_share(self.template).eval(), "running", self._seen)
        norms = {n: m for n, m in self._record.named_modules() if isinstance(m, layers.BatchNorm) and m.mode == "record"}
        self._fresh = {n: torch.stack((m.running_mean, m.running_var)) for n, m in norms.items()}
        self._norms = {n: len(m.running_mean) for n, m in norms.items()}
        self.buffers_size = 2 * sum(self._norms.values())
        self.dropouts = slots(self.template)

    def views(self, theta: Tensor) -> dict[str, Tensor]:
        """The parameters as views of theta [P], by name."""
        parts = torch.split(theta, self._sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes)}

    def _buffers(self, flat: Tensor) -> dict[str, Tensor]:
        """[Q] as running_mean and running_var of every BatchNorm."""
        out: dict[str, Tensor] = {}
        for part, (name, c) in zip(torch.split(flat, [2 * c for c in self._norms.values()]), self._norms.items()):
            prefix = f"{name}." if name else ""
            out[f"{prefix}running_mean"], out[f"{prefix}running_var"] = part[:c], part[c:]
        return out

    def init(self, keys: Tensor) -> Tensor:
        """Weights drawn from p(theta0): keys int64 [G, 2] -> [G, P]; task g depends on keys[g] alone."""
        return initialize(self.template, self.kind, keys.to(self.device), self.factory, self.dtype)

    def __call__(self, theta: Tensor, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Logits of the training-time forward pass: theta [P], x [B, C, H, W] -> [B, K]. Pure; BatchNorm uses the batch.

        kept: dropout's masks [B, U] (``dropout.masks`` of ``dropouts``); None: nothing is dropped.
        """
        given = self.views(theta) | ({} if kept is None else placed(self.dropouts, kept, theta.dtype))
        # The fused attention kernels have no second derivative; the plain formula has.
        with sdpa_kernel(SDPBackend.MATH):
            logits: Tensor = functional_call(self.net, given, (x,))
        return logits

    def statistics(self, theta: Tensor, x: Tensor) -> Tensor:
        """BatchNorm's statistics of the batch x: [Q], per layer means [C] then unbiased variances [C]; Q = 0 without it."""
        if not self._norms:
            return theta.new_zeros(0)
        self._seen.clear()
        functional_call(self._record, self.views(theta), (x,))
        # A layer that this forward pass does not reach keeps the values it was built with.
        rows = [self._seen.pop(name, self._fresh[name]) for name in self._norms]
        return torch.cat([row.flatten() for row in rows])

    def predict(self, theta: Tensor, buffers: Tensor, x: Tensor) -> Tensor:
        """Logits of the evaluation-time forward pass: theta [P], buffers [Q] from ``statistics``, x [B, ...] -> [B, K]."""
        logits: Tensor = functional_call(self._eval, self.views(theta) | self._buffers(buffers), (x,))
        return logits

    def flatten(self, module: nn.Module) -> Tensor:
        """The weights of a module of this architecture as [P]. Raises UserError where names or shapes differ."""
        given = dict(module.named_parameters())
        for name, shape in zip(self.names, self.shapes):
            if name not in given or given[name].shape != shape:
                has = f"shape {tuple(given[name].shape)}" if name in given else "no such parameter"
                raise UserError(
                    f"the module doesn't fit the net: parameter {name} should have shape {tuple(shape)}, it has {has}"
                )
        return torch.cat([given[name].detach().to(self.device, self.dtype).flatten() for name in self.names])

    def module(self, theta: Tensor, buffers: Tensor | None = None) -> nn.Module:
        """A new module with the weights theta [P]: in training mode, or with statistics [Q] in evaluation mode."""
        fresh = copy.deepcopy(self.template)
        values = self.views(theta.detach()) | (self._buffers(buffers.detach()) if buffers is not None else {})
        slots = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
        with torch.no_grad():
            for name, value in values.items():
                slots[name].copy_(value)
        return fresh.train(buffers is None)

    def check(self, x: Tensor, form: checks.Form = "reverse") -> None:
        """Raises UserError that names the layer and the reason if this net can't be trained by meta-gradients.

        x: [B, C, H, W], two images or more; 8 or more with BatchNorm on tiny maps, whose derivatives explode on few values.
        It takes a few of the engine's gradients, in float64.
        form: the second-order product that will be used, ``reverse`` or ``forward``.
        """
        checks.check(self, x.to(self.device), form)
