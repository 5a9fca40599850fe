"""Whether a folder is on a mount that other machines are known not to see."""

from __future__ import annotations

import os
import re
from pathlib import Path

from metadist.errors import UserError

LOCAL_TYPES = {"tmpfs", "ramfs", "devtmpfs", "squashfs", "proc", "sysfs"}  # what no other machine can mount
LOCAL_PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # a machine's own, by the Filesystem Hierarchy Standard


def mount_of(path: Path, mounts: str) -> tuple[str, str]:
    """Mount point and type of the file system that ``path`` is on. mounts: the text of /proc/self/mounts."""
    found = ("/", "")
    for line in mounts.splitlines():
        _, place, kind, *_ = line.split()
        place = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), place)
        if (path == Path(place) or Path(place) in path.parents) and len(place) >= len(found[0]):
            found = (place, kind)
    return found


def refuse_local(path: Path, mounts: str | None = None, key: str = "run_dir") -> None:
    """Raise UserError if only this machine can see ``path``, which ``key`` says."""
    real = Path(os.path.realpath(path))
    if mounts is None:
        table = Path("/proc/self/mounts")
        mounts = table.read_text() if table.exists() else ""
    place, kind = mount_of(real, mounts)
    own = next((p for p in LOCAL_PLACES if real == Path(p) or Path(p) in real.parents), None)
    # A file system of the network mounted below such a place is shared all the same.
    if own is not None and len(place) <= len(own):
        why = f"{own} is each machine's own"
    elif kind in LOCAL_TYPES:
        why = f"{place} is a {kind} of this machine"
    else:
        return
    raise UserError(
        f"{key}={path} can't be seen by the nodes ({why}); give a {key} on a file system that they share, "
        "or check_mount=false if they do see it"
    )
