"""lower_bound.png: what sets of M examples reach in linear regression, beside what theory says.

Design choices
- Matplotlib's object interface on the Agg canvas: no global state, no display.
"""

from __future__ import annotations

import io
import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_LEARNED, _THEORY, _INK = "#c8452d", "#26466d", "#222222"


def picture(result: dict[str, Any]) -> bytes:
    """The plot as PNG bytes: excess against M, logarithmic (the cliff) and linear (theory and practice agree)."""
    figure = Figure(figsize=(11.5, 4.9), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"One gradient step from any start needs M ≥ D examples: linear regression, D = {result['dimension']}, "
        f"N = {result['samples']}, {result['trials']} problems", fontsize=12.5, color=_INK,
    )  # fmt: skip
    cliff, near = figure.subplots(1, 2, width_ratios=[1.15, 1])
    for axes in (cliff, near):
        _axes(axes, result)
    floor = 10.0 ** math.floor(math.log10(max(min([s["reached"] for s in result["sets"]] + [1e-12]), 1e-32)) - 1)
    cliff.set_yscale("log")
    cliff.set_ylim(floor, 10 * result["bounds"][0])
    near.set_ylim(0, 1.05 * result["bounds"][0])
    cliff.legend(framealpha=1, edgecolor="white", fontsize=9.5, labelcolor=_INK, loc="lower left")
    cliff.annotate(
        "bound 0: the optimum is reachable;\nlearned up to the optimizer's precision",
        (result["rank"], 0.8), xycoords=("data", "axes fraction"), xytext=(6, 0), textcoords="offset points",
        fontsize=9.5, color=_INK, va="top",
    )  # fmt: skip
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _axes(axes: Axes, result: dict[str, Any]) -> None:
    rank, dimension, bounds = result["rank"], result["dimension"], result["bounds"]
    axes.axvline(rank, color="#999999", lw=1, ls="--", zorder=0)
    name = f"D = {dimension}" if rank == dimension else f"rank = {rank}"
    axes.annotate(f" {name}", (rank, 0.93), xycoords=("data", "axes fraction"), fontsize=10, color="#666666")
    axes.plot(range(rank), bounds[:rank], "-o", ms=3, color=_THEORY, lw=1.6, label="bound: no set of M examples gets below")
    if len(bounds) > rank:
        axes.plot(range(rank, len(bounds)), bounds[rank:], "-o", ms=3, color=_THEORY, lw=1.6)  # zeros: on the linear axis only
    sizes = [s["size"] for s in result["sets"]]
    each = list(zip(*(s["reached_each"] for s in result["sets"])))
    for i, values in enumerate(each):
        axes.plot(sizes, values, "o", ms=4, mew=0, alpha=0.35, color=_LEARNED, label=None if i else "learned, each problem")
    axes.plot(
        sizes, [s["reached"] for s in result["sets"]], "o", ms=7.5, mfc="none", mew=1.6, color=_LEARNED, label="learned, mean"
    )
    axes.set_xlabel("M, distilled examples", color=_INK)
    axes.set_ylabel("expected excess loss after one step", color=_INK)
    axes.set_xlim(-0.03 * len(bounds), 1.04 * (len(bounds) - 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, colors=_INK)
