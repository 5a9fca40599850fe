"""THE trainer: meta-steps through an exchange, with validation, checkpoints, roll-back, a monitor and a clean stop.

Design choices
- What a run does at step s is a function of (configuration, s) alone; so it may be killed anywhere and started again. What
  depends on the clock or the machine (compilation, group size) is resolved once and recorded in the run folder.
- At a step where several things are due, their order is fixed: roll-back, validation, checkpoint, stop. A checkpoint thus holds
  the choice of the best set so far, and a resumed run validates at the steps the uninterrupted one does.
- Roll-back goes to the state at the last multiple of run.checkpoint_every that is not inside a series of bad steps. Every
  checkpoint carries it along: where a stop or the clock happened to write checkpoints must not show in the result.
"""

from __future__ import annotations

import math
import time
from typing import Any

from torch import Tensor

from metadist.config import Config
from metadist.errors import RunError
from metadist.exchange import Exchange
from metadist.exchange.server import batch_of, item_size
from metadist.run import origins, plan
from metadist.run.compute import Compute
from metadist.run.cost import peak_memory_mb
from metadist.run.folder import RunFolder
from metadist.run.job import build, product
from metadist.run.monitor import Monitor
from metadist.run.product import Job
from metadist.run.signals import Stop
from metadist.run.state import MetaState

Snapshot = tuple[dict[str, Tensor], dict[str, Any]]


def train(config: Config, folder: RunFolder, exchange: Exchange, stop: Stop, setup: Job | None = None) -> dict[str, Any]:
    """Run or resume until config.steps are done; returns the summary (with "stopped" if a signal ended it early).

    config: as resolved by the folder. setup: prepared objects (the Python API); default: built from the configuration.
    Raises UserError before any work, RunError for a fault on the way.
    """
    began = time.monotonic()
    setup = setup or build(config)
    origins.check(setup.origins, folder)
    horizon = config.meta.horizon or int(folder.resolve("horizon", lambda: config.steps))
    state = MetaState(setup.method.parameters(), config.meta, horizon, setup.least, setup.project)
    trainer = Trainer(setup, state, folder, exchange)
    trainer.resume()
    trainer.monitor = Monitor(folder.path if exchange.rank == 0 else None, state.step, config.steps, folder.incarnation)
    try:
        trainer.prepare()
        trainer.monitor.begin()
        with stop.agreeing():
            stopped = trainer.loop(stop)
        minutes = trainer.minutes_before + (time.monotonic() - began) / 60
        if stopped is not None:
            return {"steps": state.step, "stopped": stopped}
        return trainer.product.finish(state, folder, exchange, trainer.monitor, minutes)
    finally:
        trainer.monitor.close()


