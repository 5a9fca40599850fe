"""The product: a distilled set. Images, labels and the recipe that trains on them, in one self-describing file.

    import metadist
    distilled = metadist.load("mnist-10")        # a shipped name, a file, or a run folder
    net = distilled.replay(MyNet())              # any torch module for its image size and classes
    net(distilled.normalize(x))                  # x: real images in [0, 1]

Design choices
- One checksummed safetensors file (metadist.store): tensors, and a manifest in JSON. Loading runs no code of the file.
- A generator is kept instead of its images; they are made when the file is loaded, and others by ``fresh``.
- Images are kept as float32, float16 or uint8 (see ``codec``); rates, order and labels are always exact.
- A set for one fixed initialization holds its weights, or, to stay small, the recipe to draw them again (net, seed) with
  their SHA-256: other bits are an error, not a silent loss of accuracy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from metadist import draw, nets, store
from metadist.config import NetConfig
from metadist.data.normalization import Normalization
from metadist.errors import RunError, UserError, unknown
from metadist.metagrad.optimizers import Optimizer
from metadist.synthetic import codec, picture, replay
from metadist.synthetic.maker import Maker
from metadist.synthetic.network import FILE as NETWORKS

FILE = "distilled.safetensors"
STARTS = ("auto", "own")
SETS = Path(__file__).parents[1] / "sets"
_KIND = "metadist distilled set"
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class DistilledSet:
    """A distilled set of N images used as S ordered batches over T steps; image s*B + b belongs to batch s, B = N/S."""

    images: Tensor  # [N, C, H, W] float, normalised
    labels: Tensor  # int64 [N], or float probabilities [N, K]
    order: Tensor  # int64 [T]: the batch of each step; every batch 0 ... S-1 occurs
    lr: Tensor  # float [T]: learning rate of each step
    normalization: Normalization  # what made real images in [0, 1] comparable to these
    momentum: Tensor | None = None  # float [T]: momentum, Adam's beta1; None for sgd
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"kind": "sgd"})  # kind, beta2, eps
    theta0: Tensor | None = None  # [P]: the one initialization this set is for; None: any
    manifest: Mapping[str, Any] = field(default_factory=dict)  # JSON-able: method, data, split, classes, net, seed, metrics...
    maker: Maker | None = None  # the generator that made the images, if one did

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other (UserError)."""
        n, steps, order = len(self.images), self.steps, self.order
        good = {
            "images [N, C, H, W]": self.images.dim() == 4 and self.images.is_floating_point() and n > 0,
            "labels [N] or [N, K]": len(self.labels) == n and self.labels.dim() == 1 + self.labels.is_floating_point(),
            "order [T], in which every batch occurs": order.dim() == 1 and 0 < steps == len(set(order.tolist())),
            "number of images, a multiple of the batches": steps > 0 and n % steps == 0,
            "lr [T]": self.lr.shape == order.shape,
            "momentum [T]": self.momentum is None or self.momentum.shape == order.shape,
            "momentum, which this optimizer needs": self.momentum is not None or self.optimizer["kind"] == "sgd",
        }
        for what, ok in good.items():
            if not ok:
                raise UserError(f"a distilled set of {n} images in {steps} batches lacks a fitting {what}")

    @property
    def steps(self) -> int:
        """S: how many batches the images are."""
        return int(self.order.max()) + 1 if len(self.order) else 0

    @property
    def classes(self) -> tuple[str, ...]:
        """The K class names; numbers where the manifest has none."""
        count = self.labels.shape[1] if self.labels.is_floating_point() else int(self.labels.max()) + 1
        return tuple(self.manifest.get("classes") or map(str, range(count)))

    @property
    def channels(self) -> int:
        """C, channels of an image."""
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """H = W, pixels of a side."""
        return self.images.shape[-1]

    def batches(self) -> tuple[Tensor, Tensor]:
        """(x [S, B, C, H, W], y [S, B] or [S, B, K])."""
        x, y = self.images, self.labels
        return x.reshape(self.steps, -1, *x.shape[1:]), y.reshape(self.steps, -1, *y.shape[1:])

    def dataset(self) -> TensorDataset:
        """The (image, label) pairs as a torch Dataset, for a DataLoader."""
        return TensorDataset(self.images, self.labels)

    def schedule(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The optimizer's table h [T, K] of the recorded rates."""
        momentum = None if self.momentum is None else self.momentum.to(dtype)
        return Optimizer(**self.optimizer).schedule(self.lr.to(dtype), momentum)

    def fresh(self, seed: int) -> DistilledSet:
        """The set with newly made batches: another draw of its generator's curriculum ("full" has no other).

        Raises UserError for a set of images.
        """
        if self.maker is None:
            raise UserError("this set holds images, not a generator: there are no fresh batches; use batches()")
        images, labels = self.maker.make(seed)
        return replace(self, images=images, labels=labels)

    def normalize(self, x: Tensor) -> Tensor:
        """Real images x [N, C, H, W] in [0, 1] as this set's networks see them; UserError for other channels or sizes."""
        if tuple(x.shape[-3:]) != tuple(self.images.shape[1:]):
            given, want = (" x ".join(map(str, s)) for s in (x.shape[-3:], self.images.shape[1:]))
            raise UserError(f"images of {given} do not fit this set of {want} images; resize them to that")
        return self.normalization.apply(x)

    def start(self) -> Tensor | None:
        """The one initialization [P] this set is for, stored or drawn again by its recipe; None if it is for any.

        Raises RunError if the weights drawn here are not, bit for bit, the recorded ones.
        """
        recipe = self.manifest.get("theta0_recipe")
        if self.theta0 is not None or recipe is None:
            return self.theta0
        theta0 = _draw_start(recipe, self.channels, self.size, len(self.classes))
        if digest(theta0) != recipe["sha256"]:
            raise RunError(
                f"the initialization drawn again (net={recipe['net']['name']}, seed={recipe['seed']}) differs from the one "
                'this set was made for; use the version of metadist in its manifest, or replay with start="own"'
            )
        return theta0

    def replay(self, net: nn.Module, start: str = "auto") -> nn.Module:
        """Train ``net`` in place by the recorded ordered steps and rates; returns it in evaluation mode.

        net: any module from [B, C, H, W] to logits [B, K]; trained in its own dtype and on its own device, in train mode.
        start: "auto": from the set's initialization if it is for a fixed one | "own": from the module's weights.
        Raises UserError if module and set do not fit.
        """
        if start not in STARTS:
            raise unknown("start", start, STARTS)
        theta0 = self.start() if start == "auto" else None
        if theta0 is not None:
            replay.put(net, theta0)
        like = next(net.parameters(), self.images)
        x, y = (v.to(like) if v.is_floating_point() else v.to(like.device) for v in self.batches())
        # Double precision until the last moment: bias corrections of a half-precision module would be coarse.
        h = self.schedule(torch.float64).to(like)
        replay.train(net, x, y, self.order, h, Optimizer(**self.optimizer))
        return net

    def save(self, path: Path | str, precision: str = "float32") -> None:
        """Write the set atomically, with a checksum.

        precision: of the images: "float32" | "float16" | "uint8" (affine per image; a quarter of the size); of a generator's
            weights: the first two.
        Raises UserError for another precision, RunError when the disk refuses.
        """
        tensors = {"order": self.order, "lr": self.lr}
        if self.maker is not None:
            tensors |= self.maker.pack(precision)
        else:
            tensors |= codec.pack(self.images, precision) | {"labels": self.labels}
        tensors |= {k: v for k, v in (("momentum", self.momentum), ("theta0", self.theta0)) if v is not None}
        tensors |= {f"normalization/{k}": v for k, v in self.normalization.tensors().items()}
        head = {"kind": _KIND, "format": _FORMAT, "optimizer": dict(self.optimizer), "manifest": dict(self.manifest)}
        head |= {"generator": dict(self.maker.settings)} if self.maker is not None else {}
        store.save_tensors(path, tensors, head)

    def export(self, folder: Path | str) -> None:
        """Write each image as a PNG (denormalised, clipped) and `labels.json` into ``folder``."""
        picture.export(folder, self.normalization.invert(self.images), self.labels, self.classes, self.steps)

    def picture(self) -> Tensor:
        """``shown`` as one grid, uint8 [height, width, 3]: steps downwards, classes across (see picture.arrange)."""
        images, steps = self.shown()
        return picture.grid(self.normalization.invert(images), steps, len(self.classes))

    def shown(self) -> tuple[Tensor, int]:
        """The images that pictures show, step by step, and how many steps they are: all, or of a generator the first of
        each class, of at most 16 steps.
        """
        if self.maker is None:
            return self.images, self.steps
        x, y = self.batches()
        y = y.argmax(-1) if y.is_floating_point() else y
        steps = sorted({round(i * (self.steps - 1) / 15) for i in range(16)})
        classes = range(len(self.classes))
        return torch.cat([x[s][[int((y[s] == c).nonzero()[:1].sum()) for c in classes]] for s in steps]), len(steps)

    def save_picture(self, path: Path | str) -> None:
        """Write ``picture`` as a PNG."""
        store.atomic_write(path, picture.png(self.picture()))


def digest(theta: Tensor) -> str:
    """SHA-256 of weights in float32: what a recipe of an initialization records."""
    return hashlib.sha256(theta.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest()


def theta0_recipe(net: Mapping[str, Any], seed: int, theta0: Tensor) -> dict[str, Any]:
    """The manifest's `theta0_recipe` for weights drawn as `init(draw.key(seed, "theta0", 0, [0]))` of that net.

    net: NetConfig as a dict.
    """
    return {"net": dict(net), "seed": seed, "sha256": digest(theta0)}


def _draw_start(recipe: Mapping[str, Any], channels: int, size: int, classes: int) -> Tensor:
    config = NetConfig(**recipe["net"])
    if config.name == "custom":
        raise UserError('this set was made for a custom net, whose code a file may not name; replay with start="own"')
    learner = nets.build(config, channels, size, classes)
    return learner.init(draw.key(recipe["seed"], "theta0", 0, torch.tensor([0])))[0]


def shipped() -> tuple[str, ...]:
    """Names of the sets that come with the package."""
    return tuple(sorted(p.stem for p in SETS.glob("*.safetensors")))


def find(given: str) -> Path:
    """The file that ``load`` reads. Raises UserError for an unknown name."""
    path = Path(given).expanduser()
    if (path / FILE).is_file():
        return path / FILE
    if path.is_file():
        return path
    if given in shipped():
        return SETS / f"{given}.safetensors"
    if (path / NETWORKS).is_file():
        raise UserError(f"{given} holds trained networks, no distilled set: they are for metadist.load_network, kd.teachers")
    if path.is_dir():
        raise UserError(f"{given} holds no {FILE}, which a run writes at its end: let it end, or give another run")
    raise UserError(f"{unknown('distilled set', given, shipped())}; or give a file or a run folder")


def load(path_or_name: Path | str) -> DistilledSet:
    """A distilled set from a file, a run folder (its `distilled.safetensors`), or by the name of a shipped one.

    Images come back in float32, all tensors on the CPU.
    Raises UserError for an unknown name (listing them) or a file that holds something else, store.Torn for a damaged one.
    """
    path = find(str(path_or_name))
    tensors, head = store.load_tensors(path)
    if head.get("kind") != _KIND:
        raise UserError(f"{path} is not a distilled set; give a file such as <run folder>/{FILE}")
    if head["format"] != _FORMAT:
        raise UserError(f"{path} has format {head['format']}, this metadist reads {_FORMAT}; install the version that made it")
    prefix = "normalization/"
    inner = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    maker = Maker.unpack(tensors, head["generator"]) if "generator" in head else None
    images, labels = maker.make() if maker is not None else (codec.unpack(tensors), tensors["labels"])
    return DistilledSet(
        images=images,
        labels=labels,
        order=tensors["order"],
        lr=tensors["lr"],
        normalization=Normalization.from_tensors(inner),
        momentum=tensors.get("momentum"),
        optimizer=head["optimizer"],
        theta0=tensors.get("theta0"),
        manifest=head["manifest"],
        maker=maker,
    )
