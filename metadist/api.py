"""The Python API: what the command line does, with any torch Dataset, any module, and a method as a plain function.

    import metadist
    distilled = metadist.distil(my_dataset, net=MyNet, steps=400, ipc=10, run_dir="runs/mine")
    net = distilled.replay(MyNet())
    print(metadist.evaluate(distilled, my_test_set, net=MyNet).text())

Keywords are the keys of ``launch/local.py --help``; they go through the same checks. Mistakes are raised as
``metadist.UserError``, faults on the way as ``metadist.RunError``: one line each.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra
from torch.utils.data import Dataset

from metadist import data as data_room
from metadist import exchange, nets
from metadist.config import Config, DataConfig, NetConfig
from metadist.data import Data, Split, pixels
from metadist.errors import UserError
from metadist.evaluate import fitting
from metadist.evaluate.protocols import Evaluation
from metadist.evaluate.recipe import Recipe
from metadist.evaluate.statistics import Summary
from metadist.methods.starts import Starts, fresh
from metadist.nets import Learner
from metadist.run import own, trainer
from metadist.run.compose import compose
from metadist.run.evaluation import Given, named
from metadist.run.folder import RunFolder
from metadist.run.overrides import groups
from metadist.run.setup import device_of
from metadist.run.signals import Stop, stop_status
from metadist.run.sweep import quoted
from metadist.run.worker import execute
from metadist.synthetic.distilled import DistilledSet, load
from metadist.synthetic.network import Network
from metadist.synthetic.network import load as load_network

__all__ = ["Network", "distil", "evaluate", "load", "load_network"]


def distil(
    train: Dataset[Any] | str | None = None,
    test: Dataset[Any] | None = None,
    *,
    net: own.Net | str | None = None,
    method: str | None = None,
    loss: own.Loss | None = None,
    run_dir: str | Path | None = None,
    **overrides: Any,
) -> DistilledSet:
    """Learn a distilled set in this process, or resume the run in ``run_dir``; returns the set chosen on validation.

    train: a map-style torch Dataset of (image, label): PIL images or tensors [C, H, W], uint8 or in [0, 1]; or the name of a
        data set ("mnist"); default: digits.
    test: the Dataset the result is judged on, once; without it a fifth of ``train`` is held out for that.
    net: a module, a class or function that makes one (which then gives p(theta0) too), or a name ("convnet"); default: lenet.
    method: a published name; default: the preset's, else dd_random_init.
    loss: a method of your own: (phi, task, setup) -> loss of each task [G], differentiable in phi (the learned tensors by
        name). It takes the place of the method's: tasks are drawn, sets judged as ``method`` says; ``setup.method.loss`` is
        the one replaced, ``setup.inner.unroll`` the engine. Draw nothing in it: a run must be able to resume bit for bit.
    run_dir: the run folder; default runs/<method>-<data>-<net>-<hash of the identity>.
    overrides: keys of the command line, nested or dotted: steps=100, inner={"steps": 1}, **{"meta.lr": 0.02}, preset="...".

    What is given as an object enters the run's identity: a hash of the images and labels as read; of the module's repr, the
    shapes of its parameters and the values of its buffers and frozen ones (trainable values are drawn anew: a module that
    resets nothing of its own keeps those it is given with); of the source of ``loss`` (not of what it refers to). So a
    folder refuses another.
    The first Ctrl-C saves a checkpoint and raises KeyboardInterrupt, the second ends the process; SIGTERM raises SystemExit.
    Raises UserError for a mistake, RunError for a fault on the way.
    """
    if isinstance(train, str) and test is not None:
        raise UserError(f"train={train} brings a test split of its own; leave test out, or give a Dataset for train")
    if train is None and test is not None:
        raise UserError("test is given without train; give both Datasets")
    words = {"method": method, "run_dir": run_dir} | _objects(train, net)
    config = _compose([*_words({k: v for k, v in words.items() if v is not None}), *_words(overrides)])
    if config.method.synthetic == "network":
        raise UserError(f"method={config.method.name} trains networks, it distils no images; use launch/local.py")
    if config.method.name == "lower_bound":
        raise UserError("method=lower_bound is a demonstration that distils no images; run launch/local.py method=lower_bound")
    if config.workers != 1:
        raise UserError(f"workers={config.workers}: distil runs in this process alone; use launch/local.py for more workers")
    found = None
    if train is not None and not isinstance(train, str):
        found = own.read(train, test, config.data.size)
        config.data.name, config.data.path = found.name, None
    if loss is not None:
        config.method.name += f"+{own.loss_name(loss)}"
    folder = RunFolder.open(config)
    if folder.finished is None:
        _run(folder, found, None if isinstance(net, str) else net, loss)
    return load(folder.path)


def _compose(words: list[str]) -> Config:
    """``compose``, also inside a program that Hydra runs: there is one global Hydra, and the caller's must come back."""
    theirs = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        return compose(words)
    finally:
        GlobalHydra.instance().hydra = theirs


def _objects(train: Dataset[Any] | str | None, net: own.Net | str | None) -> dict[str, Any]:
    """The words that stand for train and net."""
    words: dict[str, Any] = {}
    if isinstance(train, str):
        words["data"] = train
    elif train is not None:  # the group without settings of its own; name and path are filled in once the images are read
        words |= {"data": "folder", "data.path": "the given Dataset"}
    if isinstance(net, str):
        words["net"] = net
    elif net is not None:
        words |= {"net": "custom", "net.target": own.net_name(net)}
    return words


