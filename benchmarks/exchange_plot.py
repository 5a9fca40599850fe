"""The picture of section ``simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from exchange_simulate import CASES, FAILURES, HARD, SCENES, SHARDS, SLOW, SLOWER, pick
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

# Okabe and Ito's colours, told apart by the colour-blind; markers tell them apart in print.
BLUE, ORANGE, GREEN, PINK, BLACK, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000", "#56B4E9"
_MARKS = dict(zip(SHARDS, zip((BLUE, SKY, GREEN, PINK, BLACK), "osD^v")))
# A server's process has a thread that moves and encrypts bytes, and one that answers; the trainer sums.
_PARTS = {
    "io": "encryption",
    "shard_io": "encryption",
    "hub": "messages",
    "shard": "messages",
    "trainer": "sums",
    "card": "card",
}
_STYLES = dict(zip(SCENES, (":", "--", "-")))


def _line(axes: Axes, rows: list[dict[str, Any]], key: str, **style: Any) -> None:
    scale = 100 if key == "share" else 1
    axes.plot([r["workers"] for r in rows], [scale * r[key] for r in rows], **{"markersize": 4.5, "linewidth": 1.6} | style)


def _shares(axes: Axes, rows: list[dict[str, Any]], mb: float, task_s: float) -> None:
    """Both exchanges, with and without trouble: colours tell the exchange, strokes the trouble."""
    for scene, stroke in _STYLES.items():
        for shards, color, mark in ((1, BLUE, "o"), (0, ORANGE, "s")):
            same = pick(rows, scene=scene, megabytes=mb, task_s=task_s, shards=shards)
            _line(axes, same, "share", color=color, marker=mark, linestyle=stroke)
    axes.set(ylim=(-3, 104), ylabel="tasks/s, % of what the workers' summed speed allows")
    axes.annotate("equal workers: both exchanges", (0.5, 0.92), xycoords="axes fraction", ha="center", fontsize=9)
    axes.set_title(f"Who wins: {mb:g} MB, tasks of {task_s:g} s, one server")
    handles = [
        Line2D([], [], color=BLUE, marker="o", label="server"),
        Line2D([], [], color=ORANGE, marker="s", label="all-reduce"),
    ]
    handles += [Line2D([], [], color="grey", linestyle=stroke, label=scene) for scene, stroke in _STYLES.items()]
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(0, 0.55))


def _scaling(axes: Axes, found: dict[str, Any], mb: float, task_s: float) -> None:
    """Tasks a second by shards; the legend says from how many workers on they are the bottleneck, and what of them."""
    rows, case = found["rows"], {"megabytes": mb, "task_s": task_s}
    ideal = pick(rows, scene=HARD, **case, shards=-1)
    _line(axes, ideal, "tasks_per_s", color="0.8", marker="", linewidth=7, label="a server that costs nothing")
    for shards, (color, mark) in _MARKS.items():
        same = pick(rows, scene=HARD, **case, shards=shards)
        limit = pick(found["bottlenecks"], **case, shards=shards)[0]
        what = f"{_PARTS[limit['part']]} from {limit['from_workers']:,}" if limit["from_workers"] else "no bottleneck"
        label = f"server, {shards} shard{'s' * (shards > 1)}: {what}"
        _line(axes, same, "tasks_per_s", color=color, marker=mark, linestyle="-", label=label)
    for scene, stroke in _STYLES.items():
        same = pick(rows, scene=scene, **case, shards=0)
        _line(axes, same, "tasks_per_s", color=ORANGE, marker="s", linestyle=stroke, label=f"all-reduce: {scene}")
    axes.set(yscale="log", ylabel="tasks/s", ylim=(None, 30 * ideal[-1]["tasks_per_s"]))
    axes.set_title(f"Where the server saturates: {mb:g} MB, tasks of {task_s:g} s")
    axes.legend(fontsize=8, loc="upper left", title="what limits the server, from how many workers on", title_fontsize=8)


def draw(found: dict[str, Any], path: Path) -> None:
    """Three panels: who wins, and how far one server and its shards go."""
    figure, panels = plt.subplots(1, 3, figsize=(17, 6), constrained_layout=True)
    _shares(panels[0], found["rows"], *CASES[0])
    for axes, case in zip(panels[1:], CASES[1:]):
        _scaling(axes, found, *case)
    for axes in panels:
        axes.set_xscale("log", base=2)
        ticks = sorted({r["workers"] for r in found["rows"]})
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=8)
        axes.set_xlabel("workers")
        axes.grid(alpha=0.25)
    figure.suptitle(
        f"Simulated from measured costs (CURVE on; cards of {found['link_gbit']:g} Gbit/s; a meta-step takes a task from every "
        f"worker). Stragglers: lengths vary by 30 %, {SLOW:.0%} of the workers are {SLOWER:g}x slower.\n"
        f"Failures: a worker fails every {1 / FAILURES:g} h, is back in 2 min, all-reduce restarts from its checkpoint. "
        f"The servers of the middle and right: {HARD}.", fontsize=10)  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)
