"""`launch/compare.py`: several runs under one budget, one table, one picture.

    python launch/compare.py preset=gtn_three_gradients data.root=data
    python launch/compare.py preset=gtn_three_gradients smoke=true

A comparison is a file of configs/compare/: named runs, what they have in common, minutes of meta-steps for each, an accuracy
whose time is taken, inner steps at which the memory of one task is measured, seeds with which each run is repeated. It prints a
table and writes comparison.json and comparison.png beside the run folders. The same command resumes it: finished runs and
measurements are not repeated.

keys: preset (required), out (default runs/<preset>), budget_min, smoke, json=true; any other key goes to every run.

Comparisons of trained networks (teachers, assistants, students) have steps of their own instead of a budget, and runs that wait
for others: metadist.run.compare_networks.

Design choices
- Each run's number of meta-steps is its budget over the seconds a meta-step takes here, measured once and kept: a resumed
  comparison compares what it began to compare. Where a meta-step of all costs the same (same_steps), the first run's number
  is everyone's: another load of the machine is no difference between the runs.
- Runs and measurements are processes of their own: one's memory and compiled code do not weigh on the next.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from metadist.errors import RunError, UserError, unknown
from metadist.evaluate.statistics import Summary
from metadist.run.compose import compose
from metadist.run.listing import read_json
from metadist.run.overrides import config_dir
from metadist.run.sweep import STATUS, Forward, Job, end_with_parent, quoted, run_child
from metadist.run.table import table
from metadist.run.unread import unread
from metadist.store import atomic_write

SMOKE_STEPS = 3
_OWN = ("preset", "out", "budget_min", "smoke", "json")


@dataclass(frozen=True)
class Comparison:
    """What a file of configs/compare/ says, the user's words included. runs: name -> words of its command; with seeds, one for
    each of them (``seeded``)."""

    name: str
    title: str
    budget_min: float
    target: float
    curve: str
    memory_steps: tuple[int, ...]
    runs: dict[str, tuple[str, ...]]
    smoke: bool
    same_steps: bool


def comparisons() -> tuple[str, ...]:
    """Names of all comparisons."""
    return tuple(sorted(p.stem for p in (config_dir() / "compare").glob("*.yaml")))


def read(argv: Sequence[str]) -> tuple[Comparison, Path, bool]:
    """The comparison, where it goes, whether JSON is asked for. Raises UserError for anything that can't be run."""
    pairs = [word.partition("=") for word in argv]
    own = {k: v for k, _, v in pairs if k in _OWN}
    if any(not sep for _, sep, _ in pairs) or "preset" not in own:
        raise UserError(f"usage: python launch/compare.py preset=<{'|'.join(comparisons())}> [key=value ...]")
    if set_here := next((k for k, _, _ in pairs if k in ("steps", "run_dir")), None):
        raise UserError(f"{set_here} is set by the comparison, for each run; give budget_min or out instead")
    if own["preset"] not in comparisons():
        raise unknown("preset", own["preset"], comparisons())
    found: Any = OmegaConf.to_object(OmegaConf.load(config_dir() / "compare" / f"{own['preset']}.yaml"))
    smoke, as_json = truth("smoke", own), truth("json", own)
    words = tuple(word for word in argv if word.partition("=")[0] not in _OWN)
    more = (*found["common"], *(found["smoke"] if smoke else ()), *words)
    if "seeds" in found and any(word.startswith("seed=") for word in words):
        raise UserError(
            f"seed is set by the comparison: it runs with seeds {', '.join(map(str, found['seeds']))}; leave it out"
        )
    runs = seeded({name: last(*mine, *more) for name, mine in found["runs"].items()}, found.get("seeds", ()))
    for name, mine in runs.items():
        try:
            compose(mine)
        except UserError as e:
            raise UserError(f"{own['preset']}, {name}: {e}") from None
    try:
        budget = float(own.get("budget_min", found["budget_min"]))
    except ValueError:
        budget = math.nan
    if not 0 < budget < math.inf:
        raise UserError(f"budget_min={own['budget_min']} is no number of minutes above 0")
    steps = tuple(found["memory_steps"][:2] if smoke else found["memory_steps"])
    place = Path(own.get("out") or f"runs/{own['preset']}{'-smoke' if smoke else ''}").expanduser().absolute()
    same = bool(found.get("same_steps", False))
    made = Comparison(own["preset"], found["title"], budget, float(found["target"]), found["curve"], steps, runs, smoke, same)
    return made, place, as_json


