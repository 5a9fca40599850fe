"""comparison.png: accuracy against time, memory against inner steps; of trained networks, test errors."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metadist.run.compare import family

COLOURS = ("#c8452d", "#4c86b8", "#5a9e57", "#8d6cab", "#c79a2b", "#444444")
WORDS = {"valid_accuracy": "validation accuracy of fresh learners, %", "meta_loss": "meta-loss on real data"}


def draw(title: str, target: float, curve: str, rows: Sequence[dict[str, Any]]) -> bytes:
    """The page as PNG bytes. curve: what is drawn against time, one of WORDS. rows: as of ``compare.report``."""
    measured = bool(rows[0]["memory"])
    figure = Figure(figsize=(11 if measured else 7, 4.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    panels = list(figure.subplots(1, 2)) if measured else [figure.subplots()]
    for row, colour in zip(rows, _colours(rows), strict=True):
        minutes, values = zip(*row[curve], strict=True) if row[curve] else ((), ())
        label = f"{row['name']}: {100 * row['test']['mean']:.1f} % at the end (test)"
        panels[0].plot(minutes, values, color=colour, marker="o", markersize=3, linewidth=1, label=label)
    panels[0].set(xlabel="minutes of meta-steps", ylabel=WORDS[curve], yscale="log" if curve == "meta_loss" else "linear")
    if curve == "valid_accuracy":
        panels[0].axhline(target, color="#bbbbbb", linewidth=1, linestyle=":")
    if measured:
        _memory(panels[1], rows)
    for axes in panels:
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _colours(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A colour for each row: the seeds of one run share it."""
    families = list(dict.fromkeys(family(row["name"]) for row in rows))
    return [COLOURS[families.index(family(row["name"])) % len(COLOURS)] for row in rows]


def _memory(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    first = {family(row["name"]): (row, colour) for row, colour in reversed(list(zip(rows, _colours(rows), strict=True)))}
    for name, (row, colour) in reversed(first.items()):
        steps, used = zip(*((int(n), v / 1e6) for n, v in row["memory"].items()), strict=True)
        axes.plot(steps, used, color=colour, marker="o", markersize=4, label=name)
    axes.set(xlabel="inner steps", ylabel="live tensors of one task's meta-gradient, MB", xscale="log", yscale="log")
    axes.set_xticks(steps, [str(n) for n in steps], minor=False)
    axes.minorticks_off()


def networks(title: str, plot: Mapping[str, str], rows: Sequence[dict[str, Any]]) -> bytes:
    """Test errors in percent: against the key plot.x, a line for each value of plot.series; without it a bar for each run.

    rows: as of ``compare_networks.report``. Whiskers are 95% intervals of the mean. Of the paths to one size the best is red.
    """
    figure = Figure(
        figsize=(8, max(3.0, 0.32 * len(rows) + 1.2) if "x" not in plot else 4.4), facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots()
    _lines(axes, plot, rows) if "x" in plot else _bars(axes, rows)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _error(row: dict[str, Any]) -> tuple[float, float]:
    return 100 * (1 - row["test"]["mean"]), 100 * (row["test"]["ci95"] or 0.0)


def _lines(axes: Any, plot: Mapping[str, str], rows: Sequence[dict[str, Any]]) -> None:
    placed = [row for row in rows if plot["x"] in row["at"]]
    series = sorted({row["at"].get(plot.get("series", ""), "") for row in placed}, key=str)
    for value, colour in zip(series, COLOURS, strict=False):
        mine = sorted(
            (row["at"][plot["x"]], *_error(row)) for row in placed if row["at"].get(plot.get("series", ""), "") == value
        )
        x, y, whisker = zip(*mine, strict=True)
        label = f"{plot.get('series_name', '')} {value}".strip()
        axes.errorbar(x, y, whisker, color=colour, marker="o", markersize=4, linewidth=1, capsize=2, label=label)
    looks = itertools.product(("#888888", "#222222"), ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1))))
    for row, (colour, style) in zip((row for row in rows if not row["at"]), itertools.cycle(looks), strict=False):
        axes.axhline(_error(row)[0], color=colour, linewidth=1, linestyle=style, label=row["name"])
    axes.set(xlabel=plot.get("xlabel", plot["x"]), ylabel="test errors, %", xscale=plot.get("xscale", "linear"))
    places = sorted({row["at"][plot["x"]] for row in placed})
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False)


def _bars(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    ends = {tuple(row["at"]["path"])[-1] for row in rows if "path" in row["at"]}
    routes = {end: [r for r in rows if len(r["at"].get("path", [])) > 1 and r["at"]["path"][-1] == end] for end in ends}
    best = {min(found, key=lambda r: _error(r)[0])["name"] for found in routes.values() if len(found) > 1}
    for i, row in enumerate(rows):
        mean, whisker = _error(row)
        axes.barh(i, mean, xerr=whisker, color="#c8452d" if row["name"] in best else "#4c86b8", height=0.7)
        axes.annotate(f" {mean:.2f}", (mean + whisker, i), va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="test errors, %")