class Trainer:
    """One worker's part of a run."""

    def __init__(self, setup: Job, state: MetaState, folder: RunFolder, exchange: Exchange) -> None:
        """Keep the pieces; ``resume`` and ``prepare`` come before ``loop``."""
        self.setup, self.state, self.folder, self.exchange = setup, state, folder, exchange
        self.config: Config = setup.config
        self.product = product(setup)
        self.monitor = Monitor(None, 0, 0)
        self.anchor: Snapshot = self._snapshot()
        # Where roll-backs return to decides the result: fixed at the first start, whatever checkpoint_every is later.
        self.anchor_every = int(folder.resolve("anchor-every", lambda: setup.config.run.checkpoint_every))
        self.minutes_before = 0.0
        self._started = self._saved = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._since = 0
        self.compute = Compute(setup.method, 1, setup.device, setup.static)

    def resume(self) -> None:
        """Restore the newest whole checkpoint, if any. Raises RunError if workers find different ones."""
        found = self.folder.checkpoints.load_newest()
        if found is not None:
            _, tensors, metadata = found
            if metadata["anchor"] is None:
                self.anchor = (tensors, metadata["state"])
            else:
                prefix = "anchor/"
                own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                self.anchor = (own, metadata["anchor"])
                tensors = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
            self._restore(tensors, metadata["state"])
            self.minutes_before = metadata["minutes"]
        self.exchange.agree(self.state.step)

    def prepare(self) -> None:
        """Resolve group size and compilation, and tell what the run will cost, by a trial step."""
        if not self.exchange.computes:
            item = int(self.folder.resolve("item", lambda: item_size(self.config)))
            self.monitor.say(plan.serving(self.setup, self.state, item, self.folder))
            return
        decided = plan.decide(self.setup, self.folder, self.exchange, self.state.step)
        self.setup = self.setup.compiled(decided.compile)
        self.product = product(self.setup)
        self.compute = Compute(self.setup.method, decided.group, self.setup.device, self.setup.static)
        plan.announce(self.setup, self.product, self.compute, self.state, self.folder, self.exchange, self.monitor)

    def loop(self, stop: Stop) -> str | None:
        """Meta-steps until config.steps; returns the name of the signal that ended it before, if one did."""
        state, due = self.state, self.config.run
        while state.step < self.config.steps:
            before = state.step
            leave = self._step(stop)
            if state.step == before:  # nothing came that could be applied, and there is no more time for it
                self._save()
                return stop.requested or "SIGTERM"
            if state.bad >= self.config.meta.max_bad:
                self._roll_back()
            last = state.step == self.config.steps
            self.product.reached(state, self.folder)
            self._log(last)
            if last or state.step % self.config.eval.every == 0:
                self._validate()
            if state.step % self.anchor_every == 0 and state.bad == 0:  # what made steps bad is no place to return to
                self.anchor = self._snapshot()
            late = due.checkpoint_s > 0 and time.monotonic() - self._saved >= due.checkpoint_s
            if last or leave or late or state.step % due.checkpoint_every == 0:
                self._save()
            if leave and not last:
                return stop.requested or "SIGTERM"
        return None

    def _step(self, stop: Stop) -> bool:
        began = time.perf_counter()
        _, leave = self.exchange.step(
            self.state,
            self.config.tasks,
            lambda state, tasks: self.compute(state.phi, state.step, tasks),
            lambda state, total: state.apply(total),
            lambda: stop.requested is not None,
        )
        spent = time.perf_counter() - began
        for name, value in (("step_s", spent), *self.compute.spent().items()):
            self._seconds[name] = self._seconds.get(name, 0.0) + value
        self._since += 1
        return leave

    def _roll_back(self) -> None:
        state = self.state
        if state.rollbacks >= self.config.meta.max_rollbacks:
            raise RunError(
                f"{state.bad} meta-steps in a row without a usable gradient, after {state.rollbacks} roll-backs; "
                "lower meta.lr or inner.lr, or set meta.clip"
            )
        rollbacks, scale, skipped = state.rollbacks + 1, state.scale / 2, state.skipped
        failed = state.step
        self._restore(*self.anchor)
        state.rollbacks, state.scale, state.skipped, state.bad = rollbacks, scale, skipped, 0
        self.anchor = (self.anchor[0], self._counters())
        self.monitor.say(f"rolled back from step {failed} to {state.step} after {self.config.meta.max_bad} bad steps; "
                         f"meta rate x {scale:g} from here on")  # fmt: skip

    def _snapshot(self) -> Snapshot:
        return {k: v.detach().cpu().clone() for k, v in self.state.tensors().items()}, self._counters()

    def _counters(self) -> dict[str, Any]:
        return {**self.state.metadata(), "exchange": self.exchange.snapshot()}

    def _restore(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        self.state.restore(tensors, counters)
        self.exchange.restore(counters.get("exchange", {}))

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self.exchange.rank != 0:
            return
        tensors, counters = self._snapshot()
        minutes = self.minutes_before + (self._saved - self._started) / 60
        anchor = None if self.anchor[1]["step"] == counters["step"] else self.anchor[1]
        if anchor is not None:
            tensors |= {f"anchor/{k}": v for k, v in self.anchor[0].items()}
        self.folder.fence()
        self.folder.checkpoints.save(self.state.step, tensors, {"state": counters, "anchor": anchor, "minutes": minutes})

    def _validate(self) -> None:
        state = self.state
        phi = {k: v.clone() for k, v in state.kept.items()}
        scores = self.product.outcomes(phi, "validation", self.product.networks("validation"), self.exchange)["score"]
        mean = float(scores.mean())
        sd = float(scores.std()) if len(scores) > 1 else 0.0
        self.monitor.log(state.step, {"valid_accuracy": 100 * mean, "valid_accuracy_sd": 100 * sd})
        if mean > state.best_valid:
            state.best, state.best_valid, state.best_step = phi, mean, state.step

    def _log(self, last: bool) -> None:
        state, run = self.state, self.config.run
        self.monitor.advance(state.step)
        if state.step != 1 and state.step % run.log_every and not last:
            return
        values = {"meta_loss": state.loss, "grad_norm": state.grad_norm, "meta_rate": self.config.meta.lr * state.factor()}
        values |= {"skipped": float(state.skipped), "rollbacks": float(state.rollbacks)}
        values |= self.product.scalars(state.phi)
        each = {k: v / max(self._since, 1) for k, v in self._seconds.items()}
        if self.exchange.computes:
            each["exchange_s"] = max(0.0, each["step_s"] - each["compute_s"] - each["data_s"])
        else:
            each = {"step_s": each["step_s"]}
        own, spreads = self.exchange.figures()
        values |= own | self.setup.method.figures()
        for name, counts in spreads.items():
            self.monitor.histogram(state.step, name, counts)
        values |= each | {"tasks_per_s": batch_of(self.config) / max(each["step_s"], 1e-9)}
        values["peak_memory_mb"] = peak_memory_mb(self.setup.device)
        self._seconds, self._since = {}, 0
        self.monitor.log(state.step, {k: v for k, v in values.items() if math.isfinite(v) or k in ("meta_loss", "grad_norm")})
        if state.step == 1 or last or state.step % run.image_every == 0:
            grid = self.product.picture(state.kept)
            if grid is not None:
                self.monitor.image(state.step, "images", grid)
