"""`launch/compare.py` for trained networks: teachers, assistants and students, run after run, as one table and one picture.

    python launch/compare.py preset=hinton data.root=data
    python launch/compare.py preset=takd smoke=true

A file of configs/compare/ with `kind: networks` holds named runs, each a list of words. `@name` in them is the folder of an
earlier run: a student waits for its teacher. `grid` makes a run of every combination of values, `chains` one of every link of
the listed paths. The same command resumes it: finished runs are not repeated.

    python launch/compare.py preset=takd cluster=slurm gpus_per_node=1 data.root=/shared/data

submits it: an array of all runs that wait for none, one of those that wait for these, and so on (metadist.run.cluster.waves).

keys: preset (required), out (default runs/<preset>), smoke, json=true; any other key goes to every run.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from metadist.config import Config
from metadist.errors import UserError
from metadist.evaluate.statistics import Summary
from metadist.identity import is_circumstance
from metadist.run.compare import Record, folder, last, truth
from metadist.run.compose import compose
from metadist.run.listing import read_json
from metadist.run.overrides import config_dir
from metadist.run.sweep import STATUS, Forward, Job, quoted, run_child
from metadist.run.table import table
from metadist.store import atomic_write

_OWN = ("preset", "out", "smoke", "json")
_REFERENCE = re.compile(r"@\{([^}]*)\}|@([\w.-]+)")


@dataclass(frozen=True)
class Row:
    """One run.

    words: of its command, references resolved. needs: the earlier runs it reads.
    at: its place in the picture. config: that of words.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    at: Mapping[str, Any]
    config: Config


@dataclass(frozen=True)
class Set:
    """A comparison: its rows, published figures by name, gaps to be recovered, axes of the picture."""

    name: str
    title: str
    rows: tuple[Row, ...]
    paper: Mapping[str, str]
    gaps: Mapping[str, Sequence[str]]
    plot: Mapping[str, str]


def is_networks(name: str) -> bool:
    """Whether a comparison is one of trained networks."""
    return _file(name).get("kind") == "networks"


def _file(name: str) -> dict[str, Any]:
    found: Any = OmegaConf.to_object(OmegaConf.load(config_dir() / "compare" / f"{name}.yaml"))
    return dict(found)


def listed(found: Mapping[str, Any]) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """(name, words, place in the picture) of every run of a file: its runs, its grid, links of its chains, runs after them."""
    for name, words in found["runs"].items():
        yield name, words, {}
    if grid := found.get("grid"):
        keys = list(grid["values"])
        for values in itertools.product(*grid["values"].values()):
            at = dict(zip(keys, values, strict=True))
            yield ", ".join(f"{k.split('.')[-1]} {v:g}" for k, v in at.items()), [
                *grid["words"], *(f"{k}={v:g}" for k, v in at.items())], at  # fmt: skip
    if chains := found.get("chains"):
        yield from _links(chains)
    for name, words in (found.get("after") or {}).items():
        yield name, words, {}


def _links(chains: Mapping[str, Any]) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """Every link of every path, once: 10, 10-6, 10-6-2; the first of a path is a teacher trained alone."""
    seen = set()
    for path in chains["paths"]:
        for end in range(1, len(path) + 1):
            name = "-".join(map(str, path[:end]))
            if name in seen:
                continue
            seen.add(name)
            size = f"{chains['key']}={path[end - 1]}"
            before = "-".join(map(str, path[: end - 1]))
            words = [*chains["student"], f"kd.teachers=[@{before}]"] if before else list(chains["teacher"])
            yield name, [*words, size], {"path": path[:end]}


