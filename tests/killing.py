"""A space of one shape whose second architecture kills the process that builds it, as the kernel does where memory runs out."""

from __future__ import annotations

import os
import signal

import torch
from torch import nn


class Space:
    name = "killing"

    def __len__(self) -> int:
        return 3

    def key(self, index: int) -> str:
        return f"number-{index}"

    def module(self, index: int, channels: int, size: int, classes: int) -> nn.Module:
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, classes))

    def shape(self, index: int) -> str:
        return "one"

    def choice(self, index: int) -> tuple[float, ...]:
        return (float(index),)

    def shared(self, index: int, channels: int, size: int, classes: int) -> nn.Module:
        return nn.Sequential(
            nn.ParameterDict({"choice": nn.Parameter(torch.zeros(1))}), self.module(0, channels, size, classes)
        )
