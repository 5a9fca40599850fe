"""What a configuration asks of the machine and of the exchange, judged before any work (see metadist.run.validate)."""

from __future__ import annotations

from metadist.config import Config
from metadist.errors import UserError


def machine(config: Config) -> None:
    """Workers, run folder, number formats. Raises UserError."""
    engine = config.engine
    if config.run_dir == "":
        raise UserError("run_dir is empty; give a folder, or leave it out")
    if config.workers > config.tasks and config.exchange.name == "allreduce":
        raise UserError(f"workers={config.workers} is more than tasks={config.tasks}: a worker without a task has no work; "
                        f"give workers 1 to {config.tasks}, or more tasks")  # fmt: skip
    if engine.dtype == "float64" and engine.precision != "fp32":
        raise UserError(f"engine.precision={engine.precision} is for engine.dtype=float32; float64 is exact, use fp32")


def server(config: Config) -> None:
    """exchange=server. Raises UserError."""
    c, tasks = config.exchange, config.tasks
    if c.name != "server":
        return
    if config.method.name == "lower_bound":
        raise UserError("method=lower_bound takes a second on one core; leave exchange=server out")
    batch = c.batch or tasks
    carrying = _carrying(config)
    if carrying is not None and (c.max_staleness or c.deadline_s or batch != tasks or c.wire != "full"):
        raise UserError(
            f"{carrying[0]} carries learners from one meta-step to the next: with exchange=server give "
            f"exchange.max_staleness=0 (no batch, deadline_s, wire), or {carrying[1]}"
        )
    for key, given, what in (("tasks", tasks, "a meta-step's tasks"), ("exchange.batch", batch, "the tasks a meta-step takes")):
        if c.item and given % c.item:
            raise UserError(f"exchange.item={c.item} does not divide {key}={given}, {what}; allowed: divisors of it, or 0")
    if 0 < c.queue < -(-batch // (c.item or 1)):
        raise UserError(f"exchange.queue={c.queue} holds less than a meta-step's gradients; give at least "
                        f"{-(-batch // (c.item or 1))}, or 0")  # fmt: skip
    if config.engine.dtype == "float64" and c.wire != "full":
        raise UserError(f"exchange.wire={c.wire} is for engine.dtype=float32; float64 is exact, use full")


def _carrying(config: Config) -> tuple[str, str] | None:
    """What makes this method carry learners, and what would end it; None if it carries none."""
    if config.method.gradient == "implicit" and config.implicit.warm_start:
        return "implicit.warm_start=true", "implicit.warm_start=false"
    if config.method.gradient == "matching" and config.method.match == "class" and config.matching.outer > 1:
        return f"matching.outer={config.matching.outer}", "matching.outer=1"
    return None


def gpu(config: Config) -> None:
    """GPUs that this machine lacks. Raises UserError."""
    if config.device == "auto" and config.engine.precision == "fp32" and config.exchange.backend != "nccl":
        return  # nothing depends on whether a GPU is there: spare the import of torch
    import torch

    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise UserError(f"device=cuda, but torch {torch.__version__} sees no GPU here; use device=cpu or device=auto")
    if config.engine.precision != "fp32" and (config.device == "cpu" or not gpu):
        raise UserError(
            f"engine.precision={config.engine.precision} names a GPU's matrix units, and this run is on a CPU; use fp32"
        )
    if config.exchange.backend != "nccl":
        return
    if config.device == "cpu" or not gpu:
        raise UserError("exchange.backend=nccl works between GPUs, and this run is on a CPU; use gloo or auto")
    gpus = torch.cuda.device_count()
    if config.workers > gpus:
        raise UserError(f"exchange.backend=nccl takes a GPU a worker: workers={config.workers}, GPUs {gpus}; use gloo or auto")
