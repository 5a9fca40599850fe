"""`launch/evaluate.py`: what a distilled set is worth, by fresh networks trained on it and on what it has to beat.

    python launch/evaluate.py run=runs/x                        the set of a run, everything below
    python launch/evaluate.py set=mnist-10 data.root=data       a shipped set, or a file
    python launch/evaluate.py run=runs/x protocol=recorded baselines=random nets=50
    python launch/evaluate.py run=runs/x protocol=mtt            as published: dc | dsa | mtt, real images by the same
    python launch/evaluate.py run=runs/x protocol=dsa transfer=mlp,lenet,alexnet,vgg11,resnet18
    python launch/evaluate.py run=runs/x check=gradient         bias of the run's meta-gradient against the exact one

It prints a table and writes report.png and evaluation.json into the run folder (with set=: the current folder) or out=.
Accuracies are means over `nets` networks; rates that have to be chosen are chosen on the validation split.

keys (value: meaning)
  run, set       a run folder | a shipped name or a file of a set
  out            folder for report.png and evaluation.json
  nets           200: networks by recorded steps; ordinary training and transfer take at most 20, the full data set 5
  protocol       recorded,standard: the recorded ordered steps, ordinary shuffled training; or for standard a published one:
                 dc    20 nets, 300 epochs (mnist: 1,000, augment=dsa:crop_scale_rotate), lr 0.01 divided by 10 at half,
                       momentum 0.9, weight_decay 0.0005, batch 256, augment=none, baselines=random
                 dsa   the same, 1,000 epochs, augment=dsa
                 mtt   as dsa, 5 nets at the learned rate (its mean), schedule=half_anew; real images at it or 0.01
                 each number may be given anew; the published figures are the best over evaluations, here the test judges once
  epochs, optimizer, momentum, weight_decay, batch    of ordinary training: 100, momentum (sgd | momentum | adam), 0.9, 0, 256
  lr             null: of ordinary training, chosen from a grid on validation; one rate, or several to choose from
  baseline_lr    lr: of ordinary training on real images
  schedule       half: a tenth of the rate from half of the steps on | constant | half_anew: and there a new optimizer
  augment        none,auto: with none, crop, flip, crop_flip or auto (crop for digits, crop_flip for others, none below 16 px),
                 dsa or dsa:<operations joined by _> (color, crop, cutout, flip, scale, rotate; dsa: all, no flip on digits)
  baselines      all: random, class_mean, kmeans, kcenter, all or none: real images of the same number
  full, full_epochs   false, 5: train on the full data set as well
  transfer       none: other networks to train on the set and on random real images, such as mlp,lenet,alexnet,vgg11,resnet18
  split          test | valid: who judges
  trials         5: networks that choose a rate on validation
  seed           the run's: of fresh initializations, shuffling, random images
  chunk          20: networks at once
  compile        false: compile the training steps
  net, data      another network or data set than the set was made with; data.root, data.size... as for launch/local.py
  device, threads, cache_dir, json     auto, all, the run's, false
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from metadist import data as data_room
from metadist import nets
from metadist.config import Config, DataConfig, NetConfig
from metadist.data import Data
from metadist.errors import UserError, unknown
from metadist.evaluate import fitting, picture, published, report
from metadist.evaluate.report import Report, Row
from metadist.evaluate.settings import Settings
from metadist.evaluate.suite import Examination
from metadist.methods.starts import Starts, fresh
from metadist.nets import Learner
from metadist.run import gradient_check
from metadist.run.evaluation_keys import USAGE, Words, parse
from metadist.run.folder import RunFolder
from metadist.run.overrides import config_dir
from metadist.run.setup import DTYPES, device_of, starts_of
from metadist.run.table import table
from metadist.store import atomic_write
from metadist.synthetic import distilled
from metadist.synthetic.distilled import DistilledSet


@dataclass(frozen=True)
class Given:
    """The one initialization a set was made for."""

    theta0: Tensor  # [1, P]

    def sample(self, step: int, tasks: Tensor) -> Tensor:
        """The same weights for every task."""
        return self.theta0.expand(len(tasks), -1)

    def held_out(self, count: int, purpose: str = "evaluation") -> Tensor:
        """The same weights."""
        return self.theta0


@dataclass(frozen=True)
class Subject:
    """What is examined: a set, and the configuration it was made with (or as much of it as the set tells)."""

    dset: DistilledSet
    config: Config
    folder: RunFolder | None


def subject(words: Words) -> Subject:
    """The set that run= or set= names. Raises UserError if there is none."""
    if (words.run is None) == (words.set is None):
        raise UserError(f"give run= or set=, one of them; {USAGE}")
    if words.run is not None:
        folder = RunFolder.attach(words.run)
        return Subject(distilled.load(words.run), folder.config, folder)
    assert words.set is not None
    dset = distilled.load(words.set)
    manifest, config = dset.manifest, Config()
    config.data = DataConfig(name=str(manifest.get("data")), size=dset.size)
    config.net = NetConfig(**manifest.get("net", {}))
    config.seed = int(manifest.get("seed", 0))
    if config.net.name == "custom" and words.net is None:
        raise UserError(f"set={words.set} was made with a net of its author's own, which a file may not name; give net=")
    return Subject(dset, config, None)


def configured(given: Subject, words: Words, data_keys: dict[str, Any]) -> Config:
    """The configuration with the words' data, net and device in place. Raises UserError for unknown names."""
    config = given.config
    if words.data is not None:
        config.data = DataConfig(name=words.data, root=config.data.root, path=config.data.path)
    config.data = dataclasses.replace(config.data, **data_keys)
    if words.net is not None:
        config.net = named(words.net)
    if words.device is not None:
        if words.device not in ("auto", "cpu", "cuda"):
            raise unknown("device", words.device, ("auto", "cpu", "cuda"))
        config.device = words.device
    config.cache_dir = words.cache_dir or config.cache_dir
    return config