def _words(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested keywords as words of the command line."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _words(value, f"{name}.")
        else:
            yield f"{name}={value if name in groups() and isinstance(value, str) else _literal(name, value)}"


def _literal(name: str, value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case numbers.Integral():
            return repr(int(value))
        case numbers.Real():
            return repr(float(value))
        case str() | Path():
            return quoted(str(value))
        case list() | tuple():
            return f"[{','.join(_literal(name, v) for v in value)}]"
    raise UserError(f"{name} is given a {type(value).__name__}; allowed: numbers, text, true or false, None, lists, keys")


def _run(folder: RunFolder, data: own.OwnData | None, net: own.Net | None, loss: own.Loss | None) -> None:
    """Train in this process as one worker of one."""

    def body(folder: RunFolder, rank: int, world: int, store: str | None, stop: Stop) -> dict[str, Any]:
        link = exchange.connect(folder.config, rank, world, store, folder.incarnation)
        summary = trainer.train(folder.config, folder, link, stop, own.setup(folder.config, data, net, loss))
        link.close()
        return summary

    with Stop() as stop:
        status = execute(folder, 0, 1, None, stop, body)
    if status == stop_status("SIGINT"):
        raise KeyboardInterrupt
    if status:
        raise SystemExit(status)


def evaluate(
    dset: DistilledSet | str | Path,
    data: Dataset[Any] | str | None = None,
    net: own.Net | str | None = None,
    nets: int = 20,
    *,
    seed: int | None = None,
    root: str = "data",
    download: bool = False,
    device: str = "auto",
    chunk: int = 20,
) -> Summary:
    """Accuracy of ``nets`` fresh networks trained on a set by its recorded steps: mean, sd, n, ci95 (fractions).

    dset: a set, or what ``load`` takes.
    data: a torch Dataset, all of whose images judge; or a data set's name; default: the one the set was made for.
    net: a module, a class or function that makes one, or a name; default: the net the set was made for. A set made for one
        initialization is judged from it, unless another net is named.
    root, download: where torchvision finds a named data set (its test split judges), and whether it may fetch it.
    seed: of the initializations; default: the set's.
    chunk: networks trained at once.
    Raises UserError if set, data and net do not fit each other.
    """
    dset = dset if isinstance(dset, DistilledSet) else load(dset)
    config = Config(device=device, seed=int(dset.manifest.get("seed", 0)) if seed is None else seed)
    if device not in ("auto", "cpu", "cuda") or nets < 1 or chunk < 1:
        raise UserError(f"device={device}, nets={nets}, chunk={chunk}: allowed are auto, cpu or cuda; 1 or more; 1 or more")
    where = device_of(config)
    judged = _judge(dset, data, DataConfig(root=root, download=download, size=dset.size), where)
    learner = _learner(dset, net, where)
    starts = _starts(dset, net, learner, config.seed)
    evaluation = Evaluation(learner, judged, starts, nets=nets, seed=config.seed, chunk=chunk)
    return evaluation.recorded(Recipe.of(dset, learner.dtype, where)).summary


def _judge(dset: DistilledSet, data: Dataset[Any] | str | None, cfg: DataConfig, device: torch.device) -> Data:
    """The real images as the set's networks see them."""
    if data is None or isinstance(data, str):
        cfg.name = data or str(dset.manifest.get("data"))
        if data is None and cfg.name not in data_room.sources.NAMED:
            raise UserError(f"the set was made for a Dataset of its author's own ({cfg.name}); give data=")
        found = data_room.load(cfg, device, torch.float32)
        fitting.check(dset, found)
        return fitting.aligned(found, dset.normalization)
    held = own.read(data, None, dset.size).train
    if int(held.y.max()) >= len(dset.classes):
        raise UserError(f"the Dataset has the label {int(held.y.max())}, the set classes 0 to {len(dset.classes) - 1}")
    x = pixels.unit(held.x).to(device, torch.float32)
    split = Split(dset.normalize(x), held.y.to(device))
    return Data(type(data).__name__, split, split, split, dset.classes, dset.normalization)


def _made_for(dset: DistilledSet) -> NetConfig:
    return NetConfig(**dset.manifest.get("net", {}))


def _learner(dset: DistilledSet, net: own.Net | str | None, device: torch.device) -> Learner:
    made_for, classes = _made_for(dset), len(dset.classes)
    if net is None and made_for.name == "custom":
        raise UserError("the set was made for a net of its author's own, which a file may not name; give net=")
    if net is None or isinstance(net, str):
        config = made_for if net in (None, made_for.name) else named(str(net))
        return nets.build(config, dset.channels, dset.size, classes, torch.float32, device)
    init = made_for.init if made_for.name == "custom" else "default"
    learner = own.learner(net, init, torch.float32, device, classes)
    learner.check(dset.images[:4].to(device))
    return learner


def _starts(dset: DistilledSet, net: own.Net | str | None, learner: Learner, seed: int) -> Starts:
    """The set's own initialization, or fresh ones."""
    theta0 = None if isinstance(net, str) else dset.start()
    if theta0 is not None and len(theta0) == learner.size:
        return Given(theta0.to(learner.device, learner.dtype)[None])
    if net is None and dset.manifest.get("init") == "pretrained":
        raise UserError(
            "the set was made for pre-trained networks, which are not in its file: judge it by launch/evaluate.py "
            "run=<its run folder>, or give net= to train fresh ones on it"
        )
    return fresh(learner, seed, net is None and _made_for(dset).draw_width)
