"""method=train and kd: from a configuration to the objects of a run: data, learner, teachers, method."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from metadist import data as data_room
from metadist import draw, nets
from metadist.config import Config
from metadist.data import Data, Split
from metadist.errors import UserError
from metadist.evaluate import fitting
from metadist.methods import advice as advice_room
from metadist.methods.advice import Advice
from metadist.methods.kd import Training
from metadist.nets import Learner
from metadist.nets.watch import first_line
from metadist.run import origins
from metadist.run.origins import Origin
from metadist.run.setup import DTYPES, device_of, tune
from metadist.store.logits import Logits
from metadist.synthetic import distilled, network
from metadist.synthetic.images import Phi
from metadist.synthetic.network import Network, snapshot_name


@dataclass(frozen=True)
class TrainingSetup:
    """Everything one worker computes with."""

    config: Config
    device: torch.device
    data: Data
    learner: Learner
    advice: Advice | None
    teachers: tuple[Network, ...]
    method: Training

    @property
    def static(self) -> bool:
        """Every step has the same shapes but for the soft term's, which are seen."""
        return True

    @property
    def is_compiled(self) -> bool:
        """Whether the loss is compiled."""
        return self.method.compiled

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The teachers; of data=distilled the images."""
        found = [origins.teachers(t.digest() for t in self.teachers)] if self.teachers else []
        if self.config.data.name == "distilled":
            found.append(origins.images(self.data.train, self.data.normalization))
        return tuple(found)

    @property
    def least(self) -> Mapping[str, float]:
        """There are none."""
        return {}

    def project(self, phi: Phi) -> None:
        """The constraint on the weights, train.max_square."""
        self.method.project(phi)

    def compiled(self, compile: bool) -> TrainingSetup:
        """The same with its loss compiled or not."""
        return dataclasses.replace(self, method=Training(self.config, self.data, self.learner, self.advice, compile))


def data_of(config: Config, device: torch.device, dtype: torch.dtype) -> Data:
    """The configured data; of data=distilled the set's images to train on, and the real ones it was made of to judge.

    Raises UserError for a set that does not fit its own data set.
    """
    if config.data.name != "distilled":
        return data_room.load(config.data, device, dtype, config.cache_dir, config.smoke)
    dset = distilled.load(str(config.data.path))
    if config.data.size not in (None, dset.size):
        raise UserError(f"data.size={config.data.size} is not the {dset.size} of data.path={config.data.path}; leave it out")
    name = str(dset.manifest.get("data"))
    if name not in data_room.sources.NAMED:
        raise UserError(f"data.path={config.data.path} was made of {name}, which no name stands for: nothing could judge")
    real = dataclasses.replace(config.data, name=name, path=None, size=dset.size, normalize="none")
    found = data_room.load(real, device, dtype, config.cache_dir, config.smoke)
    fitting.check(dset, found)
    labels = dset.labels.to(device)
    train = Split(dset.images.to(device, dtype), labels.to(dtype) if labels.is_floating_point() else labels)
    return dataclasses.replace(fitting.aligned(found, dset.normalization), train=train)


def teachers_of(config: Config) -> tuple[Network, ...]:
    """The networks of kd.teachers, as they were after the part kd.stopped of their training. UserError if there are none."""
    kd, found = config.kd, []
    for given in kd.teachers:
        place = Path(given).expanduser()
        if kd.stopped == 1:
            found.append(network.load(place))
            continue
        if not (file := place / snapshot_name(kd.stopped)).is_file():
            there = sorted(p.stem.removeprefix("network-") for p in place.glob("network-[0-9]*.safetensors"))
            raise UserError(f"kd.stopped={kd.stopped:g}: {place} holds no networks of that part of their training; "
                            f"it has {', '.join(there) or 'none'} (train.snapshots)")  # fmt: skip
        found.append(network.load(file))
    return tuple(found)


def _advice(config: Config, data: Data, teachers: tuple[Network, ...], device: torch.device) -> Advice | None:
    if not teachers or not config.kd.alpha:
        return None
    kd = config.kd
    for teacher, name in zip(teachers, kd.teachers, strict=True):
        needed = config.train.networks if kd.pair else None
        advice_room.check(teacher, name, data.channels, data.size, data.classes, needed)
    kept = None
    if kd.variants:
        images = hashlib.sha256(data.train.x.detach().cpu().contiguous().numpy().data).hexdigest()
        engine = {"dtype": config.engine.dtype, "precision": config.engine.precision}
        recipe = {"images": images, **engine, "teachers": [t.digest() for t in teachers]}
        if config.data.augment != "none":
            recipe |= {"augment": config.data.augment, "seed": str(config.seed)}
        kept = Logits(config.cache_dir, recipe)
    return Advice(teachers, data.normalization, kd.T, kd.pair, device, kept)


def _fits(learner: Learner, data: Data, name: str) -> None:
    """Raise UserError for a net that can't take the images."""
    theta = learner.init(draw.key(0, "check", 0, torch.zeros(1, dtype=torch.int64)))[0]
    try:
        with torch.no_grad():
            learner(theta, data.test.x[:2])
    except UserError:
        raise
    except Exception as e:
        size = "x".join(map(str, data.test.x.shape[1:]))
        raise UserError(f"net={name} can't take images of {size}: {first_line(e)} (data.size resizes images)") from e


def build(config: Config) -> TrainingSetup:
    """Build everything, not compiled yet. Raises UserError for data, a net or teachers that don't fit each other."""
    device, dtype = device_of(config), DTYPES[config.engine.dtype]
    tune(config.engine.precision, device)
    teachers = teachers_of(config)
    data = data_of(config, device, dtype)
    if wrong := [c for c in config.data.exclude if not 0 <= c < len(data.classes)]:
        raise UserError(
            f"data.exclude={wrong[0]} is no class of data={config.data.name}; allowed: 0 to {len(data.classes) - 1}"
        )
    learner = nets.build(config.net, data.channels, data.size, len(data.classes), dtype, device)
    _fits(learner, data, config.net.name)
    advice = _advice(config, data, teachers, device)
    return TrainingSetup(config, device, data, learner, advice, teachers, Training(config, data, learner, advice))