def named(name: str) -> NetConfig:
    """The net of that name as net=<name> alone configures it. Raises UserError for an unknown one."""
    allowed = [n for n in nets.NAMES if n != "custom"]
    if name not in allowed:
        raise unknown("net", name, allowed)
    words: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "net" / f"{name}.yaml"))
    return NetConfig(**words)


def starts(given: Subject, words: Words, config: Config, learner: Learner, data: Data, seed: int) -> tuple[Starts, str]:
    """Where networks start from, and in words."""
    theta0 = given.dset.start() if words.net is None else None
    if theta0 is not None:
        return Given(theta0.to(learner.device, learner.dtype)[None]), "the set's own initialization"
    if given.folder is not None and config.method.init == "pretrained" and words.net is None:
        if words.data is not None:
            raise UserError(
                f"data={words.data}: this run's pre-trained networks belong to its own data; leave data= out or give net="
            )
        return starts_of(config, learner, data, learner.device), "held-out pre-trained networks"
    return fresh(learner, seed, config.net.draw_width), f"fresh {config.net.init} initializations"


def examine(given: Subject, words: Words, settings: Settings, config: Config) -> Report:
    """Load, fit together, measure. Raises UserError if set, data and nets don't fit each other."""
    device, dtype = device_of(config), DTYPES[config.engine.dtype]
    data = data_room.load(config.data, device, dtype, config.cache_dir, config.smoke)
    fitting.check(given.dset, data)
    sizes = (data.channels, data.size, len(data.classes), dtype, device)
    learner = nets.build(config.net, *sizes)
    others = {name: nets.build(named(name), *sizes) for name in words.transfer}
    begin, described = starts(given, words, config, learner, data, settings.seed)
    seen = fitting.aligned(data, given.dset.normalization)
    examination = Examination(given.dset, seen, learner, config.net.name, begin, described, settings, say(words))
    poison = (config.method.attack, config.method.target) if config.method.objective == "poison" else None
    return examination.run(others, poison)


def say(words: Words) -> Any:
    """Progress, one line a measurement, on stderr; silent with json=true."""

    def line(row: Row) -> None:
        images, training, net, accuracy, *_ = report.cells(row)
        print(f"  {accuracy:>6} %  {net}, {images}, {training} ({row.seconds:.1f} s)", file=sys.stderr, flush=True)

    return (lambda row: None) if words.json else line


def text(found: Report) -> str:
    """What a person reads: the table and where it comes from."""
    s = found.settings
    judged = f"{s.split} split of {found.data}; rates chosen on the validation split; networks start from {found.starts}"
    lines = [judged, table(report.HEADER, [report.cells(row) for row in found.rows])]
    if s.ordinary in published.NAMES:
        numbers = f"momentum {s.momentum:g}, weight decay {s.weight_decay:g}, batch {s.batch}, schedule {s.schedule}"
        lines.append(
            f"protocol {s.ordinary}: {numbers}; published figures are the best of many evaluations, these are judged once"
        )
    if any(row.net != found.net for row in found.rows):
        lines += ["transfer", table(report.TRANSFER_HEADER, report.transfer(found))]
    for name, value in (found.poison or {}).items():
        lines.append(f"{name.replace('_', ' ')}: {value.text()}")
    return "\n".join(lines)


def write(found: Report, folder: Path) -> None:
    """report.png and evaluation.json. RunError when the disk refuses."""
    picture.save(found, folder / "report.png")
    atomic_write(folder / "evaluation.json", (json.dumps(found.as_dict(), indent=1) + "\n").encode())


def check(words: Words, given: Subject) -> int:
    """check=gradient. Raises UserError for another check or without a run folder."""
    if words.check != "gradient":
        raise unknown("check", words.check, ("gradient",))
    if given.folder is None:
        raise UserError("check=gradient needs run=<run folder>: a set alone has no meta-gradient")
    found = gradient_check.check(given.folder, given.config)
    parts = {"gradient": found.configured, "first_order": found.first_order}
    if words.json:
        listed = {name: [dataclasses.asdict(b) for b in biases] for name, biases in parts.items()}
        print(json.dumps({"step": found.step, **listed}, indent=1))
        return 0
    engine, method = given.config.engine, given.config.method
    how = f"{method.gradient}, {engine.dtype}, {engine.precision}"
    named = (f"as configured ({how})", "by the first-order shortcut (no Hessian products)")
    for which, biases in zip(named, parts.values(), strict=True):
        if biases:
            print(f"meta-gradient of step {found.step} {which} against the exact one")
            rows = [(b.parameter, f"{b.cosine:.9f}", f"{b.relative_error:.3e}", f"{b.norm:.3e}") for b in biases]
            print(table(("parameter", "cosine", "relative error", "norm of exact"), rows))
    return 0


def main(argv: Sequence[str]) -> int:
    """Exit status of `launch/evaluate.py` on these words. Raises UserError and RunError."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    words, measured, data_keys = parse(argv)
    given = subject(words)
    if words.threads:
        torch.set_num_threads(words.threads)
    config = configured(given, words, data_keys)
    if words.check is not None:
        return check(words, given)
    asked = published.settings(measured, config.data.name, given.dset)
    settings = Settings(**{"seed": config.seed, "chunk": config.eval.chunk, **asked})
    found = examine(given, words, settings, config)
    folder = Path(words.out) if words.out else given.folder.path if given.folder else Path.cwd()
    if words.out:
        folder.mkdir(parents=True, exist_ok=True)
    write(found, folder)
    if words.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        print(f"{text(found)}\nlook at {folder / 'report.png'}; figures in {folder / 'evaluation.json'}")
    return 0
