"""Initialization distributions p(theta0), drawn by counter.

Design choices
- Parameter i of a net draws from ``draw.split(key, i)``: a task's weights depend on its key alone, never on how many tasks
  are drawn together or where.
- ``xavier``, ``kaiming`` and ``orthogonal`` speak of convolution and linear weights: their biases are zero, a normalization's
  weight 1 and bias 0. ``default`` is PyTorch's own: U(-b, b), b = 1/sqrt(fan_in), for weight and bias.
- The gain of a normalized weight is its norm: the net computes what it would without it.
- Any other parameter (an embedding, a class token) keeps the module's own distribution: the module is built again by its
  ``factory`` with the CPU generator seeded from the key, or its ``reset_parameters`` are called so. A user's module with
  ``default`` is drawn like this as a whole.
- Orthogonal matrices are made in float64, one task at a time: a batched QR may round differently from a single one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from metadist import draw
from metadist.errors import UserError, unknown
from metadist.nets import weight_norm

INITS = ("xavier", "kaiming", "orthogonal", "default")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a net: its name, shape, role (weight | bias | one | zero | gain | own) and its layer's fan-in."""

    name: str
    shape: torch.Size
    role: str
    fan_in: int = 0

    @property
    def fan_out(self) -> int:
        """Outputs times receptive field, of a weight."""
        return self.shape[0] * math.prod(self.shape[2:])


def _role(owner: nn.Module, local: str) -> tuple[str, int]:
    if isinstance(owner, _ConvNd | nn.Linear) and local in ("weight", "bias"):
        return local, math.prod(owner.weight.shape[1:])
    if isinstance(owner, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm) and local in ("weight", "bias"):
        return ("one" if local == "weight" else "zero"), 0
    return ("gain" if weight_norm.is_gain(owner, local) else "own"), 0


def parameters(module: nn.Module) -> list[Parameter]:
    """The trainable parameters of ``module`` in ``named_parameters`` order; frozen ones are constants.

    Raises UserError if there is none, or one is not of real numbers or not yet made (lazy).
    """
    owners = dict(module.named_modules())
    found = []
    for name, value in module.named_parameters():
        if isinstance(value, nn.parameter.UninitializedParameter):
            raise UserError(f"parameter {name} of the net is lazy; give its layer explicit sizes")
        if not value.requires_grad:
            continue
        if not value.is_floating_point():
            raise UserError(f"parameter {name} of the net is {value.dtype}; only real floating-point parameters are allowed")
        path, _, local = name.rpartition(".")
        found.append(Parameter(name, value.shape, *_role(owners[path], local)))
    if not found:
        raise UserError("the net has no trainable parameters; give a module with at least one that requires a gradient")
    return found


def _orthogonal(keys: Tensor, shape: torch.Size) -> Tensor:
    """Haar-distributed orthonormal rows or columns (Saxe et al., arXiv 1312.6120): [G, *shape] float64."""
    rows, columns = shape[0], math.prod(shape[1:])
    tall = draw.normal(keys, (max(rows, columns), min(rows, columns)), torch.float64)
    out = []
    for matrix in tall.unbind(0):
        q, r = torch.linalg.qr(matrix)
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        out.append((q if rows >= columns else q.T).reshape(shape))
    return torch.stack(out)


def _draw(kind: str, p: Parameter, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """One parameter of every task: [G, *shape]."""
    if kind == "default" and p.role in ("weight", "bias"):
        bound = 1 / math.sqrt(p.fan_in) if p.fan_in else 0.0
        return (draw.uniform(keys, p.shape, dtype) * 2 - 1) * bound
    if p.role != "weight":
        value = 1.0 if p.role == "one" else 0.0
        return torch.full((len(keys), *p.shape), value, dtype=dtype, device=keys.device)
    if kind == "orthogonal":
        return _orthogonal(keys, p.shape).to(dtype)
    scale = 2 / (p.fan_in + p.fan_out) if kind == "xavier" else 2 / p.fan_in
    return draw.normal(keys, p.shape, dtype) * math.sqrt(scale)


def rebuild(module: nn.Module, factory: Callable[[], nn.Module] | None, key: Tensor) -> dict[str, Tensor]:
    """All parameters of a new draw of the module from its own distribution: by the factory, else by ``reset_parameters``.

    key: int64 [2], seeds the CPU generator, which is put back afterwards.
    """
    high, low = key.tolist()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(high << 31 ^ low)
        if factory is not None:
            fresh = factory()
        else:
            fresh = copy.deepcopy(module).cpu()
            for layer in reversed(list(fresh.modules())):  # parents last: theirs may overrule their children's
                reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
                if callable(reset):
                    reset()
    return {name: value.detach() for name, value in fresh.named_parameters()}


def initialize(
    module: nn.Module,
    kind: str,
    keys: Tensor,
    factory: Callable[[], nn.Module] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws flat weights for every key.

    kind: one of INITS. ``xavier``: N(0, 2/(fan_in+fan_out)) (Glorot and Bengio 2010); ``kaiming``: N(0, 2/fan_in)
    (He et al., arXiv 1502.01852).
    keys: int64 [G, 2]. Returns [G, P] on the keys' device. Raises UserError for an unknown kind.
    """
    if kind not in INITS:
        raise unknown("net.init", kind, INITS)
    specs = parameters(module)
    whole = kind == "default" and factory is not None
    own = [p.name for p in specs if whole or p.role == "own"]
    rebuilt = [rebuild(module, factory, key) for key in keys] if own else []
    drawn: dict[str, Tensor] = {}
    for i, p in enumerate(specs):
        if p.role == "gain":
            drawn[p.name] = _gain(module, p, drawn, len(keys))
        elif p.name in own:
            drawn[p.name] = torch.stack([r[p.name] for r in rebuilt]).to(keys.device, dtype)
        else:
            drawn[p.name] = _draw(kind, p, draw.split(keys, i), dtype)
    return torch.cat([value.reshape(len(keys), -1) for value in drawn.values()], dim=1)


def _gain(module: nn.Module, p: Parameter, drawn: dict[str, Tensor], count: int) -> Tensor:
    """[G, O]: the norms of its layer's weights, be they drawn, tied to another layer's, or frozen."""
    weight = module.get_submodule(p.name.rpartition(".")[0]).weight
    assert isinstance(weight, Tensor)
    if not weight.requires_grad:
        return weight_norm.norms(weight.detach()[None]).expand(count, -1)
    names = {id(v): name for name, v in module.named_parameters()}
    return weight_norm.norms(drawn[names[id(weight)]])
