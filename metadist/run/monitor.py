"""What a run shows while it runs: TensorBoard, a progress bar or plain lines, and log.txt.

Design choices
- One table, NAMES, defines every logged name in words; a name that is not in it is refused.
- `step` is the number of meta-steps done. A run resumed at step n keeps what was logged up to n and purges what the killed
  process logged after it.
- One writer: rank 0. For other ranks ``Monitor(None, ...)`` does nothing at all.
- A terminal gets a bar with time left and latest accuracy, anything else plain lines; log.txt gets the lines either way.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metadist.errors import unknown
from metadist.run.cost import duration
from metadist.store import atomic_write, disk_error

NAMES: dict[str, str] = {
    "meta_loss": "cross-entropy on real data after training on the distilled images, mean over the step's tasks; "
    "method=train and kd: the networks' own loss",
    "grad_norm": "Euclidean norm of the whole meta-gradient, before clipping",
    "rate/": "learned learning rate of inner step NN (rate/00 is the first)",
    "momentum/": "learned momentum of inner step NN",
    "meta_rate": "learning rate of the outer optimizer at this step, roll-backs included",
    "valid_accuracy": "accuracy in percent on the validation split, mean over fresh networks trained on the distilled set; "
    "method=train and kd: over the networks",
    "valid_accuracy_sd": "standard deviation in percent of that accuracy over the networks",
    "step_s": "wall seconds of a meta-step, mean since the last log",
    "compute_s": "of step_s: this worker's tasks forward and backward",
    "exchange_s": "of step_s: summing gradients over the workers, waiting for them included",
    "data_s": "of step_s: drawing real batches, initializations and augmentation",
    "tasks_per_s": "tasks done per second by all workers together",
    "peak_memory_mb": "peak memory of rank 0 in MB: resident on a CPU, tensors on a GPU",
    "skipped": "meta-steps skipped so far because their gradient was not finite or exploded",
    "rollbacks": "roll-backs to the last checkpoint so far, each with half the meta rate after it",
    "residual": "implicit: |lambda - (H + damping) v| / |lambda| of the last tasks' systems; 0: solved exactly",
    "inner_gradient_norm": "implicit: norm of the inner loss's gradient where the last tasks' training ended",
    "staleness": "server: versions that each applied gradient was behind, since the last log",
    "accepted": "server: gradients accepted since its start",
    "stale": "server: gradients refused for their staleness, their tasks handed out again",
    "duplicate": "server: gradients for a lease that its sender did not hold any more",
    "lost": "server: gradients that never came or were lost with a shard, their tasks handed out again",
    "refused": "server: connections and messages that were refused",
    "workers_alive": "server: workers heard of within five heartbeats",
    "queue_length": "server: gradients accepted and not yet applied",
    "pull_ms": "server: milliseconds from a worker's request to its parameters, waiting for work not included; mean",
    "push_ms": "server: milliseconds from a worker's gradient to the verdict on it; mean",
    "utilisation/": "server: fraction of the time since the last log that worker NN computed",
    "images": "the distilled images as one grid, a row per inner step or class",
}


PUBLISH_S = 2.0

# TensorBoard shows a row of cards for each prefix; a name with a slash is its own.
ROWS: dict[str, tuple[str, ...]] = {
    "learning": ("meta_loss", "grad_norm", "valid_accuracy", "valid_accuracy_sd", "meta_rate"),
    "seconds": ("step_s", "compute_s", "exchange_s", "data_s", "tasks_per_s", "peak_memory_mb"),
    "implicit": ("residual", "inner_gradient_norm"),
    "trouble": ("skipped", "rollbacks"),
    "server": (
        "staleness",
        "accepted",
        "stale",
        "duplicate",
        "lost",
        "refused",
        "workers_alive",
        "queue_length",
        "pull_ms",
        "push_ms",
    ),
}


def tag(name: str) -> str:
    """The name under which TensorBoard shows a logged name: learning/meta_loss, rate/03."""
    return next((f"{row}/{name}" for row, names in ROWS.items() if name in names), name)


def known(name: str) -> bool:
    """Whether ``name`` is defined in NAMES, itself or by its prefix up to the slash."""
    head, slash, tail = name.partition("/")
    return f"{head}/" in NAMES and bool(tail) if slash else name in NAMES


class Monitor:
    """Logs one start of one run.

    run_dir: where the event file and log.txt go; None: everything is a no-op (ranks other than 0).
    start_step: meta-steps done when this start begins; total_steps: where it ends.
    incarnation: this start's number; part of the event file's name.
    """

    def __init__(self, run_dir: str | Path | None, start_step: int, total_steps: int, incarnation: int = 0) -> None:
        """Open the event file, log.txt and the bar."""
        self._dir = None if run_dir is None else Path(run_dir)
        self._total, self._start, self._since = total_steps, start_step, time.monotonic()
        self._valid: float | None = None
        self._published, self._incarnation = -math.inf, incarnation
        self._bar: Any = None
        if self._dir is None:
            return
        # Scalars of steps > start_step are a dead process's; at 0 everything is.
        purge = start_step + 1 if start_step else 0
        from torch.utils.tensorboard import SummaryWriter  # ~1 s to import: not for the other ranks

        try:
            self._log = (self._dir / "log.txt").open("a", encoding="utf-8")
            suffix = f".{incarnation:04d}"
            self._writer = SummaryWriter(str(self._dir), purge_step=purge, filename_suffix=suffix)
        except OSError as e:
            raise disk_error(self._dir, 0, e) from e
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log scalars at ``step`` (meta-steps done); values that hold meta_loss also make a line.

        Raises UserError (a fault of the caller) for a name that NAMES does not define.
        """
        for name in values:
            if not known(name):
                raise unknown("logged name", name, NAMES)
        if self._dir is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(tag(name), float(value), step)
        self._writer.flush()
        self._valid = values.get("valid_accuracy", self._valid)
        if "meta_loss" in values:
            self._show(step, values)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Log a distribution; nothing if it is empty."""
        if not known(name):
            raise unknown("logged name", name, NAMES)
        if self._dir is not None and values:
            self._writer.add_histogram(tag(name), torch.tensor(values, dtype=torch.float64), step)
            self._writer.flush()

    def image(self, step: int, name: str, grid: Tensor) -> None:
        """Log a picture. grid: uint8 [H, W, 3 or 1]."""
        if not known(name):
            raise unknown("logged name", name, NAMES)
        if self._dir is not None:
            self._writer.add_image(name, grid, step, dataformats="HWC")
            self._writer.flush()

    def say(self, text: str) -> None:
        """Print ``text`` for the user and keep it in log.txt."""
        if self._dir is None:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
        self._keep(text)

    def begin(self) -> None:
        """Start the clock that the time left is reckoned by: compilation and trial steps before it don't count."""
        self._since = time.monotonic()

    def advance(self, step: int) -> None:
        """Move the bar to ``step``; cheap, may be called every step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        if self._dir is None:
            return
        self._dir = None
        self._writer.close()
        self._log.close()
        if self._bar is not None:
            self._bar.close()

    def _show(self, step: int, values: dict[str, float]) -> None:
        line = self._line(step, values)
        self._publish(step)
        if self._bar is None:
            self.say(line)
            return
        self._keep(line)
        shown = {"loss": f"{values['meta_loss']:.3f}"}
        if self._valid is not None:
            shown["valid"] = f"{self._valid:.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self.advance(step)

    def _left(self, step: int) -> float | None:
        """Seconds to the end at the pace so far, evaluations and checkpoints included; None before the first step."""
        done = step - self._start
        return (time.monotonic() - self._since) / done * (self._total - step) if done > 0 else None

    def _publish(self, step: int) -> None:
        """For `launch/status.py`: how far this start is, in a file of its own, at most every PUBLISH_S seconds."""
        if self._dir is None or (time.monotonic() - self._published < PUBLISH_S and step < self._total):
            return
        self._published = time.monotonic()
        record = {"step": step, "steps": self._total, "left_s": self._left(step), "valid_accuracy": None, "time": time.time()}
        if self._valid is not None:
            record["valid_accuracy"] = self._valid / 100
        atomic_write(self._dir / "progress" / f"{self._incarnation:04d}.json", json.dumps(record).encode())

    def _line(self, step: int, values: dict[str, float]) -> str:
        parts = [f"step {step}/{self._total}", f"loss {values['meta_loss']:.3f}"]
        if "grad_norm" in values:
            parts.append(f"grad {values['grad_norm']:.1e}".replace("e+0", "e").replace("e-0", "e-"))
        if self._valid is not None:
            parts.append(f"valid {self._valid:.1f}")
        if "step_s" in values:
            parts.append(f"{values['step_s']:.3g} s/step")
        if (left := self._left(step)) is not None:
            parts.append(f"left {duration(left)}")
        bad = [f"{k} {values[k]:.0f}" for k in ("skipped", "rollbacks") if values.get(k)]
        return "  ".join(parts + bad)

    def _keep(self, text: str) -> None:
        try:
            self._log.write(text + "\n")
            self._log.flush()
        except OSError as e:
            raise disk_error(Path(self._log.name), len(text), e) from e
