"""From a configuration to what every candidate is trained and judged with; the work on a search, and its result."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metadist import data as data_room
from metadist.config import Config
from metadist.config_search import FREE
from metadist.evaluate import fitting
from metadist.evaluate.plan import Plan
from metadist.evaluate.recipe import Recipe
from metadist.metagrad.optimizers import Optimizer
from metadist.run import search_set
from metadist.run.attempts import Attempts
from metadist.run.cost import duration
from metadist.run.queue import run_queue
from metadist.run.search import Search, Task
from metadist.run.setup import DTYPES, device_of, with_precision
from metadist.search.table import Outcome, Table
from metadist.search.training import Measured, measure
from metadist.search.ways import Bench, cost
from metadist.store import atomic_write, clean
from metadist.synthetic.distilled import load

_SAY_S = 10.0  # between two lines
SUMMARY = "summary.json"
PATIENCE = 2  # processes killed at a task before its candidates are done one by one
KILLED = "its process was killed, as by the system where memory runs out"


def prepare(config: Config, folder: Path) -> Bench:
    """Load the data and the set, and check that they fit each other. Raises UserError."""
    device, dtype, c = device_of(config), DTYPES[config.engine.dtype], config.search
    torch.set_num_threads(config.threads or 1)
    data = data_room.load(config.data, device, dtype, config.cache_dir, config.smoke)
    recipe, dset = None, None
    if c.set is not None:
        dset = load(c.set)
        search_set.check(config, dset, data)
        data = fitting.aligned(data, dset.normalization)
        recipe = Recipe.of(dset, dtype, device)
    clean(folder)
    optimizer = Optimizer("momentum" if c.momentum else "sgd")
    plan = Plan(c.epochs, optimizer, c.momentum, c.weight_decay, c.batch, config.data.augment, c.schedule, (c.lr,))
    lower = functools.partial(with_precision, precision=config.engine.precision, device=device)
    steps = c.steps or (len(recipe.order) if recipe is not None else 1)
    compile = config.engine.compile == "on"  # every architecture is compiled anew: that pays for few
    bench = Bench(data, recipe, plan, steps, c.set_lr, c.coreset, c.halving, c.seed, c.init, lower, compile)
    for way in c.proxy:
        if way not in FREE:
            cost(bench, way)  # draws the subsets: what can't be drawn is a mistake to be told before any work
    return bench


def work(config: Config, folder: Path, attempts: Attempts, patient: bool = True) -> bool:
    """Work on what is missing beside all others who do; True once everything is done. Raises UserError and RunError.

    attempts: of ``marks``, which whoever ends this process by a signal tells so.
    patient: stay while others work. Before its last phase every worker is: what comes next is for all.
    """
    search = Search(config, folder)
    if search.finished():
        return True
    bench = prepare(config, folder)
    say = _Progress(config, search)
    last = False
    for phase in search.phases():
        tasks = {t.name: t for way, indices in phase.items() for t in search.tasks(way, indices)}
        last = (config.search.truth != "none" and not config.search.halving) or "retrained" in phase
        done = run_queue(
            list(tasks),
            lambda name, tasks=tasks: _do(search, bench, tasks[name], say, attempts),  # type: ignore[misc]
            lambda name, tasks=tasks: not search.missing(tasks[name]),  # type: ignore[misc]
            attempts.place,
            patient=patient or not last,
        )
        if not done:
            return False
    return True


def marks(folder: Path) -> Attempts:
    """Those of a search's tasks."""
    return Attempts(folder / "queue")


