"""What matching class by class, and augmentation, ask of a configuration (see metadist.run.validate)."""

from __future__ import annotations

from metadist.config import Config
from metadist.errors import UserError


def by_class(config: Config) -> None:
    """method.match=class: dc, dsa, dm. Raises UserError."""
    m, inner = config.method, config.inner
    if m.gradient == "distribution" and m.match != "class":
        raise UserError("method.gradient=distribution compares class by class; give method.match=class, or choose method=dm")
    if m.match != "class":
        return
    if m.gradient not in ("matching", "distribution"):
        raise UserError(
            f"method.match=class is for method.gradient=matching or distribution, not {m.gradient}; choose method=dc, dsa or dm"
        )
    if m.synthetic != "images" or m.objective != "real":
        raise UserError(f"method.match=class compares images with real ones; method.synthetic={m.synthetic} and "
                        f"method.objective={m.objective} don't go with it; give images and real")  # fmt: skip
    _augmented(config)
    if m.gradient == "distribution":
        _embedded(config)
    if inner.loss_every:
        raise UserError(
            f"inner.loss_every={inner.loss_every} is for method.match=batch; method.match=class compares once a meta-step"
        )


def _augmented(config: Config) -> None:
    """dc and dsa are one method without and with augmentation; a set carries its method's name."""
    name, given = config.method.name, config.dsa
    if name == "dsa" and given == "none":
        raise UserError("dsa=none contradicts method=dsa; choose method=dc, or leave it out")
    if name == "dc" and given != "none":
        raise UserError(f"dsa={given} contradicts method=dc; choose method=dsa, or leave it out")


def _embedded(config: Config) -> None:
    for key, given in (("learn_lr", config.inner.learn_lr), ("learn_momentum", config.inner.learn_momentum)):
        if given:
            raise UserError(f"inner.{key}=true, but method.gradient=distribution trains no network; give inner.{key}=false")
    if config.labels.kind == "soft":
        raise UserError("labels.kind=soft, but method.gradient=distribution sees no labels; give labels.kind=hard")


def augmentation(config: Config) -> None:
    """The strategy ``dsa``. Raises UserError."""
    if config.dsa == "none":
        return
    from metadist.data import dsa, sources  # with torch, which other configurations' checks go without

    if "flip" in dsa.operations(config.dsa) and config.data.name in sources.DIGIT_SETS:
        raise UserError(f"dsa={config.dsa} mirrors images, and a mirrored digit of {config.data.name} is no digit; use "
                        f"{dsa.MIRROR_FREE}")  # fmt: skip


def tasks(config: Config, classes: int) -> None:
    """What only the data's number of classes can tell. Raises UserError."""
    if config.method.match == "class" and config.tasks != classes:
        raise UserError(f"tasks={config.tasks}, but method={config.method.name} has a task for each class and "
                        f"data={config.data.name} has {classes}; give tasks={classes}")  # fmt: skip
