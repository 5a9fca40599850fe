"""Keys that a run would not read: given by a user, they are refused rather than ignored."""

from __future__ import annotations

from metadist.config import Config
from metadist.identity import SERVER, flatten


def _under(config: Config, *groups: str) -> list[str]:
    """These groups and their keys."""
    return [*groups, *(k for k in flatten(config) if k.startswith(tuple(f"{group}." for group in groups)))]


def unread(config: Config, slurm: bool = False) -> dict[str, str]:
    """Keys that this run would not read, and what they belong to. A user who gives one has something else in mind."""
    method, inner, meta = config.method, config.inner, config.meta
    belong = {
        "method.init=pretrained": (method.init == "pretrained", [k for k in flatten(config) if k.startswith("pretrained.")]),
        "method.objective=poison": (method.objective == "poison", ["method.attack", "method.target"]),
        "method.synthetic=generator": (
            method.synthetic == "generator",
            ["generator", *(k for k in flatten(config) if k.startswith("generator."))],
        ),
        "method.gradient=implicit": (
            method.gradient == "implicit",
            ["implicit", *(k for k in flatten(config) if k.startswith("implicit."))],
        ),
        "implicit.solver=neumann": (method.gradient != "implicit" or config.implicit.solver == "neumann", ["implicit.step"]),
        "implicit.warm_start=true": (method.gradient != "implicit" or config.implicit.warm_start, ["implicit.restart"]),
        "method.gradient=matching": (method.gradient == "matching", ["matching", "matching.distance"]),
        "method.gradient=unrolled, truncated or matching": (method.gradient != "implicit", ["inner.loss_every"]),
        "method.synthetic=images or generator": (
            method.synthetic != "network",
            [
                *_under(config, "inner", "labels"),
                "eval.nets",
                "eval.final_nets",
                "eval.chunk",
                "engine.mixed",
                "meta.lr_rate",
                "meta.lr_labels",
                "run.image_every",
            ],
        ),
        "method=train or kd": (
            method.synthetic == "network",
            [*_under(config, "train"), "data.exclude", "net.dropout", "net.input_dropout"],
        ),
        "method.loss=distillation": (method.loss == "distillation", _under(config, "kd")),
        "method=kd": (method.name == "kd", ["kd.teachers", "kd.pair", "kd.stopped", "kd.until", "kd.variants"]),
        "method.synthetic=images": (method.synthetic == "images", ["ipc"]),
        "labels.kind=soft": (config.labels.kind == "soft", ["labels.confidence", "meta.lr_labels"]),
        "inner.optimizer=momentum or adam": (inner.optimizer != "sgd", ["inner.momentum"]),
        "inner.optimizer=adam": (inner.optimizer == "adam", ["inner.beta2", "inner.eps"]),
        "inner.learn_lr=true": (inner.learn_lr, ["inner.rate"]),
        "meta.optimizer=adam": (meta.optimizer == "adam", ["meta.beta2", "meta.eps"]),
        "meta.schedule=step or cosine": (meta.schedule != "constant", ["meta.decay"]),
        "launch/slurm.py": (slurm, ["cluster", *(k for k in flatten(config) if k.startswith("cluster.") or k in INTERFACE)]),
        "exchange=server": (
            config.exchange.name == "server",
            [*SERVER, *(k for k in flatten(config) if k.startswith("cluster.server_"))],
        ),
        "exchange=allreduce": (config.exchange.name == "allreduce", ["exchange.backend"]),
        "method=lower_bound": (method.name == "lower_bound", [k for k in flatten(config) if k.startswith("lower_bound.")]),
    }
    return {key: what for what, (read, keys) in belong.items() if not read for key in keys}


INTERFACE = ("exchange.interface",)  # on one machine the workers meet on loopback
