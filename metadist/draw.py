"""Counter-based random draws: every random number is a pure function of (seed, stream, step, task).

Design choices
- Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written in
  int64 tensor operations with masks: additions, rotations and exclusive-ors only, so the same bits come out on a CPU, on a
  GPU and inside a compiled graph. No state, no rank, no clock.
- Uniforms take the upper 24 bits (float32) or 53 bits (float64): exact conversions.
- Normals are looked up, not computed: log and cos differ in the last place between processors, a table and one addition
  do not. A draw is Q[hi] + q[lo]: two independent 16-bit quantile tables of N(0, 15/16) and N(0, 1/16). The sum has
  unit variance, a continuous-looking density, and reaches +-5.3. Same values in float32 and float64.
- A key is a tensor of two 32-bit words in int64, shape [..., 2]; leading axes are tasks.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def _rotate(x: Tensor, r: int) -> Tensor:
    return ((x << r) & _MASK) | (x >> (32 - r))


def threefry(key: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 of the counter (x0, x1) under ``key``.

    key: int64 [..., 2], words in [0, 2**32); its leading axes broadcast against the counters.
    x0, x1: int64 counters in [0, 2**32).
    Returns two int64 tensors of words in [0, 2**32).
    """
    k0, k1 = key[..., 0], key[..., 1]
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = (x0 + k0) & _MASK, (x1 + k1) & _MASK
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 = (x0 + x1) & _MASK
            x1 = _rotate(x1, r) ^ x0
        x0 = (x0 + schedule[(i + 1) % 3]) & _MASK
        x1 = (x1 + schedule[(i + 2) % 3] + (i + 1)) & _MASK
    return x0, x1


def key(seed: int, stream: str, step: int | Tensor = 0, task: int | Tensor = 0) -> Tensor:
    """The key of one task's draws.

    seed: any integer in [0, 2**63).
    stream: what is drawn ("theta0", "batch"...); streams never overlap.
    step: meta-step, integer or int64 tensor, below 2**32.
    task: global task number, integer or int64 tensor [G], below 2**32.
    Returns int64 [..., 2], leading axes those of step and task broadcast, on task's device if that is a tensor, else step's.
    """
    step_t, task_t = torch.as_tensor(step), torch.as_tensor(task)
    device = task_t.device if isinstance(task, Tensor) else step_t.device
    root = torch.tensor([seed & _MASK, (seed >> 32) & _MASK], dtype=torch.int64, device=device)
    name = torch.tensor(zlib.crc32(stream.encode()), dtype=torch.int64, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    root = torch.stack(threefry(root, name, zero), dim=-1)
    a, b = step_t.to(device, torch.int64), task_t.to(device, torch.int64)
    return torch.stack(threefry(root, a, b), dim=-1)


def split(keys: Tensor, index: int | Tensor) -> Tensor:
    """A new, independent key derived from ``keys`` [..., 2] and an integer (or int64 tensor that broadcasts)."""
    index_t = torch.as_tensor(index, dtype=torch.int64, device=keys.device)
    # The second counter word is out of reach of bits(), so derived keys never repeat its output.
    return torch.stack(threefry(keys, index_t, torch.full_like(index_t, _MASK)), dim=-1)


def bits(keys: Tensor, n: int) -> Tensor:
    """``n`` random 32-bit words per key: int64 [..., n] in [0, 2**32)."""
    counter = torch.arange((n + 1) // 2, dtype=torch.int64, device=keys.device)
    words = threefry(keys.unsqueeze(-2), counter, torch.zeros_like(counter))
    return torch.cat(words, dim=-1)[..., :n]


def uniform(keys: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform on [0, 1): [..., *shape]; 24 random bits in float32 (and narrower), 53 in float64."""
    n = math.prod(shape)
    lead = keys.shape[:-1]
    if dtype == torch.float64:
        words = bits(keys, 2 * n)
        high, low = words[..., :n] >> 5, words[..., n:] >> 6
        out = (high * (1 << 26) + low).to(torch.float64) * 2.0**-53
    else:
        out = ((bits(keys, n) >> 8).to(torch.float32) * 2.0**-24).to(dtype)
    return out.reshape((*lead, *shape))


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    grid = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    quantiles = torch.special.ndtri(grid)
    quantiles = quantiles / quantiles.square().mean().sqrt()
    # Rounded to a coarse grid, so that a last-place difference between mathematics libraries cannot show.
    wide = (quantiles * math.sqrt(15 / 16) * 2**20).round() / 2**20
    narrow = (quantiles * math.sqrt(1 / 16) * 2**20).round() / 2**20
    return wide.to(device, torch.float32), narrow.to(device, torch.float32)


def normal(keys: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal: [..., *shape]. The float64 draw is the float32 draw, widened."""
    words = bits(keys, math.prod(shape))
    wide, narrow = _tables(keys.device)
    out = wide[words >> 16] + narrow[words & 0xFFFF]
    return out.to(dtype).reshape((*keys.shape[:-1], *shape))


def integers(keys: Tensor, shape: Sequence[int], high: int | Tensor) -> Tensor:
    """Integers uniform on [0, high), high < 2**31: int64 [..., *shape]. Bias at most high / 2**32.

    high: the same for all, or int64 [..., 1] for each key.
    """
    words = bits(keys, math.prod(shape))
    return ((words * high) >> 32).reshape((*keys.shape[:-1], *shape))


def permutation(keys: Tensor, n: int) -> Tensor:
    """A random order of n things per key: int64 [..., n] (stable sort of random words)."""
    return torch.sort(bits(keys, n), dim=-1, stable=True).indices
