"""Layers with the numbers of PyTorch's, made of operations that every transform of ``torch.func`` takes.

Design choices
- ``torch.nn.functional.batch_norm`` cannot go through ``vmap(vjp(grad))`` and writes its running statistics in place;
  ``layer_norm`` gives WRONG second derivatives in ``vjp(vmap(grad))`` and ``jvp(vmap(grad))`` where its weight is vmapped too
  (torch 2.15). In a Learner's private copies every batch, instance, layer and RMS normalization is replaced by the classes
  below: means, squares and products only. Parameter names stay, so the flat weight vector does too. GroupNorm is right.
- Statistics are computed in the parameters' precision when activations are bfloat16 or float16, as PyTorch does.
- ``torch.nn.LocalResponseNorm`` averages by a 3-D pooling; a sum of shifted slices is the same sum and fuses.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from metadist.errors import UserError

Mode = Literal["batch", "record", "running"]


def _spread(v: Tensor, x: Tensor) -> Tensor:
    """[C] as [1, C, 1...] beside ``x``."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class MeanOnlyBatchNorm(_BatchNorm):
    """Batch normalization that takes away the mean and leaves the variance alone (Salimans and Kingma, arXiv 1602.07868).

    x: [B, C, ...]. It has a bias [C], no factor; ``running_var`` stays 1.
    """

    def __init__(self, features: int) -> None:
        """features: C."""
        super().__init__(features, affine=False)
        self.bias = nn.Parameter(torch.zeros(features))

    def reset_parameters(self) -> None:
        """Bias 0."""
        self.reset_running_stats()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape; in training by the batch's mean, else by the running one."""
        mean = self.running_mean
        assert mean is not None and self.num_batches_tracked is not None
        if self.training:
            mean = x.mean([d for d in range(x.dim()) if d != 1])
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.detach(), share)  # type: ignore[union-attr]
        return x + _spread(self.bias - mean, x)


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe and Szegedy, arXiv 1502.03167) without side effects, made from PyTorch's own layer.

    mode ``batch``: normalizes by the batch; ``record``: also leaves [2, C] (mean, unbiased variance) in ``seen[name]``;
    ``running``: normalizes by the buffers ``running_mean`` and ``running_var``. x: [B, C, ...].
    Raises UserError where a channel has one value only (its variance is then no number).
    """

    def __init__(self, source: _BatchNorm, name: str, mode: Mode, seen: dict[str, Tensor]) -> None:
        """Shares ``source``'s parameters and buffers; ``name`` is its place in the net."""
        super().__init__()
        self.weight, self.bias, self.eps = source.weight, source.bias, source.eps
        self.name, self.seen, self.mean_only = name, seen, isinstance(source, MeanOnlyBatchNorm)
        # Without running statistics PyTorch normalizes by the batch in evaluation too.
        self.mode: Mode = mode if source.running_mean is not None else "batch"
        self.register_buffer("running_mean", source.running_mean)
        self.register_buffer("running_var", source.running_var)
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        wide, n = _widen(x), x.numel() // x.shape[1]
        if self.mode == "running":
            mean, var = self.running_mean, self.running_var
        else:
            if n == 1:
                raise UserError(f"layer {self.name}: BatchNorm needs more than one value per channel; give it a larger batch")
            dims = [d for d in range(x.dim()) if d != 1]
            var, mean = torch.var_mean(wide, dims, correction=0)
        if self.mode == "record":
            self.seen[self.name] = torch.stack((mean, var * (n / (n - 1))))
        if self.mean_only:
            return (wide + _spread(self.bias - mean, x)).to(x.dtype)
        # One factor and one shift per channel, as PyTorch's own CPU kernel has it: two passes over the images instead of four.
        scale = (var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (wide * _spread(scale, x) + _spread(shift, x)).to(x.dtype)


class InstanceNorm(nn.Module):
    """Instance normalization (arXiv 1607.08022) by the image's own statistics, made from PyTorch's layer. x: [B, C, ...]."""

    def __init__(self, source: _InstanceNorm) -> None:
        """Shares ``source``'s parameters."""
        super().__init__()
        self.weight, self.bias, self.eps = source.weight, source.bias, source.eps

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        wide, dims = _widen(x), list(range(2, x.dim()))
        centred = wide - wide.mean(dims, keepdim=True)
        out = centred * (centred.square().mean(dims, keepdim=True) + self.eps).rsqrt()
        out = out if self.weight is None else out * _spread(self.weight, x)
        return (out if self.bias is None else out + _spread(self.bias, x)).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer (Ba et al., arXiv 1607.06450) or root-mean-square (arXiv 1910.07467) normalization, made from PyTorch's layer.

    Normalizes over the last ``len(normalized_shape)`` dimensions.
    """

    def __init__(self, source: nn.LayerNorm | nn.RMSNorm) -> None:
        """Shares ``source``'s parameters."""
        super().__init__()
        self.weight, self.eps, self.normalized_shape = source.weight, source.eps, source.normalized_shape
        self.bias = source.bias if isinstance(source, nn.LayerNorm) else None
        self.centred = isinstance(source, nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        """[..., *normalized_shape] -> the same shape. Raises UserError where the input ends in another shape."""
        shape = self.normalized_shape
        if x.shape[x.dim() - len(shape) :] != shape:
            raise UserError(f"a normalization over {list(shape)} got {list(x.shape)}; data.size resizes images")
        wide, dims = _widen(x), list(range(-len(shape), 0))
        if self.centred:
            wide = wide - wide.mean(dims, keepdim=True)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        out = wide * (wide.square().mean(dims, keepdim=True) + eps).rsqrt()
        out = out if self.weight is None else out * self.weight
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class LocalResponseNorm(nn.Module):
    """x / (k + alpha/size * sum over ``size`` neighbouring channels of x^2)^beta (Krizhevsky et al. 2012), as PyTorch's."""

    def __init__(self, size: int, alpha: float, beta: float, k: float) -> None:
        """The arguments of ``torch.nn.LocalResponseNorm``."""
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        channels = x.shape[1]
        square = nn.functional.pad(x.square(), (0, 0, 0, 0, self.size // 2, (self.size - 1) // 2))
        total = square[:, :channels]
        for i in range(1, self.size):
            total = total + square[:, i : i + channels]
        return x * (self.k + self.alpha / self.size * total).pow(-self.beta)


def is_batch_norm(module: nn.Module) -> bool:
    """Is this PyTorch's batch normalization, its forward pass not overridden by the user?"""
    known = (_BatchNorm.forward, nn.SyncBatchNorm.forward, MeanOnlyBatchNorm.forward)
    return isinstance(module, _BatchNorm) and type(module).forward in known


def _replacement(module: nn.Module, name: str, mode: Mode, seen: dict[str, Tensor]) -> nn.Module | None:
    forward = type(module).forward
    if isinstance(module, _BatchNorm) and is_batch_norm(module):
        return BatchNorm(module, name, mode, seen)
    if isinstance(module, _InstanceNorm) and forward is _InstanceNorm.forward and module.running_mean is None:
        return InstanceNorm(module)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return LayerNorm(module)
    return None


def pure(root: nn.Module, mode: Mode, seen: dict[str, Tensor]) -> nn.Module:
    """``root`` with its normalizations replaced, in place; returns the new root.

    Layers with a forward pass of the user's own, and instance normalizations that keep running statistics, stay as they are
    (``Learner.check`` judges them).
    """
    made = {m: new for n, m in root.named_modules() if (new := _replacement(m, n, mode, seen)) is not None}
    for module in list(root.modules()):
        # Not named_children(), which names a layer that stands twice only once.
        for child, layer in module._modules.items():
            if layer is not None and layer in made:
                module._modules[child] = made[layer]
    return made.get(root, root)
