"""A sweep on a cluster: one array, a run folder each, one table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metadist.config import flatten
from metadist.errors import UserError
from metadist.run.cluster import record
from metadist.run.cluster.batch import LOGS
from metadist.run.compose import Point
from metadist.run.folder import RunFolder
from metadist.run.sweep import Job, comparison, jobs
from metadist.store import atomic_write


def plan(points: Sequence[Point]) -> tuple[Path, list[RunFolder]]:
    """The sweep's folder and its runs' folders, made and checked. UserError for what one array can't hold."""
    shapes = {
        k: {json.dumps(flatten(p.config)[k]) for p in points} for k in flatten(points[0].config) if k.startswith("cluster.")
    }
    if mixed := [k.removeprefix("cluster.") for k, values in shapes.items() if len(values) > 1]:
        raise UserError(
            f"{mixed[0]} can't be swept: all runs of an array get the same machines; submit a command for each value"
        )
    todo = jobs(points)
    for point, job in zip(points, todo):
        point.config.run_dir = job.run_dir
    folders = [RunFolder.prepare(point.config) for point in points]
    key = hashlib.sha256("\n".join(sorted(str(f.path) for f in folders)).encode()).hexdigest()[:8]
    place = (Path("runs") / f"sweep-{key}").absolute()
    (place / LOGS).mkdir(parents=True, exist_ok=True, mode=0o700)
    for folder in folders:
        (folder.path / LOGS).mkdir(exist_ok=True, mode=0o700)
    described = [{"words": j.words, "swept": j.swept, "run_dir": str(f.path)} for j, f in zip(todo, folders)]
    record.write(place / "sweep.json", {"runs": [str(f.path) for f in folders], "jobs": described})
    return place, folders


def text(place: Path) -> str:
    """The comparison table of a sweep as it stands."""
    known: list[dict[str, Any]] = record.read(place / "sweep.json")["jobs"]
    todo = [Job(tuple(j["words"]), j["swept"], j["run_dir"]) for j in known]
    return comparison(todo, [_state(Path(j.run_dir)) for j in todo])


def _state(run_dir: Path) -> str:
    if record.read(run_dir / "summary.json").get("finished"):
        return record.FINISHED
    found = record.ends(run_dir)
    return str(found[-1].get("reason")) if found else "not yet"


def write_table(place: Path) -> None:
    """Put the table into the sweep's folder."""
    atomic_write(place / "table.txt", f"{text(place)}\n".encode())
