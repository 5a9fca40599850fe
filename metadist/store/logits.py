"""Logits of teachers, kept so that an image is shown to them once: a file a variant of augmentation, memory-mapped.

Design choices
- A row is an image of the training split, a variant a draw of the augmentation: both are numbers, so (row, variant) is the key.
- One checksummed safetensors file a variant. Its checksum is proven when it is opened, and it is mapped, never held: of a
  store larger than memory only what is looked up stays.
- As in ``cached``: one process makes, the others wait; a torn or foreign file is made again; a disk that takes no file is a
  warning, the logits are then held in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from metadist.errors import RunError
from metadist.store.atomic import clean
from metadist.store.cache import locked
from metadist.store.files import proven, save_tensors

log = logging.getLogger("metadist")
_NAME = "logits"


class Logits:
    """The logits that a recipe stands for.

    cache_dir: the cache's folder (`~` is the home folder).
    recipe: JSON-able; everything they depend on (teachers, images, augmentation...).
    """

    def __init__(self, cache_dir: Path | str, recipe: Mapping[str, Any]) -> None:
        """Nothing is read before it is asked for."""
        text = json.dumps(recipe, sort_keys=True)
        self.recipe = json.loads(text)
        self.folder = Path(cache_dir).expanduser() / "logits" / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._open: dict[int, Tensor] = {}

    def path(self, variant: int) -> Path:
        """The file of one variant."""
        return self.folder / f"variant-{variant:06d}.safetensors"

    def variant(self, number: int, make: Callable[[], Tensor]) -> Tensor:
        """Logits [rows, networks, classes] of one variant, on the CPU: mapped, or made by ``make`` and put there."""
        if number not in self._open:
            self._open[number] = self._find(number, make)
        return self._open[number]

    def _find(self, number: int, make: Callable[[], Tensor]) -> Tensor:
        if (found := self._map(number)) is not None:
            return found
        with locked(self.path(number).with_suffix(".lock")):
            if (found := self._map(number)) is not None:  # made by another process meanwhile
                return found
            clean(self.folder)
            made = make().to("cpu").contiguous()
            try:
                save_tensors(self.path(number), {_NAME: made}, {"recipe": self.recipe, "variant": number})
            except RunError as e:
                log.warning("the store of logits is not used: %s", e)
                return made
        mapped = self._map(number)
        return made if mapped is None else mapped

    def _map(self, number: int) -> Tensor | None:
        path = self.path(number)
        try:
            head = proven(path)
        except FileNotFoundError:
            return None
        except RunError as e:
            log.warning("stored logits are made again: %s", e)
            return None
        if head.get("recipe") != self.recipe or head.get("variant") != number:
            log.warning("stored logits %s are made again: they belong to another recipe", path)
            return None
        with safe_open(str(path), framework="pt") as file:
            found: Tensor = file.get_tensor(_NAME)
        return found