def read(argv: Sequence[str], judge: Callable[[Sequence[str]], Config] = compose) -> tuple[Set, Path, bool]:
    """The comparison, where it goes, whether JSON is asked for. judge: words -> Config. UserError for what can't be run."""
    own = {k: v for k, _, v in (word.partition("=") for word in argv) if k in _OWN}
    if set_here := next((w.partition("=")[0] for w in argv if w.startswith(("steps=", "run_dir=", "budget_min="))), None):
        raise UserError(f"{set_here} is set by the comparison, for each run; leave it out")
    name = own["preset"]
    found = _file(name)
    smoke, as_json = truth("smoke", own), truth("json", own)
    place = Path(own.get("out") or f"runs/{name}{'-smoke' if smoke else ''}").expanduser().absolute()
    given = [word for word in argv if word.partition("=")[0] not in _OWN]
    rows: list[Row] = []
    for run, mine, at in listed(found):
        words = last(*found["common"], *mine, *(found["smoke"] if smoke else ()), *given)
        needs = [a or b for word in words for a, b in _REFERENCE.findall(word)]
        if unknown := [n for n in needs if n not in {r.name for r in rows}]:
            raise UserError(f"{name}, {run}: @{unknown[0]} is no run above it")
        resolved = tuple(_REFERENCE.sub(lambda m: quoted(str(folder(place, m[1] or m[2]))), word) for word in words)
        try:
            config = judge(resolved)
        except UserError as e:
            raise UserError(f"{name}, {run}: {e}") from None
        rows.append(Row(run, resolved, tuple(needs), at, config))
    made = Set(name, found["title"], tuple(rows), found.get("paper") or {}, found.get("gaps") or {}, found.get("plot") or {})
    return made, place, as_json


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
            "corrections": summary.get("corrections"), "paper": c.paper.get(row.name), "at": dict(row.at),
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
    """Of the gap in errors between two runs, [alone, teacher], the part that a student closes.

    Students are compared seed by seed with the same network alone: they begin and see the images alike.
    """
    errors, out = {row["name"]: row["errors"] for row in rows}, {}
    for student, (alone, teacher) in c.gaps.items():
        gap = Summary.of([float(e) for e in errors[alone]]).mean - Summary.of([float(e) for e in errors[teacher]]).mean
        if gap > 0:
            pairs = zip(errors[alone], errors[student], strict=True)
            out[student] = {"of": [alone, teacher], "gap": gap} | Summary.of([(a - s) / gap for a, s in pairs]).as_dict()
    return out


def _count(values: Sequence[int] | None) -> tuple[str, str]:
    if values is None:
        return "-", "-"
    s = Summary.of([float(v) for v in values])
    return f"{s.mean:.1f} +- {s.sd:.1f} ({s.n})", "-" if s.ci95 is None else f"+-{s.ci95:.1f}"


def text(c: Set, rows: Sequence[dict[str, Any]], gaps: Mapping[str, dict[str, Any]]) -> str:
    """The table for people, and a line for every gap."""
    header = ("run", "test errors (sd, n)", "95 %", "accuracy %", "steps", "minutes", "with its teachers", "paper")
    cells = []
    for row in rows:
        minutes = (f"{row['minutes']:.1f}", f"{row['all_minutes']:.1f}")
        accuracy = f"{100 * row['test']['mean']:.2f}"
        cells.append((row["name"], *_count(row["errors"]), accuracy, str(row["steps"]), *minutes, row["paper"] or "-"))
        for how, note in (("before", "as trained"), ("prior", "bias by prior"), ("test", "bias by the test set")):
            if correction := row["corrections"]:
                part = correction[how]
                seen = Summary.of([1 - e / correction["missing_images"] for e in part["missing_errors"]]).mean
                cells.append((f"  {note}", *_count(part["errors"]), f"{100 * seen:.1f} of the missing", "", "", "", ""))
    lines = [c.title, table(header, cells)]
    for name, g in gaps.items():
        known = "" if g["ci95"] is None else f" +-{100 * g['ci95']:.0f} (95% interval, n={g['n']})"
        lines.append(f"{name}: recovers {100 * g['mean']:.0f}%{known} of the gap between {g['of'][0]} and {g['of'][1]}")
    return "\n".join(lines)


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
