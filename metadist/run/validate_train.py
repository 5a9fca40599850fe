"""A configuration of ordinary training and knowledge distillation judged before any work (see metadist.run.validate)."""

from __future__ import annotations

from metadist.config import Config, DataConfig
from metadist.errors import UserError

NAMES = ("train", "kd")


def training(config: Config) -> None:
    """Raise UserError for the first thing wrong with method.synthetic=network, and for what belongs to it elsewhere."""
    m, train, kd = config.method, config.train, config.kd
    if m.synthetic != "network":
        if config.data.name == "distilled":
            raise UserError(f"data=distilled is a set to train networks on: method=train or kd; method={m.name} makes one")
        return
    if m.name not in NAMES:
        raise UserError(f"method.synthetic=network contradicts method={m.name}, which makes a set; choose method=train or kd")
    if m.name == "kd" and not kd.teachers:
        raise UserError("method=kd needs kd.teachers=[<run folder of method=train>]; without a teacher choose method=train")
    if train.networks > 1 and config.meta.clip:
        raise UserError(f"meta.clip={config.meta.clip:g} would clip the {train.networks} networks of train.networks together; "
                        "give meta.clip=0, or train.networks=1")  # fmt: skip
    if wrong := [p for p in train.snapshots if not 0 < p < 1]:
        raise UserError(f"train.snapshots={wrong[0]} is no part of a training; allowed: above 0 and below 1")
    if config.net.draw_width:
        raise UserError(f"net.draw_width=true is for learners of a set; method={m.name} trains nets of one width: leave it out")
    if config.data.augment == "none" and kd.variants > 1:
        raise UserError(f"kd.variants={kd.variants}: with data.augment=none an image has one form; give kd.variants=1")
    if train.max_square and config.net.weight_norm:
        raise UserError(
            "train.max_square holds the weights' length, which net.weight_norm=true divides out; leave one of them out"
        )
    length = config.meta.horizon or config.steps
    if late := [p for p in train.snapshots if max(1, round(p * length)) > config.steps]:
        raise UserError(
            f"train.snapshots={late[0]:g} of {length} steps (meta.horizon) is after steps={config.steps}; give less"
        )
    if config.data.name == "distilled":
        _distilled(config.data)


def _distilled(data: DataConfig) -> None:
    """Raise UserError for a key that chooses or changes real images, where those of a set are trained on as they are."""
    defaults = DataConfig()
    for key in ("exclude", "fraction", "normalize"):
        if getattr(data, key) != getattr(defaults, key):
            raise UserError(f"data.{key} is for real images; data=distilled is used as it is: leave it out")
