"""Files that are either whole and proven so, or refused: atomic writes and checksummed tensors.

Design choices
- A write goes to a temporary name in the same folder, is flushed to the disk (fsync), renamed, and the folder is flushed:
  at any instant of a kill or a power cut the final name holds the old content or the new one, never a part of it.
- Tensors are safetensors, never pickle. The SHA-256 covers the WHOLE file, header included: it is computed with 64 zeros in
  its own place inside the metadata and then put there. One file, no sidecar, and every flipped byte shows.
- All metadata is one JSON string under one key, so that equal content gives equal bytes on disk.
- A full, read-only or forbidden disk is a RunError of one line: the path, the size needed and the mend.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import mmap
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from metadist.errors import RunError

_ZEROS = "0" * 64
# As it stands in the file: the JSON string of the metadata, quoted once more by the header's own JSON.
_MARK = b'{\\"sha256\\":\\"'
_TEMP = ".tmp"
_STALE_S = 86400.0  # a temporary file of another machine is given up after a day
_counter = itertools.count()
_active: set[Path] = set()  # temporary files this process is writing now

_MENDS = {
    errno.ENOSPC: "free that much there and start the same command again",
    errno.EDQUOT: "your quota is used up: free that much there and start the same command again",
    errno.EROFS: "choose a folder on a writable disk and start the same command again",
    errno.EACCES: "make the folder writable for you or choose another",
    errno.EPERM: "make the folder writable for you or choose another",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and start the same command again",
}


class Torn(RunError):
    """A file that is incomplete, altered, or not one of ours. ``path`` is the file, ``why`` what is wrong with it."""

    def __init__(self, path: Path | str, why: str) -> None:
        """Keep both; the message is one line."""
        super().__init__(f"{path} cannot be trusted: {why}")
        self.path, self.why = Path(path), why


def disk_error(path: Path, size: int, cause: OSError) -> RunError:
    """The one line for a write of ``size`` bytes to ``path`` that failed."""
    mend = _MENDS.get(cause.errno or 0, "mend that and start the same command again")
    what = cause.strerror or str(cause)
    return RunError(f"cannot write {path} ({size / 1e6:.3g} MB needed): {what}; what was there is intact; {mend}")


def _flush_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
            raise
    finally:
        os.close(fd)


def _write_flushed(path: Path, data: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path | str, data: bytes, mode: int = 0o666) -> None:
    """Put ``data`` at ``path``, all of it or nothing; missing folders are made.

    mode: the file's, less the umask, from its first byte on.
    Raises RunError (path, MB needed, mend) when the disk refuses; the old file is then intact and no temporary file is left.
    """
    path = Path(path)
    temp = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.{next(_counter)}{_TEMP}"
    _active.add(temp)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.unlink(missing_ok=True)  # left by a dead process that had our number
        _write_flushed(temp, data, mode)
        temp.replace(path)
        _flush_folder(path.parent)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise disk_error(path, len(data), e) from e
        raise
    finally:
        _active.discard(temp)


def write_first(path: Path, data: bytes, mode: int = 0o666) -> bool:
    """Put ``data`` at ``path`` unless the name exists; whole or not at all. Returns whether it was ours."""
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.0{_TEMP}")  # the pattern clean() knows
    atomic_write(draft, data, mode)
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: the check is then not atomic, the write still is
        if path.exists():
            return False
        try:
            draft.replace(path)
        except OSError as e:
            raise disk_error(path, len(data), e) from e
        return True
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _is_stale(temp: Path) -> bool:
    parts = temp.name.removesuffix(_TEMP).rsplit(".", 2)
    if len(parts) != 3 or not parts[1].isdigit():
        return False
    pid, here = int(parts[1]), parts[0].endswith(f".{socket.gethostname()}")
    if here and pid == os.getpid():  # in a container the next process often has the same number
        return temp not in _active
    if here:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False
    return time.time() - temp.stat().st_mtime > _STALE_S


def clean(folder: Path | str) -> list[Path]:
    """Remove the temporary files in ``folder`` whose writers are dead; returns what was removed.

    A writer on this machine is asked for by its process number; one of another machine is given up after a day.
    """
    removed = []
    for temp in Path(folder).glob(f".*{_TEMP}"):
        with contextlib.suppress(OSError):  # another process may clean at the same time; a read-only disk keeps its rubbish
            if _is_stale(temp):
                temp.unlink()
                removed.append(temp)
    return removed


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
