"""Trained networks as a product: chosen on validation, judged once on the test split, written with their summary.

Design choices
- How a run is done is not known here: trainer, exchanges and checkpoints are those of distillation.
- Errors are counted, and stand beside the percentage: that is how the source has them, of 10,000 test images.
- Validation looks at no label of a class that the training images lack.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metadist
from metadist import draw
from metadist.data import Split
from metadist.evaluate import bias
from metadist.evaluate.statistics import Summary
from metadist.evaluate.train import at_once, predictions, statistics
from metadist.exchange import Exchange
from metadist.run.finish import about
from metadist.run.folder import RunFolder
from metadist.run.monitor import Monitor
from metadist.run.state import MetaState
from metadist.run.training import TrainingSetup
from metadist.synthetic.images import Phi
from metadist.synthetic.network import FILE, Network, snapshot_name

LAST = "network-last.safetensors"
_BATCHES, _IMAGES = 16, 128  # training images that BatchNorm's statistics are taken from
_AT_ONCE = 500  # images judged at once


class Networks:
    """The S networks of a training run."""

    def __init__(self, setup: TrainingSetup) -> None:
        """Of this setup."""
        self.setup, self.config, self.learner = setup, setup.config, setup.learner
        valid, exclude = setup.data.valid, torch.tensor(setup.config.data.exclude, device=setup.data.valid.y.device)
        seen = ~torch.isin(valid.y, exclude)
        self.valid = Split(valid.x[seen], valid.y[seen]) if len(exclude) else valid

    def networks(self, purpose: str) -> int:
        """All of them, always."""
        return self.config.train.networks

    def evaluation_s(self, state: MetaState, exchange: Exchange) -> float:
        """Two networks a worker are timed; at the end each is judged once for its figure, once for the report."""
        count = min(self.config.train.networks, 2 * exchange.world)
        began = time.perf_counter()
        self.outcomes(state.kept, "validation", count, exchange)
        each, left = (time.perf_counter() - began) / count, self.config.steps - state.step
        more = len(self.setup.data.test.y) / max(len(self.valid.y), 1)
        return each * self.config.train.networks * (left // self.config.eval.every + 2 * more)

    def scalars(self, phi: Phi) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}

    def picture(self, phi: Phi) -> Tensor | None:
        """There are no images."""
        return None

    def outcomes(self, phi: Phi, purpose: str, count: int, exchange: Exchange) -> dict[str, Tensor]:
        """Accuracy ("score") of the first ``count`` networks."""
        table = exchange.spread(purpose, phi, count, lambda some: self._accuracy(phi, purpose, some), 1)
        return {"score": table[0]}

    def share(self, phi: Phi, purpose: str, first: int, count: int, all: int) -> Tensor:
        """Accuracies [1, count] of some of them."""
        return self._accuracy(phi, purpose, torch.arange(first, first + count))

    def _accuracy(self, phi: Phi, purpose: str, some: Tensor) -> Tensor:
        split = self.valid if purpose == "validation" else self.setup.data.test
        theta = phi["theta"].detach()[some.to(phi["theta"].device)]
        guesses = predictions(self.learner, theta, self.buffers(theta), split.x, chunk=len(theta))
        return (guesses == split.y).to(torch.float64).mean(1)[None]

    def buffers(self, theta: Tensor) -> Tensor:
        """BatchNorm's statistics [n, Q] on training images drawn for the purpose."""
        train, key = self.setup.data.train, draw.key(self.config.seed, "statistics")
        rows = draw.integers(key, (_BATCHES, min(_IMAGES, len(train))), len(train)).to(train.x.device)
        x = train.x[rows] if self.learner.buffers_size else train.x[:1, None]
        return statistics(self.learner, theta, x, chunk=at_once(self.learner, len(theta), _IMAGES))

    def reached(self, state: MetaState, folder: RunFolder) -> None:
        """Keep the networks of the parts train.snapshots of the training."""
        for part in self.config.train.snapshots:
            if folder.writes and state.step == max(1, round(part * state.horizon)):
                folder.fence()
                self.file(state.kept, state.step, {}).save(folder.path / snapshot_name(part))

    def file(self, phi: Phi, step: int, metrics: dict[str, Any]) -> Network:
        """The networks that ``phi`` is after ``step`` steps, with their manifest."""
        config, data = self.config, self.setup.data
        manifest = {
            "method": config.method.name,
            "data": config.data.name,
            "classes": list(data.classes),
            "channels": data.channels,
            "size": data.size,
            "net": dataclasses.asdict(config.net),
            "config": {k: dataclasses.asdict(getattr(config, k)) for k in ("train", "kd", "meta", "data")},
            "seed": config.seed,
            "step": step,
            "version": metadist.__version__,
            "metrics": metrics,
        }
        theta = phi["theta"].detach()
        return Network(theta.cpu(), self.buffers(theta).cpu(), data.normalization, manifest)

    def finish(
        self, state: MetaState, folder: RunFolder, exchange: Exchange, monitor: Monitor, minutes: float
    ) -> dict[str, Any]:
        """Judge the chosen networks on the test split, write them, return the summary. All workers judge; rank 0 writes."""
        config, best = self.config, state.best or dict(state.kept)
        monitor.say(f"judging the networks of step {state.best_step} on the test split")
        scores = self.outcomes(best, "evaluation", config.train.networks, exchange)["score"]
        count = len(self.setup.data.test)
        summary = about(config, state, exchange, minutes) | {
            "test": Summary.of(scores).as_dict(),
            "errors": [round((1 - float(s)) * count) for s in scores],
            "test_images": count,
            "parameters": self.learner.size,
            "teachers": self._teachers(),
        }
        if exchange.rank == 0:
            self._write(state, folder, best, summary)
        return summary

    def _teachers(self) -> list[dict[str, Any]]:
        given = zip(self.config.kd.teachers, self.setup.teachers, strict=True)
        return [{"path": p, "sha256": t.digest(), "data": t.manifest.get("data"),
                 **{k: t.manifest["metrics"].get(k) for k in ("errors", "test_images")}} for p, t in given]  # fmt: skip

    def _write(self, state: MetaState, folder: RunFolder, best: Phi, summary: dict[str, Any]) -> None:
        if self.config.data.exclude:
            summary["corrections"] = self.corrections(best["theta"].detach())
        logits = self._all_logits(best["theta"].detach())
        if len(logits) > 1:
            together = torch.softmax(logits.double(), -1).mean(0).argmax(-1)
            summary["together"] = int((together != self.setup.data.test.y).sum())
        summary["text"] = text(summary, folder, self.setup.data.classes)
        metrics = {k: summary[k] for k in ("test", "errors", "test_images", "valid_accuracy")}
        folder.fence()
        self.file(best, state.best_step, metrics).save(folder.path / FILE)
        self.file(state.kept, state.step, {}).save(folder.path / LAST)
        self._report(logits.argmax(-1), summary, folder)
        folder.fence()  # drawing takes seconds
        folder.write_summary(summary)

    @torch.no_grad()
    def _all_logits(self, theta: Tensor) -> Tensor:
        """On the test split: [S, N, K]."""
        pairs = zip(theta, self.buffers(theta), strict=True)
        return torch.stack([self._logits(one, buffers, self.setup.data.test.x) for one, buffers in pairs])

    def _report(self, guesses: Tensor, summary: dict[str, Any], folder: RunFolder) -> None:
        test, classes = self.setup.data.test, self.setup.data.classes
        here = (self.setup.data.name, len(test))
        alike = [t for t in summary["teachers"] if t["errors"] and (t["data"], t["test_images"]) == here]
        short = [Path(t["path"]).name for t in alike]
        names = short if len(set(short)) == len(short) else [t["path"] for t in alike]
        teachers = {name: sum(t["errors"]) / len(t["errors"]) for name, t in zip(names, alike, strict=True)}
        title = f"{summary['method']} on {summary['data']}, {summary['net']}, {summary['steps']} steps"
        images = self.setup.data.normalization.invert(test.x)
        from metadist.evaluate import network_picture  # matplotlib: half a second that only rank 0 spends

        network_picture.save(folder.path / "report.png", title, guesses, test.y, images, classes, teachers)

    @torch.no_grad()
    def corrections(self, theta: Tensor) -> dict[str, Any]:
        """Test errors, those in the missing classes among them, before and after their biases were raised; for each network.

        prior: to the rate at which the classes occur, on validation images without labels. test: to the fewest errors on the
        test split itself, as in arXiv 1503.02531: no honest figure, and named for what it is.
        """
        data, missing = self.setup.data, self.config.data.exclude
        prior = torch.bincount(data.valid.y, minlength=len(data.classes)).double() / len(data.valid)
        unseen = torch.isin(data.test.y, torch.tensor(missing, device=data.test.y.device))
        out: dict[str, Any] = {"missing": list(missing), "missing_images": int(unseen.sum())}
        found: dict[str, list[list[int]]] = {"before": [], "prior": [], "test": []}
        for one, buffers in zip(theta, self.buffers(theta), strict=True):
            valid, test = (self._logits(one, buffers, s.x) for s in (data.valid, data.test))
            biases = {"before": torch.zeros_like(test[0]), "prior": bias.by_prior(valid, missing, prior),
                      "test": bias.by_labels(test, missing, data.test.y)}  # fmt: skip
            for name, b in biases.items():
                wrong = (test + b).argmax(1) != data.test.y
                found[name].append([int(wrong.sum()), int((wrong & unseen).sum())])
        return out | {name: {"errors": [a for a, _ in v], "missing_errors": [b for _, b in v]} for name, v in found.items()}

    def _logits(self, theta: Tensor, buffers: Tensor, x: Tensor) -> Tensor:
        return torch.cat([self.learner.predict(theta, buffers, part) for part in torch.split(x, _AT_ONCE)])


