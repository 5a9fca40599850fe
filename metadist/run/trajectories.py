"""The training of a group of experts: many networks at once, a snapshot an epoch, killed anywhere and gone on with.

Design choices
- What a network sees at a step is a function of (experts.seed, network, step): initialization, order of the images and
  augmentation are drawn by counter. So its file does not depend on who trains it, when, or beside whom.
- A group has a fixed number of networks, and they are trained together where that is faster (``at_once``); a group that would
  reach beyond experts.count is trained in full, so that one shape serves all.
- A checkpoint holds the state after any step and the snapshots so far. It is written every run.checkpoint_s seconds and when a
  stop is asked for; it is removed once the experts' files are there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metadist import draw
from metadist.config import Config
from metadist.data import Data, augment, dsa
from metadist.errors import RunError
from metadist.evaluate.train import accuracy, at_once, statistics
from metadist.metagrad.inner import Inner
from metadist.nets import Learner
from metadist.store import Checkpoints
from metadist.store.experts import Trajectory, file_name, write_expert

_SAY_S = 10.0  # between two lines about the same networks
_STATISTICS = 10  # batches that BatchNorm's statistics are averaged over


@dataclass(frozen=True)
class Job:
    """What every group of a job has in common. say: takes a line for people; left: see ``time_left``."""

    config: Config
    data: Data
    learner: Learner
    inner: Inner
    folder: Path
    key: str
    say: Callable[[str], None]
    left: Callable[[float, int], str]

    @property
    def images(self) -> int:
        """Training images of an epoch."""
        return min(self.config.experts.images or len(self.data.train), len(self.data.train))

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.images // min(self.config.experts.batch, self.images))

    def finished(self, expert: int) -> bool:
        """Whether the expert's file is there."""
        return (self.folder / file_name(expert)).exists()


def members(config: Config, group: int) -> list[int]:
    """The experts that belong to a group and to the job."""
    size = config.experts.group
    return list(range(group * size, min((group + 1) * size, config.experts.count)))


def train_group(job: Job, group: int, stop: Callable[[], bool]) -> None:
    """Train what is missing of a group; returns without it, with a checkpoint, if ``stop()`` says so.

    Raises RunError for a network whose weights are no longer finite, and when the disk refuses.
    """
    c = job.config.experts
    ids = list(range(group * c.group, (group + 1) * c.group))
    wanted = [i for i in members(job.config, group) if not job.finished(i)]
    several = at_once(job.learner, c.group, min(c.batch, job.images))
    for together in [ids] if several > 1 else [[i] for i in wanted]:
        _train(job, together, wanted, stop)
        if stop():
            return


