"""A configuration judged before any work: one line with what was given, what is allowed, how to mend it.

Design choices
- Tables for what concerns one key, short functions for what concerns several. The first fault found is raised.
- What needs the data (the number of classes) is ``validate_with_data``, called once they are loaded.
- Keys that the run would not read are metadist.run.unread's affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from metadist.config import Config
from metadist.errors import UserError, unknown
from metadist.identity import flatten
from metadist.run import validate_class, validate_machine, validate_method, validate_search, validate_train

_TRAJECTORY = {"synthetic": "images", "gradient": "trajectory", "init": "expert", "objective": "real"}
METHODS: dict[str, dict[str, str]] = {
    "dd_fixed_init": {"init": "fixed", "objective": "real"},
    "dd_random_init": {"init": "random", "objective": "real"},
    "dd_pretrained_init": {"init": "pretrained", "objective": "real"},
    "truncated": {"gradient": "truncated", "objective": "real"},
    "dd_poison": {"init": "pretrained", "objective": "poison"},
    "dd_implicit": {"synthetic": "images", "gradient": "implicit", "objective": "real"},
    "gtn_implicit": {"synthetic": "generator", "gradient": "implicit", "objective": "real"},
    "gtn_matching": {"synthetic": "generator", "gradient": "matching", "objective": "real"},
    "gtn": {"synthetic": "generator", "gradient": "unrolled", "objective": "real"},
    "mtt": {**_TRAJECTORY, "loss": "cross_entropy"},
    "mtt_kd": {**_TRAJECTORY, "loss": "distillation"},
    "dc": {"synthetic": "images", "gradient": "matching", "match": "class", "init": "random", "objective": "real"},
    "dsa": {"synthetic": "images", "gradient": "matching", "match": "class", "init": "random", "objective": "real"},
    "dm": {"synthetic": "images", "gradient": "distribution", "match": "class", "init": "random", "objective": "real"},
    "train": {"synthetic": "network", "gradient": "unrolled", "init": "random", "objective": "real", "loss": "cross_entropy"},
    "kd": {"synthetic": "network", "gradient": "unrolled", "init": "random", "objective": "real", "loss": "distillation"},
    "lower_bound": {},
}
"""Published names and the words each of them stands for; the other words are free."""

DATA = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "usps", "folder", "distilled")
NETS = (
    "mlp", "lenet", "alexcifar", "convnet", "resnet18", "resnet50", "gtn", "alexnet", "vgg11",
    "plain", "resnet_cifar", "custom",
)  # fmt: skip

CHOICES: dict[str, tuple[str, ...]] = {
    "method.name": tuple(METHODS),
    "method.synthetic": ("images", "generator", "network"),
    "generator.curriculum": ("full", "shuffled_batches", "shuffled", "none"),
    "method.gradient": ("unrolled", "truncated", "implicit", "matching", "distribution", "trajectory"),
    "method.match": ("batch", "class"),
    "images.start": ("noise", "real"),
    "implicit.solver": ("neumann", "cg"),
    "matching.distance": ("cosine", "l2"),
    "method.init": ("fixed", "random", "pretrained", "expert"),
    "method.objective": ("real", "poison"),
    "method.loss": ("cross_entropy", "distillation"),
    "pretrained.data": DATA[:-1],
    "inner.optimizer": ("sgd", "momentum", "adam"),
    "inner.rate": ("softplus", "raw"),
    "labels.kind": ("hard", "soft"),
    "meta.optimizer": ("adam", "sgd"),
    "meta.schedule": ("constant", "step", "cosine"),
    "data.name": DATA,
    "data.normalize": ("standard", "zca", "none"),
    "data.augment": ("none", "crop", "flip", "crop_flip", "jitter"),
    "net.name": NETS,
    "net.init": ("xavier", "kaiming", "orthogonal", "default"),
    "net.norm": ("none", "batch", "layer", "instance", "group"),
    "net.activation": ("sigmoid", "relu", "leaky"),
    "net.pooling": ("none", "max", "avg"),
    "teacher.net.name": tuple(n for n in NETS if n not in ("gtn", "custom")),
    "teacher.net.init": ("xavier", "kaiming", "orthogonal", "default"),
    "teacher.net.norm": ("none", "batch", "layer", "instance", "group"),
    "teacher.net.activation": ("sigmoid", "relu", "leaky"),
    "teacher.net.pooling": ("none", "max", "avg"),
    "teacher.augment": ("none", "crop", "flip", "crop_flip"),
    "engine.compile": ("auto", "on", "off"),
    "engine.mixed": ("reverse", "forward"),
    "engine.dtype": ("float32", "float64"),
    "engine.precision": ("fp32", "tf32", "bf16"),
    "exchange.name": ("allreduce", "server"),
    "exchange.wire": ("full", "bfloat16"),
    "exchange.backend": ("auto", "gloo", "nccl"),
    "device": ("auto", "cpu", "cuda"),
    "cluster.name": ("slurm", "local", "print"),
    "experts.sharpness": ("none", "sam", "gsam"),
    **validate_search.CHOICES,
}

AT_LEAST_1 = (
    "steps", "tasks", "ipc", "real_batch", "workers", "inner.steps", "inner.epochs",
    "pretrained.count", "pretrained.epochs", "pretrained.batch", "meta.max_bad",
    "eval.every", "eval.nets", "eval.final_nets", "eval.chunk",
    "run.checkpoint_every", "run.keep", "run.log_every", "run.image_every", "data.size",
    "lower_bound.dimension", "lower_bound.samples", "lower_bound.trials",
    "cluster.nodes", "cluster.cpus_per_task", "cluster.timeout_min", "cluster.array_parallelism", "cluster.signal_delay_s",
    "exchange.shards", "cluster.server_cpus",
    "generator.batch", "generator.noise", "generator.hidden", "generator.maps", "generator.conv", "generator.chunk",
    "implicit.steps", "implicit.restart", "implicit.terms", "train.networks",
    "trajectory.epochs", "trajectory.max_start", "trajectory.replay", "teacher.epochs", "teacher.batch",
    "experts.count", "experts.epochs", "experts.batch", "experts.group",
    "matching.outer", "matching.inner", "matching.batch", *validate_search.AT_LEAST_1,
)  # fmt: skip
AT_LEAST_0 = (
    "seed", "threads", "method.attack", "method.target", "inner.loss_every", "inner.window", "meta.decay_every", "meta.warmup",
    "meta.horizon", "meta.clip", "meta.max_rollbacks", "engine.group", "run.checkpoint_s", "run.anchor_every", "net.width",
    "net.depth", "data.split_seed", "cluster.tasks_per_node", "cluster.gpus_per_node", "cluster.mem_gb",
    "cluster.max_num_timeout", "cluster.max_restarts", "cluster.server_mem_gb", "cluster.server_timeout_min",
    "exchange.max_staleness", "exchange.damping", "exchange.batch",
    "trajectory.min_start", "trajectory.grow", "trajectory.grow_from", "trajectory.batch", "teacher.net.width",
    "teacher.net.depth", "teacher.weight_decay",
    "implicit.batches", "implicit.damping", "implicit.l2", "exchange.deadline_s", "exchange.item", "exchange.queue",
    "train.weight_decay", "train.max_square", "kd.until", "kd.variants",
    "experts.images", "experts.weight_decay", "experts.gsam_alpha", "experts.seed", *validate_search.AT_LEAST_0,
)  # fmt: skip
POSITIVE = (
    "pretrained.lr", "inner.lr", "inner.eps", "meta.lr", "meta.lr_rate", "meta.lr_labels", "meta.eps", "meta.explode",
    "engine.memory_gb", "exchange.timeout_s", "exchange.patience", "exchange.heartbeat_s",
    "implicit.step", "kd.T", "kd.scale", "teacher.lr", "experts.lr", "experts.rho", "matching.lr",
    "search.lr",
)  # fmt: skip
BELOW_1 = (
    "inner.momentum", "inner.beta2", "meta.beta1", "meta.beta2", "meta.ema", "experts.momentum", "teacher.momentum",
    "search.momentum", "net.dropout", "net.input_dropout", "teacher.net.dropout", "teacher.net.input_dropout",
)  # fmt: skip
INSIDE_1 = ("pretrained.held_out", "data.validation", "labels.confidence")
RANGES: dict[str, tuple[tuple[str, ...], Callable[[float], bool]]] = {
    "at least 1": (AT_LEAST_1, lambda v: v >= 1),
    "at least 0": (AT_LEAST_0, lambda v: v >= 0),
    "above 0": (POSITIVE, lambda v: v > 0),
    "at least 0 and below 1": (BELOW_1, lambda v: 0 <= v < 1),
    "above 0 and below 1": (INSIDE_1, lambda v: 0 < v < 1),
    "above 0 and at most 1": (("meta.decay", "kd.stopped", "data.fraction"), lambda v: 0 < v <= 1),
    "0 to 1": (("kd.alpha",), lambda v: 0 <= v <= 1),
}


def validate(config: Config, here: bool = True) -> None:
    """Raise UserError for the first thing wrong with ``config`` that can be told without data.

    here: the run is for this machine, so what it lacks matters.
    """
    leaves = flatten(config)
    _choices(leaves)
    _ranges(leaves)
    _method(config)
    _inner(config)
    validate_train.training(config)
    validate_method.trajectory(config)
    validate_class.by_class(config)
    validate_class.augmentation(config)
    _data_and_net(config)
    _meta(config)
    validate_machine.machine(config)
    validate_machine.server(config)
    if here:
        validate_machine.gpu(config)


def validate_with_data(config: Config, classes: int) -> None:
    """Raise UserError for what only the data's number of classes can tell."""
    images, steps = config.ipc * classes, config.inner.steps
    if config.method.synthetic == "images" and images % steps:
        allowed = ", ".join(str(d) for d in range(1, images + 1) if images % d == 0)
        total = f"the {images} distilled images (ipc={config.ipc} x {classes} classes)"
        raise UserError(f"inner.steps={steps} does not divide {total}; allowed: {allowed}")
    validate_method.trajectory_with_data(config, classes)
    validate_class.tasks(config, classes)
    for key in ("attack", "target"):
        given = getattr(config.method, key)
        if config.method.objective == "poison" and given >= classes:
            raise UserError(f"method.{key}={given} is no class of data={config.data.name}; allowed: 0 to {classes - 1}")


