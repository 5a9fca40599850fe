"""A sweep on a cluster: one array, a run folder each, one table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from metadist.errors import UserError
from metadist.identity import flatten
from metadist.run.cluster import record
from metadist.run.cluster.batch import LOGS
from metadist.run.compose import Point
from metadist.run.folder import RunFolder
from metadist.run.sweep import Job, comparison, jobs
from metadist.store import atomic_write


def plan(points: Sequence[Point]) -> tuple[Path, list[Job]]:
    """The sweep's folder and its runs, each with a run folder; nothing is made. UserError for what one array can't hold."""
    leaves = [flatten(p.config) for p in points]
    for key in (k for k in leaves[0] if k.startswith("cluster.")):
        if len({json.dumps(found[key]) for found in leaves}) > 1:
            raise UserError(f"{key.removeprefix('cluster.')} can't be swept: all runs of an array get the same machines; "
                            "submit a command for each value")  # fmt: skip
    todo = [dataclasses.replace(job, run_dir=str(Path(job.run_dir).expanduser().absolute())) for job in jobs(points)]
    key = hashlib.sha256("\n".join(sorted(job.run_dir for job in todo)).encode()).hexdigest()[:8]
    return (Path("runs") / f"sweep-{key}").absolute(), todo


def make(place: Path, points: Sequence[Point], todo: Sequence[Job]) -> list[RunFolder]:
    """The sweep's folder with the list of its runs, and their folders. UserError for a folder that holds another run."""
    for point, job in zip(points, todo):
        point.config.run_dir = job.run_dir
    folders = [RunFolder.prepare(point.config) for point in points]
    for path in (place, *(folder.path for folder in folders)):
        (path / LOGS).mkdir(parents=True, exist_ok=True, mode=0o700)
    described = [{"words": j.words, "swept": j.swept, "run_dir": j.run_dir} for j in todo]
    record.write(place / "sweep.json", {"runs": [j.run_dir for j in todo], "jobs": described})
    return folders


def runs(place: Path) -> list[Path]:
    """The run folders of a sweep's folder; empty if it is none. UserError if its list is broken."""
    return [Path(job.run_dir) for job in _known(place)] if (place / "sweep.json").exists() else []


def _known(place: Path) -> list[Job]:
    try:
        return [Job(tuple(j["words"]), j["swept"], j["run_dir"]) for j in record.read(place / "sweep.json")["jobs"]]
    except (KeyError, TypeError):
        raise UserError(f"{place / 'sweep.json'} is broken; name the run folders instead, "
                        "or submit the sweep again: finished runs stay finished") from None  # fmt: skip


def text(place: Path) -> str:
    """The comparison table of a sweep as it stands."""
    todo = _known(place)
    return comparison(todo, [_state(Path(j.run_dir)) for j in todo])


def _state(run_dir: Path) -> str:
    if record.read(run_dir / "summary.json").get("finished"):
        return record.FINISHED
    found = record.ends(run_dir)
    return str(found[-1].get("reason")) if found else "not yet"


def write_table(place: Path) -> None:
    """Put the table into the sweep's folder."""
    atomic_write(place / "table.txt", f"{text(place)}\n".encode())
