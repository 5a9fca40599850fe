"""Messages between the parameter server and its workers: a JSON header, a seal on it, and at most one block of numbers.

Design choices
- No pickle, no type on the wire: a block's length and meaning follow from the run's ``Layout``, which both sides have.
- The seal is an HMAC-SHA256 of the header under a key that only the run's processes can make; the header holds a number that
  grows from message to message, so that one that was overheard can't be used again. The block itself is covered by encryption
  (exchange.encrypt), not by the seal: hashing 40 MB takes as long as sending them.
- A field is looked at before it is used: wrong types and sizes are ``Malformed``, never an exception of another kind.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metadist.synthetic.images import Phi

PROTOCOL = 1
MAX_HEADER = 16384  # bytes
SEAL = 32  # bytes
Header = dict[str, Any]


class Malformed(ValueError):
    """A message that none of ours can have sent."""


@dataclass(frozen=True)
class Layout:
    """How meta-parameters lie in one flat vector, and how it travels.

    names, shapes: of the parameters, in order. dtype: of the parameters; wire: on the wire (narrower, or the same).
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    wire: torch.dtype

    @classmethod
    def of(cls, phi: Phi, wire: str) -> Layout:
        """The layout of these parameters; wire: "full" (their own type) or "bfloat16"."""
        dtype = next(iter(phi.values())).dtype
        narrow = torch.bfloat16 if wire == "bfloat16" else dtype
        return cls(tuple(phi), tuple(tuple(p.shape) for p in phi.values()), dtype, narrow)

    @property
    def sizes(self) -> list[int]:
        """Numbers in each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """Numbers in the flat vector."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """Names the layout."""
        words = [list(self.names), [list(s) for s in self.shapes], str(self.dtype), str(self.wire)]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()

    def flat(self, phi: Phi) -> Tensor:
        """One vector [size] of all parameters, detached, in the parameters' type, on their device."""
        return torch.cat([phi[name].detach().reshape(-1) for name in self.names])

    def split(self, flat: Tensor) -> Phi:
        """The parameters as views of a flat vector [size]."""
        parts = torch.split(flat, self.sizes)
        return {n: part.view(shape) for n, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def ranges(self, shards: int) -> list[slice]:
        """``shards`` contiguous ranges of the flat vector, sizes differ by at most one."""
        cuts = [self.size * k // shards for k in range(shards + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def block(values: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied: they must not change until they are sent."""
    return values.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data


def values(buffer: Any, dtype: torch.dtype, count: int) -> Tensor:
    """A received block as a CPU tensor [count], not copied. Raises Malformed for another length."""
    if len(buffer) != count * dtype.itemsize:
        raise Malformed(f"a block of {len(buffer)} bytes, {count * dtype.itemsize} expected")
    return torch.frombuffer(buffer, dtype=dtype) if count else torch.zeros(0, dtype=dtype)


def dump(header: Header) -> bytes:
    """A header's bytes."""
    return json.dumps(header, separators=(",", ":")).encode()


def parse(data: bytes) -> Header:
    """A received header. Raises Malformed."""
    if len(data) > MAX_HEADER:
        raise Malformed(f"a header of {len(data)} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Malformed("a header that is no JSON") from None
    if not isinstance(found, dict):
        raise Malformed("a header that is no object")
    return found


def number(header: Header, name: str) -> int:
    """An integer field, at least 0 and below 2**63. Raises Malformed."""
    value = header.get(name)
    if type(value) is not int or not 0 <= value < 2**63:
        raise Malformed(f"{name} is no count")
    return value


def real(header: Header, name: str) -> float:
    """A number field; NaN and infinities are numbers. Raises Malformed."""
    value = header.get(name)
    if type(value) not in (int, float):
        raise Malformed(f"{name} is no number")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise Malformed(f"{name} is beyond every number") from None


def text(header: Header, name: str, longest: int = 200) -> str:
    """A text field. Raises Malformed."""
    value = header.get(name)
    if not isinstance(value, str) or len(value) > longest or any("\ud800" <= c <= "\udfff" for c in value):
        raise Malformed(f"{name} is no text of at most {longest} characters")
    return value


def seal(key: bytes, header: bytes) -> bytes:
    """Proof that the sender knows ``key``."""
    return hmac.digest(key, header, "sha256")


def sealed(key: bytes, header: bytes, given: bytes) -> bool:
    """Whether ``given`` is the header's seal."""
    return hmac.compare_digest(seal(key, header), given)


def session_key(token: bytes, client: str, server: str) -> bytes:
    """The key of one connection: both sides put a random word into it, so nothing of another connection fits."""
    return hmac.digest(token, f"session {client} {server}".encode(), "sha256")