def _choices(leaves: dict[str, Any]) -> None:
    for key, allowed in CHOICES.items():
        if leaves[key] not in allowed and not (key == "pretrained.data" and leaves[key] is None):
            raise unknown(key, leaves[key], allowed)


def _ranges(leaves: dict[str, Any]) -> None:
    for key, value in leaves.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} is not a finite number")
        for allowed, (keys, fits) in RANGES.items():
            if key in keys and value is not None and not fits(value):
                raise UserError(f"{key}={value} is out of range; allowed: {allowed}")
    for key in ("seed", "experts.seed", "search.seed"):
        if leaves[key] >= 2**63:
            raise UserError(f"{key}={leaves[key]} is out of range; allowed: 0 to 2**63 - 1")
    sizes = leaves["lower_bound.set_sizes"]
    if not sizes or min(sizes) < 1:
        raise UserError(f"lower_bound.set_sizes={sizes} is out of range; allowed: one or more numbers, each at least 1")


def _method(config: Config) -> None:
    m = config.method
    for word, meant in METHODS[m.name].items():
        if getattr(m, word) != meant:
            named = [n for n, words in METHODS.items() if words.get(word) == getattr(m, word)]
            better = max(named, key=lambda n: sum(getattr(m, k) == v for k, v in METHODS[n].items()), default=None)
            hint = f"; choose method={better}, or leave the word out" if better else "; leave the word out"
            raise UserError(f"method.{word}={getattr(m, word)} contradicts method={m.name}, which means {word}={meant}{hint}")
    if m.objective == "poison" and m.attack == m.target:
        raise UserError(f"method.attack={m.attack} equals method.target: name two different classes")
    if m.init != "pretrained" and (config.pretrained.path or config.pretrained.data):
        raise UserError(
            f"pretrained.path and pretrained.data are for method.init=pretrained; method.init={m.init} reads neither"
        )
    if config.experts.path == "":
        raise UserError("experts.path= names no folder; give one, or leave it out: experts then lie under cache_dir")
    if config.pretrained.path and config.pretrained.data:
        raise UserError(
            "pretrained.path and pretrained.data are both given: weights from a file, or networks trained on that data"
        )


