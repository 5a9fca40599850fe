"""metadist learns the data that trains networks: dataset distillation by exact meta-gradients, on one core or many nodes.

    import metadist
    distilled = metadist.load("mnist-10")
    net = distilled.replay(MyNet())

``distil``, ``load``, ``evaluate``, ``load_network``: see ``metadist.api``. They are imported when they are first used:
programs that print a help text or list run folders start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # To a type checker ``metadist.evaluate`` is the function. At run time it is the package of that name, which is callable:
    # importing anything from the package binds its name here, whatever else stood there (see metadist/evaluate/__init__.py).
    from metadist.api import distil, evaluate, load, load_network
    from metadist.errors import RunError, UserError
    from metadist.synthetic.distilled import DistilledSet

__version__ = "0.1.0"
__all__ = ["DistilledSet", "RunError", "UserError", "distil", "evaluate", "load", "load_network"]

_HOME = {
    "DistilledSet": "metadist.synthetic.distilled",
    "RunError": "metadist.errors",
    "UserError": "metadist.errors",
    "distil": "metadist.api",
    "load": "metadist.synthetic.distilled",
    "load_network": "metadist.api",
}


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        return importlib.import_module("metadist.evaluate")
    if name not in _HOME:
        raise AttributeError(f"module 'metadist' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
