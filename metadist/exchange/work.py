"""What a server asks of its workers, and what a worker says of itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metadist.exchange import wire
from metadist.exchange.wire import Layout


@dataclass(frozen=True)
class Work:
    """Tasks to compute. phi: flat [P] as it came, on the CPU; step, first, count: which tasks."""

    lease: int
    version: int
    phi: Tensor
    step: int
    first: int
    count: int


@dataclass(frozen=True)
class Judge:
    """Networks to judge. phi: flat [P] in full precision; purpose: which held-out networks, ``all`` of them in number."""

    lease: int
    phi: Tensor
    purpose: str
    first: int
    count: int
    all: int


@dataclass(frozen=True)
class Leave:
    """Nothing more to do. why: the server's word: "finished"."""

    why: str


@dataclass
class Settings:
    """label: this worker's name among the run's; patience counts from silence; encrypt, beat_s: the server knows better.

    finished: whether the run has its result, asked when the server is silent.
    """

    label: str
    encrypt: bool
    beat_s: float
    patience_s: float
    finished: Callable[[], bool] = lambda: False


def facts(identity: str, layout: Layout, run: str, label: str, role: str = "worker") -> dict[str, Any]:
    """What a hello says. identity: hash of the configuration; run: the secret's name for it."""
    name = f"{label}@{socket.gethostname()}:{os.getpid()}"
    return {
        "protocol": wire.PROTOCOL,
        "run": run,
        "config": identity,
        "layout": layout.digest,
        "name": name,
        "role": role,
    }
