"""Where the named data sets come from: scikit-learn's embedded digits, and torchvision for the rest.

Design choices
- torchvision knows the files, checksums and mirrors; here they only become tensors.
- Files that are there are used without touching the folder (it may be read-only); a download happens only if they are
  not, under a lock, because several workers start at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metadist.config import DataConfig
from metadist.data.splits import Images, Raw
from metadist.errors import RunError, UserError

DIGIT_SETS = ("digits", "mnist", "svhn", "usps")  # classes are digits: a mirrored one is another sign
_TEN = tuple(str(i) for i in range(10))

_Make = Callable[[str, bool, bool], Any]  # (root, training part?, download?) -> a torchvision data set


def _torchvision(name: str, root: str, **how: Any) -> Any:
    import torchvision.datasets  # two seconds that runs on digits and on folders do without

    return getattr(torchvision.datasets, name)(root, **how)


_TORCHVISION: dict[str, _Make] = {
    "mnist": lambda root, train, download: _torchvision("MNIST", root, train=train, download=download),
    "fashion_mnist": lambda root, train, download: _torchvision("FashionMNIST", root, train=train, download=download),
    "cifar10": lambda root, train, download: _torchvision("CIFAR10", root, train=train, download=download),
    "cifar100": lambda root, train, download: _torchvision("CIFAR100", root, train=train, download=download),
    "svhn": lambda root, train, download: _torchvision("SVHN", root, split="train" if train else "test", download=download),
    "usps": lambda root, train, download: _torchvision("USPS", root, train=train, download=download),
}
NAMED = ("digits", *_TORCHVISION)


def read(cfg: DataConfig) -> Raw:
    """The named data set ``cfg.name`` (one of NAMED), as found.

    Raises UserError if its files are missing or broken, RunError if a download fails.
    """
    if cfg.name == "digits":
        return digits()
    train, test = (_open(cfg, part) for part in (True, False))
    classes = _TEN if cfg.name in DIGIT_SETS else tuple(train.classes)
    return Raw(cfg.name, classes, _tensors(train), _tensors(test))


def digits() -> Raw:
    """scikit-learn's 1,797 handwritten digits, 8x8, 17 grey levels (Alpaydin & Kaynak 1998); no test split of their own."""
    table = torch.from_numpy(_digits_table())
    x = (table[:, :64] / 16.0).to(torch.float32).reshape(-1, 1, 8, 8)
    return Raw("digits", _TEN, (x, table[:, 64].to(torch.int64)))


def _digits_table() -> NDArray[np.float64]:
    """[1797, 65]: 64 grey levels and the class, from the package's own file: importing it takes two seconds a worker."""
    found = importlib.util.find_spec("sklearn")
    for place in (found and found.submodule_search_locations) or ():
        if (path := Path(place) / "datasets" / "data" / "digits.csv.gz").exists():
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits  # wherever another version keeps it

    return np.column_stack(load_digits(return_X_y=True))


def _open(cfg: DataConfig, train: bool) -> Any:
    root, make = Path(cfg.root).expanduser(), _TORCHVISION[cfg.name]
    try:
        return make(str(root), train, False)
    except Exception as e:  # torchvision and the formats below it raise many kinds for missing and broken files
        if not cfg.download:
            raise UserError(
                f"data set {cfg.name} {_why(e)} under {root.absolute()}; download it with data.download=true"
                " or say where it lies with data.root=..."
            ) from e
    try:
        with _lock(root):
            return make(str(root), train, True)
    except Exception as e:
        raise RunError(
            f"data set {cfg.name} could not be downloaded to {root.absolute()} (delete damaged files there): {_line(e)}"
        ) from e


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One process at a time downloads to this folder."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".metadist.lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _why(e: Exception) -> str:
    """What is wrong with files on disk; torchvision says "not found or corrupted" where a checksum is all it looks at."""
    if "corrupted" in str(e):
        return "is missing or damaged"
    return "was not found" if "not found" in str(e) or isinstance(e, FileNotFoundError) else f"can't be read ({_line(e)})"


def _line(e: Exception) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__


def _tensors(found: Any) -> Images:
    """Images uint8 [N, C, H, W] and labels of a torchvision data set, whose arrays come in three layouts."""
    x = torch.as_tensor(np.asarray(found.data))
    y = torch.as_tensor(np.asarray(found.labels if hasattr(found, "labels") else found.targets))
    if x.dim() == 3:  # MNIST, USPS: [N, H, W]
        x = x.unsqueeze(1)
    elif x.shape[-1] == 3:  # CIFAR: [N, H, W, C]; SVHN is [N, C, H, W]
        x = x.permute(0, 3, 1, 2).contiguous()
    return x, y.to(torch.int64)
