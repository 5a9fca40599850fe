"""Judging a set while and after it is learned: validation by held-out starts, the test split once, the set's own file.

Networks are shared out over the workers by number; each result is a function of the network's number alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import metadist
from metadist.data import Split, split_of
from metadist.evaluate.report import Report
from metadist.evaluate.settings import Settings
from metadist.evaluate.statistics import Summary
from metadist.evaluate.suite import glance
from metadist.evaluate.train import predictions, recorded, statistics
from metadist.exchange import Exchange
from metadist.methods.poison import figures
from metadist.methods.trajectory import Guide
from metadist.run.setup import Setup
from metadist.synthetic.distilled import DistilledSet, theta0_recipe
from metadist.synthetic.generator import Generator
from metadist.synthetic.images import Phi
from metadist.synthetic.maker import Maker

REPORT_NETS = 20  # networks of the short report at the end of a run
CURVE_NETS = 5  # of them, those whose accuracy is followed from step to step


def outcomes(setup: Setup, phi: Phi, purpose: str, count: int, exchange: Exchange) -> dict[str, Tensor]:
    """Figures of held-out networks trained on ``phi``, each float64 [n]: "score", the figures of a poisoned set, and where a
    teacher takes part (the score is then of students that it teaches), on the test split, "without_teacher".

    purpose: "validation" (its split and starts) or "evaluation" (the test split, starts never used before).
    The score is what checkpoints are chosen by: accuracy in the labels the method's judge uses.
    """
    theta0 = setup.starts.held_out(count, purpose)
    names = ["score"] + (["accuracy", "attacked_accuracy", "success"] if setup.method.relabel else [])
    names += ["without_teacher"] if setup.guide and purpose != "validation" else []
    table = exchange.spread(
        purpose, phi, len(theta0), lambda some: figures_of(setup, phi, purpose, theta0[some.to(setup.device)]), len(names)
    )
    return dict(zip(names, table, strict=True))


def figures_of(setup: Setup, phi: Phi, purpose: str, theta0: Tensor) -> Tensor:
    """The figures [F, n] of networks that start at ``theta0`` [n, P]."""
    validation, method = purpose == "validation", setup.config.method
    split = setup.data.valid if validation else setup.data.test
    if setup.guide is not None:
        ways = (setup.guide,) if validation else (setup.guide, None)
        return torch.stack([(_guesses(setup, phi, split, theta0, way) == split.y).to(torch.float64).mean(1) for way in ways])
    guesses = _guesses(setup, phi, split, theta0)
    if setup.method.relabel is None:
        return (guesses == split.y).to(torch.float64).mean(1)[None]
    score = (guesses == setup.method.relabel(split.y)).to(torch.float64).mean(1)
    return torch.stack((score, *figures(guesses, split.y, method.attack, method.target)))


@torch.no_grad()
def _guesses(setup: Setup, phi: Phi, split: Split, theta0: Tensor, guide: Guide | None = None) -> Tensor:
    """Classes [n, N] that networks trained on ``phi`` see in a split; guide: they are trained by its loss, as its students."""
    synthetic, chunk, inner = setup.synthetic, setup.config.eval.chunk, setup.inner
    batches, h = synthetic.batches(phi), synthetic.schedule(phi)
    x = batches[0]
    if guide is not None:
        inner = inner.but(loss=guide.loss)
        batches = (*batches, guide.teacher(x.flatten(0, 1)).view(*x.shape[:2], -1))
    theta = recorded(inner, theta0, batches, synthetic.order, h, chunk=chunk)
    return predictions(setup.learner, theta, statistics(setup.learner, theta, x, chunk=chunk), split.x, chunk=chunk)


def summaries(values: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Mean, sd, n and 95% interval of each figure."""
    return {k: Summary.of(v).as_dict() for k, v in values.items()}


def distilled(setup: Setup, phi: Phi, step: int, metrics: dict[str, Any]) -> DistilledSet:
    """The set that ``phi`` is after ``step`` meta-steps, with its recipe and manifest."""
    config, synthetic = setup.config, setup.synthetic
    theta0 = setup.starts.held_out(1)[0].cpu() if config.method.init == "fixed" else None
    net = dataclasses.asdict(config.net)
    manifest: dict[str, Any] = {
        "method": config.method.name,
        "data": config.data.name,
        "classes": list(setup.data.classes),
        "channels": setup.data.channels,
        "size": setup.data.size,
        "split": split_of(config.data),
        "net": net,
        "init": config.method.init,
        "seed": config.seed,
        "step": step,
        "version": metadist.__version__,
        "metrics": metrics,
    }
    drawable = config.net.name != "custom" and config.net.init != "orthogonal"  # a QR's bits are the processor's own
    if theta0 is not None and drawable and theta0.dtype == torch.float32:
        # Drawn again by its recipe: the file stays as small as its images.
        manifest["theta0_recipe"] = theta0_recipe(net, config.seed, theta0)
        theta0 = None
    with torch.no_grad():
        images, labels = (v.flatten(0, 1).cpu() for v in synthetic.batches(phi))
    return DistilledSet(
        images=images,
        labels=labels,
        order=torch.tensor(synthetic.order),
        lr=synthetic.rates(phi).detach().cpu(),
        normalization=setup.data.normalization,
        momentum=None if (m := synthetic.momenta(phi)) is None else m.detach().cpu(),
        optimizer=dataclasses.asdict(synthetic.optimizer),
        theta0=theta0,
        manifest=manifest,
        maker=Maker.of(synthetic, phi) if isinstance(synthetic, Generator) else None,
    )


def examine(setup: Setup, chosen: DistilledSet) -> Report:
    """The set beside as many random real images: same steps, their rate chosen on validation, judged on the test split."""
    config = setup.config
    nets = min(config.eval.final_nets, REPORT_NETS)
    settings = Settings(nets=nets, seed=config.seed, chunk=min(config.eval.chunk, CURVE_NETS))
    described = {"fixed": "the fixed start", "random": "fresh initializations", "pretrained": "held-out pre-trained networks",
                 "expert": "fresh initializations"}  # fmt: skip
    starts = described[config.method.init]
    return glance(chosen, setup.data, setup.learner, config.net.name, setup.starts, starts, settings)
