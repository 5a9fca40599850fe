"""Checksummed tensors: a file is either whole and proven so, or refused.

Design choices
- Written by ``metadist.store.atomic``: all of it or nothing.
- Tensors are safetensors, never pickle. The SHA-256 covers the WHOLE file, header included: it is computed with 64 zeros in
  its own place inside the metadata and then put there. One file, no sidecar, and every flipped byte shows.
- All metadata is one JSON string under one key, so that equal content gives equal bytes on disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from metadist.errors import RunError
from metadist.store.atomic import atomic_write

_ZEROS = "0" * 64
# As it stands in the file: the JSON string of the metadata, quoted once more by the header's own JSON.
_MARK = b'{\\"sha256\\":\\"'


class Torn(RunError):
    """A file that is incomplete, altered, or not one of ours. ``path`` is the file, ``why`` what is wrong with it."""

    def __init__(self, path: Path | str, why: str) -> None:
        """Keep both; the message is one line."""
        super().__init__(f"{path} cannot be trusted: {why}")
        self.path, self.why = Path(path), why


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors of any shape, dtype and device, and JSON-able ``metadata``, as one checksummed safetensors file.

    tensors: name -> tensor; values (NaN payloads too) come back bit for bit, on the CPU.
    metadata: what json can hold; tuples come back as lists.
    Raises RunError when the disk refuses (see ``atomic_write``), TypeError when metadata is not JSON-able.
    """
    atomic_write(path, pack(tensors, metadata or {}))


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of ``save_tensors``'s file; equal content gives equal bytes."""
    # clone: safetensors refuses tensors that share memory, and two names for one storage are no mistake here.
    plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    text = json.dumps({"sha256": _ZEROS, "content": dict(metadata)}, separators=(",", ":"))
    blob = bytearray(safetensors.torch.save(plain, {"metadist": text}))
    at = blob.index(_MARK) + len(_MARK)
    blob[at : at + 64] = hashlib.sha256(blob).hexdigest().encode()
    return bytes(blob)


def unpack(data: bytes, path: Path | str = "<bytes>") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata in the bytes of a file of ``save_tensors``; Torn (naming ``path``) if they are not all there."""
    prove(data, path)
    content = read_header(data, path)[1]
    try:
        return safetensors.torch.load(data), content
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as e:
        raise Torn(path, f"its header is not one of metadist's ({type(e).__name__})") from e


def prove(data: bytes | mmap.mmap, path: Path | str) -> None:
    """Raise Torn (naming ``path``) unless the SHA-256 in the file's bytes is theirs."""
    at = data.find(_MARK) + len(_MARK)
    if at < len(_MARK) or len(data) < at + 64:
        raise Torn(path, "it is cut short or was not written by metadist")
    digest = hashlib.sha256(data[:at])
    digest.update(_ZEROS.encode())
    with memoryview(data) as view, view[at + 64 :] as rest:
        digest.update(rest)
    if digest.hexdigest().encode() != data[at : at + 64]:
        raise Torn(path, "its SHA-256 does not fit its content (cut short or altered)")


def read_header(data: bytes | mmap.mmap, path: Path | str) -> tuple[int, dict[str, Any]]:
    """(bytes that the whole file must have, metadata) by the header of a file of ``save_tensors``; Torn if it is none."""
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        content: dict[str, Any] = json.loads(header.pop("__metadata__")["metadist"])["content"]
        if not isinstance(content, dict):
            raise TypeError(type(content))
        return start + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0), content
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
        raise Torn(path, "it is cut short or was not written by metadist") from e


def proven(path: Path) -> dict[str, Any]:
    """The metadata of a file of ``save_tensors`` whose checksum holds; the file is mapped, not held.

    Raises as ``load_tensors``.
    """
    try:
        with path.open("rb") as plain, mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as data:
            prove(data, path)
            return read_header(data, path)[1]
    except FileNotFoundError:
        raise
    except ValueError as e:  # nothing in it to map
        raise Torn(path, "it is empty") from e
    except OSError as e:
        raise RunError(f"cannot read {path}: {e.strerror}") from e


def load_tensors(path: Path | str, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of ``save_tensors`` and prove its checksum: (tensors on ``device``, metadata).

    Raises Torn when a single byte is missing or altered, FileNotFoundError when there is no such file, RunError when it
    may not be read.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as e:
        if e.errno == errno.EIO:
            raise Torn(path, "the disk cannot read it") from e
        raise RunError(f"cannot read {path}: {e.strerror}") from e
    tensors, metadata = unpack(data, path)
    return {k: v.to(device) for k, v in tensors.items()}, metadata
