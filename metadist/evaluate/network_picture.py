"""report.png of trained networks: errors of each, errors in each class, and the test images that most of them misread."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from metadist.store import atomic_write

_OWN, _TEACHER, _FAINT = "#c8452d", "#26466d", "#dddddd"
_SHOWN = (5, 6)  # rows and columns of misread images


def save(
    path: Path | str,
    title: str,
    guesses: Tensor,
    y: Tensor,
    images: Tensor,
    classes: Sequence[str],
    teachers: Mapping[str, float],
) -> None:
    """Write the page as a PNG, atomically.

    guesses: predicted classes int64 [S, N]; y: classes [N]; images: [N, C, H, W] in [0, 1]; teachers: name -> its test errors.
    """
    wrong = (guesses != y).cpu()
    figure = Figure(figsize=(13, 4.6), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    parts: Any = figure.subfigures(1, 3, width_ratios=(1, 1.1, 1.5))
    _networks(parts[0].subplots(), wrong.sum(1), teachers, len(y))
    _classes(parts[1].subplots(), wrong, y.cpu(), classes)
    _misread(parts[2], wrong, guesses.cpu(), y.cpu(), images.cpu(), classes)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    atomic_write(path, data.getvalue())


def _plain(axes: Any, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.set_title(title, fontsize=10)


def _networks(axes: Any, errors: Tensor, teachers: Mapping[str, float], images: int) -> None:
    axes.plot(range(1, len(errors) + 1), errors, "o", color=_OWN)
    axes.axhline(float(errors.double().mean()), color=_OWN, linewidth=1, label="mean")
    for (name, value), style in zip(teachers.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color=_TEACHER, linewidth=1, linestyle=style, label=f"teacher {name}")
    axes.set_ylim(0, 1.08 * max(float(errors.max()), *teachers.values(), 1.0))
    axes.set_xlabel("network")
    axes.legend(fontsize=8, frameon=False)
    _plain(axes, f"test errors of {images:,}")


def _classes(axes: Any, wrong: Tensor, y: Tensor, classes: Sequence[str]) -> None:
    most = sorted(range(len(classes)), key=lambda c: -int(wrong[:, y == c].sum()))[:20]  # of very many classes the worst
    shown = sorted(most)
    share = torch.stack([100 * wrong[:, y == c].double().mean(1) for c in shown], 1)
    spread = share.std(0) if len(share) > 1 else None
    axes.barh(range(len(shown)), share.mean(0), xerr=spread, color=_OWN, height=0.7, error_kw={"linewidth": 1})
    axes.set_yticks(range(len(shown)), [classes[c] for c in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    _plain(axes, "misread of each class, %; whisker: sd over networks")


def _misread(figure: Any, wrong: Tensor, guesses: Tensor, y: Tensor, images: Tensor, classes: Sequence[str]) -> None:
    figure.suptitle("misread by most networks: class > what most of those read", fontsize=10)
    counts = wrong.sum(0)
    order = [int(i) for i in counts.argsort(descending=True, stable=True)[: _SHOWN[0] * _SHOWN[1]] if counts[i]]
    for axes, i in zip(figure.subplots(*_SHOWN).flat, [*order, *[-1] * (_SHOWN[0] * _SHOWN[1] - len(order))], strict=True):
        axes.set_axis_off()
        if i < 0:
            continue
        picture = images[i].clamp(0, 1).permute(1, 2, 0)
        axes.imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray_r", vmin=0, vmax=1)
        read = int(guesses[wrong[:, i], i].mode().values)
        axes.set_title(f"{classes[int(y[i])][:9]} > {classes[read][:9]}", fontsize=7, pad=2)
