"""A learned generator at rest: weights, codes and sizes, from which the batches of a distilled set are made again.

Design choices
- The file holds the generator, not its images. What ``load`` shows is one draw of the curriculum, the one that was judged;
  ``DistilledSet.fresh(seed)`` gives others.
- float16 halves the file; a generator has no use for 8 bits a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metadist import draw
from metadist.config import Config, GeneratorConfig
from metadist.errors import unknown
from metadist.synthetic.generator import Generator
from metadist.synthetic.images import Phi

PRECISIONS = ("float32", "float16")
_PREFIX = "generator/"


@dataclass(frozen=True, eq=False)
class Maker:
    """A generator with what it needs to make batches.

    phi: its tensors on the CPU; settings: generator.*, steps, classes, shape, labels, seed (JSON-able).
    """

    phi: Phi
    settings: Mapping[str, Any]

    @staticmethod
    def of(synthetic: Generator, phi: Phi) -> Maker:
        """The generator as it is now."""
        settings = {
            "generator": dataclasses.asdict(synthetic.sizes),
            "steps": synthetic.steps,
            "classes": synthetic.classes,
            "shape": list(synthetic.shape),
            "labels": synthetic.config.labels.kind,
            "seed": synthetic.config.seed,
        }
        kept = {k: v.detach().to("cpu", torch.float32) for k, v in phi.items() if k.startswith("generator.")}
        return Maker(kept | {k: phi[k].detach().to("cpu", torch.float32) for k in ("codes", "labels") if k in phi}, settings)

    def generator(self) -> Generator:
        """The object that makes batches of ``phi``."""
        config = Config()
        config.method.synthetic, config.seed = "generator", int(self.settings["seed"])
        config.generator = GeneratorConfig(**self.settings["generator"])
        config.inner.steps, config.inner.epochs = int(self.settings["steps"]), 1
        config.labels.kind = str(self.settings["labels"])
        return Generator(config, int(self.settings["classes"]), self.settings["shape"], torch.float32, "cpu")

    @torch.no_grad()
    def make(self, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Images [N, C, H, W] and their labels. seed: of another draw of the curriculum; None: the one that was judged."""
        made = self.generator()
        drawn = None
        if seed is not None:
            found = made.draw(draw.key(seed, "fresh", 0, torch.zeros(1, dtype=torch.int64)))
            drawn = None if found is None else found[0]
        x, y = made.batches(self.phi, drawn)
        return x.flatten(0, 1), y.flatten(0, 1)

    def pack(self, precision: str) -> dict[str, Tensor]:
        """The tensors of a file. Raises UserError for another precision than float32 or float16."""
        if precision not in PRECISIONS:
            raise unknown("precision of a generator", precision, PRECISIONS)
        return {_PREFIX + k: v.to(getattr(torch, precision)) for k, v in self.phi.items()}

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Maker:
        """What ``pack`` gave."""
        phi = {k.removeprefix(_PREFIX): v.to(torch.float32) for k, v in tensors.items() if k.startswith(_PREFIX)}
        return Maker(phi, settings)