def seeded(runs: Mapping[str, tuple[str, ...]], seeds: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Each run once for each seed, named "<run>, seed <seed>"; without seeds as they are."""
    if not seeds:
        return dict(runs)
    return {f"{name}, seed {seed}": last(*words, f"seed={seed}") for name, words in runs.items() for seed in seeds}


def family(name: str) -> str:
    """The run that a seeded one repeats."""
    return name.partition(", seed ")[0]


def truth(key: str, own: dict[str, str]) -> bool:
    """The program's own key as true or false. Raises UserError for anything else."""
    if (given := own.get(key, "false")) not in ("true", "false"):
        raise unknown(key, given, ("true", "false"))
    return given == "true"


def last(*words: str) -> tuple[str, ...]:
    """The words; of several for one key the last."""
    return tuple({word.partition("=")[0]: word for word in words}.values())


def probe(words: Sequence[str]) -> dict[str, float]:
    """Seconds of a meta-step and bytes of one task, measured in a process of its own. Raises RunError if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "metadist.run.probe", *words], capture_output=True, text=True, preexec_fn=end_with_parent
    )
    if done.returncode:
        raise RunError(f"measuring {' '.join(words)}: {(done.stderr.strip().splitlines() or ['it was killed'])[-1]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


class Record:
    """comparison.json: everything that was measured, by name."""

    def __init__(self, path: Path) -> None:
        """Go on with what is there."""
        self.path, self.content = path, read_json(path)

    def once(self, name: str, measure: Any) -> Any:
        """What is recorded under ``name``; measured and written if it is not there yet."""
        if name not in self.content:
            self.content[name] = measure()
            self.write()
        return self.content[name]

    def write(self) -> None:
        """Keep it."""
        atomic_write(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


def folder(place: Path, name: str) -> Path:
    """The run folder of one of the runs."""
    return place / name.replace(", ", "-").replace(" ", "-")


def run_all(c: Comparison, place: Path, record: Record) -> bool:
    """Measure, then train all; True if all finished."""
    first = family(next(iter(c.runs)))
    for name, words in c.runs.items():  # all before the first run: the machine's load may change while they work
        record.once(f"{family(name)}: probe", lambda words=words: probe(words))
    for name, words in c.runs.items():
        seconds = record.content[f"{family(name)}: probe"]["step_s"]
        if c.same_steps and family(name) != first:
            steps = record.once(f"{family(name)}: steps", lambda: record.content[f"{first}: steps"])
        else:
            affordable = max(10, int(60 * c.budget_min / seconds))
            steps = record.once(f"{family(name)}: steps", lambda n=affordable: SMOKE_STEPS if c.smoke else n)
        run_dir = str(folder(place, name))
        print(f"{name}: {steps} meta-steps of {seconds:.3g} s -> {run_dir}", flush=True)
        with Forward().installed() as forward:  # around a run alone: it ends by itself, a probe is ended by us
            code = run_child(Job((*words, f"steps={steps}", f"run_dir={quoted(run_dir)}"), {}, run_dir), forward)
        if code or forward.stopped:
            print(f"{name}: {STATUS.get(code, f'ended ({code})')}; run the same command again to go on", file=sys.stderr)
            return False
    for name, words in c.runs.items():
        ignored = unread(compose(words))
        lengths = [key for key in ("inner.steps", "implicit.steps") if key not in ignored]
        for n in c.memory_steps:
            sized = last(*words, *(f"{key}={n}" for key in lengths))
            record.once(f"{family(name)}: memory at {n}", lambda w=sized: probe(w)["bytes"])
    return True


def curve(run_dir: Path, name: str, step_s: float) -> list[tuple[float, float]]:
    """(minutes of meta-steps, a logged value) at every step that logged it, by TensorBoard's files of the run.

    step_s: seconds of a meta-step as probed: what the machine did besides while the run worked has no part in it.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return [(found.step * step_s / 60, found.value) for found in events.Scalars(f"learning/{name}")]


def report(c: Comparison, place: Path, record: Record) -> list[dict[str, Any]]:
    """One row a run."""
    rows, first = [], family(next(iter(c.runs)))
    for name in c.runs:
        summary, run_dir = read_json(folder(place, name) / "summary.json"), folder(place, name)
        pace = record.content[f"{first if c.same_steps else family(name)}: probe"]["step_s"]
        points = curve(run_dir, "valid_accuracy", pace)
        rows.append({
            "name": name, "steps": summary["steps"], "test": summary["test"], "minutes": summary["minutes"],
            "valid_accuracy": points,
            "meta_loss": curve(run_dir, "meta_loss", pace),
            "step_s": pace,
            "target_min": next((m for m, accuracy in points if accuracy >= c.target), None),
            "memory": {n: record.content[f"{family(name)}: memory at {n}"] for n in c.memory_steps},
        })  # fmt: skip
    return rows


def text(c: Comparison, rows: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    header = ("run", "accuracy % (sd, n)", "95 %", "s a meta-step", "meta-steps", f"min to {c.target:g} %",
              *(f"MB at {n}" for n in c.memory_steps))  # fmt: skip
    cells = []
    for row in rows:
        test = row["test"]
        cells.append((
            row["name"], f"{100 * test['mean']:.2f} +- {100 * test['sd']:.2f} ({test['n']})",
            "-" if test["ci95"] is None else f"+-{100 * test['ci95']:.2f}",
            f"{row['step_s']:.3g}", str(row["steps"]), "-" if row["target_min"] is None else f"{row['target_min']:.1f}",
            *(f"{v / 1e6:.1f}" for v in row["memory"].values()),
        ))  # fmt: skip
    means = "".join(f"\n{line}" for line in over_seeds(rows))
    return f"{c.title}, {c.budget_min:g} minutes of meta-steps each\n{table(header, cells)}{means}"


def over_seeds(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each run that was repeated: its mean and standard deviation over the seeds."""
    means: dict[str, list[float]] = {}
    for row in rows:
        if row["name"] != family(row["name"]):
            means.setdefault(family(row["name"]), []).append(row["test"]["mean"])
    found = {name: Summary.of(values) for name, values in means.items()}
    return [f"{name}: {100 * s.mean:.2f} +- {100 * s.sd:.2f} over {s.n} seeds" for name, s in found.items()]


def main(argv: Sequence[str]) -> int:
    """Exit status of `launch/compare.py` on these words."""
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__ + f"\ncomparisons: {', '.join(comparisons())}")
        return 0
    from metadist.run import compare_networks, compare_plot, compare_set

    chosen = next((word.partition("=")[2] for word in argv if word.startswith("preset=")), None)
    if chosen in comparisons() and compare_set.is_networks(str(chosen)):
        return compare_networks.main(argv)
    if away := next((w for w in argv if w.startswith("cluster=") and w != "cluster=local"), None):
        networks = ", ".join(n for n in comparisons() if compare_set.is_networks(n))
        raise UserError(f"{away}: {chosen} measures on this machine how far a budget goes; comparisons for arrays: {networks}")
    c, place, as_json = read(argv)
    record = Record(place / "comparison.json")
    if record.once("runs", lambda: {k: list(v) for k, v in c.runs.items()}) != {k: list(v) for k, v in c.runs.items()}:
        raise UserError(f"{place} holds a comparison of other settings; give out=<another folder>, or the words it began with")
    if not run_all(c, place, record):
        return 1
    rows = report(c, place, record)
    record.content["rows"] = rows
    record.write()
    atomic_write(place / "comparison.png", compare_plot.draw(c.title, c.target, c.curve, rows))
    print(json.dumps(rows, indent=1) if as_json else f"\n{text(c, rows)}\nlook at {place}/comparison.png")
    return 0