def _do(search: Search, bench: Bench, task: Task, say: Callable[[str], None], attempts: Attempts) -> None:
    """What is missing of a task. One that has killed two processes is done one by one: who kills then has failed."""
    results, solo = search.results, attempts.killed(task.name) >= PATIENCE
    lost = [i for i in search.missing(task) if any(o.failed == KILLED for o in results.known(task.way, i))]  # by another seed
    for index in search.missing(task):
        if index in lost or (solo and index == attempts.suspect(task.name)):
            results.put(task.way, task.repeat, index, Measured(None, KILLED, 0.0, 0))
    wanted = search.missing(task)
    for part in [(i,) for i in wanted] if solo or lost else [task.indices]:
        with attempts.begun(task.name, part[0] if solo else None):
            own = [i for i in wanted if i in part]
            for index, found in measure(bench, search.space, task.way, task.repeat, part, own):
                results.put(task.way, task.repeat, index, found)
                say(task.way)
    attempts.forget(task.name)


class _Progress:
    """A line every ten seconds and worker: how many are done, about how long the ways that have begun still take."""

    def __init__(self, config: Config, search: Search) -> None:
        self.workers, self.search = config.workers, search
        self.said = time.monotonic()

    def __call__(self, way: str) -> None:
        """One more is done."""
        if time.monotonic() - self.said < _SAY_S * self.workers:
            return
        self.said = time.monotonic()
        results, done, total, seconds, after = self.search.results, 0, 0, 0.0, list[str]()
        for name, every in self._trainings(way).items():
            known = [results.of(name, repeat, i).seconds for repeat, i in every if results.has(name, repeat, i)]
            total, done = total + len(every), done + len(known)
            if known:
                seconds += sum(known) / len(known) * (len(every) - len(known))
            else:  # nobody knows yet how long one takes
                after.append(name)
        then = f", then {', '.join(after)}" if after else ""
        print(f"{way}: {done} of {total} done, about {duration(seconds / self.workers)} left{then}", flush=True)

    def _trainings(self, way: str) -> dict[str, list[tuple[int, int]]]:
        """Every (seed, candidate) by way, of the phases up to that of ``way``."""
        found: dict[str, list[tuple[int, int]]] = {}
        for phase in self.search.phases():
            found |= {w: [(r, i) for r in range(self.search.repeats(w)) for i in indices] for w, indices in phase.items()}
            if way in phase:
                break
        return found


def outcome(config: Config, folder: Path) -> dict[str, Any]:
    """The report of a finished search: made and kept, or found as it was made for the same candidates, seeds and proxies."""
    search = Search(config, folder)
    asked = dataclasses.asdict(config.search)
    path = folder / SUMMARY
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        if found.get("search") == asked:
            return found
    from metadist.search import picture, report

    made = report.make(table(config, search))
    text = report.text(made)
    atomic_write(folder / "report.json", (json.dumps(made, indent=1) + "\n").encode())
    atomic_write(folder / "table.txt", (text + "\n").encode())
    picture.save(folder / "report.png", made)
    record = {"finished": True, "search": asked, "text": text, "report": made}
    atomic_write(path, (json.dumps(record, indent=1) + "\n").encode())
    return record


def table(config: Config, search: Search) -> Table:
    """All that was found."""
    c = config.search
    ways = {
        way: {search.key(i): search.results.outcome(way, i, search.repeats(way)) for i in indices}
        for way, indices in search.ways.items()
    }
    truth = ways.pop("truth", {})
    if search.known is not None:
        own = [search.key(i) for i in search.candidates]
        truth = {key: Outcome(search.known[key], None, 0.0, 0) for key in own}
    keys = tuple(search.key(i) for i in search.candidates)
    seconds, where = search_set.cost(c.set)
    remarks = tuple(filter(None, [search_set.remark(config)]))
    return Table(c.space, config.data.name, keys, truth, ways, seconds, where, c.best, _settings(config), remarks)


def _settings(config: Config) -> dict[str, Any]:
    """What the report shows of how candidates were trained."""
    c = config.search
    names = ("set", "seeds", "proxy_seeds", "epochs", "lr", "momentum", "weight_decay", "batch", "schedule", "steps", "set_lr")
    shown = {name: getattr(c, name) for name in (*names, "truth")} | {"augment": config.data.augment}
    return {k: v for k, v in shown.items() if v is not None}
