"""report.png: the distilled images, accuracy against inner step, and the baselines, on one page.

Design choices
- Drawn with matplotlib's object interface on the Agg canvas: no global state, no display.
- One colour means one thing all over the page: distilled, real, all real data, untrained. A paler bar is another training.
- Bands are deviation over networks, whiskers the 95% interval of the mean; the titles say so.
- Many steps make a tall picture: it is cut into columns, read from left to right.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from metadist.evaluate.report import NAMES, Report, Row
from metadist.store import atomic_write
from metadist.synthetic.distilled import DistilledSet
from metadist.synthetic.picture import grid

_COLOURS = {"distilled": "#c8452d", "none": "#b0b0b0", "all": "#26466d"}
_REAL = "#4c86b8"
_ALPHAS = (1.0, 0.62, 0.36, 0.22)  # of the trainings, in order of appearance
_INK, _FAINT = "#222222", "#dddddd"
_WIDTH = 6.4  # inches of a column


def save(report: Report, path: Path | str) -> None:
    """Write the page as a PNG, atomically."""
    atomic_write(path, draw(report))


def draw(report: Report) -> bytes:
    """The page as PNG bytes."""
    pictures = _columns(report.dset)
    tall = max(p.shape[0] for p in pictures) / sum(p.shape[1] for p in pictures)
    heights = (min(max(_WIDTH * tall, 1.2), 9.0) + 0.3, 2.9 if report.curves else 0.01)
    figure = Figure(figsize=(2 * _WIDTH, sum(heights) + 0.9), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(report), fontsize=14, color=_INK)
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.12, h_pad=0.1)
    halves: Any = figure.subfigures(1, 2)
    left, right = halves
    top, bottom = left.subfigures(2, 1, height_ratios=heights)
    _images(top, pictures, report)
    if report.curves:
        _curves(bottom.subplots(), report)
    _bars(right.subplots(), report)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _title(report: Report) -> str:
    manifest = report.dset.manifest
    made = f" made for {manifest['data']}" if manifest.get("data") not in (None, report.data) else ""
    line = f"{manifest.get('method', 'distilled set')}{made}   ·   {report.data}   ·   {report.net}"
    best = report.find("distilled") or report.find("distilled", report.settings.ordinary or "standard")
    if best is None:
        return line
    s = best.result.summary
    networks = f"± {100 * s.sd:.1f} (sd), n = {s.n} networks" if s.n > 1 else "(n = 1 network)"
    return f"{line}   ·   {report.settings.split} accuracy {100 * s.mean:.1f} % {networks}"


def _columns(dset: DistilledSet) -> list[Any]:
    """The grid of images, uint8 [h, w, 3] each: one piece, or several of whole steps where one would be too tall."""
    whole, (images, steps) = dset.picture(), dset.shown()
    pieces = min(steps, math.ceil(math.sqrt(whole.shape[0] / whole.shape[1] / 1.3)))
    if pieces <= 1:
        return [whole.numpy()]
    x = dset.normalization.invert(images).reshape(steps, -1, *images.shape[1:])
    parts = torch.tensor_split(torch.arange(steps), pieces)
    shown = [x[part].flatten(0, 1) for part in parts]
    return [grid(images, len(part), len(dset.classes)).numpy() for images, part in zip(shown, parts)]


def _images(figure: Any, pictures: list[Any], report: Report) -> None:
    dset = report.dset
    batches = "one batch" if dset.steps == 1 else f"{dset.steps} batches"
    made = "distilled" if dset.maker is None else "generated"
    figure.suptitle(f"{len(dset.images)} {made} images: {batches}, {len(dset.order)} steps", fontsize=10.5, color=_INK)
    height = max(p.shape[0] for p in pictures)
    axes = figure.subplots(1, len(pictures), squeeze=False, width_ratios=[p.shape[1] for p in pictures])[0]
    for ax, picture in zip(axes, pictures):
        ax.imshow(picture, interpolation="nearest")
        ax.set_ylim(height, 0)
        ax.set_axis_off()


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, colors=_INK)
    axes.set_axisbelow(True)


def _curves(axes: Axes, report: Report) -> None:
    count = len(report.dset.images)
    for curve in report.curves:
        colour = _COLOURS.get(curve.images, _REAL)
        mean, sd = 100 * curve.accuracies.mean(1).numpy(), 100 * curve.sd.numpy()
        label = f"{count} {NAMES.get(curve.images, curve.images)} images"
        axes.plot(curve.steps, mean, color=colour, linewidth=2, marker="o", markersize=3.5, label=label)
        axes.fill_between(curve.steps, mean - sd, mean + sd, color=colour, alpha=0.16, linewidth=0)
    axes.set_xlim(0, max(report.curves[0].steps))
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("inner step", fontsize=9.5, color=_INK)
    axes.set_title(f"{report.settings.split} accuracy (%) while training; band: ± 1 sd", fontsize=10.5, color=_INK)
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.legend(frameon=False, fontsize=9, loc="best")
    _plain(axes)


def _groups(report: Report) -> dict[str, list[Row]]:
    """Rows by what was trained on (and the net, where it is another one), in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in report.rows:
        name = row.training if row.images == "none" else NAMES.get(row.images, row.images)
        name += f"\n{row.training.replace(', ', chr(10))}" if row.images == "all" else ""
        groups.setdefault(name if row.net == report.net else f"{name}\non {row.net}", []).append(row)
    return groups


def _kind(row: Row) -> str:
    """The training without the word that tells recorded from ordered steps: the same bar for both."""
    return "steps as recorded" if row.protocol == "recorded" else row.training


def _bars(axes: Axes, report: Report) -> None:
    kinds = list(dict.fromkeys(_kind(r) for r in report.rows if r.images not in ("none", "all")))
    at, ticks = 0.0, []
    for name, rows in _groups(report).items():
        ticks.append((at + (len(rows) - 1) / 2, name))
        for row in rows:
            _bar(axes, at, row, _ALPHAS[min(kinds.index(_kind(row)), 3)] if _kind(row) in kinds else 1.0)
            at += 1
        at += 0.6
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(at - 0.9, -0.7)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    title = f"{report.settings.split} accuracy (%) after training; whiskers: 95% interval of the mean"
    axes.set_title(title, fontsize=10.5, color=_INK)
    axes.grid(axis="x", color=_FAINT, linewidth=0.7)
    _plain(axes)
    axes.tick_params(axis="y", length=0, labelsize=9.5)
    handles = [Patch(color=_INK, alpha=_ALPHAS[min(i, 3)], linewidth=0, label=kind) for i, kind in enumerate(kinds)]
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=len(handles))


def _bar(axes: Axes, at: float, row: Row, alpha: float) -> None:
    s = row.result.summary
    axes.barh(at, 100 * s.mean, color=_COLOURS.get(row.images, _REAL), alpha=alpha, height=0.86, linewidth=0)
    reach = 100 * (s.ci95 or 0.0)
    if reach:
        axes.errorbar(100 * s.mean, at, xerr=reach, color=_INK, linewidth=1.1, capsize=2.5)
    axes.text(100 * s.mean + reach + 1, at, f"{100 * s.mean:.1f}", va="center", fontsize=8.5, color=_INK, clip_on=True)