def _inner(config: Config) -> None:
    inner, total = config.inner, config.inner.steps * config.inner.epochs
    length = f"the {total} inner steps (inner.steps={inner.steps} x inner.epochs={inner.epochs})"
    if config.method.gradient == "truncated" and inner.window < 1:
        raise UserError(f"method.gradient=truncated needs inner.window, 1 to {total}: how many of {length} are differentiated")
    if config.method.gradient != "truncated" and inner.window:
        raise UserError(
            f"inner.window={inner.window} is for method.gradient=truncated; leave it out, or choose method=truncated"
        )
    if inner.window > total:
        raise UserError(f"inner.window={inner.window} is longer than {length}; allowed: 1 to {total}")
    if inner.loss_every > (inner.window or total):
        what = f"inner.window={inner.window}" if inner.window else length
        raise UserError(f"inner.loss_every={inner.loss_every} is beyond {what}; allowed: 0 to {inner.window or total}")
    validate_method.generator(config)
    validate_method.stationary(config)
    if inner.learn_momentum and inner.optimizer == "sgd":
        raise UserError("inner.learn_momentum=true needs inner.optimizer=momentum or adam; sgd has no momentum")
    if inner.learn_momentum and inner.momentum == 0:
        raise UserError(
            "inner.learn_momentum=true learns through a sigmoid, which never is 0; start from inner.momentum above 0"
        )


