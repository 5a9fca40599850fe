"""report.png of a search: truth against proxy, rank correlations, and the regret of the pick, on one page.

Design choices
- Drawn with matplotlib's object interface on the Agg canvas: no global state, no display.
- One colour means one thing all over the page: the distilled set, training on real images, judgements without training.
- Truth is often crowded at the top: its axis is the error in percent on a logarithmic scale, best at the top.
- A candidate that a proxy failed on stands at the left edge as a cross: it ranks last.
- Without truth there is one panel: the proxies' best by their own scores.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from metadist.search.words import BLIND, CEILING
from metadist.store import atomic_write

_DISTILLED, _FREE, _CEILING, _INK, _FAINT = "#c8452d", "#8d8d8d", "#26466d", "#222222", "#e6e6e6"
_REAL = {"real_steps": "#5a9e57", "early_stop": "#c79a2b", "random_real": "#4c86b8", "coreset": "#8d6cab"}
_FREE_DASHES = ("-.", ":", (0, (6, 2)))


def save(path: Path | str, report: Mapping[str, Any]) -> None:
    """Write the page as a PNG, atomically. report: as of ``metadist.search.report.make``, or that read from its JSON."""
    atomic_write(path, draw(report))


def draw(report: Mapping[str, Any]) -> bytes:
    """The page as PNG bytes."""
    judged = report["judged"] > 0
    size = (13.0, 8.4) if judged else (6 + 0.055 * _longest(report), 1.4 + 0.3 * max(4, len(_trained(report))))
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(f"{report['space']} on {report['data']}, {report['count']} candidates", fontsize=14, color=_INK)
    if judged:
        axes = figure.subplots(2, 2)
        for spot, way in zip(axes[0], _shown(report), strict=False):
            _scatter(spot, report, way)
        for spot in axes[0][len(_shown(report)) :]:
            spot.set_visible(False)
        _bars(axes[1][0], report)
        _regrets(axes[1][1], report)
        panels = list(axes.flat)
    else:
        panels = [figure.subplots()]
        _best(panels[0], report)
    for panel in panels:
        panel.grid(color=_FAINT, linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _colour(report: Mapping[str, Any], way: str) -> str:
    if way in report["free"]:
        return _FREE
    return _REAL.get(way, _DISTILLED)


def _shown(report: Mapping[str, Any]) -> list[str]:
    """The two proxies of the scatters: the distilled set and random real images where they are there, else the first ones."""
    found = list(report["proxies"])
    return sorted(found, key=lambda way: ("distilled", "random_real").index(way) if way in ("distilled", "random_real") else 2)[
        :2
    ]


def _scatter(axes: Axes, report: Mapping[str, Any], way: str) -> None:
    """Truth against one proxy, a dot a candidate."""
    scale = 1 if way in report["free"] else 100
    pairs = [(c["scores"][way], 100 * (1 - c["truth"])) for c in report["candidates"] if c["truth"] is not None]
    x = [scale * score for score, _ in pairs if score is not None]
    axes.scatter(x, [e for score, e in pairs if score is not None], s=18, color=_colour(report, way), alpha=0.75, linewidth=0)
    lost = [e for score, e in pairs if score is None]
    if lost:
        edge = axes.get_yaxis_transform()
        axes.scatter([0.012] * len(lost), lost, s=26, marker="x", color=_INK, transform=edge, label=f"failed: {len(lost)}")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    _errors(axes, [e for _, e in pairs])
    found = report["proxies"][way]["spearman"]
    title = f"{way}: Spearman " + ("undefined" if found["value"] is None else f"{found['value']:.2f}")
    title += f" [{found['low']:.2f}, {found['high']:.2f}]" if found["low"] is not None else ""
    axes.set_title(title, fontsize=11, color=_INK)
    axes.set(xlabel=way if scale == 1 else f"validation accuracy by {way}, %", ylabel="test error after full training, %")
    if way in report["free"] and x and min(x) > 0:
        axes.set_xscale("log")


def _errors(axes: Axes, errors: list[float]) -> None:
    """The axis of errors: logarithmic where none is zero, few errors at the top."""
    if min(errors) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.invert_yaxis()


def _bars(axes: Axes, report: Mapping[str, Any]) -> None:
    """Spearman of every proxy, whiskers 95 %; pale below it that of the top half; a line: the ceiling."""
    edges = [-0.1]
    for i, (way, found) in enumerate(report["proxies"].items()):
        for key, y, height, alpha in (("spearman", i - 0.14, 0.46, 1.0), ("top_half", i + 0.25, 0.26, 0.4)):
            e = found[key]
            if e["value"] is None:
                if key == "spearman":
                    axes.annotate(" undefined", (0, i), va="center", fontsize=8, color=_INK)
                continue
            axes.barh(y, e["value"], color=_colour(report, way), height=height, alpha=alpha)
            edges.append(e["value"])
            if e["low"] is not None:
                axes.plot(
                    (e["low"], e["high"]), (y, y), color=_INK, linewidth=1, marker="|", markersize=5, alpha=max(alpha, 0.6)
                )
                edges.append(e["low"])
    ceiling = report["ceiling"]
    if ceiling is not None and ceiling["spearman"]["value"] is not None:
        value = ceiling["spearman"]["value"]
        axes.axvline(value, color=_CEILING, linewidth=1.4, linestyle="--")
        axes.annotate(f"{CEILING}: {value:.2f} ", (value, -0.68), ha="right", va="center", fontsize=8, color=_CEILING)
    axes.set_yticks(range(len(report["proxies"])), list(report["proxies"]))
    axes.set_ylim(len(report["proxies"]) - 0.5, -0.95)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set(xlabel="Spearman with truth, 95 % bootstrap over candidates; pale: top half", xlim=(min(edges) - 0.04, 1.02))


def _regrets(axes: Axes, report: Mapping[str, Any]) -> None:
    """Points lost by the pick against the budget, a line a proxy; the guess and the ceiling beside."""
    lines = [(way, found, _colour(report, way)) for way, found in report["proxies"].items()]
    if report["ceiling"] is not None:
        lines.append((CEILING, report["ceiling"], _CEILING))
    lines.append((BLIND, report["blind"], _INK))
    for way, found, colour in lines:
        dash = (
            _FREE_DASHES[report["free"].index(way) % 3] if way in report["free"] else "-" if way in report["proxies"] else "--"
        )
        axes.plot([int(b) for b in found["regret"]], list(found["regret"].values()), color=colour, linestyle=dash, marker="o",
                  markersize=4, linewidth=2.2 if way == "distilled" else 1.3, label=way, clip_on=False)  # fmt: skip
    if max(v for _, found, _ in lines for v in found["regret"].values()) > 10:
        axes.set_yscale("symlog", linthresh=1)
    axes.set_xscale("log")
    budgets = [int(b) for b in report["blind"]["regret"]]
    axes.set_xticks(budgets, [str(b) for b in budgets], minor=False)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set(xlabel="candidates drawn at random, of which the proxy picks", ylabel="regret of the pick, points of accuracy")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _trained(report: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The best of every proxy that trains, with the proxy's name."""
    return [(way, b) for way, found in report["best"].items() if way not in report["free"] for b in found]


def _longest(report: Mapping[str, Any]) -> int:
    return max((len(c["key"]) for c in report["candidates"]), default=0)


def _best(axes: Axes, report: Mapping[str, Any]) -> None:
    """Without truth: the best of every proxy by its own score, and the accuracy of those trained in full."""
    rows = _trained(report)
    for i, (way, b) in enumerate(rows):
        axes.barh(i, 100 * b["score"], color=_colour(report, way), height=0.7)
        if b["retrained"] is not None:
            axes.plot(100 * b["retrained"], i, marker="D", markersize=5, color=_INK, linestyle="none")
    axes.set_yticks(range(len(rows)), [f"{b['key']}  ({way})" for way, b in rows], fontsize=7)
    axes.set_ylim(max(1, len(rows)) - 0.4, -0.6)
    axes.set(xlabel="validation accuracy by the proxy, %\ndiamond: test accuracy after full training", xlim=(0, 101))
