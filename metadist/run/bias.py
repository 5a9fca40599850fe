"""How far a run's meta-gradient is from the exact one: `launch/evaluate.py run=... check=gradient`.

Both are taken at the run's newest meta-parameters, on the very same tasks. The exact one differentiates every inner step, in
float64 without reduced-precision products; what the run does instead (a window, float32, tf32, bf16) is what shows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metadist import methods, nets
from metadist.errors import UserError
from metadist.metagrad.inner import Inner
from metadist.methods.dd import Distillation, Task
from metadist.nets.loss import cross_entropy_loss
from metadist.run.compute import Compute
from metadist.run.folder import RunFolder
from metadist.run.setup import Setup, build
from metadist.run.state import MetaState
from metadist.synthetic.images import Images, Phi


def gradient_bias(run_dir: str | Path, **circumstance: Any) -> dict[str, Any]:
    """Compare the configured meta-gradient with the exact one on one meta-step of a run.

    run_dir: a run folder with a checkpoint; circumstance: top-level configuration values to use instead (device, cache_dir).
    Returns "step", "tasks", and for the whole and each meta-parameter "cosine" and "relative_error".
    Raises UserError for a folder without a checkpoint.
    """
    folder = RunFolder.attach(run_dir)
    found = folder.checkpoints.load_newest()
    if found is None:
        raise UserError(f"run={run_dir} has no checkpoint yet; let it do run.checkpoint_every meta-steps first")
    setup = build(dataclasses.replace(folder.config, **circumstance))
    state = MetaState(setup.method.parameters(), setup.config.meta, 1)
    state.restore(found[1], found[2]["state"])
    return compare(setup, {k: v.detach() for k, v in state.phi.items()}, state.step)


def compare(setup: Setup, phi: Phi, step: int) -> dict[str, Any]:
    """The two gradients of ``phi`` on the tasks of ``step``, compared. phi: meta-parameters in the run's dtype."""
    ids = torch.arange(setup.config.tasks, device=setup.device)
    ours = Compute(setup.method, 1, setup.device, static=False)(phi, step, ids)[:-2].double() / len(ids)
    exact = torch.zeros_like(ours)
    method = exact_method(setup)
    wide = {k: v.double().requires_grad_() for k, v in phi.items()}
    for i in ids:
        loss = method.loss(wide, widened(setup.method.draw(step, i[None])))
        exact += torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(wide.values()))]) / len(ids)
    sizes = [v.numel() for v in phi.values()]
    parts = zip(phi, torch.split(ours, sizes), torch.split(exact, sizes), strict=True)
    figures = {"all": _figures(ours, exact)} | {name: _figures(a, b) for name, a, b in parts}
    return {"step": step, "tasks": len(ids), "gradient": figures}


def exact_method(setup: Setup) -> Distillation:
    """The run's method in float64, without reduced-precision products."""
    config, data = setup.config, setup.data
    learner = nets.build(config.net, data.channels, data.size, len(data.classes), torch.float64, setup.device)
    synthetic = Images(config, len(data.classes), setup.synthetic.shape, torch.float64, setup.device)
    inner = Inner(cross_entropy_loss(learner), synthetic.optimizer)
    return methods.build(config, data, synthetic, inner, setup.starts)


def widened(task: Task) -> Task:
    """The same task in float64, every inner step differentiated."""
    return task._replace(theta0=task.theta0.double(), x=task.x.double(), start=0)


def _figures(ours: Tensor, exact: Tensor) -> dict[str, float]:
    cosine = torch.nn.functional.cosine_similarity(ours, exact, dim=0)
    return {"cosine": float(cosine), "relative_error": float((ours - exact).norm() / exact.norm())}


def text(result: dict[str, Any]) -> str:
    """The comparison for a person."""
    lines = [
        f"meta-gradient at step {result['step']}, {result['tasks']} tasks: as configured against exact (float64, every step)"
    ]
    for name, f in result["gradient"].items():
        lines.append(f"  {name:10s} cosine {f['cosine']:.6f}   relative error {f['relative_error']:.2e}")
    return "\n".join(lines)
