"""Files written whole or not at all.

Design choices
- A write goes to a temporary name in the same folder, is flushed to the disk (fsync), renamed, and the folder is flushed:
  at any instant of a kill or a power cut the final name holds the old content or the new one, never a part of it.
- A full, read-only or forbidden disk is a RunError of one line: the path, the size needed and the mend.
- Nothing here needs torch, whose import costs a program that only submits, lists or records two seconds.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import time
from pathlib import Path

from metadist.errors import RunError

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


def claim(run_dir: Path | str) -> int:
    """The next incarnation number of a run folder (1, 2, ...), claimed for this process alone, across machines.

    The claim is a file made with O_EXCL in `run_dir/incarnations/` that says who holds it. Raises RunError if it cannot
    be made.
    """
    folder = Path(run_dir) / "incarnations"
    number = 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number += max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)
        while True:
            try:
                fd = os.open(folder / f"{number:04d}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                number += 1
                continue
            with os.fdopen(fd, "w") as f:
                f.write(f"{socket.gethostname()} {os.getpid()}\n")
                f.flush()
                os.fsync(f.fileno())
            return number
    except OSError as e:
        raise disk_error(folder / f"{number:04d}", 64, e) from e
