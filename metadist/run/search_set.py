"""What is known of the distilled set that a search trains on beside its images: what it cost."""

from __future__ import annotations

import json
from pathlib import Path


def cost(given: str | None) -> tuple[float | None, str | None]:
    """Seconds of all workers that making the set took, and where, in words; None where no finished run's folder is given.

    An older run's seconds are its rounded minutes. Nobody has recorded what experts cost: that they are missing is said.
    """
    folder = Path(given or "").expanduser()
    try:
        found = json.loads((folder / "summary.json").read_text()) if given else {}
        seconds = float(found["seconds"] if "seconds" in found else 60 * found["minutes"]) * int(found.get("workers", 1))
    except (OSError, ValueError, KeyError, TypeError):
        return None, None
    return seconds, f"by {given}" + ("; its experts not counted" if _by_trajectories(folder) else "")


def _by_trajectories(folder: Path) -> bool:
    """Whether a run stands on experts, which launch/experts.py has trained."""
    try:
        return bool(json.loads((folder / "config.json").read_text())["method"]["gradient"] == "trajectory")
    except (OSError, ValueError, KeyError, TypeError):
        return False
