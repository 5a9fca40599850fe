"""A generator as meta-parameters (Such et al. 2019, arXiv 1912.07768): noise and a label become the images of an inner step.

    noise + one-hot label -> linear -> BN -> leaky -> linear, H/4 x W/4 maps -> BN -> leaky
      -> x2, conv 3x3 -> BN -> leaky -> x2, conv 3x3 -> 2 tanh

Design choices
- The same interface as ``Images``: a batch for every step, rates, momenta, labels. What differs is that batches may be drawn.
- Curricula: "full": a learned latent code for every image of every step; "shuffled_batches": the same codes, whole batches
  drawn with replacement; "shuffled": every image drawn so; "none": fresh noise. All but the first draw for each task.
- Batch normalization uses the images of one inner step, so that what a step sees does not depend on how many are made at once.
- The images of ``generator.chunk`` steps are made at once and made again in the backward pass: memory holds that many
  activations, whatever the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metadist import draw
from metadist.config import Config, GeneratorConfig
from metadist.errors import UserError
from metadist.metagrad.mixed import Batch
from metadist.nets.weight_norm import normalized
from metadist.synthetic.images import Phi, Synthetic

CURRICULA = ("full", "shuffled_batches", "shuffled", "none")
SLOPE = 0.1
_EPS = 1e-5


class Generator(Synthetic):
    """What is learned when method.synthetic=generator.

    config: generator.*, inner.*, labels.*, seed.
    classes: number of classes K.
    shape: (C, H, W) of an image; H = W, a multiple of 4.
    dtype, device: of the parameters.
    """

    def __init__(
        self, config: Config, classes: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Fix sizes and order. Raises UserError for images whose side is no multiple of 4."""
        super().__init__(config, classes, shape, dtype, device)
        self.sizes, self.steps, self.batch = config.generator, config.inner.steps, config.generator.batch
        if self.shape[-1] % 4 or self.shape[-1] != self.shape[-2]:
            raise UserError(f"the generator makes images of 4 n x 4 n pixels, not {self.shape[-1]}; resize: data.size=28, say")
        self.count = self.steps * self.batch
        self.classes_of = torch.arange(self.count, device=self.device) % classes

    # --- parameters

    def parameters(self) -> Phi:
        """The meta-parameters before the first meta-step: weights generator.*, codes [N, Z], rate, momentum, labels."""
        key = draw.key(self.config.seed, "generator", 0, torch.zeros((), dtype=torch.int64, device=self.device))
        phi = self._weights(key)
        if self.sizes.curriculum != "none":
            phi["codes"] = draw.normal(draw.split(key, 100), (self.count, self.sizes.noise), self.dtype)
        return phi | self.step_parameters() | self._label_parameters()

    def _label_parameters(self) -> Phi:
        if self.config.labels.kind != "soft":
            return {}
        own = self.classes_of if self.sizes.curriculum != "none" else torch.arange(self.classes, device=self.device)
        return {"labels": self.soft_labels(own)}

    def _weights(self, key: Tensor) -> Phi:
        """He's initialization; gains such that a normalized weight is the drawn one."""
        phi: Phi = {}
        for i, (name, shape) in enumerate(layers(self.sizes, self.classes, self.shape).items()):
            fan_in = math.prod(shape[1:])
            weight = draw.normal(draw.split(key, i), shape, self.dtype) * math.sqrt(2 / ((1 + SLOPE**2) * fan_in))
            phi[f"generator.{name}.weight"] = weight
            zeros = torch.zeros(shape[0], dtype=self.dtype, device=self.device)
            if self.sizes.weight_norm:
                phi[f"generator.{name}.gain"] = weight.flatten(1).norm(dim=1)
            if name != "image":
                phi[f"generator.{name}.scale"] = zeros + 1
            phi[f"generator.{name}.bias"] = zeros
        return phi

    # --- what a task draws

    @property
    def shared(self) -> bool:
        """Whether all tasks of a meta-step see the same batches."""
        return self.sizes.curriculum == "full"

    def draw(self, keys: Tensor) -> Tensor | None:
        """What the curriculum draws for every task: noise [G, S, B, Z], images' numbers [G, S, B], or nothing. keys: [G, 2]."""
        kind, shape = self.sizes.curriculum, (self.steps, self.batch)
        if kind == "none":
            return draw.normal(keys, (*shape, self.sizes.noise), self.dtype)
        if kind == "shuffled":
            return draw.integers(keys, shape, self.count)
        if kind == "shuffled_batches":
            first = draw.integers(keys, (self.steps, 1), self.steps) * self.batch
            return first + torch.arange(self.batch, device=first.device)
        return None

    def reference(self) -> Tensor | None:
        """The draw that sets are judged, shown and kept by: [S, B, ...], of a stream that no task sees."""
        keys = draw.key(self.config.seed, "replay", 0, torch.zeros(1, dtype=torch.int64, device=self.device))
        found = self.draw(keys)
        return None if found is None else found[0]

    # --- batches

    def _labels(self, phi: Phi, drawn: Tensor | None) -> Tensor:
        """[S, B] or [S, B, K]; with tasks in front if they are drawn so."""
        numbers = self._numbers(drawn)
        if "labels" in phi:
            table = torch.softmax(phi["labels"], dim=1)
            return table[self.classes_of[numbers] if self.sizes.curriculum == "none" else numbers]
        return self.classes_of[numbers]

    def _numbers(self, drawn: Tensor | None) -> Tensor:
        """Which code (curriculum none: which place in the sequence, for the class) each image has."""
        if drawn is not None and not drawn.is_floating_point():
            return drawn
        every = torch.arange(self.count, device=self.device).view(self.steps, self.batch)
        return every if drawn is None else every.expand(drawn.shape[:-1])

    def batches(self, phi: Phi, drawn: Tensor | None = None) -> Batch:
        """All inner batches: images [S, B, C, H, W] and labels; with [G, ...] in front for what ``draw`` gave.

        drawn: None: the reference draw.
        """
        drawn = self.reference() if drawn is None else drawn
        labels = self._labels(phi, drawn)
        if drawn is not None and drawn.is_floating_point():
            classes = self.classes_of[self._numbers(drawn)]
            return self._images(phi, drawn.flatten(0, -3), classes.flatten(0, -2)).view(*drawn.shape[:-1], *self.shape), labels
        images = self._images(phi, phi["codes"].view(self.steps, self.batch, -1), self.classes_of.view(self.steps, -1))
        return (images if drawn is None else images.flatten(0, 1)[drawn]), labels

    def _images(self, phi: Phi, z: Tensor, classes: Tensor) -> Tensor:
        """Images [S, B, C, H, W] of latents [S, B, Z] and classes [S, B]."""
        weights = {k.removeprefix("generator."): v for k, v in phi.items() if k.startswith("generator.")}
        side = self.shape[-1] // 4
        hot = F.one_hot(classes, self.classes).to(z.dtype)
        names = tuple(weights)

        def make(z: Tensor, hot: Tensor, *values: Tensor) -> Tensor:
            return generate(dict(zip(names, values, strict=True)), torch.cat((z, hot), -1), side)

        made = []
        for part, own in zip(torch.split(z, self.sizes.chunk), torch.split(hot, self.sizes.chunk), strict=True):
            made.append(checkpoint(make, part, own, *weights.values(), use_reentrant=False, preserve_rng_state=False))
        return torch.cat(made)


