"""Section ``simulate``: 8 to 4,096 workers with both exchanges, made of what the other sections measured.

Design choices
- A meta-step takes a task from every worker, so the work grows with the workers, and all-reduce is spared what it is worst at.
- Shares are of what the workers' summed speed allows. Where a thread of the server is what holds it back, a server that costs
  nothing tells how much it takes away: below 90 % of that one the server is the bottleneck.
- Shards stand on the server's machine and share its network card, ``link`` Gbit/s; all-reduce has one such card a worker.
- All shards are tried in one scene, the hardest; the others compare the exchanges with one server.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

from exchange_calibrate import costs, measure
from exchange_costs import Costs, Crew, allreduce_speed
from exchange_model import ServerRun, server_speed
from exchange_parts import SPAWN
from exchange_steps import CREWS

WORKERS = tuple(2**k for k in range(3, 13))
SHARDS = (1, 2, 4, 8, 16)
CASES = ((1.2, 30.0), (1.2, 0.5), (40.0, 30.0))  # MB, seconds of a task
ENOUGH = 0.9  # of a server that costs nothing
SLOW, SLOWER = 0.05, 4.0  # that fraction of the workers (at least one) is so many times slower
FAILURES = 0.01  # of a worker, an hour
# sigma of task lengths, whether some are slow, failures of a worker an hour
SCENES = {"equal": (0.0, False, 0.0), "stragglers": (0.3, True, 0.0), "stragglers, failures": (0.3, True, FAILURES)}
HARD = "stragglers, failures"
_WARM = 5


def crew(scene: str, workers: int, task_s: float) -> Crew:
    """The workers of a scene."""
    sigma, slow, failures = SCENES[scene]
    behind = max(1, round(SLOW * workers)) if slow else 0
    return Crew((1.0,) * (workers - behind) + (SLOWER,) * behind, task_s, sigma, failures)


def free(c: Costs) -> Costs:
    """A server that costs nothing, on a card of any speed; only delays are left."""
    none = ((0.0, 0.0), (1.0, 0.0))
    return replace(
        c, io=none, hub=none, part=none, step=none, per_worker=0.0, per_parked=0.0, per_queued=0.0, link=float("inf")
    )


def _one(job: tuple[str, float, float, int, int, Costs]) -> dict[str, Any]:
    """shards 0: all-reduce; -1: a server that costs nothing."""
    scene, mb, task_s, workers, shards, c = job
    people = crew(scene, workers, task_s)
    about = {"scene": scene, "megabytes": mb, "task_s": task_s, "workers": workers, "shards": shards}
    if shards == 0:
        return about | allreduce_speed(people, mb, c)
    steps = _WARM + max(10, min(400, 4000 // workers))
    run = ServerRun(people, mb, free(c) if shards < 0 else c, max(1, shards))
    return about | server_speed(run, steps, _WARM)


def sweep(c: Costs, workers: tuple[int, ...]) -> list[dict[str, Any]]:
    """All combinations."""
    cases = itertools.product(SCENES, CASES, workers, (-1, 0, *SHARDS))
    jobs = [(scene, *case, n, k, c) for scene, case, n, k in cases if scene == HARD or k in (0, 1)]
    jobs.sort(key=lambda job: -job[3])
    with SPAWN.Pool(4) as pool:
        found = pool.map(_one, jobs, chunksize=1)
    return sorted(found, key=lambda r: (r["scene"], r["megabytes"], r["task_s"], r["workers"], r["shards"]))


def pick(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows with these values."""
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def bottlenecks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each size and task length: from how many workers on a server with K shards holds them back, and what does."""
    out = []
    for mb, task_s in CASES:
        for k in SHARDS:
            first, part = None, ""
            for r in pick(rows, scene=HARD, megabytes=mb, task_s=task_s, shards=k):
                best = pick(rows, scene=HARD, megabytes=mb, task_s=task_s, workers=r["workers"], shards=-1)[0]
                if r["tasks_per_s"] < ENOUGH * best["tasks_per_s"]:
                    first, part = r["workers"], max(r["load"], key=r["load"].get)
                    break
            most = max(r["tasks_per_s"] for r in pick(rows, scene=HARD, megabytes=mb, task_s=task_s, shards=k))
            out.append({"megabytes": mb, "task_s": task_s, "shards": k, "from_workers": first, "part": part, "most": most})
    return out


def winners(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The better exchange of every combination, a server with as many shards as suit it, and by how much."""
    out = []
    for r in pick(rows, shards=0):
        same = {k: r[k] for k in ("scene", "megabytes", "task_s", "workers")}
        best = max((s for s in pick(rows, **same) if s["shards"] > 0), key=lambda s: s["tasks_per_s"])
        one = pick(rows, **same, shards=1)[0]["tasks_per_s"] / r["tasks_per_s"]
        out.append(same | {"one_server": one, "best_server": best["tasks_per_s"] / r["tasks_per_s"], "shards": best["shards"]})
    return out


