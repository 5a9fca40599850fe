"""`launch/compare.py` for trained networks: teachers, assistants and students, run after run, as one table and one picture.

    python launch/compare.py preset=hinton data.root=data
    python launch/compare.py preset=takd smoke=true

A file of configs/compare/ with `kind: networks` holds named runs, each a list of words. `@name` in them is the folder of an
earlier run: a student waits for its teacher. `grid` makes a run of every combination of values, `chains` one of every link of
the listed paths; `sets` are runs that distil a set, on which networks may then be trained (metadist.run.compare_set). The same
command resumes it: finished runs are not repeated.

    python launch/compare.py preset=takd cluster=slurm gpus_per_node=1 data.root=/shared/data

submits it: an array of all runs that wait for none, one of those that wait for these, and so on (metadist.run.cluster.waves).

keys: preset (required), out (default runs/<preset>), smoke, json=true, paths=[[10,6,2],[10,2]] (the chains of a preset that has
some); any other key goes to every run, unless the runs differ in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metadist.errors import UserError
from metadist.evaluate import statistics
from metadist.evaluate.statistics import Summary
from metadist.identity import is_circumstance
from metadist.run.compare import Record, folder
from metadist.run.compare_set import Row, Set, read
from metadist.run.listing import read_json
from metadist.run.sweep import STATUS, Forward, Job, quoted, run_child
from metadist.run.table import table
from metadist.store import atomic_write

TOGETHER = " together"


def finished(row: Row, place: Path) -> bool:
    """Whether a run is done, by its folder."""
    summary = read_json(folder(place, row.name) / "summary.json")
    return bool(summary.get("finished")) and summary.get("steps", -1) >= row.config.steps


def run_all(c: Set, place: Path) -> bool:
    """Train all, in order; True if all finished."""
    for i, row in enumerate(c.rows):
        if finished(row, place):
            continue
        run_dir = str(folder(place, row.name))
        print(f"[{i + 1}/{len(c.rows)}] {row.name} -> {run_dir}", flush=True)
        with Forward().installed() as forward:
            code = run_child(Job((*row.words, f"run_dir={quoted(run_dir)}"), {}, run_dir), forward)
        if code or forward.stopped:
            print(f"{row.name}: {STATUS.get(code, f'ended ({code})')}; run the same command again to go on", file=sys.stderr)
            return False
    return True


def report(c: Set, place: Path) -> list[dict[str, Any]]:
    """One row a run. Minutes are the run's own, `all_minutes` with those of the runs it needs."""
    found = {row.name: read_json(folder(place, row.name) / "summary.json") for row in c.rows}
    rows = []
    for row in c.rows:
        summary, before = found[row.name], _before(c, row)
        rows.append({
            "name": row.name, "steps": summary["steps"], "test": summary["test"], "errors": summary.get("errors"),
            "images": summary.get("test_images"), "parameters": summary.get("parameters"), "minutes": summary["minutes"],
            "all_minutes": round(summary["minutes"] + sum(found[name]["minutes"] for name in before), 2),
            "all_steps": summary["steps"] + sum(found[name]["steps"] for name in before),
            "corrections": summary.get("corrections"), "together": summary.get("together"),
            "paper": c.paper.get(row.name), "at": dict(row.at),
        })  # fmt: skip
    return rows


def _before(c: Set, row: Row) -> set[str]:
    """All runs that a run stands on."""
    needs = {r.name: r.needs for r in c.rows}
    out, todo = set[str](), list(row.needs)
    while todo:
        if (name := todo.pop()) not in out:
            out.add(name)
            todo += needs[name]
    return out


