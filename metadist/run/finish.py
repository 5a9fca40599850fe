"""The end of a run: the set chosen on validation, judged once on the test split, written with its picture and summary."""

from __future__ import annotations

import shlex
from typing import Any

from torch import Tensor

import metadist
from metadist.config import Config
from metadist.evaluate.statistics import Summary
from metadist.exchange import Exchange
from metadist.run import judge
from metadist.run.environment import environment
from metadist.run.folder import RunFolder
from metadist.run.monitor import Monitor
from metadist.run.setup import Setup
from metadist.run.state import MetaState
from metadist.synthetic.images import Phi


def picture(setup: Setup, phi: Phi) -> Tensor:
    """The distilled images as one grid, uint8 [H, W, 3]."""
    return judge.distilled(setup, phi, 0, {}).picture()


def finish(
    setup: Setup, state: MetaState, folder: RunFolder, exchange: Exchange, monitor: Monitor, minutes: float
) -> dict[str, Any]:
    """Judge the chosen set on the test split, write the result, return the summary. All workers judge; rank 0 writes.

    The others don't wait in a collective for that, whose time is limited: they wait in ``exchange.close``.
    """
    config = setup.config
    best = state.best or dict(state.kept)
    monitor.say(f"judging the set of step {state.best_step} on the test split")
    test = judge.summaries(judge.outcomes(setup, best, "evaluation", config.eval.final_nets, exchange))
    summary = about(config, state, exchange, minutes) | {
        "test": test["score"],
        "figures": {k: v for k, v in test.items() if k != "score"},
        "images": setup.synthetic.count,
        "synthetic": config.method.synthetic,
    }
    if exchange.rank == 0:
        write(setup, state, folder, best, summary)
    return summary


def about(config: Config, state: MetaState, exchange: Exchange, minutes: float) -> dict[str, Any]:
    """What every run's summary says, whatever it has made."""
    return {
        "method": config.method.name,
        "data": config.data.name,
        "net": config.net.name,
        "seed": config.seed,
        "steps": state.step,
        "best_step": state.best_step,
        "valid_accuracy": state.best_valid,
        "skipped": state.skipped,
        "rollbacks": state.rollbacks,
        "minutes": round(minutes, 2),
        "seconds": 60 * minutes,
        "workers": exchange.workers,
        "version": metadist.__version__,
        "environment": environment(),
        "finished": True,
    }


def write(setup: Setup, state: MetaState, folder: RunFolder, best: Phi, summary: dict[str, Any]) -> None:
    """Examine the set; write distilled sets, pictures and, last, the summary that says the run is finished."""
    report = judge.examine(setup, judge.distilled(setup, best, state.best_step, {})) if setup.config.eval.report else None
    baselines = [row for row in report.rows if row.images == "random"] if report else []
    summary["baselines"] = {row.images: row.result.summary.as_dict() for row in baselines}
    summary["text"] = text(summary, folder)
    metrics = {k: summary[k] for k in ("test", "figures", "valid_accuracy", "baselines")}
    chosen = judge.distilled(setup, best, state.best_step, metrics)
    folder.fence()
    if report:
        from metadist.evaluate import picture as page  # matplotlib: half a second that only rank 0 spends

        page.save(report, folder.path / "report.png")
        folder.fence()  # drawing takes seconds
    chosen.save(folder.path / "distilled.safetensors")
    judge.distilled(setup, dict(state.kept), state.step, {}).save(folder.path / "distilled-last.safetensors")
    chosen.save_picture(folder.path / "images.png")
    folder.write_summary(summary)


def text(summary: dict[str, Any], folder: RunFolder) -> str:
    """What a person reads at the end."""
    kind = f"{summary['images']} {'generated' if summary['synthetic'] == 'generator' else 'distilled'} images"
    what = f"{summary['method']} on {summary['data']}, {summary['net']}"
    lines = [f"{what}, {summary['steps']} meta-steps, {summary['minutes']:.1f} min"]
    # A poisoned set's score counts class K as right where it is read as T: not what a baseline's accuracy means.
    score = "malicious score" if "success" in summary["figures"] else "test accuracy"
    lines.append(f"  trained on {kind:32s} {score} {Summary(**summary['test']).text()}")
    for name, value in summary["baselines"].items():
        what = f"{summary['images']} real images, {name}"
        lines.append(f"  trained on {what:32s} test accuracy {Summary(**value).text()}")
    for name, value in summary["figures"].items():
        lines.append(f"  {name.replace('_', ' '):43s} {Summary(**value).text()}")
    path = shlex.quote(str(folder.path))
    pictures = "report.png and images.png" if summary["baselines"] else "images.png"
    lines.append(f"look at {path}/{pictures}; monitor: tensorboard --logdir {path}")
    return "\n".join(lines)
