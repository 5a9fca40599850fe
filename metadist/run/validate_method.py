"""What methods of their own ask of a configuration, judged before any work (see metadist.run.validate)."""

from __future__ import annotations

from metadist.config import Config
from metadist.errors import UserError


def generator(config: Config) -> None:
    """method.synthetic=generator. Raises UserError."""
    if config.method.synthetic == "generator" and config.generator.batch < 2:
        raise UserError(
            f"generator.batch={config.generator.batch}: batch normalization makes one image a constant; give 2 or more"
        )


def stationary(config: Config) -> None:
    """What implicit gradients and gradient matching can't learn, because their gradient in it is zero. Raises UserError."""
    kind, inner = config.method.gradient, config.inner
    if kind not in ("implicit", "matching"):
        return
    for key, given in (("inner.learn_lr", inner.learn_lr), ("inner.learn_momentum", inner.learn_momentum)):
        if given:
            raise UserError(f"{key}=true, but method.gradient={kind} does not differentiate the training's path, so its rates "
                            f"have no gradient; give {key}=false")  # fmt: skip
    if kind == "implicit" and config.method.synthetic == "generator" and config.generator.curriculum not in ("full", "none"):
        raise UserError(f"generator.curriculum={config.generator.curriculum} orders the steps of a training that "
                        "method.gradient=implicit does not see; give full (learned codes) or none (fresh noise)")  # fmt: skip
    if kind == "implicit" and not config.implicit.l2 and not config.implicit.damping:
        raise UserError(
            "implicit.l2=0 and implicit.damping=0: the Hessian then has directions without curvature; give one above 0"
        )


def trajectory(config: Config) -> None:
    """Trajectory matching, and a teacher beside it. Raises UserError."""
    method, t, inner = config.method, config.trajectory, config.inner
    matched = method.gradient == "trajectory"
    if matched != (method.init == "expert"):
        raise UserError(f"method.gradient={method.gradient} and method.init={method.init} don't go together: trajectories, "
                        "and they alone, start at experts; choose method=mtt")  # fmt: skip
    if method.loss == "distillation" and method.synthetic != "network" and not matched:
        raise UserError(
            f"method.loss=distillation is for method.gradient=trajectory, not {method.gradient}; choose method=mtt_kd"
        )
    if not matched:
        return
    if t.min_start >= t.max_start:
        raise UserError(f"trajectory.min_start={t.min_start} is not below trajectory.max_start={t.max_start}: no start epoch "
                        f"is left; allowed: 0 to {t.max_start - 1}")  # fmt: skip
    if t.grow_from and not (t.grow and t.min_start < t.grow_from <= t.max_start):
        raise UserError(f"trajectory.grow_from={t.grow_from} needs trajectory.grow above 0 and a bound from "
                        f"{t.min_start + 1} to {t.max_start} (trajectory.min_start + 1 to trajectory.max_start)")  # fmt: skip
    if t.batch and inner.steps > 1:
        raise UserError(f"trajectory.batch={t.batch} and inner.steps={inner.steps} both say how many images a step takes; "
                        "give inner.steps=1, and N as inner.epochs")  # fmt: skip
    steps = inner.steps * inner.epochs
    if t.replay < steps:
        raise UserError(f"trajectory.replay={t.replay} is shorter than the {steps} inner steps (inner.steps={inner.steps} x "
                        f"inner.epochs={inner.epochs}) that it goes on from; allowed: {steps} or more")  # fmt: skip


def trajectory_with_data(config: Config, classes: int) -> None:
    """What only the data can tell. Raises UserError."""
    images, batch = config.ipc * classes, config.trajectory.batch
    if config.method.gradient == "trajectory" and batch > images:
        raise UserError(f"trajectory.batch={batch} is more than the {images} distilled images (ipc={config.ipc} x {classes} "
                        f"classes); allowed: 1 to {images}, or 0")  # fmt: skip