def _data_and_net(config: Config) -> None:
    data, net = config.data, config.net
    if data.name == "folder" and not data.path:
        raise UserError("data=folder needs data.path=<folder with one folder of images per class>")
    if data.name == "distilled" and not data.path:
        raise UserError("data=distilled needs data.path=<run folder, file or shipped name of a distilled set>")
    if data.name not in ("folder", "distilled") and data.path:
        raise UserError(
            f"data.path={data.path} is for data=folder and data=distilled; data={data.name} is found under data.root"
        )
    if config.pretrained.data == "folder" and data.name != "folder":
        raise UserError("pretrained.data=folder would need a path of its own; use pretrained.path=<file of weights>")
    if net.draw_width and config.method.init != "random":
        raise UserError(
            f"net.draw_width=true draws initializations anew; method.init={config.method.init} does not: leave it out"
        )
    if net.name == "custom" and not net.target:
        raise UserError("net=custom needs net.target=<import path of an nn.Module class>, such as my.module.Net")
    if net.name != "custom" and (net.target or net.kwargs):
        raise UserError(f"net.target and net.kwargs are for net=custom; net={net.name} reads neither")


def _meta(config: Config) -> None:
    meta = config.meta
    if meta.horizon and meta.schedule != "cosine":
        raise UserError(f"meta.horizon={meta.horizon} is for meta.schedule=cosine; meta.schedule={meta.schedule} has none")
    if meta.decay_every and meta.schedule != "step":
        raise UserError(
            f"meta.decay_every={meta.decay_every} is for meta.schedule=step; meta.schedule={meta.schedule} has none"
        )
