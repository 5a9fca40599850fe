"""`launch/compare.py` with cluster=slurm: a comparison of networks as arrays, a wave of runs that wait for the one before.

    python launch/compare.py preset=takd cluster=slurm gpus_per_node=1 timeout_min=240 data.root=/shared/data
    python launch/compare.py preset=takd cluster=print gpus_per_node=1 data.root=/shared/data     show the batch files

Design choices
- A wave is an array of its own (metadist.run.cluster.sweep): all runs whose teachers an earlier wave makes. SLURM keeps the
  order by `dependency=afterok`; a run that is requeued has not ended, so it does not break it. One that fails ends the waves
  behind it (`kill-on-invalid-dep`), which would else wait for ever.
- Nothing is kept but what the run folders hold: the same command submits again what has not finished, and prints the table when
  all have. A run at work is not submitted twice.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from metadist.errors import UserError
from metadist.run.cluster import record, scheduler, sweep
from metadist.run.cluster.batch import LOGS, Executor
from metadist.run.cluster.command import check_scheduler, free, place_workers, translated, wait_for
from metadist.run.cluster.mounts import refuse_local
from metadist.run.cluster.precheck import precheck
from metadist.run.compare import folder
from metadist.run.compare_networks import begun, finished, result
from metadist.run.compare_set import Row, Set, read
from metadist.run.compose import Point, compose
from metadist.run.sweep import Job, quoted


def main(argv: Sequence[str]) -> int:
    """Exit status. Raises UserError and RunError."""
    words = translated(argv)
    c, place, as_json = read(words, lambda mine: compose(mine, place_workers(words)))
    todo = waves(c, place)
    cluster = c.rows[0].config.cluster
    if cluster.name == "print":
        for number, rows in enumerate(todo):
            sys.stdout.write(_executor(place, number, rows, f"<job of wave {number}>" if number else None).text)
        return 0
    if cluster.check_mount:
        refuse_local(place)
    known = begun(c, place)
    if not todo:
        result(c, place, known, as_json)
        return 0
    check_scheduler(cluster)
    _check(c, place, todo)
    sent = _submit(place, todo)
    again = " ".join(["python launch/compare.py", *argv])
    print(f"  status         python launch/status.py run={place}/wave-1\n  cancel         scancel {' '.join(sent)}\n"
          f"  table          {again} (at the end; before it, what has not finished is submitted again)")  # fmt: skip
    if not cluster.wait:
        return 0
    watched = [(f"{job}_{i}", folder(place, row.name), _place(place, n) / LOGS)
               for n, (job, rows) in enumerate(zip(sent, todo, strict=True)) for i, row in enumerate(rows)]  # fmt: skip
    if status := wait_for(watched):
        return status
    result(c, place, known, as_json)
    return 0


def waves(c: Set, place: Path) -> list[list[Row]]:
    """The runs that have not finished: first those that wait for none of them, then those that wait for these, and so on."""
    level: dict[str, int] = {}
    for row in c.rows:  # a run stands below all that it needs
        if not finished(row, place):
            level[row.name] = 1 + max((level.get(need, -1) for need in row.needs), default=-1)
    return [[row for row in c.rows if level.get(row.name) == n] for n in range(1 + max(level.values(), default=-1))]


def _place(place: Path, number: int) -> Path:
    return place / f"wave-{number + 1}"


def _executor(place: Path, number: int, rows: Sequence[Row], after: str | None) -> Executor:
    cluster = rows[0].config.cluster
    if after is not None:
        more = {**cluster.additional_parameters, "dependency": f"afterok:{after}", "kill_on_invalid_dep": "yes"}
        cluster = dataclasses.replace(cluster, additional_parameters=more)
    return Executor(_place(place, number), cluster, len(rows))


def _check(c: Set, place: Path, todo: Sequence[Sequence[Row]]) -> None:
    """Raise UserError for what a job would refuse hours later, as far as it can be told before its teachers are there."""
    done = {row.name for row in c.rows if finished(row, place)}
    for row in (row for rows in todo for row in rows):
        free(folder(place, row.name))
        alone = dataclasses.replace(row.config, kd=dataclasses.replace(row.config.kd, teachers=[]))
        if done.issuperset(row.needs):
            precheck(row.config)
        elif row.config.data.name != "distilled":
            precheck(alone)


def _submit(place: Path, todo: Sequence[Sequence[Row]]) -> list[str]:
    """Submit every wave; the arrays' numbers. If one is refused the others are taken back."""
    sent: list[str] = []
    for number, rows in enumerate(todo):
        dirs = [str(folder(place, row.name)) for row in rows]
        points = [Point(row.words, {"run": row.name}, dataclasses.replace(row.config)) for row in rows]  # a folder is put in
        jobs = [Job((*row.words, f"run_dir={quoted(d)}"), {"run": row.name}, d) for row, d in zip(rows, dirs, strict=True)]
        for one in sweep.make(_place(place, number), points, jobs):
            one.write_config()
        try:
            sent.append(_executor(place, number, rows, sent[-1] if sent else None).send())
        except UserError:
            scheduler.cancel(*sent)
            raise
        for i, d in enumerate(dirs):
            told = {"job": f"{sent[-1]}_{i}", "cluster": "slurm", "sweep": str(_place(place, number))}
            record.write(Path(d) / LOGS / "job.json", told)
        print(f"wave {number + 1}: submitted array {sent[-1]} of {len(rows)}: {', '.join(row.name for row in rows)}")
    return sent