def validate(steps: dict[str, Any], c: Costs) -> list[dict[str, Any]]:
    """The simulation of what section ``steps`` measured, and its error."""
    out = []
    for r in steps["rows"]:
        factors, sigma = CREWS[r["crew"]]
        people = Crew(tuple(map(float, factors)), steps["nap_s"], sigma)
        if r["exchange"] == "server":
            run = ServerRun(people, steps["megabytes"], c, 1, r["max_staleness"], r["tasks"])
            found = server_speed(run, 1500, 100)
        else:
            found = allreduce_speed(people, steps["megabytes"], c, r["tasks"])
        measured = r["share"]
        about = {k: r[k] for k in ("crew", "exchange", "max_staleness", "tasks")}
        out.append(about | {"measured": measured, "simulated": found["share"], "error": found["share"] / measured - 1})
    return out


def run(wired: dict[str, Any], steps: dict[str, Any] | None, link_gbit: float, quick: bool) -> dict[str, Any]:
    """The section. link_gbit: of each machine's network card."""
    began = time.monotonic()
    measured = measure(sorted({r["megabytes"] for r in wired["rows"]}))
    loopback = costs(wired, measured)
    c = replace(loopback, link=link_gbit * 125)
    rows = sweep(c, WORKERS[:3] if quick else WORKERS)
    found = {"measured": measured, "costs": vars(c), "link_gbit": link_gbit, "rows": rows, "bottlenecks": bottlenecks(rows)}
    if steps is not None:
        found["validation"] = validate(steps, loopback)
    show(found)
    print(f"simulated in {time.monotonic() - began:.0f} s")
    return found


def show(found: dict[str, Any]) -> None:
    """Tables."""
    for r in found.get("validation", []):
        name = f"{r['crew']}, {r['exchange']}, max_staleness={r['max_staleness']}, tasks={r['tasks']}"
        print(f"{name:<66} measured {r['measured']:.1%}  simulated {r['simulated']:.1%}  error {r['error']:+.1%}")
    print("\nworkers from which on a server with so many shards holds them back (what of it does); tasks/s at most")
    for mb, task_s in CASES:
        cells = [
            f"{b['shards']}: {b['from_workers'] or 'never'} ({b['part'] or '-'}) {b['most']:.0f}/s"
            for b in pick(found["bottlenecks"], megabytes=mb, task_s=task_s)
        ]
        print(f"  {mb:g} MB, tasks of {task_s:g} s, shards " + ";  ".join(cells))
    print(f"\nserver / all-reduce, one server (the best number of shards; tried with {HARD} alone)")
    best = winners(found["rows"])
    for scene, (mb, task_s) in itertools.product(SCENES, CASES):
        cells = [
            f"{w['workers']}: {w['one_server']:.2f} ({w['best_server']:.2f})"
            for w in pick(best, scene=scene, megabytes=mb, task_s=task_s)
        ]
        print(f"  {scene}, {mb:g} MB, {task_s:g} s  " + "  ".join(cells))
