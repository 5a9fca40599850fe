"""What a run makes, as the trainer sees it: judged on validation, kept, shown, judged once on the test split, written.

There are two: a distilled set (``Sets``, by metadist.run.judge and finish) and trained networks (metadist.run.networks).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from metadist.config import Config
from metadist.data import Data
from metadist.evaluate.protocols import CHOICE_IMAGES, CURVE_IMAGES
from metadist.exchange import Exchange
from metadist.run import finish, forecast, judge
from metadist.run.compute import Method
from metadist.run.folder import RunFolder
from metadist.run.monitor import Monitor
from metadist.run.origins import Origin
from metadist.run.setup import Setup
from metadist.run.state import MetaState
from metadist.synthetic.images import Phi


class Product(Protocol):
    """What a run makes of its meta-parameters."""

    def networks(self, purpose: str) -> int:
        """How many networks judge; purpose: "validation" | "evaluation"."""
        ...

    def evaluation_s(self, state: MetaState, exchange: Exchange) -> float:
        """Seconds of all validations left, the final judgement and its report, by a trial in which all take part."""
        ...

    def outcomes(self, phi: Phi, purpose: str, count: int, exchange: Exchange) -> dict[str, Tensor]:
        """Figures of ``count`` networks, each float64 [n], shared out over the workers; "score" chooses the checkpoint."""
        ...

    def share(self, phi: Phi, purpose: str, first: int, count: int, all: int) -> Tensor:
        """A server's worker: the figures [F, count] of networks first ... of ``all``."""
        ...

    def scalars(self, phi: Phi) -> dict[str, float]:
        """What to log of the parameters, by its name in monitor.NAMES."""
        ...

    def picture(self, phi: Phi) -> Tensor | None:
        """What to show of them, uint8 [H, W, 3]."""
        ...

    def reached(self, state: MetaState, folder: RunFolder) -> None:
        """A meta-step was done: keep what is to be kept at this one."""
        ...

    def finish(
        self, state: MetaState, folder: RunFolder, exchange: Exchange, monitor: Monitor, minutes: float
    ) -> dict[str, Any]:
        """Judge what was chosen on the test split, write it, return the summary."""
        ...


class Job(Protocol):
    """Everything one worker computes with, whatever the product."""

    @property
    def config(self) -> Config:
        """The run's configuration."""
        ...

    @property
    def device(self) -> torch.device:
        """This worker's."""
        ...

    @property
    def data(self) -> Data:
        """Real data."""
        ...

    @property
    def method(self) -> Method:
        """What a task is and loses."""
        ...

    @property
    def static(self) -> bool:
        """Whether every meta-step has the same shapes."""
        ...

    @property
    def is_compiled(self) -> bool:
        """Whether the method runs compiled."""
        ...

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Networks made elsewhere that it stands on."""
        ...

    @property
    def least(self) -> Mapping[str, float]:
        """Lower bounds of parameters, by name."""
        ...

    def project(self, phi: Phi) -> None:
        """Put updated parameters back, in place, into any other set they must lie in."""
        ...

    def compiled(self, compile: bool) -> Job:
        """The same, compiled or not."""
        ...


class Sets:
    """A distilled set."""

    def __init__(self, setup: Setup) -> None:
        """Of this setup."""
        self.setup, self.config = setup, setup.config

    def networks(self, purpose: str) -> int:
        """Fresh or held-out ones; a fixed start is one."""
        if self.config.method.init == "fixed":
            return 1
        return self.config.eval.nets if purpose == "validation" else self.config.eval.final_nets

    def evaluation_s(self, state: MetaState, exchange: Exchange) -> float:
        """See metadist.run.forecast."""
        config, valid, test = self.config, self.setup.data.valid, self.setup.data.test
        pace = forecast.pace(self.setup, state.kept, exchange.world)
        ways = 2 if self.setup.guide else 1  # students are judged with their teacher and without
        ours = forecast.left(config, state.step, len(valid.y), len(test.y), ways)
        chosen, curve = len(valid.thinned(CHOICE_IMAGES).y), len(test.thinned(CURVE_IMAGES).y)
        alone = forecast.report(config, chosen, len(test.y), curve).seconds(pace) if config.eval.report else 0.0
        return ours.seconds(pace) / exchange.world + alone

    def outcomes(self, phi: Phi, purpose: str, count: int, exchange: Exchange) -> dict[str, Tensor]:
        """Networks trained on the set."""
        return judge.outcomes(self.setup, phi, purpose, count, exchange)

    def share(self, phi: Phi, purpose: str, first: int, count: int, all: int) -> Tensor:
        """Some of them."""
        networks = self.setup.starts.held_out(all, purpose)[first : first + count]
        return judge.figures_of(self.setup, phi, purpose, networks)

    def scalars(self, phi: Phi) -> dict[str, float]:
        """Learned rates and momenta of the inner steps."""
        synthetic, inner = self.setup.synthetic, self.config.inner
        n = synthetic.inner_steps
        rates, momenta = synthetic.rates(phi)[:n], synthetic.momenta(phi)
        # What is not learned, or learned as one, is the same at every step: one number says it.
        rates = rates if inner.learn_lr and not inner.shared_lr else rates[:1]
        momenta = rates[:0] if momenta is None else momenta[: n if inner.learn_momentum else 1]
        values = {f"rate/{t:02d}": v for t, v in enumerate(rates.tolist())}
        return values | {f"momentum/{t:02d}": v for t, v in enumerate(momenta.tolist())}

    def picture(self, phi: Phi) -> Tensor | None:
        """The images."""
        return finish.picture(self.setup, phi)

    def reached(self, state: MetaState, folder: RunFolder) -> None:
        """Nothing but checkpoints is kept on the way."""

    def finish(
        self, state: MetaState, folder: RunFolder, exchange: Exchange, monitor: Monitor, minutes: float
    ) -> dict[str, Any]:
        """See metadist.run.finish."""
        return finish.finish(self.setup, state, folder, exchange, monitor, minutes)
