"""A user's own objects in a run: a torch Dataset, a module, a method's loss as a plain function.

Design choices
- Each has a name with the SHA-256 of its content in it, and the name stands where the configuration has a name. So identity,
  run folder and manifest need no case of their own: a folder refuses other images, another net or another loss.
- A Dataset is read once, in order; its tensors are what is hashed and used.
- A loss is what a method adds to the rest of a run: tasks, learned parameters, evaluation stay as configured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from metadist import data as data_room
from metadist.config import Config
from metadist.data import Data, own
from metadist.data.splits import Images
from metadist.errors import UserError
from metadist.methods.dd import Distillation, Task
from metadist.nets import Learner
from metadist.run.setup import DTYPES, Setup, build, device_of
from metadist.synthetic.images import Phi

Net = nn.Module | Callable[[], nn.Module]
Loss = Callable[[Phi, Task, Setup], Tensor]
_DIGITS = 12  # of a hash, in a name


class Held(Dataset[Any]):
    """Images and labels that were read from a Dataset."""

    def __init__(self, images: Images, classes: tuple[str, ...]) -> None:
        """Keep them."""
        (self.x, self.y), self.classes = images, classes

    def __len__(self) -> int:
        """The number of images."""
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Image i and its label."""
        return self.x[i], int(self.y[i])


class OwnData(NamedTuple):
    """A user's Datasets, read: training images, test images if given, and their name."""

    train: Held
    test: Held | None
    name: str


def read(train: Dataset[Any], test: Dataset[Any] | None, size: int | None) -> OwnData:
    """The Datasets' items as tensors, resized to ``size`` if given; see metadist.data.from_datasets for what they may be."""
    raw = own.read(train, test, size)
    parts = [Held(images, raw.classes) for images in (raw.train, raw.test) if images is not None]
    tensors = {f"{i}{k}": v for i, part in enumerate(parts) for k, v in (("x", part.x), ("y", part.y))}
    name = f"{raw.name}-{_digest(repr(raw.classes), tensors)}"
    return OwnData(parts[0], parts[1] if test is not None else None, name)


def net_name(net: Net) -> str:
    """Class and hash of a module: its repr, the shapes of its parameters, and the values of what is not trained."""
    module = made(net)
    shapes = [(n, tuple(p.shape), p.requires_grad) for n, p in module.named_parameters()]
    constant = {n: p for n, p in module.named_parameters() if not p.requires_grad} | dict(module.named_buffers())
    return f"{type(module).__name__}-{_digest(f'{module!r}{shapes}', constant)}"


def loss_name(loss: Loss) -> str:
    """Name and hash of a function: its source, or where there is none (a prompt) its byte code."""
    name = getattr(loss, "__name__", type(loss).__name__)
    try:
        text = textwrap.dedent(inspect.getsource(loss))
    except (OSError, TypeError):
        code = getattr(loss, "__code__", None)
        text = f"{code.co_code!r}{code.co_names}" if code is not None else f"{type(loss).__module__}.{name}"
    return f"{name.strip('<>')}-{_digest(text, {})}"


def made(net: Net) -> nn.Module:
    """The module, or what the function or class makes. Raises UserError if that is no module."""
    if isinstance(net, nn.Module):
        return net
    # Layers draw when they are built: what of it stays (frozen parameters) must be the same each time.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = net()
    if not isinstance(module, nn.Module):
        raise UserError(f"net={net!r} makes a {type(module).__name__}; give a module, or a class or function that makes one")
    return module


def learner(net: Net, init: str, dtype: torch.dtype, device: torch.device, classes: int) -> Learner:
    """The learner of a user's module; a class or function also gives its own p(theta0) (init "default")."""
    return Learner(made(net), init, None if isinstance(net, nn.Module) else net, dtype, device, classes)


def setup(config: Config, data: OwnData | None, net: Net | None, loss: Loss | None) -> Setup:
    """``metadist.run.setup.build`` with the given objects in place of what the configuration names."""
    device, dtype = device_of(config), DTYPES[config.engine.dtype]
    found: Data | None = None
    if data is not None:
        found = data_room.from_datasets(data.train, data.test, config.data, device, dtype, config.cache_dir)
        found = dataclasses.replace(found, name=data.name)
    if net is None:
        built = build(config, found)
    else:
        found = found or data_room.load(config.data, device, dtype, config.cache_dir, config.smoke)
        built = build(config, found, learner(net, config.net.init, dtype, device, len(found.classes)))
    return built if loss is None else OwnSetup.of(built, loss)


class OwnMethod(Distillation):
    """The configured method with another loss. ``setup.method`` is the configured one, for a loss that builds on it."""

    def __init__(self, setup: Setup, function: Loss) -> None:
        """Take over all but the loss."""
        m = setup.method
        super().__init__(m.config, m.data, m.synthetic, m.inner, m.starts, m.window, m.relabel)
        self.setup, self.function = setup, function

    def loss(self, phi: Phi, task: Task) -> Tensor:
        """The user's loss of each task [G]. Raises UserError for another shape."""
        value = self.function(phi, task, self.setup)
        if not isinstance(value, Tensor) or value.shape != task.theta0.shape[:1]:
            given = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            name = getattr(self.function, "__name__", "loss")
            raise UserError(f"{name} must return one loss a task, a tensor [{len(task.theta0)}] here; it returned {given}")
        return value


@dataclasses.dataclass(frozen=True)
class OwnSetup(Setup):
    """A setup whose method has a user's loss, compiled or not."""

    function: Loss

    @staticmethod
    def of(setup: Setup, function: Loss) -> OwnSetup:
        """The setup with this loss."""
        parts = {f.name: getattr(setup, f.name) for f in dataclasses.fields(Setup)}
        return OwnSetup(**parts | {"method": OwnMethod(setup, function)}, function=function)

    @property
    def static(self) -> bool:
        """No: nothing is known of what the function does, so a GPU may not capture the whole of it."""
        return False

    def compiled(self, compile: bool) -> Setup:
        """See Setup; the loss sees the compiled inner training."""
        return OwnSetup.of(super().compiled(compile), self.function)


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256(text.encode())
    for name, value in tensors.items():
        total.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:_DIGITS]