def layers(sizes: GeneratorConfig, classes: int, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The weights' shapes by name."""
    channels, side = shape[0], shape[-1] // 4
    return {
        "first": (sizes.hidden, sizes.noise + classes),
        "second": (sizes.maps * side * side, sizes.hidden),
        "conv": (sizes.conv, sizes.maps, 3, 3),
        "image": (channels, sizes.conv, 3, 3),
    }


def generate(weights: Phi, z: Tensor, side: int) -> Tensor:
    """Images [S, B, C, 4 side, 4 side] in (-2, 2) from latents with their labels [S, B, Z + K].

    weights: as of ``layers``, with their gains, scales and biases. Statistics are each step's own.
    """
    steps, batch = z.shape[:2]

    def weight(name: str) -> Tensor:
        v, gain = weights[f"{name}.weight"], weights.get(f"{name}.gain")
        return v if gain is None else normalized(v, gain)

    def normal(x: Tensor, name: str) -> Tensor:
        """Batch normalization of every step by itself, and the non-linearity. x: [S * B, F, ...]."""
        grouped = x.view(steps, batch, *x.shape[1:])
        dims = [1, *range(3, grouped.dim())]
        var, mean = torch.var_mean(grouped, dims, correction=0, keepdim=True)
        tail = (1, 1, -1, *[1] * (grouped.dim() - 3))
        scale = (var + _EPS).rsqrt() * weights[f"{name}.scale"].view(tail)
        out = grouped * scale + (weights[f"{name}.bias"].view(tail) - mean * scale)
        return F.leaky_relu(out, SLOPE).view(x.shape)

    def conv(x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        wide = F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (1, 1, 1, 1), mode="reflect")
        return F.conv2d(wide, weight(name), bias)

    x = normal(F.linear(z.flatten(0, 1), weight("first")), "first")
    x = normal(F.linear(x, weight("second")), "second")
    x = normal(conv(x.view(len(x), -1, side, side), "conv"), "conv")
    x = 2 * torch.tanh(conv(x, "image", weights["image.bias"]))
    return x.view(steps, batch, *x.shape[1:])
