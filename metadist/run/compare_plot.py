"""comparison.png: accuracy against time, memory against inner steps."""

from __future__ import annotations

import io
from collections.abc import Sequence
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
