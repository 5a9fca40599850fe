"""Keys that a run would not read: given by a user, they are refused rather than ignored."""

from __future__ import annotations

from metadist.config import Config
from metadist.config_search import TRAINED
from metadist.identity import SERVER, flatten


def _under(config: Config, *groups: str) -> list[str]:
    """These groups and their keys."""
    return [*groups, *(k for k in flatten(config) if k.startswith(tuple(f"{group}." for group in groups)))]


def _training(config: Config) -> dict[str, tuple[bool, list[str]]]:
    """What networks alone, and what sets alone read."""
    method = config.method
    return {
        "method.synthetic=images or generator": (
            method.synthetic != "network",
            [
                *_under(config, "inner", "labels", "teacher", "teacher.net"),
                "eval.nets",
                "eval.final_nets",
                "eval.chunk",
                "eval.report",
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
        "method=kd": (method.name == "kd", ["kd.teachers", "kd.pair", "kd.stopped", "kd.until", "kd.variants"]),
    }


def unread(config: Config, slurm: bool = False) -> dict[str, str]:
    """Keys that this run would not read, and what they belong to. A user who gives one has something else in mind."""
    method, inner, meta = config.method, config.inner, config.meta
    classwise = method.match == "class"
    trained = classwise and method.gradient == "matching"
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
        "method.gradient=unrolled, truncated or matching": (
            method.gradient not in ("implicit", "trajectory"),
            ["inner.loss_every"],
        ),
        "method.gradient=matching or distribution": (method.gradient in ("matching", "distribution"), ["method.match"]),
        "method.match=batch": (not classwise, ["inner.loss_every"]),
        "method.match=class or method.gradient=trajectory": (classwise or method.gradient == "trajectory", ["dsa"]),
        "method=dc or dsa": (trained, ["matching.outer"]),
        "method=dc or dsa with matching.outer above 1": (
            trained and config.matching.outer > 1,
            ["matching.inner", "matching.batch", "matching.lr"],
        ),
        **_training(config),
        "method.synthetic=images": (method.synthetic == "images", ["ipc", "images", "images.start"]),
        "labels.kind=soft": (config.labels.kind == "soft", ["labels.confidence", "meta.lr_labels"]),
        "inner.optimizer=momentum or adam": (inner.optimizer != "sgd", ["inner.momentum"]),
        "inner.optimizer=adam": (inner.optimizer == "adam", ["inner.beta2", "inner.eps"]),
        "inner.learn_lr=true": (inner.learn_lr, ["inner.rate", "inner.shared_lr"]),
        "meta.optimizer=adam": (meta.optimizer == "adam", ["meta.beta2", "meta.eps"]),
        "meta.schedule=step or cosine": (meta.schedule != "constant", ["meta.decay"]),
        "launch/slurm.py": (slurm, ["cluster", *(k for k in flatten(config) if k.startswith("cluster.") or k in INTERFACE)]),
        "exchange=server": (
            config.exchange.name == "server",
            [*SERVER, *(k for k in flatten(config) if k.startswith("cluster.server_"))],
        ),
        "exchange=allreduce": (config.exchange.name == "allreduce", ["exchange.backend"]),
        "method=lower_bound": (method.name == "lower_bound", [k for k in flatten(config) if k.startswith("lower_bound.")]),
        "method.gradient=trajectory and launch/experts.py": (
            method.gradient == "trajectory",
            [k for k in flatten(config) if k.startswith("experts.")],
        ),
        "launch/search.py": (False, _under(config, "search")),
        **_of_experts(config),
        **_of_trajectories(config),
    }
    return {key: what for what, (read, keys) in belong.items() if not read for key in keys}


def _of_trajectories(config: Config) -> dict[str, tuple[bool, list[str]]]:
    """What trajectory matching and a teacher beside it read, and what the former does not."""
    method = config.method
    return {
        "method.gradient=trajectory": (method.gradient == "trajectory", _under(config, "trajectory")),
        "experts.path=null": (  # a given store tells how it was trained
            method.gradient != "trajectory" or config.experts.path is None,
            [k for k in _under(config, "experts")[1:] if k not in ("experts.count", "experts.path")],
        ),
        "another method.gradient than trajectory": (method.gradient != "trajectory", ["real_batch"]),
        "method.loss=distillation": (
            method.loss == "distillation",
            [*_under(config, "kd"), *_under(config, "teacher"), *_under(config, "teacher.net")],
        ),
        "teacher.path=null": (
            config.teacher.path is None,
            ["teacher.epochs", "teacher.lr", "teacher.momentum", "teacher.weight_decay", "teacher.batch", "teacher.augment"],
        ),
    }


def _of_experts(config: Config) -> dict[str, tuple[bool, list[str]]]:
    """What the training of experts reads or not, by its own words."""
    kind = config.experts.sharpness
    return {
        "experts.sharpness=sam or gsam": (kind != "none", ["experts.rho"]),
        "experts.sharpness=gsam": (kind == "gsam", ["experts.gsam_alpha"]),
    }


def unread_by_experts(config: Config, key: str) -> str | None:
    """Why launch/experts.py would not read ``key``; None if it does."""
    section = key.partition(".")[0]
    if section == "cluster":
        return "cluster=slurm"
    if section not in EXPERTS and key not in EXPERTS:
        return "launch/local.py"
    return next((what for what, (read, keys) in _of_experts(config).items() if not read and key in keys), None)


def _of_search(config: Config) -> dict[str, tuple[bool, list[str]]]:
    """What an architecture search reads or not, by its own words."""
    c, trained = config.search, config.search.truth in ("train", "none")
    cheap = set(TRAINED) & set(c.proxy)
    return {
        "space=convnets and space=cells": (c.space in ("convnets", "cells"), ["search.width"]),
        "space=cells": (c.space == "cells", ["search.cells"]),
        "a proxy that trains": (bool(cheap), ["search.steps", "search.proxy_seeds"]),
        "proxy=distilled": ("distilled" in cheap, ["search.set_lr"]),
        "proxy=random_real and proxy=coreset": (bool({"random_real", "coreset"} & cheap), ["search.draws"]),
        "proxy=coreset": ("coreset" in cheap, ["search.coreset"]),
        "truth=train and truth=none": (trained, ["search.seeds"]),
        "training on real images": (
            trained or bool(cheap - {"distilled"}),
            [f"search.{k}" for k in ("epochs", "lr", "batch")],
        ),
    }


def unread_by_search(config: Config, key: str) -> str | None:
    """Why launch/search.py would not read ``key``; None if it does."""
    section = key.partition(".")[0]
    if section == "cluster":
        return "cluster=slurm"
    if section not in SEARCH and key not in SEARCH:
        return "launch/local.py"
    return next((what for what, (read, keys) in _of_search(config).items() if not read and key in keys), None)


INTERFACE = ("exchange.interface",)  # on one machine the workers meet on loopback
EXPERTS = (
    "data", "net", "experts", "preset", "engine.dtype", "engine.precision", "engine.compile", "run.checkpoint_s", "workers",
    "device", "threads", "cache_dir", "smoke",
)  # fmt: skip
"""Sections and keys that launch/experts.py reads."""
SEARCH = (
    "data", "search", "preset", "engine.dtype", "engine.precision", "engine.compile", "workers", "device", "threads",
    "cache_dir", "run_dir", "smoke",
)  # fmt: skip
"""Sections and keys that launch/search.py reads."""
