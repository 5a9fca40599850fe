"""Weight normalization (Salimans and Kingma, arXiv 1602.07868): W = g V / |V|, the norm of each output's weights.

Design choices
- Any net may have it (net.weight_norm): its convolutions and linear layers become the classes below, with one parameter more,
  ``gain``. V keeps the name ``weight``, so that the flat weight vector is the old one with gains in it.
- At the start g = |V|: the net is the one that p(theta0) would have given without it.
- Not torch.nn.utils.parametrizations.weight_norm: its fused kernel has no rule under ``vmap(vjp(grad))``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from metadist.errors import UserError


def normalized(v: Tensor, gain: Tensor) -> Tensor:
    """g V / |V|: v [O, ...], gain [O] -> [O, ...]; the norm is over all but the first dimension."""
    square: Tensor = v.flatten(1).square().sum(1)
    out: Tensor = v * (gain * square.rsqrt()).view(-1, *[1] * (v.dim() - 1))
    return out


class _Normed:
    """What the layers share."""

    weight: Tensor
    gain: nn.Parameter

    def reset_gain(self) -> None:
        """g = |V|."""
        self.gain = nn.Parameter(self.weight.detach().flatten(1).norm(dim=1))


class Linear(_Normed, nn.Linear):
    """A linear layer with normalized weights."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return nn.functional.linear(x, normalized(self.weight, self.gain), self.bias)

    def reset_parameters(self) -> None:
        """Draw V anew; g follows."""
        super().reset_parameters()
        self.reset_gain()


class Conv2d(_Normed, nn.Conv2d):
    """A convolution with normalized weights."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W']."""
        out: Tensor = self._conv_forward(x, normalized(self.weight, self.gain), self.bias)
        return out

    def reset_parameters(self) -> None:
        """Draw V anew; g follows."""
        super().reset_parameters()
        self.reset_gain()


_NORMED: dict[type[nn.Module], Any] = {nn.Linear: Linear, nn.Conv2d: Conv2d}


def weight_normed(module: nn.Module) -> nn.Module:
    """``module`` with all its layers of class nn.Linear and nn.Conv2d normalized, in place.

    Raises UserError if it has none, or other layers with weights that can't be normalized.
    """
    found = 0
    for name, layer in module.named_modules():
        if type(layer) in _NORMED:
            layer.__class__ = _NORMED[type(layer)]
            layer.reset_gain()
            found += 1
        elif isinstance(layer, _ConvNd | nn.Linear) and not isinstance(layer, _Normed):
            raise UserError(
                f"net.weight_norm=true knows nn.Linear and nn.Conv2d; layer {name} is a {type(layer).__name__}: leave it out"
            )
    if not found:
        raise UserError("net.weight_norm=true, but the net has no layer of class nn.Linear or nn.Conv2d; leave it out")
    return module


def is_gain(owner: nn.Module, local: str) -> bool:
    """Whether parameter ``local`` of a layer is a gain."""
    return isinstance(owner, _Normed) and local == "gain"


def norms(v: Tensor) -> Tensor:
    """|V| of every output for drawn weights v [G, O, ...]: [G, O]."""
    return v.flatten(2).square().sum(2).sqrt()
