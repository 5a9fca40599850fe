"""What a run costs, in words, before its first step; and what it takes while it runs."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def duration(seconds: float) -> str:
    """Seconds as people say them: 48s, 3m20s, 2h05m, 3d04h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def megabytes(mb: float) -> str:
    """A size given in MB (1e6 bytes) with three digits: 1.23 MB, 45.6 GB."""
    return f"{mb / 1e3:.3g} GB" if mb >= 1e3 else f"{mb:.3g} MB"


def peak_memory_mb(device: torch.device | str = "cpu") -> float:
    """Peak memory of this process so far in MB (1e6 bytes): on a GPU what tensors took there, else resident memory."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, KiB on Linux


def disk_mb(
    checkpoint_mb: float, set_mb: float, keep: int, anchors: int = 0, scalars: int = 0, pictures_mb: float = 0.0
) -> float:
    """Disk a run takes in MB.

    checkpoint_mb, set_mb: size of a checkpoint and of a distilled set (two are kept: the best and the last).
    keep, anchors: checkpoints kept at its end; one more exists while it is written.
    scalars: values logged in all (60 bytes each in TensorBoard's file); pictures_mb: all logged pictures together.
    """
    return checkpoint_mb * (keep + anchors + 1) + 2 * set_mb + scalars * 60e-6 + pictures_mb


def estimate(
    step_s: float, steps_left: int, peak_mb: float, disk: float, *, evaluation_s: float = 0.0, workers: int = 1, tasks: int = 0
) -> str:
    """The lines printed before the first step.

    step_s: seconds of a meta-step, from a trial step; steps_left: meta-steps still to do.
    peak_mb: peak memory of one worker in MB; disk: MB the folder will take in all.
    evaluation_s: seconds of all validations and of the final evaluation together; workers, tasks: as configured.
    """
    training = step_s * steps_left
    total = training + evaluation_s
    hours = f"{total / 3600:.2g} h" if total >= 36 else "less than 0.01 h"
    each = f"{tasks} tasks a step, " if tasks else ""
    plural = "" if workers == 1 else "s"
    lines = [
        f"this run: {steps_left} meta-steps x {step_s:.3g} s ({each}{workers} worker{plural}) = {duration(training)}"
        + (f", evaluation {duration(evaluation_s)}" if evaluation_s else "")
        + f"; in all {hours}",
        f"peak memory {megabytes(peak_mb)} a worker, disk {megabytes(disk)}",
    ]
    return "\n".join(lines)
