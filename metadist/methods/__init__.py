"""Published methods as points in a space of axes; ``build`` puts one together from the words of the configuration."""

from __future__ import annotations

from typing import cast

from metadist.config import Config
from metadist.data import Data
from metadist.errors import UserError
from metadist.metagrad.inner import Inner
from metadist.methods.dc import Condensation
from metadist.methods.dd import Distillation, Window, whole
from metadist.methods.dm import Distribution
from metadist.methods.implicit import Implicit
from metadist.methods.matching import Matching
from metadist.methods.poison import relabelled
from metadist.methods.starts import Starts
from metadist.methods.trajectory import Guide, Segments, Trajectory
from metadist.methods.truncated import random_window
from metadist.nets import Learner
from metadist.nets.loss import with_l2
from metadist.synthetic.images import Images, Synthetic


def window_of(config: Config) -> Window:
    """The differentiated part of each meta-step's unroll. Raises UserError for a window longer than the unroll."""
    inner = config.inner
    steps = inner.steps * inner.epochs
    if config.method.gradient == "unrolled":
        return whole(steps, inner.loss_every)
    if not 1 <= inner.window <= steps:
        raise UserError(
            f"inner.window={inner.window} must lie between 1 and inner.steps x inner.epochs = {steps} for gradient=truncated"
        )
    return random_window(steps, inner.window, inner.loss_every, config.seed)


def build(
    config: Config,
    data: Data,
    synthetic: Synthetic,
    inner: Inner,
    starts: Starts,
    learner: Learner,
    guide: Guide | None = None,
) -> Distillation:
    """The method that ``config.method`` names. guide: the teacher and its loss, for method.loss=distillation."""
    method = config.method
    if method.gradient == "trajectory":
        assert isinstance(synthetic, Images)
        return Trajectory(config, data, synthetic, inner, cast(Segments, starts), guide)
    relabel = relabelled(method.attack, method.target) if method.objective == "poison" else None
    inner = inner if synthetic.shared else inner.but(shared=False)
    if method.gradient == "implicit":
        penalized = inner.but(loss=with_l2(inner.loss, config.implicit.l2))
        return Implicit(config, data, synthetic, inner, starts, penalized, relabel)
    if method.match == "class":
        assert isinstance(synthetic, Images)
        kind = Distribution if method.gradient == "distribution" else Condensation
        return kind(config, data, synthetic, inner, starts, learner)
    if method.gradient == "matching":
        return Matching(config, data, synthetic, inner, starts, learner, relabel)
    return Distillation(config, data, synthetic, inner, starts, window_of(config), relabel)
