"""Training many fresh learners at once on a set, and saying what the set is worth.

``metadist.evaluate(...)`` is ``metadist.api.evaluate``. The package is callable because Python binds a package's name in its
parent as soon as anything is imported from it: a function of that name in ``metadist`` would vanish at the first
``from metadist.evaluate import ...``. A module's ``__class__`` may be replaced for such ends (Python's data model, 3.3.2.1).
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallableRoom(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See ``metadist.api.evaluate``."""
        from metadist.api import evaluate  # it stands above this room: imported when called, never with it

        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableRoom
