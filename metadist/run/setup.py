"""From a configuration to the objects of a run: data, learner, synthetic set, inner training, starts, method."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist import data as data_room
from metadist import draw, methods, nets
from metadist.config import Config
from metadist.data import Data
from metadist.errors import UserError
from metadist.evaluate.pool import pool
from metadist.evaluate.teachers import teacher
from metadist.evaluate.train import at_once
from metadist.metagrad.execution import lowered
from metadist.metagrad.inner import Inner
from metadist.metagrad.mixed import Batch, Loss
from metadist.methods.dd import Distillation
from metadist.methods.starts import Expert, Experts, Fixed, Pretrained, Starts, fresh
from metadist.methods.trajectory import Guide
from metadist.nets import Learner
from metadist.nets.loss import cross_entropy_loss, distillation_loss, judging_loss
from metadist.run import origins
from metadist.run.origins import Origin
from metadist.run.validate import validate_with_data
from metadist.synthetic.generator import Generator
from metadist.synthetic.images import Images, Phi, Synthetic

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Setup:
    """Everything one worker computes with."""

    config: Config
    device: torch.device
    data: Data
    learner: Learner
    synthetic: Synthetic
    starts: Starts
    inner: Inner
    method: Distillation
    guide: Guide | None

    @property
    def static(self) -> bool:
        """Whether every meta-step has the same number of inner steps."""
        return self.config.method.gradient != "truncated"

    @property
    def is_compiled(self) -> bool:
        """Whether the inner step and its adjoint are compiled."""
        return self.inner.compiled

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The pool of pre-trained starts, or the experts."""
        if isinstance(self.starts, Pretrained):
            return (origins.pool(self.starts.train),)
        return (origins.experts(self.starts.experts.key),) if isinstance(self.starts, Expert) else ()

    @property
    def least(self) -> Mapping[str, float]:
        """Of learned rates."""
        return self.synthetic.least

    def project(self, phi: Phi) -> None:
        """Lower bounds are all there are."""

    def compiled(self, compile: bool) -> Setup:
        """The same with the inner step and its adjoint compiled; on a GPU captured, where the whole can't be."""
        graph = self.device.type == "cuda" and not self.static
        inner = self.inner.but(compile=compile, graph=graph)
        method = methods.build(self.config, self.data, self.synthetic, inner, self.starts, self.learner, self.guide)
        return dataclasses.replace(self, inner=inner, method=method)


def device_of(config: Config) -> torch.device:
    """The device of this worker; with several GPUs LOCAL_RANK picks one. UserError for device=cuda without a GPU."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU here; give device=cpu or device=auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def tune(precision: str, device: torch.device) -> None:
    """Settings of this process's GPU, if it has one."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True  # a resumed run must end where the uninterrupted one does, bit for bit
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def with_precision(loss: Loss, precision: str, device: torch.device) -> Loss:
    """The loss with its matrix products in tf32 or bf16; fp32 leaves it alone."""
    tune(precision, device)
    if precision != "bf16":
        return loss

    def in_low_precision(theta: Tensor, batch: Batch) -> Tensor:
        with lowered(precision, device):
            return loss(theta, batch)

    return in_low_precision


def starts_of(config: Config, learner: Learner, data: Data, device: torch.device) -> Starts:
    """p(theta0) as method.init says; a pool of pre-trained networks is trained or read here."""
    if config.method.init == "fixed":
        return Fixed(learner, config.seed, device)
    if config.method.init == "random":
        return fresh(learner, config.seed, config.net.draw_width)
    if config.method.init == "expert":
        return Expert(learner, experts_of(config), config.trajectory, config.seed)
    where = {"root", "download"}
    described = {k: v for k, v in dataclasses.asdict(config.data).items() if k not in where}
    identity = {"net": dataclasses.asdict(config.net), "data": described, "seed": config.seed, "dtype": config.engine.dtype}
    if config.smoke:  # trained on a few images only
        identity["smoke"] = True
    return Pretrained(pool(config, learner, data, identity), config.pretrained.held_out, config.seed)


def experts_of(config: Config) -> Experts:
    """The experts of a configuration. Raises UserError, with the command that makes them, if they are missing.

    A smoke run's experts are made here: they take a second.
    """
    from metadist.run.experts import experts_dir, open_experts, work  # they load Hydra, which other runs can spare

    if config.smoke and config.experts.path is None:
        folder = experts_dir(config)
        folder.mkdir(parents=True, exist_ok=True)
        work(config, folder, lambda: False)
    return open_experts(config)


def guide_of(config: Config, learner: Learner, data: Data, device: torch.device) -> Guide | None:
    """The teacher, trained or read here, and a student's loss beside it; None where no teacher takes part."""
    if config.method.loss != "distillation":
        return None
    kd = config.kd
    loss = with_precision(distillation_loss(learner, kd.alpha, kd.T, kd.scale), config.engine.precision, device)
    return Guide(teacher(config, data, learner.dtype), loss)


def synthetic_of(config: Config, data: Data, dtype: torch.dtype, device: torch.device) -> Synthetic:
    """What is learned. Raises UserError for images that the generator can't make."""
    classes, shape = len(data.classes), data.train.x.shape[1:]
    if config.method.synthetic == "generator":
        return Generator(config, classes, shape, dtype, device)
    return Images(config, classes, shape, dtype, device, data.train)


def build(config: Config, data: Data | None = None, learner: Learner | None = None) -> Setup:
    """Build everything, not compiled yet.

    data, learner: given objects take the place of config.data and config.net (the Python API).
    Raises UserError for a net that can't take the images or be differentiated, and for what ``validate_with_data`` refuses.
    """
    device, dtype = device_of(config), DTYPES[config.engine.dtype]
    if data is None:
        data = data_room.load(config.data, device, dtype, config.cache_dir, config.smoke)
    validate_with_data(config, len(data.classes))
    if learner is None:
        learner = nets.build(config.net, data.channels, data.size, len(data.classes), dtype, device)
    # Noise, not real images: equal pixels of a blank background are ties in max-pooling, where no derivative exists.
    shape = (4, *data.train.x.shape[1:])
    learner.check(
        draw.normal(draw.key(config.seed, "check", 0, torch.zeros((), dtype=torch.int64, device=device)), shape, dtype)
    )
    starts = starts_of(config, learner, data, device)
    synthetic = synthetic_of(config, data, dtype, device)
    loss = with_precision(cross_entropy_loss(learner), config.engine.precision, device)
    alone = at_once(learner, 0, config.real_batch)
    judge = with_precision(judging_loss(learner), config.engine.precision, device) if learner.buffers_size else None
    inner = Inner(loss, synthetic.optimizer, config.engine.mixed, judge_group=alone, judge_loss=judge)
    guide = guide_of(config, learner, data, device)
    method = methods.build(config, data, synthetic, inner, starts, learner, guide)
    return Setup(config, device, data, learner, synthetic, starts, inner, method, guide)