class _Training:
    """Networks ``ids`` after ``step`` steps, and their snapshots so far."""

    def __init__(self, job: Job, ids: Sequence[int]) -> None:
        """From their last checkpoint, or from the beginning."""
        self.job, self.ids, device = job, ids, job.learner.device
        number = torch.tensor(ids, dtype=torch.int64, device=device)
        seed = job.config.experts.seed
        self.keys = draw.key(seed, "expert order", 0, number)
        self.place = job.folder / "partial" / f"{ids[0]:05d}-{ids[-1]:05d}"
        # Whoever holds the group's lock is its only writer; one number for all of them.
        self.checkpoints = Checkpoints(self.place, 1, keep=2)
        self.saved_at = time.monotonic()
        found = self.checkpoints.load_newest()
        if found is None:
            theta0 = job.learner.init(draw.key(seed, "expert theta0", 0, number))
            self.step, self.state = 0, job.inner.optimizer.init(theta0)
            self.paths = [Trajectory(theta) for theta in theta0]
        else:
            self.step, tensors, _ = found
            self.state = tuple(tensors[f"state/{i}"].to(device) for i in range(1 + job.inner.optimizer.buffers))
            own = [{k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{n}/")} for n in range(len(ids))]
            self.paths = [Trajectory.of(saved) for saved in own]
        self._order: tuple[int, Tensor] = (-1, self.keys)

    def save(self) -> None:
        """Keep the state and the snapshots."""
        tensors = {f"state/{i}": part for i, part in enumerate(self.state)}
        for n, path in enumerate(self.paths):
            tensors |= {f"{n}/{k}": v for k, v in {**path.tensors(), **path.rest()}.items()}
        self.checkpoints.save(self.step, tensors, {})
        self.saved_at = time.monotonic()

    def advance(self, h: Tensor) -> None:
        """One step of every network."""
        job, (epoch, i) = self.job, divmod(self.step, self.job.steps)
        key = draw.split(self.keys, epoch)
        if self._order[0] != epoch:
            order = draw.permutation(draw.split(key, 0), len(job.data.train))[:, : job.images]
            self._order = epoch, order
        batch = min(job.config.experts.batch, job.images)
        rows = self._order[1][:, i * batch : (i + 1) * batch]
        x = _augmented(job, draw.split(key, 1 + i), job.data.train.x[rows])
        self.state = job.inner.advance(self.state, (x.unsqueeze(1), job.data.train.y[rows].unsqueeze(1)), (0,), h)
        self.step += 1

    def snapshot(self) -> None:
        """The end of an epoch."""
        theta = self.state[0]
        if not bool(torch.isfinite(theta).all()):
            lost = self.ids[int((~torch.isfinite(theta).all(1)).nonzero()[0])]
            raise RunError(f"expert {lost} diverged in epoch {self.step // self.job.steps}: its weights are not finite; lower "
                           f"experts.lr (now {self.job.config.experts.lr:g})")  # fmt: skip
        for path, weights in zip(self.paths, theta):
            path.add(weights)


def _train(job: Job, ids: Sequence[int], wanted: Sequence[int], stop: Callable[[], bool]) -> None:
    run, began, said, c = _Training(job, ids), time.monotonic(), time.monotonic(), job.config.experts
    total, every, first = job.steps * c.epochs, job.config.run.checkpoint_s, run.step
    rates = torch.full((1,), c.lr, dtype=run.state[0].dtype, device=run.state[0].device)
    h = job.inner.optimizer.schedule(rates, torch.full_like(rates, c.momentum))
    with torch.no_grad():
        while run.step < total:
            run.advance(h)
            epoch, rest = divmod(run.step, job.steps)
            if not rest:
                run.snapshot()
            leave = stop()
            if (leave and run.step < total) or 0 < every <= time.monotonic() - run.saved_at:
                run.save()
            if leave and run.step < total:
                return
            if not rest and time.monotonic() - said > _SAY_S:
                said = time.monotonic()
                each = (said - began) / (run.step - first) * job.steps / len(ids)
                job.say(f"{name(ids)}: epoch {epoch}/{c.epochs}, {each:.3g} s each; {job.left(each, epoch * len(ids))}")
        _finish(job, run, wanted)


def name(ids: Sequence[int]) -> str:
    """Of some experts, for people."""
    return f"expert {ids[0]}" if len(ids) == 1 else f"experts {ids[0]} to {ids[-1]}"


def _augmented(job: Job, keys: Tensor, x: Tensor) -> Tensor:
    """Augmented images [g, B, C, H, W], each drawn for on its own; the operation of dsa is one a batch."""
    strategy = job.config.experts.dsa
    x = augment(job.config.data.augment, keys, x)
    if strategy == "none":
        return x
    return dsa.apply(dsa.parameters(strategy, draw.split(keys, 2), x.shape[1], x.shape[-1], x.dtype), x)


def _finish(job: Job, run: _Training, wanted: Sequence[int]) -> None:
    """Judge the last snapshots and write the experts' files."""
    judged = _judge(job, run.state[0])
    theta = torch.stack([path.decoded for path in run.paths])
    decoded = _judge(job, theta.to(run.state[0]))
    for number, path, own, read in zip(run.ids, run.paths, judged.tolist(), decoded.tolist()):
        if number in wanted:
            figures = {"valid_accuracy": own, "valid_accuracy_decoded": read, "difference_error": path.error}
            write_expert(job.folder, number, job.key, path, figures)
    job.say(f"{name(run.ids)}: {100 * float(judged.mean()):.2f} % on validation")
    shutil.rmtree(run.place, ignore_errors=True)


def _judge(job: Job, theta: Tensor) -> Tensor:
    """Accuracy on the validation split: float64 [g]."""
    learner, x, batch = job.learner, job.data.train.x, min(job.config.experts.batch, job.images)
    count = min(_STATISTICS, len(x) // batch) if learner.buffers_size else 0
    seen = x[: count * batch].reshape(count, batch, *x.shape[1:]) if count else x[:0].unsqueeze(0)
    chunk = job.config.experts.group
    return accuracy(learner, theta, statistics(learner, theta, seen, chunk=chunk), job.data.valid, chunk=chunk)
