"""Distribution matching (DM: Zhao and Bilen 2021, arXiv 2110.04181): no training at all.

For each class the distilled images' mean embedding by a random network shall be the real images':

    sum over classes c    | mean of f(distilled_c) - mean of f(real_c) |^2,    f: activations before the last linear layer

The network is drawn anew for every meta-step; what is compared is augmented by the same draw on both sides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from metadist.config import Config
from metadist.data import Data
from metadist.metagrad.inner import Inner
from metadist.methods.by_class import ByClass
from metadist.methods.starts import Starts
from metadist.nets import Learner
from metadist.nets.embedding import embedding
from metadist.synthetic.images import Images, Phi


class Compared(NamedTuple):
    """What the tasks of one group draw.

    numbers: [G] classes. x: [G, R, C, H, W] real images. siamese: [G, 1, WIDTH]. theta0: [1, P].
    """

    numbers: Tensor
    x: Tensor
    siamese: Tensor
    theta0: Tensor


class Distribution(ByClass):
    """The method. Arguments as ``Distillation``; learner: the network that embeds.

    Raises UserError for a net without a last linear layer.
    """

    def __init__(self, config: Config, data: Data, synthetic: Images, inner: Inner, starts: Starts, learner: Learner) -> None:
        """Keep the pieces."""
        super().__init__(config, data, synthetic, inner, starts)
        self.embed = embedding(learner, data.train.x.shape[1:])

    def draw(self, step: int, tasks: Tensor) -> Any:
        """Everything random of these classes [G] of this meta-step."""
        return Compared(tasks, self.real(step, tasks), self.siamese(step, tasks), self.fresh(step))

    def loss(self, phi: Phi, task: Any) -> Tensor:
        """Squared distance [G] between the mean embeddings of the two batches of each class."""
        (own, _), (real, _) = self.pair(phi, task.numbers, task.x, task.siamese)
        with torch.no_grad():  # on a CPU one class after another (see evaluate.train.at_once), else all at once
            pieces = torch.split(real, self.inner.judge_group or len(real))
            theirs = torch.cat([self._mean(task.theta0[0], piece) for piece in pieces])
        return (self._mean(task.theta0[0], own) - theirs).square().sum(1)

    def _mean(self, theta: Tensor, x: Tensor) -> Tensor:
        """Mean embeddings [G, F] of images [G, B, C, H, W]; vmap keeps classes apart where a net normalizes by its batch."""
        lowered = self.config.engine.precision == "bf16"
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=lowered, cache_enabled=False):
            features = vmap(self.embed, (None, 0))(theta, x)
        return features.to(theta.dtype).mean(1)
