"""What of a configuration defines the result, and what is mere circumstance (how many workers, which device).

Circumstance may differ when a run is resumed; the identity names its folder and guards it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from metadist.config import Config

CIRCUMSTANCE = {
    "steps", "run_dir", "workers", "device", "threads", "cache_dir", "run",
    "data.root", "data.download", "exchange.timeout_s", "exchange.backend", "exchange.interface", "cluster",
    "exchange.shards", "exchange.queue", "exchange.encrypt", "exchange.patience", "exchange.heartbeat_s",
    "engine.compile", "engine.group", "engine.memory_gb", "eval.chunk", "eval.final_nets", "eval.report",
}  # fmt: skip


SERVER = tuple(
    f"exchange.{name}"
    for name in (
        "max_staleness", "damping", "batch", "deadline_s", "item", "wire", "shards", "queue", "encrypt", "patience",
        "heartbeat_s",
    )
)  # fmt: skip
"""Keys that exchange=server alone reads."""

FREE = ("net.kwargs", "teacher.net.kwargs", "cluster.additional_parameters")  # leaves that hold keys of their own


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf by its dotted name, sorted."""

    def walk(prefix: str, node: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for k, v in node.items():
            if isinstance(v, dict) and f"{prefix}{k}" not in FREE:
                out |= walk(f"{prefix}{k}.", v)
            else:
                out[f"{prefix}{k}"] = v
        return out

    return dict(sorted(walk("", dataclasses.asdict(config)).items()))


def is_circumstance(key: str) -> bool:
    """Whether a leaf, by its dotted name, may differ when a run is resumed."""
    return key in CIRCUMSTANCE or key.split(".")[0] in CIRCUMSTANCE


def identity(config: Config) -> dict[str, Any]:
    """The leaves that define the result: all but circumstance, and what only another exchange or another kind of set reads."""
    unread = () if config.exchange.name == "server" else SERVER
    method, guided = config.method, config.method.loss == "distillation"
    read = {
        "generator.": method.synthetic == "generator",
        "images.": method.synthetic == "images",
        "implicit.": method.gradient == "implicit",
        "matching.": method.gradient == "matching",
        "trajectory.": method.gradient == "trajectory",
        "experts.": method.gradient == "trajectory",
        "train.": method.synthetic == "network",
        "kd.": guided,
        "teacher.": guided and method.synthetic != "network",
        "search.": False,  # launch/search.py has an identity of its own
    }
    elsewhere = tuple(prefix for prefix, used in read.items() if not used)
    leaves = {k: v for k, v in flatten(config).items() if not k.startswith(elsewhere)}
    return {k: v for k, v in leaves.items() if not is_circumstance(k) and k not in unread}


def identity_hash(config: Config) -> str:
    """SHA-256 of the identity, in hex."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()


def default_run_dir(config: Config) -> str:
    """runs/<method>-<data>-<net>-<8 hex of the identity>."""
    return f"runs/{config.method.name}-{config.data.name}-{config.net.name}-{identity_hash(config)[:8]}"


# Keys that came after recipes were first hashed. At these values they change nothing and are left out, so that experts and
# teachers made before are still found.
_LATER: dict[str, Any] = {"data.fraction": 1.0, "data.exclude": [], "net.dropout": 0.0, "net.input_dropout": 0.0}


def for_recipe(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The ``values`` of a config group as they stand in the recipe of something that is kept and found by it."""
    return {k: v for k, v in values.items() if f"{group}.{k}" not in _LATER or v != _LATER[f"{group}.{k}"]}