def errors(values: list[int], images: int) -> str:
    """Counts of errors in words: `146.2 +- 3.1 of 10,000 (n=5, 95% interval of the mean +-2.7)`."""
    s = Summary.of(torch.tensor(values, dtype=torch.float64))
    if s.ci95 is None:
        return f"{s.mean:.0f} of {images:,}"
    return f"{s.mean:.1f} +- {s.sd:.1f} of {images:,} (n={s.n}, 95% interval of the mean +-{s.ci95:.1f})"


def text(summary: dict[str, Any], folder: RunFolder, classes: tuple[str, ...]) -> str:
    """What a person reads at the end."""
    what, images = f"{summary['method']} on {summary['data']}, {summary['net']}", summary["test_images"]
    lines = [f"{what}, {summary['steps']} steps, {summary['minutes']:.1f} min"]
    lines.append(f"  test errors    {errors(summary['errors'], images)}")
    lines.append(f"  test accuracy  {Summary(**summary['test']).text()}")
    if "together" in summary:
        lines.append(f"  all together   {errors([summary['together']], images)}, by the mean of their probabilities")
    for teacher in summary["teachers"]:
        known = f"  {errors(teacher['errors'], teacher['test_images'])}" if teacher["errors"] else ""
        other = f" ({teacher['data']})" if teacher["data"] != summary["data"] else ""
        lines.append(f"  teacher {teacher['path']}{known}{other}")
    if "corrections" in summary:
        c = summary["corrections"]
        missing = ", ".join(classes[i] for i in c["missing"])
        words = {"before": "as trained", "prior": "bias raised to its prior on unlabelled validation images",
                 "test": "bias raised by the test split itself (as in the paper; not honest)"}  # fmt: skip
        for name, word in words.items():
            lines.append(f"  without class {missing}, {word}: {errors(c[name]['errors'], images)}, "
                         f"of class {missing} {errors(c[name]['missing_errors'], c['missing_images'])}")  # fmt: skip
    path = shlex.quote(str(folder.path))
    lines.append(f"look at {path}/report.png; the networks are in {FILE} beside it; monitor: tensorboard --logdir {path}")
    return "\n".join(lines)
