"""Tasks that are classes: what gradient matching (``dc``) and distribution matching (``dm``) of images share.

Task c of a meta-step is class c: a real batch of that class against the distilled images of that class, both seen by the one
learner that all classes of the step share, both augmented by the same draw (siamese, arXiv 2102.08259).

The sources add the classes' losses up, the engine takes their mean over the tasks: a published pixel rate r is meta.lr = r x
classes here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metadist import draw
from metadist.config import Config
from metadist.data import Data, augment, dsa
from metadist.metagrad.inner import Inner
from metadist.metagrad.mixed import Batch
from metadist.methods.dd import Distillation, whole
from metadist.methods.starts import Starts
from metadist.synthetic.images import Images, Phi


class ByClass(Distillation):
    """What the methods of this kind draw and compare. Arguments as ``Distillation``.

    config: real_batch, seed, data.augment (of real images alone), dsa (of both).
    """

    def __init__(self, config: Config, data: Data, synthetic: Images, inner: Inner, starts: Starts) -> None:
        """Sort the training images by class."""
        super().__init__(config, data, synthetic, inner, starts, whole(1, 0))
        self.images = synthetic
        self.rows = torch.sort(data.train.y, stable=True).indices
        self.sizes = torch.bincount(data.train.y, minlength=synthetic.classes)
        self.firsts = self.sizes.cumsum(0) - self.sizes
        self._drawn: tuple[int, Tensor] | None = None

    def fresh(self, step: int) -> Tensor:
        """A learner [1, P] of this meta-step's own."""
        if self._drawn is None or self._drawn[0] != step:  # groups of one step ask for the same
            self._drawn = step, self.starts.sample(step, torch.zeros(1, dtype=torch.int64, device=self.images.device))
        return self._drawn[1]

    def real(self, step: int, tasks: Tensor) -> Tensor:
        """Real images [G, R, C, H, W] of these classes, drawn with replacement."""
        config = self.config
        drawn = draw.integers(draw.key(config.seed, "batch", step, tasks), (config.real_batch,), self.sizes[tasks, None])
        x = self.data.train.x[self.rows[self.firsts[tasks, None] + drawn]]
        return augment(config.data.augment, draw.key(config.seed, "augment", step, tasks), x)

    def siamese(self, step: int, tasks: Tensor) -> Tensor:
        """What is done to both sides, the same to every image of a class: [G, 1, WIDTH] of ``metadist.data.dsa``."""
        keys = draw.key(self.config.seed, "siamese", step, tasks)
        return dsa.parameters(self.config.dsa, keys, 1, self.images.shape[-1], self.images.dtype)

    def pair(self, phi: Phi, numbers: Tensor, x: Tensor, siamese: Tensor) -> tuple[Batch, Batch]:
        """The two batches of each class: images [G, B, C, H, W] and labels, distilled and real, augmented.

        numbers: [G] classes; x: [G, R, C, H, W] from ``real``; siamese: as drawn.
        """
        both = (phi["images"], self.images.labels(phi))
        own, labels = (v.view(-1, self.images.classes, *v.shape[1:])[:, numbers].transpose(0, 1).contiguous() for v in both)
        y = numbers[:, None].expand(x.shape[:2])
        if self.config.dsa == "none":
            return (own, labels), (x, y)
        return (dsa.apply(siamese, own), labels), (dsa.apply(siamese, x), y)