def recovered(c: Set, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the gap in errors between two runs, [alone, teacher], the part that a student closes; `<run> together`: its ensemble.

    Students are compared seed by seed with the same network alone: they begin and see the images alike.
    """
    errors, out = {row["name"]: row["errors"] for row in rows}, {}
    errors |= {f"{row['name']}{TOGETHER}": [row["together"]] for row in rows if row["together"] is not None}
    for student, (alone, teacher) in c.gaps.items():
        if {student, alone, teacher} <= errors.keys():  # one network has no `together`
            found = statistics.recovered(errors[alone], errors[student], errors[teacher])
            if found is not None:
                out[student] = {"of": [alone, teacher], **found.as_dict()}
    return out


def _count(values: Sequence[int] | None) -> tuple[str, str]:
    if values is None:
        return "-", "-"
    s = Summary.of([float(v) for v in values])
    return f"{s.mean:.1f} +- {s.sd:.1f} ({s.n})", "-" if s.ci95 is None else f"+-{s.ci95:.1f}"


def text(c: Set, rows: Sequence[dict[str, Any]], gaps: Mapping[str, dict[str, Any]]) -> str:
    """The table for people, and a line for every gap."""
    header = ("run", "test errors (sd, n)", "95 %", "accuracy %", "steps", "minutes", "with its teachers", "paper")
    cells: list[tuple[str, ...]] = []
    measured = {name for pair in c.gaps.values() for name in pair}
    for row in rows:
        minutes = (f"{row['minutes']:.1f}", f"{row['all_minutes']:.1f}")
        accuracy = f"{100 * row['test']['mean']:.2f}"
        cells.append((row["name"], *_count(row["errors"]), accuracy, str(row["steps"]), *minutes, row["paper"] or "-"))
        if row["together"] is not None and f"{row['name']}{TOGETHER}" in measured:
            cells.append(
                ("  together", *_count([row["together"]]), f"{100 * (1 - row['together'] / row['images']):.2f}", *[""] * 4)
            )
        for how, note in (("before", "as trained"), ("prior", "bias by prior"), ("test", "bias by the test set")):
            if correction := row["corrections"]:
                part = correction[how]
                seen = Summary.of([1 - e / correction["missing_images"] for e in part["missing_errors"]]).mean
                cells.append((f"  {note}", *_count(part["errors"]), f"{100 * seen:.1f} of the missing", "", "", "", ""))
    lines = [c.title, table(header, cells)]
    for name, g in gaps.items():
        known = "" if g["ci95"] is None else f" +-{100 * g['ci95']:.0f} (95% interval, n={g['n']})"
        lines.append(f"{name}: recovers {100 * g['mean']:.0f}%{known} of the gap between {g['of'][0]} and {g['of'][1]}")
    return "\n".join([*lines, *_paths(rows)])


def _paths(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Of the chains to one size: the best, and the direct path, at equal steps of the student."""
    links = [row for row in rows if len(row["at"].get("path", [])) > 1]
    for end in sorted({row["at"]["path"][-1] for row in links}):
        routes = [row for row in links if row["at"]["path"][-1] == end and row["at"]["path"][0] == links[0]["at"]["path"][0]]
        direct = [row for row in routes if len(row["at"]["path"]) == 2]
        if len(routes) > 1 and direct:
            best = max(routes, key=lambda row: float(row["test"]["mean"]))
            shown = [f"{row['name']} {Summary(**row['test']).text()}" for row in (best, direct[0])]
            yield f"to {end}: the best of {len(routes)} paths is {shown[0]}; the direct one is {shown[1]}"


def result(c: Set, place: Path, record: Record, as_json: bool) -> None:
    """Write and print the table of a comparison whose runs are all done."""
    from metadist.run import compare_plot

    rows = report(c, place)
    gaps = recovered(c, rows)
    record.content |= {"rows": rows, "gaps": gaps}
    record.write()
    shown = text(c, rows, gaps)
    atomic_write(place / "table.txt", f"{shown}\n".encode())
    atomic_write(place / "comparison.png", compare_plot.networks(c.title, c.plot, rows))
    print(json.dumps(rows, indent=1) if as_json else f"\n{shown}\nlook at {place}/comparison.png")


def begun(c: Set, place: Path) -> Record:
    """Its record. Raises UserError where the folder holds a comparison of other settings; how it is run may differ."""
    record = Record(place / "comparison.json")
    words = {row.name: [w for w in row.words if not is_circumstance(w.lstrip("+").partition("=")[0])] for row in c.rows}
    if record.once("runs", lambda: words) != words:
        raise UserError(f"{place} holds a comparison of other settings; give out=<another folder>, or the words it began with")
    return record


def main(argv: Sequence[str]) -> int:
    """Exit status of `launch/compare.py` on the words of such a comparison."""
    if any(word.startswith("cluster=") and word != "cluster=local" for word in argv):
        from metadist.run.cluster import waves

        return waves.main(argv)
    c, place, as_json = read(argv)
    record = begun(c, place)
    if not run_all(c, place):
        return 1
    result(c, place, record, as_json)
    return 0
